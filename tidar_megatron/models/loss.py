"""The joint loss, ``1/(1+alpha) * (alpha * mean CE_AR + mean CE_diffusion)``, as sums that megatron-core can reduce.

The means are over the supervised tokens of the whole global batch. The per-token weights (``data/doubled.py``) carry
alpha and the ratio of the two counts, so here a loss is one weighted sum, and its denominator one count.
"""

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from tidar_megatron.data.doubled import Batch
from tidar_megatron.models.cross_entropy import linear_cross_entropy
from tidar_megatron.models.output_layer import output_weight, whole_states


def token_losses(chunk: GPTModel, batch: Batch, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted sum of a micro-batch's cross-entropies, and each of them.

    Args:
        chunk: the last chunk of the model.
        batch: the micro-batch, loss weights set.
        hidden: what ``run_model`` gave for it.

    Returns:
        The sum, a differentiable float32 scalar, and float32 ``[b, t]`` without a gradient.
    """
    states = whole_states(chunk, hidden)
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
    """What megatron-core's schedule wants of a loss function under ``calculate_per_token_loss``.

    Args:
        chunk: the last chunk of the model.
        batch: the micro-batch, loss weights set.
        hidden: what ``run_model`` gave for it.

    Returns:
        The weighted sum, differentiable; the count to divide by once summed over the global batch (int32); and, for
        the log, the sums float64 ``[2]`` of the AR and the diffusion losses, each token for those it stands for.
    """
    total, losses = token_losses(chunk, batch, hidden)
    supervised = losses * batch.stands_for
    clean = batch.seq_length
    sums = torch.stack([supervised[:, :clean].sum(), supervised[:, clean:].sum()]).double()
    count = losses.new_full((), batch.num_tokens, dtype=torch.int32)  # filled on its device: nobody waits for a copy
    return total, count, sums
