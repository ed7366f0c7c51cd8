"""The joint loss, ``1/(1+alpha) * (alpha * mean CE_AR + mean CE_diffusion)``, as sums that megatron-core can reduce.

The means are over the supervised tokens of the full global batch. The per-token weights (``data/doubled.py``) include
alpha and the ratio of the two counts, so the loss here is one weighted sum with one count as its denominator.
"""

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from tidar_megatron.adapter import CANDIDATES
from tidar_megatron.data.doubled import Batch
from tidar_megatron.models.cross_entropy import linear_cross_entropy
from tidar_megatron.models.draft_loss import linear_draft_loss
from tidar_megatron.models.output_layer import full_states, output_weight, split_passes
from tidar_megatron.models.selector import selector_loss


def token_losses(chunk: GPTModel, batch: Batch, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of a micro-batch's cross-entropies, and the cross-entropy of each token.

    Args:
        chunk: the last chunk of the model.
        batch: the micro-batch, with its loss weights set.
        hidden: the hidden states that ``run_model`` returned for the micro-batch.

    Returns:
        The sum, a differentiable float32 scalar; and the cross-entropies, float32 ``[b, t]`` without a gradient.
    """
    states = full_states(chunk, hidden)
    total, losses = linear_cross_entropy(
        states.flatten(0, 1),
        output_weight(chunk),
        batch.labels.t().flatten(),
        batch.loss_weights.t().flatten(),
        chunk.pg_collection.tp,
        chunk.unpadded_vocab_size,
    )
    return total, losses.view(states.shape[:2]).t()


def draft_loss(chunk: GPTModel, batch: Batch, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of the mask tokens alone, in the form of :func:`joint_loss`; the sum of the AR losses is 0.

    The frozen output layer gets no gradient. Clean tokens have logits only where masks learn from them.
    """
    drafts, weight, group = chunk.draft_config, output_weight(chunk), chunk.pg_collection.tp
    clean, masks = split_passes(hidden, batch)
    S = batch.seq_length
    states = _block_after_block(full_states(chunk, masks))
    labels, weights, stands_for = (x[:, S:].flatten() for x in (batch.labels, batch.loss_weights, batch.stands_for))
    teacher = None
    if drafts.draft_loss != "ce":
        with torch.no_grad():
            teacher = _teachers(full_states(chunk, clean), batch.teachers, chunk.pg_collection.cp)
        has_teacher = batch.teachers.flatten() >= 0
        weights, stands_for = weights * has_teacher, stands_for * has_teacher
    total, seen = linear_draft_loss(
        states,
        weight,
        labels,
        weights,
        chunk.block_size,
        drafts.draft_loss,
        drafts.draft_loss_weighting,
        group,
        chunk.unpadded_vocab_size,
        teacher,
        min(CANDIDATES, chunk.unpadded_vocab_size) if chunk.selector is not None else 0,
    )
    if chunk.selector is not None:
        blocks = labels.view(-1, chunk.block_size)
        # offset 0 is the certain token in decoding; before offset j stands the label of offset j - 1
        previous, used = blocks.roll(1, 1).flatten(), torch.ones_like(blocks)
        used[:, 0] = 0
        chosen = seen.weights * used.flatten()
        shown = seen.top_ids, seen.top_logits, previous, seen.wanted, chosen
        total = total + selector_loss(chunk.selector, states, weight, *shown, group)
    of_masks = (seen.losses * stands_for).sum().double()
    count = seen.losses.new_full((), batch.num_tokens, dtype=torch.int32)
    return total, count, torch.stack([torch.zeros_like(of_masks), of_masks])


def _block_after_block(states: Tensor) -> Tensor:
    """Return ``[M, b, h]`` as ``[b * M, h]``: the masks of a block after each other."""
    return states.transpose(0, 1).flatten(0, 1)


def _teachers(clean: Tensor, places: Tensor, cp_group: dist.ProcessGroup) -> Tensor:
    """Return the states ``[b * M, h]`` of the clean tokens at ``places [b, M]`` among the keys.

    Args:
        clean: This context-parallel rank's clean states, ``[S / CP, b, h]``.
        places: :attr:`Batch.teachers`; -1 gives any state.
        cp_group: The context-parallel ranks.
    """
    if cp_group.size() > 1:
        parts = [torch.empty_like(clean) for _ in range(cp_group.size())]
        dist.all_gather(parts, clean.contiguous(), group=cp_group)
        clean = torch.cat(parts)
    rows = torch.arange(len(places), device=places.device).unsqueeze(1)
    return clean[places.clamp(min=0), rows].flatten(0, 1)


def joint_loss(chunk: GPTModel, batch: Batch, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the joint loss as megatron-core's schedules expect it under ``calculate_per_token_loss``.

    Args:
        chunk: the last chunk of the model.
        batch: the micro-batch, with its loss weights set.
        hidden: the hidden states that ``run_model`` returned for the micro-batch.

    Returns:
        The weighted sum, a differentiable float32 scalar; the count, int32, whose sum over the global batch is the
        denominator; and, for the log, float64 ``[2]``: the sums of the AR and the diffusion losses, where each token
        counts ``batch.stands_for`` times.
    """
    total, losses = token_losses(chunk, batch, hidden)
    supervised = losses * batch.stands_for
    clean = batch.seq_length
    sums = torch.stack([supervised[:, :clean].sum(), supervised[:, clean:].sum()]).double()
    count = losses.new_full((), batch.num_tokens, dtype=torch.int32)  # filled on the device, without a copy to wait for
    return total, count, sums
