"""Packed sequences -> what the model sees: the doubled sequence, and the weight of each token's loss.

S clean tokens, then S mask tokens, both at positions 0 .. S-1. A clean token is to give its document's next token, a
mask token the token of its own place. The AR warm-up phase has the clean half alone.

Shapes: b rows, S packed length, L = 2S (doubled) or S (clean half alone).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from tidar_megatron.attention_mask import clean_tokens, training_layout
from tidar_megatron.data.packing import PackedSequence


@dataclass
class Batch:
    """One micro-batch.

    Attributes:
        tokens: int64 ``[b, L]``.
        labels: int64 ``[b, L]``, 0 where not supervised.
        supervised: bool ``[b, L]``.
        position_ids: int64 ``[b, L]``, one row expanded (stride 0 over b), also after :meth:`to`.
        visibility: int32 ``[b, L, 4]``, the metadata of ``attention_mask``.
        loss_weights: float32 ``[b, L]``, zero until :func:`set_loss_weights`.
        ar_tokens: supervised clean tokens.
        diffusion_tokens: supervised mask tokens; 0 in a batch of the clean half alone.
        doubled: whether there is a mask half.
    """

    tokens: Tensor
    labels: Tensor
    supervised: Tensor
    position_ids: Tensor
    visibility: Tensor
    loss_weights: Tensor
    ar_tokens: int
    diffusion_tokens: int
    doubled: bool

    @property
    def num_tokens(self) -> int:
        """This micro-batch's part of the loss's denominator (Megatron's ``num_tokens``)."""
        return self.diffusion_tokens if self.doubled else self.ar_tokens

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on ``device``; without waiting for it where the memory allows."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        # Copying an expanded tensor would write out every row.
        moved["position_ids"] = self.position_ids[:1].to(device, non_blocking=True).expand(len(self.tokens), -1)
        return replace(self, **moved)


def make_batch(sequences: Sequence[PackedSequence], block_size: int, mask_token_id: int, doubled: bool = True) -> Batch:
    """Stack packed sequences of one length into a micro-batch, doubled or the clean half alone."""

    def stack(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(sequence, name) for sequence in sequences]))

    clean, document, index = stack("tokens"), stack("document"), stack("index")
    ar_supervised, diffusion_supervised = stack("ar_supervised"), stack("diffusion_supervised")
    positions = torch.arange(clean.shape[1])
    if doubled:
        tokens = torch.cat([clean, torch.full_like(clean, mask_token_id)], dim=1)
        labels = torch.cat([stack("labels"), clean * diffusion_supervised], dim=1)
        supervised = torch.cat([ar_supervised, diffusion_supervised], dim=1)
        positions = positions.repeat(2)
        visibility = training_layout(document, index, block_size)
    else:
        tokens, labels, supervised = clean, stack("labels"), ar_supervised
        visibility = clean_tokens(document, index)
    return Batch(
        tokens=tokens,
        labels=labels,
        supervised=supervised,
        position_ids=positions.expand(tokens.shape),
        visibility=visibility,
        loss_weights=torch.zeros(tokens.shape),
        ar_tokens=int(ar_supervised.sum()),
        diffusion_tokens=int(diffusion_supervised.sum()) if doubled else 0,
        doubled=doubled,
    )


def set_loss_weights(batch: Batch, ar_total: int, diffusion_total: int, ar_loss_weight: float) -> None:
    """Give each token its weight in the joint loss, before the forward.

    With the totals of supervised tokens over the whole global batch (every rank, every micro-batch) and alpha =
    ``ar_loss_weight``::

        sum(weights * CE) / diffusion_total == (alpha * mean(CE, clean) + mean(CE, masks)) / (1 + alpha)

    over the global batch, and the same with ``sum(num_tokens)`` as the denominator: means over the global batch, so
    the loss depends neither on micro-batching nor on ranks. A mean over no tokens counts as 0. For the clean half
    alone the loss is the mean CE of the clean tokens: weight 1, denominator ``ar_total``.
    """
    if batch.doubled:
        length = batch.tokens.shape[1] // 2
        diffusion = 1.0 / (1.0 + ar_loss_weight)
        ar = ar_loss_weight * diffusion * diffusion_total / ar_total if ar_total else 0.0
        weights = torch.tensor([ar, diffusion], dtype=torch.float32).repeat_interleave(length)
    else:
        weights = torch.ones(batch.tokens.shape[1])
    batch.loss_weights = batch.supervised * weights.to(batch.supervised.device)
