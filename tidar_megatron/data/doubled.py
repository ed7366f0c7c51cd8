"""Packed sequences -> what the model sees: the doubled sequence, and the weight of each token's loss.

S clean tokens, then S mask tokens, both at positions 0 .. S-1. A clean token is to give its document's next token, a
mask token the token of its own place. The AR warm-up phase has the clean half alone.

Shapes: b rows, S packed length, L = 2S (doubled) or S (clean half alone). Under context parallelism a rank holds L / CP
of the tokens, and the metadata of K keys: all S clean tokens and its own masks (``context_parallel.py``).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from tidar_megatron.attention_mask import clean_tokens, training_layout
from tidar_megatron.context_parallel import key_tokens, own_tokens
from tidar_megatron.data.packing import PackedSequence


@dataclass
class Batch:
    """One micro-batch.

    Attributes:
        tokens: int64 ``[b, L]``.
        labels: int64 ``[b, L]``, 0 where not supervised.
        supervised: bool ``[b, L]``.
        padding: bool ``[b, L]``, True for fill (megatron-core's ``padding_mask``).
        position_ids: int64 ``[b, L]``, one row expanded (stride 0 over b), also after :meth:`to`.
        visibility: int32 ``[b, K, 4]``, the metadata of ``attention_mask`` of the keys; K = L on one rank.
        visibility_on_host: the same, wherever the batch has been moved to.
        loss_weights: float32 ``[b, L]``, zero until :func:`set_loss_weights`.
        ar_tokens: supervised clean tokens.
        diffusion_tokens: supervised mask tokens; 0 in a batch of the clean half alone.
        num_tokens: tokens that are not fill, of both halves: the micro-batch's part of the loss's denominator
            (Megatron's ``num_tokens``).
        doubled: whether there is a mask half.
    """

    tokens: Tensor
    labels: Tensor
    supervised: Tensor
    padding: Tensor
    position_ids: Tensor
    visibility: Tensor
    visibility_on_host: Tensor
    loss_weights: Tensor
    ar_tokens: int
    diffusion_tokens: int
    num_tokens: int
    doubled: bool

    @property
    def seq_length(self) -> int:
        """Clean tokens of a row on this rank."""
        return self.tokens.shape[1] // 2 if self.doubled else self.tokens.shape[1]

    def shard(self, rank: int, size: int) -> "Batch":
        """The part of a whole batch that one context-parallel rank holds; S must be a multiple of 2 x CP x B."""
        if size == 1:
            return self
        own = own_tokens(self.seq_length, rank, size, self.doubled)
        keys = key_tokens(self.seq_length, rank, size, self.doubled)
        supervised = self.supervised[:, own]
        clean = self.seq_length // size
        visibility = self.visibility[:, keys]
        return Batch(
            tokens=self.tokens[:, own],
            labels=self.labels[:, own],
            supervised=supervised,
            padding=self.padding[:, own],
            position_ids=self.position_ids[0, own].expand(len(self.tokens), -1),
            visibility=visibility,
            visibility_on_host=visibility,
            loss_weights=self.loss_weights[:, own],
            ar_tokens=int(supervised[:, :clean].sum()),
            diffusion_tokens=int(supervised[:, clean:].sum()),
            num_tokens=int((~self.padding[:, own]).sum()),
            doubled=self.doubled,
        )

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on ``device``; without waiting for it where the memory allows."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        # Copying an expanded tensor would write out every row.
        moved["visibility_on_host"] = self.visibility_on_host
        moved["position_ids"] = self.position_ids[:1].to(device, non_blocking=True).expand(len(self.tokens), -1)
        return replace(self, **moved)


def make_batch(sequences: Sequence[PackedSequence], block_size: int, mask_token_id: int, doubled: bool = True) -> Batch:
    """Stack packed sequences of one length into a micro-batch, doubled or the clean half alone."""

    def stack(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(sequence, name) for sequence in sequences]))

    clean, document, index = stack("tokens"), stack("document"), stack("index")
    ar_supervised, diffusion_supervised = stack("ar_supervised"), stack("diffusion_supervised")
    padding = ~diffusion_supervised
    positions = torch.arange(clean.shape[1])
    if doubled:
        tokens = torch.cat([clean, torch.full_like(clean, mask_token_id)], dim=1)
        labels = torch.cat([stack("labels"), clean * diffusion_supervised], dim=1)
        supervised = torch.cat([ar_supervised, diffusion_supervised], dim=1)
        padding = torch.cat([padding, padding], dim=1)
        positions = positions.repeat(2)
        visibility = training_layout(document, index, block_size)
    else:
        tokens, labels, supervised = clean, stack("labels"), ar_supervised
        visibility = clean_tokens(document, index)
    return Batch(
        tokens=tokens,
        labels=labels,
        supervised=supervised,
        padding=padding,
        position_ids=positions.expand(tokens.shape),
        visibility=visibility,
        visibility_on_host=visibility,
        loss_weights=torch.zeros(tokens.shape),
        ar_tokens=int(ar_supervised.sum()),
        diffusion_tokens=int(diffusion_supervised.sum()) if doubled else 0,
        num_tokens=int((~padding).sum()),
        doubled=doubled,
    )


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of some micro-batches, or of the whole global batch."""

    ar: int
    diffusion: int
    all: int

    @staticmethod
    def of(batches: Sequence[Batch]) -> "TokenCounts":
        """Summed over micro-batches."""
        return TokenCounts(*(sum(getattr(b, f"{name}_tokens") for b in batches) for name in ("ar", "diffusion", "num")))


def set_loss_weights(batch: Batch, total: TokenCounts, ar_loss_weight: float) -> None:
    """Give each token its weight in the joint loss, before the forward.

    With the totals over the whole global batch (every rank, every micro-batch) and alpha = ``ar_loss_weight``::

        sum(weights * CE) / total.all == (alpha * mean(CE, clean) + mean(CE, masks)) / (1 + alpha)

    over the global batch, and ``total.all == sum(num_tokens)``: means over the global batch, so the loss depends
    neither on micro-batching nor on ranks. A mean over no tokens counts as 0. For the clean half alone the loss is the
    mean CE of the clean tokens. The denominator is what went through the model, so that the balancing loss of a mixture
    of experts, which megatron-core divides by it as well, is a mean over the same tokens.
    """

    def mean(weight: float, count: int) -> float:
        return weight * total.all / count if count else 0.0

    if batch.doubled:
        ar = mean(ar_loss_weight / (1.0 + ar_loss_weight), total.ar)
        diffusion = mean(1.0 / (1.0 + ar_loss_weight), total.diffusion)
        weights = torch.tensor([ar, diffusion], dtype=torch.float32).repeat_interleave(batch.seq_length)
    else:
        weights = torch.full((batch.seq_length,), mean(1.0, total.ar))
    batch.loss_weights = batch.supervised * weights.to(batch.supervised.device)
