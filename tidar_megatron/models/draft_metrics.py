"""How good the drafts are, measured while training: teacher-forced, from one forward over the doubled sequence.

For offset k = 1 .. B-1 of a block (offset 0 is certain at decode), the verifier's distribution p_AR comes from the
clean token before the position, the drafter's q_diffusion from the mask token at it. Speculative sampling accepts such
a draft with probability ``a_k = sum_v min(p_AR(v), q_diffusion(v))``; greedy decoding when the two argmaxes agree. The
expected tokens per forward is the mean over blocks of ``1 + sum_k a_1 * .. * a_k`` (not the product of means).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tidar_megatron.data.doubled import Batch


@dataclass(frozen=True)
class EvaluationSums:
    """Sums and counts over tokens or blocks; adding two of them merges their data. All float64.

    ``values`` is ``[7 + 3 * (B - 1)]``: AR loss and count, diffusion loss and count, complete blocks, their expected
    tokens under sampling, under greedy; then per offset: acceptance, agreement, count.
    """

    values: Tensor

    @staticmethod
    def zeros(block_size: int, device: torch.device) -> "EvaluationSums":
        """The sums over nothing."""
        return EvaluationSums(torch.zeros(7 + 3 * (block_size - 1), dtype=torch.float64, device=device))

    def means(self) -> dict[str, float | list[float]]:
        """What is logged. Offsets run from 1 to B - 1."""
        scalars, per_offset = self.values[:7].tolist(), self.values[7:].reshape(3, -1).tolist()
        ar, ar_count, diffusion, diffusion_count, blocks, sampled, greedy = scalars
        accepted, agreed, counts = per_offset
        return {
            "ar_loss": ar / max(ar_count, 1),
            "diffusion_loss": diffusion / max(diffusion_count, 1),
            "acceptance_by_offset": [a / max(n, 1) for a, n in zip(accepted, counts, strict=True)],
            "agreement_by_offset": [a / max(n, 1) for a, n in zip(agreed, counts, strict=True)],
            "tokens_per_forward": sampled / max(blocks, 1),
            "greedy_tokens_per_forward": greedy / max(blocks, 1),
        }


def evaluation_sums(logits: Tensor, batch: Batch, block_size: int, tp_group: dist.ProcessGroup) -> EvaluationSums:
    """Both losses and the draft metrics of one micro-batch.

    Args:
        logits: ``[b, 2S, V / TP]`` (of this context-parallel rank), this rank's part of the vocabulary.
        batch: the doubled micro-batch they belong to, with masks of every block.
        block_size: B.
        tp_group: the ranks that share the vocabulary.
    """
    logits = logits.float()
    S = batch.seq_length
    assert batch.mask_length == S, "drafts are measured at every block"
    log_z = vocab_parallel_logsumexp(logits, tp_group)
    losses = log_z - vocab_parallel_gather(logits, batch.labels, tp_group)
    ar, diffusion = batch.supervised[:, :S], batch.supervised[:, S:]

    probabilities = (logits - log_z.unsqueeze(-1)).exp_()
    # p_AR for position i stands at clean token i - 1; position 0 of the row is offset 0 of a block and never looked at
    p_ar, q_diffusion = probabilities[:, : S - 1], probabilities[:, S + 1 :]
    overlap = torch.minimum(p_ar, q_diffusion).sum(-1)
    dist.all_reduce(overlap, group=tp_group)
    best = vocab_parallel_argmax(logits, tp_group)
    agree = (best[:, : S - 1] == best[:, S + 1 :]).to(overlap)

    def by_offset(per_position: Tensor) -> Tensor:
        """``[b, S - 1]`` (positions 1 ..) -> ``[blocks, B - 1]`` (offsets 1 ..): blocks start at multiples of B."""
        first = per_position.new_zeros(per_position.shape[0], 1)
        return torch.cat([first, per_position], dim=1).reshape(-1, block_size)[:, 1:].double()

    accepted, agreed = by_offset(overlap), by_offset(agree)
    supervised = diffusion.reshape(-1, block_size)
    complete, counted = supervised.all(-1), supervised[:, 1:].double()
    scalars = [
        (losses[:, :S] * ar).sum(),
        ar.sum(),
        (losses[:, S:] * diffusion).sum(),
        diffusion.sum(),
        complete.sum(),
        (1 + accepted.cumprod(-1).sum(-1))[complete].sum(),
        (1 + agreed.cumprod(-1).sum(-1))[complete].sum(),
    ]
    per_offset = [(accepted * counted).sum(0), (agreed * counted).sum(0), counted.sum(0)]
    return EvaluationSums(torch.cat([torch.stack([s.double() for s in scalars]), *per_offset]))


def vocab_parallel_logsumexp(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[..., V / TP]`` -> ``[...]``, over the whole vocabulary."""
    top = logits.amax(-1)
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    total = (logits - top.unsqueeze(-1)).exp_().sum(-1)
    dist.all_reduce(total, group=group)
    return top + total.log()


def vocab_parallel_gather(logits: Tensor, ids: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The logit of each id: ``[..., V / TP]``, ``[...]`` -> ``[...]``."""
    part = logits.shape[-1]
    local = ids - group.rank() * part
    mine = (local >= 0) & (local < part)
    values = logits.gather(-1, local.clamp(0, part - 1).unsqueeze(-1)).squeeze(-1) * mine
    dist.all_reduce(values, group=group)
    return values


def vocab_parallel_argmax(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[..., V / TP]`` -> the best id over the whole vocabulary, the smallest among equals."""
    value, index = logits.max(-1)
    top = value.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    index = torch.where(value == top, index + group.rank() * logits.shape[-1], torch.iinfo(index.dtype).max)
    dist.all_reduce(index, op=dist.ReduceOp.MIN, group=group)
    return index
