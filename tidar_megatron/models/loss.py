"""The joint loss, ``1/(1+alpha) * (alpha * mean CE_AR + mean CE_diffusion)``, as sums that megatron-core can reduce.

The means are over the supervised tokens of the full global batch. The per-token weights (``data/doubled.py``) include
alpha and the ratio of the two counts, so the loss here is one weighted sum with one count as its denominator.
"""

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from tidar_megatron.data.doubled import Batch
from tidar_megatron.models.cross_entropy import linear_cross_entropy
from tidar_megatron.models.output_layer import full_states, output_weight


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
