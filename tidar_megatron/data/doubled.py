"""Packed sequences -> what the model sees: the doubled sequence, and the weight of each token's loss.

S clean tokens, then mask tokens at the same positions: one for each of them, or for those of chosen blocks alone
(``blocks.py``). A clean token is to give its document's next token, a mask token the token of its own place. The AR
warm-up phase has the clean half alone.

Positions are what the rotary embedding turns by. They begin at 0 with each document of a row (``--reset-positions``),
or run from 0 to S - 1; where nothing attends across documents that is the same to the model but for rounding, since
rotary attention knows differences of positions alone.

Shapes: b rows, S packed length, M masks a row (S; fewer where blocks are chosen; 0 in the AR warm-up), L = S + M. Under
context parallelism a rank holds L / CP of the tokens, S / CP clean ones first, and the metadata of K keys: all S clean
tokens and its own masks (``context_parallel.py``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tidar_megatron.attention_mask import clean_tokens, training_layout
from tidar_megatron.context_parallel import key_tokens, own_tokens
from tidar_megatron.data.blocks import strata
from tidar_megatron.data.packing import PackedSequence


@dataclass
class Batch:
    """One micro-batch.

    Attributes:
        tokens: int64 ``[b, L]``.
        labels: int64 ``[b, L]``, 0 where not supervised.
        supervised: bool ``[b, L]``.
        stands_for: float32 ``[b, L]``, the tokens whose loss this one's estimates: 0 where not supervised, else 1; the
            mask of a chosen block counts for the blocks of its stratum, one drawn at random for those that were not.
        padding: bool ``[b, L]``, True for fill (megatron-core's ``padding_mask``).
        position_ids: int64 ``[b, L]``, below S; where all rows have the same and no blocks are chosen, one row expanded
            (stride 0 over b), also after :meth:`to`.
        visibility: int32 ``[b, K, 4]``, the metadata of ``attention_mask`` of the keys; K = L on one rank.
        visibility_on_host: the same, wherever the batch has been moved to.
        loss_weights: float32 ``[b, L]``, zero until :func:`set_loss_weights`.
        ar_tokens: supervised clean tokens.
        diffusion_tokens: tokens that the diffusion loss is the mean over: the supervised masks that there are, or
            would be were every block chosen; 0 in a batch of the clean half alone.
        num_tokens: tokens that are not fill, clean ones and masks: the micro-batch's part of the loss's denominator
            (Megatron's ``num_tokens``).
        seq_length: clean tokens of a row on this rank, S / CP; the others are its masks.
        sample_ids: of each row (source, epoch, n), for the log; empty where there is nothing to tell.
    """

    tokens: Tensor
    labels: Tensor
    supervised: Tensor
    stands_for: Tensor
    padding: Tensor
    position_ids: Tensor
    visibility: Tensor
    visibility_on_host: Tensor
    loss_weights: Tensor
    ar_tokens: int
    diffusion_tokens: int
    num_tokens: int
    seq_length: int
    sample_ids: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def mask_length(self) -> int:
        """Mask tokens of a row on this rank, M / CP."""
        return self.tokens.shape[1] - self.seq_length

    @property
    def doubled(self) -> bool:
        """Whether there are masks; else the clean half alone."""
        return self.mask_length > 0

    def shard(self, rank: int, size: int) -> "Batch":
        """The part of a whole batch that one context-parallel rank holds; S and M are multiples of 2 x CP x B."""
        if size == 1:
            return self
        own = own_tokens(self.seq_length, rank, size, self.doubled, self.mask_length)
        keys = key_tokens(self.seq_length, rank, size, self.doubled, self.mask_length)
        supervised, padding = self.supervised[:, own], self.padding[:, own]
        clean = self.seq_length // size
        visibility = self.visibility[:, keys]
        return Batch(
            tokens=self.tokens[:, own],
            labels=self.labels[:, own],
            supervised=supervised,
            stands_for=self.stands_for[:, own],
            padding=padding,
            position_ids=_each_row(self.position_ids, lambda positions: positions[:, own]),
            visibility=visibility,
            visibility_on_host=visibility,
            loss_weights=self.loss_weights[:, own],
            ar_tokens=int(supervised[:, :clean].sum()),
            # the mask of a token that is not fill is supervised
            diffusion_tokens=int((~padding[:, :clean]).sum()) if self.doubled else 0,
            num_tokens=int((~padding).sum()),
            seq_length=clean,
            sample_ids=self.sample_ids,
        )

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on ``device``; without waiting for it where the memory allows (:meth:`pinned`)."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The batch in page-locked memory, from which a GPU copies it while the program goes on."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "visibility_on_host"}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **{name: _each_row(tensor, function) for name, tensor in tensors.items()})


def _each_row(rows: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``function`` of ``[b, ...]``; of one row where all are one, since a copy would write out every one of them."""
    if rows.stride(0) != 0:
        return function(rows)
    return function(rows[:1]).expand(len(rows), *(-1 for _ in rows.shape[1:]))


def make_batch(
    sequences: Sequence[PackedSequence],
    block_size: int,
    mask_token_id: int,
    doubled: bool = True,
    chosen: NDArray[np.int64] | None = None,
    reset_positions: bool = True,
    cross_document_attention: bool = False,
    masked: NDArray[np.float32] | None = None,
) -> Batch:
    """Stack packed sequences of one length into a micro-batch, doubled or the clean half alone.

    Args:
        sequences: the rows.
        block_size: B.
        mask_token_id: what a mask token is.
        doubled: whether there are masks.
        chosen: int64 ``[b, m]`` of :func:`tidar_megatron.data.blocks.choose_blocks`, the blocks of each row that have
            masks; default: all of them.
        reset_positions: whether they begin anew with each document.
        cross_document_attention: a row is one document to attention, fill included; labels stay as they are.
        masked: float32 ``[b, S]`` of :func:`tidar_megatron.data.random_masks.random_masks`, how often the loss of a
            place counts; where it is 0 the diffusion half shows the clean token. Default: all are masked, and count 1.
    """

    def stack(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(sequence, name) for sequence in sequences]))

    clean, document, index = stack("tokens"), stack("document"), stack("index")
    ar_supervised, diffusion_supervised = stack("ar_supervised"), stack("diffusion_supervised")
    S = clean.shape[1]
    labels, supervised, padding = stack("labels"), ar_supervised, ~diffusion_supervised
    stands_for = supervised.float()
    positions = _positions(document, S, reset_positions)
    if cross_document_attention:
        document, index = torch.zeros_like(document), torch.arange(S).expand(clean.shape)
    if doubled:
        picked, weight = _masks(len(clean), S, block_size, chosen)

        def join(of_clean: Tensor, of_masks: Tensor) -> Tensor:
            """``[b, S, ...]``, and what a mask of each place would have ``[b, S, ...]`` -> ``[b, S + M, ...]``."""
            return torch.cat([of_clean, of_masks[picked]], dim=1)

        counts = torch.ones(clean.shape) if masked is None else torch.from_numpy(masked)
        predicted = diffusion_supervised & (counts > 0)
        tokens = join(clean, torch.where(counts > 0, mask_token_id, clean))
        labels = join(labels, clean * predicted)
        supervised = join(supervised, predicted)
        padding = join(padding, padding)
        stands_for = join(stands_for, predicted * counts)
        stands_for[:, S:] *= weight
        visibility = join(*training_layout(document, index, block_size).split(S, dim=1))
        positions = join(positions, positions)
    else:
        tokens = clean
        visibility = clean_tokens(document, index)
    if chosen is None and (positions == positions[:1]).all():
        positions = positions[:1].expand(tokens.shape)
    return Batch(
        tokens=tokens,
        labels=labels,
        supervised=supervised,
        stands_for=stands_for,
        padding=padding,
        position_ids=positions,
        visibility=visibility,
        visibility_on_host=visibility,
        loss_weights=torch.zeros(tokens.shape),
        ar_tokens=int(ar_supervised.sum()),
        diffusion_tokens=int(diffusion_supervised.sum()) if doubled else 0,
        num_tokens=int((~padding).sum()),
        seq_length=S,
    )


def _positions(document: Tensor, seq_length: int, reset: bool) -> Tensor:
    """Of clean tokens: int64 ``[b, S]``."""
    place = torch.arange(seq_length).expand(document.shape)
    if not reset:
        return place
    begins = torch.ones_like(document, dtype=torch.bool)
    begins[:, 1:] = document[:, 1:] != document[:, :-1]
    return place - (place * begins).cummax(dim=1).values


def _masks(rows: int, seq_length: int, block_size: int, chosen: NDArray[np.int64] | None) -> tuple[Any, Tensor]:
    """Which places of ``[b, S]`` have masks, as an index; and the blocks that each stands for, float32 ``[M]``."""
    if chosen is None:
        return (slice(None), slice(None)), torch.ones(seq_length)
    places = torch.from_numpy(chosen).unsqueeze(-1) * block_size + torch.arange(block_size)
    sizes = torch.from_numpy(np.diff(strata(seq_length // block_size, chosen.shape[1])))
    return (torch.arange(rows).unsqueeze(-1), places.flatten(1)), sizes.float().repeat_interleave(block_size)


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
    """Give each token its weight in the joint loss, before the forward; on the batch's device, without waiting for it.

    With the totals over the whole global batch (every rank, every micro-batch) and alpha = ``ar_loss_weight``::

        sum(weights * CE) / total.all == (alpha * mean(CE, clean) + mean(CE, masks)) / (1 + alpha)

    over the global batch, and ``total.all == sum(num_tokens)``: means over the global batch, so the loss depends
    neither on micro-batching nor on ranks. A mean over no tokens counts as 0. For the clean half alone the loss is the
    mean CE of the clean tokens. Where blocks are chosen, ``mean(CE, masks)`` is the unbiased estimate of the mean over
    every block's masks: each chosen one as often as it stands for another, over the count of all.

    The denominator is what went through the model, so that the balancing loss of a mixture of experts, which
    megatron-core divides by it as well, is a mean over the same tokens.
    """

    def mean(weight: float, count: int) -> float:
        return weight * total.all / count if count else 0.0

    weights = batch.stands_for.clone()
    if batch.doubled:
        weights[:, : batch.seq_length] *= mean(ar_loss_weight / (1.0 + ar_loss_weight), total.ar)
        weights[:, batch.seq_length :] *= mean(1.0 / (1.0 + ar_loss_weight), total.diffusion)
    else:
        weights *= mean(1.0, total.ar)
    batch.loss_weights = weights
