"""Draft metrics for evaluation during training: teacher-forced, from one forward over the doubled sequence.

For offset k = 1 .. B-1 of a block (in decoding, offset 0 is the certain token), the verifier's distribution p_AR comes
from the clean token before the position, and the drafter's q_diffusion from the mask token at the position.
Speculative sampling accepts such a draft with probability ``a_k = sum_v min(p_AR(v), q_diffusion(v))``; greedy decoding
accepts it if the two argmaxes agree. The expected number of tokens per forward is the mean over blocks of
``1 + sum_k a_1 * .. * a_k`` (not the product of means). All sums are over the ids that the exported model has: the
padding of the vocabulary is masked out.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tidar_megatron.data.doubled import Batch
from tidar_megatron.models.cross_entropy import chunk_tokens, exponentiate, mask_padding, own_columns


@dataclass(frozen=True)
class EvaluationSums:
    """Sums and counts over tokens or blocks; adding the values of two merges their data.

    Attributes:
        values: float64 ``[7 + 3 * (B - 1)]``: AR loss and count, diffusion loss and count, complete blocks, their
            expected tokens per forward in sampling and in greedy decoding; then, by offset, acceptance, agreement and
            count.
    """

    values: Tensor

    @staticmethod
    def zeros(block_size: int, device: torch.device) -> "EvaluationSums":
        """Return the sums over no tokens."""
        return EvaluationSums(torch.zeros(7 + 3 * (block_size - 1), dtype=torch.float64, device=device))

    def means(self) -> dict[str, float | list[float]]:
        """Return the means by the names under which they are logged. Lists run over the offsets 1 to B - 1."""
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


@torch.no_grad()
def evaluation_sums(
    states: Tensor,
    weight: Tensor,
    batch: Batch,
    block_size: int,
    tp_group: dist.ProcessGroup,
    vocab_size: int,
    chunk: int | None = None,
) -> EvaluationSums:
    """Compute both losses and the draft metrics of one micro-batch.

    Only the logits of ``chunk`` tokens exist at a time: of clean tokens, and of the mask tokens one position later.

    Args:
        states: the last hidden states of this context-parallel rank's micro-batch, ``[2S, b, h]``.
        weight: this rank's rows of the output layer, ``[V / TP, h]``.
        batch: the doubled micro-batch of the states, with the masks of every block.
        block_size: the block size B.
        tp_group: the ranks that share the vocabulary.
        vocab_size: the number of ids that the model has; the weight's rows after them are padding.
        chunk: tokens whose logits exist at a time; by default
            :func:`~tidar_megatron.models.cross_entropy.chunk_tokens`.
    """
    S = batch.seq_length
    assert batch.mask_length == S, "drafts are measured at every block"
    # p_AR of position i comes from clean token i - 1, so each clean token is paired with the mask one position later.
    # The roll pairs the last with the first, which is offset 0 of a block and never used.
    clean, masks = states[:S].flatten(0, 1), states[S:].roll(-1, 0).flatten(0, 1)
    labels_tb = batch.labels.t()
    clean_labels, mask_labels = labels_tb[:S].flatten(), labels_tb[S:].roll(-1, 0).flatten()
    pairs = max((chunk or chunk_tokens(states.shape[2])) // 2, 1)
    parts = []
    for first in range(0, len(clean), pairs):
        rows = slice(first, first + pairs)
        logits = torch.cat([clean[rows], masks[rows]]) @ weight.t()
        mask_padding(logits, vocab_size, tp_group)
        labels = torch.cat([clean_labels[rows], mask_labels[rows]])
        parts.append(_pair_figures(logits, labels, tp_group))
    ar_loss, diffusion_loss, overlap, agree = torch.cat(parts, dim=1).view(4, S, -1).transpose(1, 2)
    ar, diffusion = batch.supervised[:, :S], batch.supervised[:, S:]

    def by_offset(per_pair: Tensor) -> Tensor:
        """Regroup ``[b, S]``, indexed by clean token, as ``[blocks, B - 1]``: blocks start at multiples of B."""
        return per_pair.roll(1, 1).reshape(-1, block_size)[:, 1:].double()

    accepted, agreed = by_offset(overlap), by_offset(agree)
    supervised = diffusion.reshape(-1, block_size)
    complete, counted = supervised.all(-1), supervised[:, 1:].double()
    scalars = [
        (ar_loss * ar).sum(),
        ar.sum(),
        (diffusion_loss.roll(1, 1) * diffusion).sum(),
        diffusion.sum(),
        complete.sum(),
        (1 + accepted.cumprod(-1).sum(-1))[complete].sum(),
        (1 + agreed.cumprod(-1).sum(-1))[complete].sum(),
    ]
    per_offset = [(accepted * counted).sum(0), (agreed * counted).sum(0), counted.sum(0)]
    return EvaluationSums(torch.cat([torch.stack([s.double() for s in scalars]), *per_offset]))


def _pair_figures(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return ``[4, n]`` (both losses, overlap, agreement) from logits ``[2n, V / TP]``, clean ones first."""
    best = vocab_parallel_argmax(logits, group)
    exponentials, losses, total = exponentiate(logits, *own_columns(labels, logits.shape[-1], group), group)
    p_ar, q_diffusion = exponentials.div_(total.unsqueeze(-1)).chunk(2)
    overlap = torch.minimum(p_ar, q_diffusion).sum(-1)
    dist.all_reduce(overlap, group=group)
    best_ar, best_diffusion = best.chunk(2)
    return torch.stack([*losses.chunk(2), overlap, (best_ar == best_diffusion).to(overlap)])


def vocab_parallel_argmax(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the argmax over the full vocabulary, int64 ``[...]``; of equal logits the smallest id wins.

    Args:
        logits: ``[..., V / TP]``, with the vocabulary's padding masked.
        group: the ranks that share the vocabulary, in the order of their parts.
    """
    value, index = logits.max(-1)
    top = value.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    index = torch.where(value == top, index + group.rank() * logits.shape[-1], torch.iinfo(index.dtype).max)
    dist.all_reduce(index, op=dist.ReduceOp.MIN, group=group)
    return index
