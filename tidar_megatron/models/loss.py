"""The joint loss, ``1/(1+alpha) * (alpha * mean CE_AR + mean CE_diffusion)``, as sums that megatron-core can reduce.

The means are over the supervised tokens of the whole global batch. The per-token weights (``data/doubled.py``) carry
alpha and the ratio of the two counts, so here a loss is one weighted sum, and its denominator one count.
"""

import torch
from torch import Tensor

from tidar_megatron.data.doubled import Batch


def joint_loss(batch: Batch, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What megatron-core's schedule wants of a loss function under ``calculate_per_token_loss``.

    Args:
        batch: the micro-batch, loss weights set.
        losses: per-token cross-entropies float32 ``[b, t]``.

    Returns:
        The weighted sum, differentiable; the count to divide by once summed over the global batch (int32); and, for
        the log, the sums float64 ``[2]`` of the AR and the diffusion losses, each token for those it stands for.
    """
    supervised = losses.detach() * batch.stands_for
    clean = batch.seq_length
    sums = torch.stack([supervised[:, :clean].sum(), supervised[:, clean:].sum()]).double()
    count = losses.new_full((), batch.num_tokens, dtype=torch.int32)  # filled on its device: nobody waits for a copy
    return (losses * batch.loss_weights).sum(), count, sums
