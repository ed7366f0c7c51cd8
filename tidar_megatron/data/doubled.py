"""The model's input: packed sequences become doubled sequences, with a loss weight for each token.

A doubled sequence is S clean tokens followed by mask tokens at the same positions: one for each clean token, only for
those of chosen blocks, or for blocks that start anywhere (``blocks.py``). A clean token predicts its document's next
token, a mask token predicts the token of its own position. During the AR warm-up there is only the clean half.

Positions are the inputs of the rotary embedding. They restart at 0 with each document of a row (``--reset-positions``),
or run from 0 to S - 1. If no token attends across documents, both give the same model output except for rounding,
because rotary attention depends only on differences of positions.

Shapes: b rows, S clean tokens and M masks per row (M is S, less if blocks are chosen, any multiple of B if they start
anywhere, 0 during the AR warm-up), and L = S + M. With context parallelism a rank holds L / CP tokens, the S / CP clean
ones first, and the metadata of K keys: all S clean tokens and its own masks (``context_parallel.py``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tidar_megatron.attention_mask import anywhere_layout, clean_tokens, training_layout
from tidar_megatron.context_parallel import key_tokens, own_tokens
from tidar_megatron.data.blocks import strata
from tidar_megatron.data.packing import PackedSequence


@dataclass
class Batch:
    """One micro-batch of doubled sequences, or of clean halves.

    Attributes:
        tokens: int64 ``[b, L]``.
        labels: int64 ``[b, L]``. Those of clean tokens are 0 where not supervised; those of masks, the tokens of their
            places, are also there where they are not, for they tell what stands before the next mask.
        supervised: bool ``[b, L]``.
        stands_for: float32 ``[b, L]``, the number of tokens that this token's loss represents: 0 if it is not
            supervised, otherwise 1. With chosen blocks it is the number of blocks in a mask's stratum; with random
            masks it is 1 / t (``random_masks.py``).
        padding: bool ``[b, L]``, True for fill (megatron-core's ``padding_mask``).
        draftable: bool ``[b, S]``, the clean places whose token a mask may have as its label.
        position_ids: int64 ``[b, L]``, below S + B. If all rows are equal and no blocks are chosen, it is one row
            expanded (stride 0 over b), also after :meth:`to`.
        visibility: int32 ``[b, K, 4]``, the visibility metadata of the keys (``attention_mask.py``); K = L on one rank.
        visibility_on_host: ``visibility``, kept on the host when the batch is moved to another device.
        loss_weights: float32 ``[b, L]``, zero until :func:`set_loss_weights` is called.
        teachers: int64 ``[b, M]``, for each mask the clean token before its place, in the order of the keys; -1 if its
            document has none.
        ar_tokens: The number of supervised clean tokens.
        diffusion_tokens: The number of tokens that the diffusion loss is averaged over: the supervised masks, of
            aligned blocks as if every block were chosen; 0 if there is only the clean half.
        num_tokens: The number of tokens that are not fill, clean tokens and masks: the micro-batch's part of the loss's
            denominator (Megatron's ``num_tokens``).
        seq_length: The number of clean tokens per row on this rank, S / CP; the other tokens of a row are masks.
        starts_anywhere: Whether blocks start anywhere.
        sample_ids: (source, epoch, n) of each row, for the log; empty in evaluation batches.
        attention_plan: What attention has prepared of this batch ahead of its step, or None.
    """

    tokens: Tensor
    labels: Tensor
    supervised: Tensor
    stands_for: Tensor
    padding: Tensor
    draftable: Tensor
    position_ids: Tensor
    visibility: Tensor
    visibility_on_host: Tensor
    loss_weights: Tensor
    teachers: Tensor
    ar_tokens: int
    diffusion_tokens: int
    num_tokens: int
    seq_length: int
    starts_anywhere: bool = False
    sample_ids: list[tuple[int, int, int]] = field(default_factory=list)
    attention_plan: Any = None  # of models/attention: its map(function) applies a function to each of its tensors

    @property
    def mask_length(self) -> int:
        """The number of mask tokens per row on this rank, M / CP."""
        return self.tokens.shape[1] - self.seq_length

    @property
    def doubled(self) -> bool:
        """Return whether the batch has masks; otherwise it is the clean half alone."""
        return self.mask_length > 0

    def shard(self, rank: int, size: int) -> "Batch":
        """Return the part of a full batch that one context-parallel rank holds.

        Args:
            rank: The context-parallel rank.
            size: CP; S and M must be multiples of 2 x CP x B.
        """
        if size == 1:
            return self
        own = own_tokens(self.seq_length, rank, size, self.doubled, self.mask_length)
        keys = key_tokens(self.seq_length, rank, size, self.doubled, self.mask_length)
        supervised, padding = self.supervised[:, own], self.padding[:, own]
        clean = self.seq_length // size
        visibility = self.visibility[:, keys]
        draftable = self.draftable[:, own[:clean]]
        averaged = supervised[:, clean:] if self.starts_anywhere else draftable
        return Batch(
            tokens=self.tokens[:, own],
            labels=self.labels[:, own],
            supervised=supervised,
            stands_for=self.stands_for[:, own],
            padding=padding,
            draftable=draftable,
            position_ids=_each_row(self.position_ids, lambda positions: positions[:, own]),
            visibility=visibility,
            visibility_on_host=visibility,
            loss_weights=self.loss_weights[:, own],
            teachers=_in_key_order(self.teachers[:, own[clean:] - self.seq_length], keys[: self.seq_length]),
            ar_tokens=int(supervised[:, :clean].sum()),
            diffusion_tokens=int(averaged.sum()) if self.doubled else 0,
            num_tokens=int((~padding).sum()),
            seq_length=clean,
            starts_anywhere=self.starts_anywhere,
            sample_ids=self.sample_ids,
        )

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on ``device``; the copy is asynchronous if the batch is :meth:`pinned`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """Return the batch in page-locked memory, from which a GPU copies it asynchronously."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "visibility_on_host"}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        plan = None if self.attention_plan is None else self.attention_plan.map(function)
        mapped = {name: _each_row(tensor, function) for name, tensor in tensors.items()}
        return replace(self, **mapped, attention_plan=plan)


def _in_key_order(places: Tensor, clean_keys: Tensor) -> Tensor:
    """Return where places of the row are among the clean keys, int64 ``[S]``; -1 stays -1."""
    order = torch.empty_like(clean_keys)
    order[clean_keys] = torch.arange(len(clean_keys))
    return torch.where(places >= 0, order[places.clamp(min=0)], -1)


def _each_row(rows: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply ``function`` to ``[b, ...]``; to a single row if the rows are expanded, so that they stay expanded."""
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
    starts: NDArray[np.int64] | None = None,
) -> Batch:
    """Stack packed sequences of equal length into a micro-batch, doubled or only the clean half.

    Args:
        sequences: The rows.
        block_size: B.
        mask_token_id: The id of the mask token.
        doubled: Whether to add masks.
        chosen: int64 ``[b, m]`` from :func:`tidar_megatron.data.blocks.choose_blocks`, the blocks of each row that have
            masks; by default all blocks.
        reset_positions: Whether positions restart at 0 with each document.
        cross_document_attention: Whether attention treats a row as one document, fill included; labels do not change.
        masked: float32 ``[b, S]`` from :func:`tidar_megatron.data.random_masks.random_masks`, the factor of each
            place's loss; where it is 0, the diffusion half shows the clean token. By default every place is masked
            with a factor of 1.
        starts: int64 ``[b, n]`` from :func:`tidar_megatron.data.blocks.choose_starts`, the places at which the blocks
            of each row start; by default they start at multiples of B of each document.
    """

    def stack(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(sequence, name) for sequence in sequences]))

    clean, document, index = stack("tokens"), stack("document"), stack("index")
    ar_supervised, diffusion_supervised = stack("ar_supervised"), stack("diffusion_supervised")
    S = clean.shape[1]
    labels, supervised, is_token = stack("labels"), ar_supervised, stack("is_token")
    padding = ~is_token
    stands_for = supervised.float()
    place = torch.arange(S).expand(clean.shape)
    teachers = torch.where((index > 0) & (place > 0), place - 1, -1)
    positions, labelled = _positions(document, S, reset_positions), document
    if cross_document_attention:
        document, index = torch.zeros_like(document), torch.arange(S).expand(clean.shape)
    if doubled and starts is not None:
        places = torch.from_numpy(starts)
        masks = _masks_anywhere(places, clean, is_token, labelled, document, index, positions, block_size)
        predicted = masks.real & diffusion_supervised.gather(1, masks.places)
        teachers = torch.where(masks.real, teachers.gather(1, masks.places), -1)
        tokens = torch.cat([clean, torch.full_like(masks.labels, mask_token_id)], dim=1)
        labels = torch.cat([labels, masks.labels], dim=1)
        supervised = torch.cat([supervised, predicted], dim=1)
        padding = torch.cat([padding, ~masks.real], dim=1)
        stands_for = supervised.float()
        visibility = torch.cat([clean_tokens(document, index), masks.visibility], dim=1)
        positions = torch.cat([positions, masks.positions], dim=1)
    elif doubled:
        picked, weight = _masks(len(clean), S, block_size, chosen)

        def join(of_clean: Tensor, of_masks: Tensor) -> Tensor:
            """Append the values of the masks that exist to those of the clean tokens.

            Args:
                of_clean: The values of the clean tokens, ``[b, S, ...]``.
                of_masks: The values for a mask at every place, ``[b, S, ...]``.

            Returns:
                ``[b, S + M, ...]``.
            """
            return torch.cat([of_clean, of_masks[picked]], dim=1)

        counts = torch.ones(clean.shape) if masked is None else torch.from_numpy(masked)
        predicted = diffusion_supervised & (counts > 0)
        tokens = join(clean, torch.where(counts > 0, mask_token_id, clean))
        labels = join(labels, clean * (is_token & (counts > 0)))
        supervised = join(supervised, predicted)
        padding = join(padding, padding)
        stands_for = join(stands_for, predicted * counts)
        stands_for[:, S:] *= weight
        visibility = join(*training_layout(document, index, block_size).split(S, dim=1))
        positions = join(positions, positions)
        teachers = teachers[picked]
    else:
        teachers = teachers[:, :0]
        tokens = clean
        visibility = clean_tokens(document, index)
    if chosen is None and starts is None and (positions == positions[:1]).all():
        positions = positions[:1].expand(tokens.shape)
    return Batch(
        tokens=tokens,
        labels=labels,
        supervised=supervised,
        stands_for=stands_for,
        padding=padding,
        draftable=diffusion_supervised,
        position_ids=positions,
        visibility=visibility,
        visibility_on_host=visibility,
        loss_weights=torch.zeros(tokens.shape),
        teachers=teachers,
        ar_tokens=int(ar_supervised.sum()),
        diffusion_tokens=int((diffusion_supervised if starts is None else supervised[:, S:]).sum()) if doubled else 0,
        num_tokens=int((~padding).sum()),
        seq_length=S,
        starts_anywhere=doubled and starts is not None,
    )


class _Masks(NamedTuple):
    """The masks of blocks that start anywhere; each field is ``[b, M]``, ``visibility`` int32 ``[b, M, 4]``."""

    labels: Tensor
    real: Tensor
    visibility: Tensor
    positions: Tensor
    places: Tensor


def _masks_anywhere(
    starts: Tensor,
    clean: Tensor,
    is_token: Tensor,
    labelled: Tensor,
    document: Tensor,
    index: Tensor,
    positions: Tensor,
    block_size: int,
) -> _Masks:
    """Return the masks of blocks that start at the places ``starts [b, n]``; the other arguments are ``[b, S]``.

    A block sees the clean tokens of its ``document`` before its start, and has labels in its document as ``labelled``
    tells it; the two differ where attention crosses documents. Masks beyond the end of the document, or of the row,
    are there as in decoding, but they are not ``real`` and have no label.
    """
    offset = torch.arange(block_size)
    places = (starts.unsqueeze(-1) + offset).flatten(1)
    first, offset = starts.repeat_interleave(block_size, dim=1), offset.repeat(starts.shape[1])
    inside = places.clamp(max=clean.shape[1] - 1)
    real = (places == inside) & (labelled.gather(1, inside) == labelled.gather(1, first)) & is_token.gather(1, inside)
    visibility = anywhere_layout(document, index, starts, block_size)
    positions = positions.gather(1, first) + offset
    return _Masks(clean.gather(1, inside) * real, real, visibility, positions, inside)


def _positions(document: Tensor, seq_length: int, reset: bool) -> Tensor:
    """Return the positions of the clean tokens: int64 ``[b, S]``."""
    place = torch.arange(seq_length).expand(document.shape)
    if not reset:
        return place
    begins = torch.ones_like(document, dtype=torch.bool)
    begins[:, 1:] = document[:, 1:] != document[:, :-1]
    return place - (place * begins).cummax(dim=1).values


def _masks(rows: int, seq_length: int, block_size: int, chosen: NDArray[np.int64] | None) -> tuple[Any, Tensor]:
    """Return an index of the places of ``[b, S]`` that have masks, and the blocks each represents, float32 ``[M]``."""
    if chosen is None:
        return (slice(None), slice(None)), torch.ones(seq_length)
    places = torch.from_numpy(chosen).unsqueeze(-1) * block_size + torch.arange(block_size)
    sizes = torch.from_numpy(np.diff(strata(seq_length // block_size, chosen.shape[1])))
    return (torch.arange(rows).unsqueeze(-1), places.flatten(1)), sizes.float().repeat_interleave(block_size)


@dataclass(frozen=True)
class TokenCounts:
    """The token counts of some micro-batches, or of the global batch.

    Attributes:
        ar: The sum of ``Batch.ar_tokens``.
        diffusion: The sum of ``Batch.diffusion_tokens``.
        all: The sum of ``Batch.num_tokens``.
    """

    ar: int
    diffusion: int
    all: int

    @staticmethod
    def of(batches: Sequence[Batch]) -> "TokenCounts":
        """Return the counts summed over micro-batches."""
        return TokenCounts(*(sum(getattr(b, f"{name}_tokens") for b in batches) for name in ("ar", "diffusion", "num")))


def set_loss_weights(batch: Batch, total: TokenCounts, ar_loss_weight: float) -> None:
    """Set each token's weight in the joint loss before the forward, on the batch's device and without synchronizing.

    With ``total`` over the global batch (all ranks, all micro-batches) and alpha = ``ar_loss_weight``::

        sum(weights * CE) / total.all == (alpha * mean(CE, clean) + mean(CE, masks)) / (1 + alpha)

    where sum and means are over the global batch and ``total.all == sum(num_tokens)``. The loss therefore does not
    depend on micro-batches or ranks. A mean over no tokens counts as 0. If there is only the clean half, the loss is
    the mean CE of the clean tokens. If blocks are chosen, ``mean(CE, masks)`` is an unbiased estimate of the mean over
    the masks of all blocks: each loss is multiplied by the number of blocks it represents.

    The denominator counts every token that went through the model: megatron-core also divides the load-balancing loss
    of a mixture of experts by it, which is then a mean over the same tokens.

    Args:
        batch: The micro-batch; its ``loss_weights`` are replaced.
        total: The token counts of the global batch.
        ar_loss_weight: alpha.
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
