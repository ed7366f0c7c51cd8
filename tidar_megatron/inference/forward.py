"""The contents of a decode forward: the tokens of each sequence, packed side by side, and their attention.

A :class:`ForwardLayout` describes the tokens of one sequence in a forward. The mask among them comes from
:mod:`tidar_megatron.attention_mask`, once per layout. Every token of a decode step sees the whole committed prefix, so
only the local T x T part needs a mask, and this part does not depend on the prefix length.

The tokens of all sequences of a forward are packed into one row without padding, so each matrix product of the model
serves all of them. Attention, which ``attention.py`` registers with transformers, handles the sequences one by one, or
several in one call if that needs little padding. Each sequence reads its own slot of the :class:`KVPool`, so
sequences cannot see each other, and they may differ in length and layout.

Shapes: T tokens of a sequence in the forward, P committed tokens before them, H query heads, N K/V heads (never
expanded), G = H / N, D head dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar_megatron.attention_kernels import aligned, attend, has_flash, hiding
from tidar_megatron.attention_mask import INDEX, decode_layout, may_attend
from tidar_megatron.inference.cache import BLOCK, KVPool, rounded_keys


class ForwardLayout(NamedTuple):
    """The tokens of one sequence in a forward: ``num_drafts`` drafts, then ``draft_length`` masks per branch.

    Branch r is the pre-draft for the outcome "exactly r drafts accepted". The tokens are ordered as in
    :func:`~tidar_megatron.attention_mask.decode_layout`. Without branches it is a plain causal forward.
    """

    num_drafts: int
    branches: tuple[int, ...] = ()
    draft_length: int = 0

    @property
    def num_masks(self) -> int:
        """The number of masks of all branches."""
        return len(self.branches) * self.draft_length

    @property
    def num_tokens(self) -> int:
        """The number of tokens T, drafts and masks."""
        return self.num_drafts + self.num_masks

    def branch_after(self, accepted: int) -> int | None:
        """Return the branch of the outcome ``accepted``, or else the longest shorter one, or None.

        A shorter branch has seen fewer drafts, all of which were accepted.
        """
        return max((r for r in self.branches if r <= accepted), default=None)

    def rows_after(self, accepted: int) -> range:
        """Return the rows that draft the tokens after the next certain token, if ``accepted`` drafts were accepted.

        They belong to :meth:`branch_after`. Its rows up to the certain token's position are skipped, because the
        certain token is chosen from autoregressive logits. The range is empty if there is no branch.
        """
        branch = self.branch_after(accepted)
        if branch is None:
            return range(0)
        start = self.num_drafts + self.branches.index(branch) * self.draft_length
        return range(start + accepted - branch + 1, start + self.draft_length)


@lru_cache(maxsize=4096)
def position_offsets(layout: ForwardLayout) -> tuple[int, ...]:
    """Return the T position ids of a layout, relative to P."""
    return tuple(decode_layout(0, layout.num_drafts, layout.branches, layout.draft_length)[:, INDEX].tolist())


def local_mask(layout: ForwardLayout) -> Tensor:
    """Return which tokens of the forward may attend to which, bool ``[T, T]``; the same for every prefix length."""
    tokens = decode_layout(0, layout.num_drafts, layout.branches, layout.draft_length)
    return may_attend(tokens, tokens)


MOST_KEPT = 128  # biases of more tokens are not cached: they are large and belong to prompt chunks, used once
KEPT_PREFIX = 2048  # the longest prefix for which a cached bias serves


def _bias(
    layout: ForwardLayout, rows: "Rows", dtype: torch.dtype, device: torch.device, prefix: int, read: int
) -> Tensor:
    """Return the bias on the scores of a layout's tokens after ``prefix`` tokens, ``[1, 1, rows, read]``.

    It has zeros for the prefix, :func:`local_mask` after it, repeated per query head of a group, and hides the rest.
    The bias has the dtype of the queries, because the kernel silently computes wrong results for any other.
    """
    visible = local_mask(layout)
    tokens = len(visible)
    # rows of padding see everything, so their output is finite
    bias = torch.zeros(rows.padded, read, dtype=dtype, device=device)
    own = bias[: rows.number].unflatten(0, (-1, tokens))
    own[..., prefix : prefix + tokens].masked_fill_(~visible.to(device), hiding(dtype))
    own[..., prefix + tokens :] = hiding(dtype)
    return bias[None, None]


@lru_cache(maxsize=32)  # a megabyte each where a plan has many tokens
def _kept_bias(layout: ForwardLayout, rows: "Rows", dtype: torch.dtype, device: torch.device) -> Tensor:
    return _bias(layout, rows, dtype, device, KEPT_PREFIX, KEPT_PREFIX + layout.num_tokens + BLOCK)


class Rows(NamedTuple):
    """The rows of queries that one head of the kernel gets: ``number`` of them, ``padded`` to a number that fits.

    On a CPU they are multiples of four, because a matrix product adds up its last rows in another order. A row then has
    the same bits whatever other rows the forward has.
    """

    number: int
    padded: int

    @staticmethod
    def of(groups: int, tokens: int, device: torch.device) -> "Rows":
        """Return the rows for ``tokens`` tokens of ``groups`` query heads."""
        number = groups * tokens
        return Rows(number, -(-number // 4) * 4 if has_flash(device) else number)

    def pad(self, query: Tensor) -> Tensor:
        """Return queries ``[..., number, D]``, padded with zeros to ``[..., padded, D]``."""
        return query if self.number == self.padded else F.pad(query, (0, 0, 0, self.padded - self.number))

    def unpad(self, out: Tensor) -> Tensor:
        """Return the rows of ``[..., padded, D]`` without the padding."""
        return out if self.number == self.padded else out.narrow(-2, 0, self.number)


class Part(NamedTuple):
    """The part of a sequence in a forward: its drafts (or a prompt chunk), after ``length`` committed tokens."""

    slot: int
    length: int
    tokens: Sequence[int]
    layout: ForwardLayout


class Forward(Protocol):
    """The interface that a model's forward needs: the tokens of several sequences, packed, and their attention.

    ``starts`` holds the first row of each sequence; ``num_tokens`` is the number of rows. ``mask_rows`` tells which are
    masks: a slice, row numbers (int64), or a bool per row; None if none is.
    """

    starts: list[int]
    num_tokens: int

    @property
    def mask_rows(self) -> "slice | Tensor | None": ...

    def inputs(self, mask_token_id: int | None, device: torch.device) -> Tensor:
        """Return token ids and position ids, int64 ``[2, 1, tokens]``."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Write all keys and values after the committed tokens of their sequence, and compute attention.

        Args:
            layer: The layer's index.
            query: ``[1, H, tokens, D]``.
            key: ``[1, N, tokens, D]``.
            value: ``[1, N, tokens, D]``.
            scale: The factor on the scores.

        Returns:
            The output, ``[1, tokens, H, D]``.
        """


class PackedForward:
    """A :class:`Forward` over the parts of several sequences, packed without padding.

    Attention reads each sequence's keys apart. A call costs as much as the work of a few small parts, so adjacent parts
    share a call if that pads little (:class:`SharedCall`).
    """

    def __init__(self, pool: KVPool, parts: Sequence[Part]) -> None:
        self.pool, self.parts = pool, parts
        edges, place = [], 0
        for part in parts:
            assert len(part.tokens) == part.layout.num_drafts
            edges.append(place)
            place += part.layout.num_tokens
        self.starts: list[int] = edges
        self.num_tokens = place
        self.num_masks = sum(part.layout.num_masks for part in parts)
        # with the rows of the forward that each serves; the first layer arranges them
        self._calls: list[tuple[slice, SingleCall | SharedCall]] = []

    @property
    def mask_rows(self) -> "slice | Tensor | None":
        """The rows that are masks; see :class:`Forward`."""
        if not self.num_masks:
            return None
        if len(self.parts) == 1:
            return slice(self.num_tokens - self.num_masks, self.num_tokens)
        ranges = [
            torch.arange(start + part.layout.num_drafts, start + part.layout.num_tokens)
            for start, part in zip(self.starts, self.parts, strict=True)
        ]
        return torch.cat(ranges)

    def inputs(self, mask_token_id: int | None, device: torch.device) -> Tensor:
        """Return token ids and position ids; see :meth:`Forward.inputs`."""
        ids: list[int | None] = []
        positions: list[int] = []
        for part in self.parts:
            ids += [*part.tokens, *[mask_token_id] * part.layout.num_masks]
            positions += [part.length + offset for offset in position_offsets(part.layout)]
        return torch.tensor(ids + positions).to(device).view(2, 1, -1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Write K/V and compute attention; see :meth:`Forward.attend`."""
        if not self._calls:
            self._calls = self._arranged(query, key.shape[1])
        if len(self._calls) == 1:
            return self._calls[0][1].attend(self.pool, layer, query, key, value, scale)
        outputs = []
        for rows, call in self._calls:
            q, k, v = (tensor[:, :, rows] for tensor in (query, key, value))
            outputs.append(call.attend(self.pool, layer, q, k, v, scale))
        return torch.cat(outputs, dim=1)

    def _arranged(self, query: Tensor, kv_heads: int) -> list[tuple[slice, "SingleCall | SharedCall"]]:
        calls: list[tuple[slice, SingleCall | SharedCall]] = []
        start = 0
        for parts in in_calls(self.parts, query.shape[1] * query.shape[3]):
            rows = slice(start, start := start + sum(part.layout.num_tokens for part in parts))
            if len(parts) == 1:
                calls.append((rows, SingleCall.of(parts[0], query[:, :, rows], kv_heads)))
            else:
                calls.append((rows, SharedCall.of_parts(parts, query.shape[1] // kv_heads, query)))
        return calls


A_CALL = 1e6  # multiply-adds that take about as long as one more call: 0.1 ms on a core


def in_calls(parts: Sequence[Part], channels: int) -> list[list[Part]]:
    """Return the parts of each call: adjacent small parts share one while the padding costs less than more calls.

    Args:
        parts: The parts of a forward, in the order of their slots.
        channels: The channels of all query heads together.
    """
    calls: list[list[Part]] = []
    slot = tokens = end = own = 0  # of the last call: its last slot, most tokens, largest end, and work without padding
    for part in parts:
        size = part.layout.num_tokens
        reads = part.length + size
        count = len(calls[-1]) if calls and part.slot == slot + 1 else 0  # parts that it may join
        padding = (count + 1) * max(tokens, size) * max(end, reads) - own - size * reads
        if count and max(tokens, size) <= MOST_KEPT and 2 * channels * padding <= A_CALL * count:
            calls[-1].append(part)
        else:
            calls.append([part])
            tokens = end = own = 0
        slot, tokens, end, own = part.slot, max(tokens, size), max(end, reads), own + size * reads
    return calls


@dataclass(frozen=True)
class SharedCall:
    """The attention inputs, shared by all layers, of n sequences with T tokens each that are served in one call.

    Sequences with fewer tokens are padded with copies of their last one.

    Attributes:
        slots: The adjacent slots of the pool.
        places: The places to write new keys and values to: the number of the slot among the n, int64 ``[n, 1]``, and
            the position there, ``[n, T]``.
        read: The number of keys to read of each slot.
        rows: The rows of queries per K/V head.
        bias: The bias on the scores, ``[n, 1, rows, read]``.
        padding: If sequences are padded, the packed row of each padded row, int64 ``[n * T]``.
        unpadding: If sequences are padded, the padded row of each packed row, int64 ``[tokens]``.
    """

    slots: slice
    places: tuple[Tensor, Tensor]
    read: int
    rows: Rows
    bias: Tensor
    padding: Tensor | None = None
    unpadding: Tensor | None = None

    @staticmethod
    def of(slots: slice, lengths: Tensor, visible: Tensor, read: int, groups: int, dtype: torch.dtype) -> "SharedCall":
        """Prepare attention of n sequences from tensors on the device, without waiting for it.

        Args:
            slots: The adjacent slots of the pool.
            lengths: The committed tokens of each, int64 ``[n]``.
            visible: Which of the new tokens may attend to which, bool ``[n, T, T]``.
            read: The number of keys to read of each slot.
            groups: The query heads per K/V head.
            dtype: The dtype of the queries.
        """
        count, tokens, device = len(lengths), visible.shape[-1], lengths.device
        rows = Rows.of(groups, tokens, device)
        places = lengths[:, None] + torch.arange(tokens, device=device)
        columns = read + aligned(tokens)  # the last columns are for padding that is not read
        bias = torch.zeros(count, 1, rows.padded, columns, dtype=dtype, device=device)
        own = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, hiding(dtype))
        own = own.repeat(1, groups, 1)
        each = torch.arange(count, device=device)[:, None]
        bias[:, 0, : own.shape[1]][each, :, places] = own.transpose(1, 2)
        bias.masked_fill_(torch.arange(columns, device=device) >= lengths[:, None, None, None] + tokens, hiding(dtype))
        bias = bias[..., :read]
        return SharedCall(slots, (each, places), read, rows, bias)

    @staticmethod
    def of_parts(parts: Sequence[Part], groups: int, query: Tensor) -> "SharedCall":
        """Prepare attention of several parts in adjacent slots; ``query`` only tells device and dtype."""
        device = query.device
        sizes = [part.layout.num_tokens for part in parts]
        most = max(sizes)
        slots = slice(parts[0].slot, parts[0].slot + len(parts))
        lengths = torch.tensor([part.length for part in parts])
        visible = torch.stack([padded_mask(part.layout, most, device) for part in parts])
        read = rounded_keys(max(part.length + size for part, size in zip(parts, sizes, strict=True)))
        call = SharedCall.of(slots, lengths.to(device), visible, read, groups, query.dtype)
        if min(sizes) == most:
            return call
        counts = torch.tensor(sizes)[:, None]
        within = torch.arange(most).expand(len(parts), -1)
        own = within.minimum(counts - 1)  # the token of its part that each padded row holds
        return replace(
            call,
            # padding writes what the last token writes, to the same place
            places=(call.places[0], (lengths[:, None] + own).to(device)),
            padding=(counts.cumsum(0) - counts + own).flatten().to(device),
            unpadding=(within < counts).flatten().nonzero().flatten().to(device),
        )

    def attend(self, pool: KVPool, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Write K/V to the pool and compute attention; shapes as in :meth:`Forward.attend`."""
        count = len(self.places[0])
        if self.padding is not None:
            query, key, value = (x.index_select(2, self.padding) for x in (query, key, value))
        query, key, value = (x[0].unflatten(1, (count, -1)).transpose(0, 1) for x in (query, key, value))
        _, heads, tokens, head_dim = query.shape
        folded = self.rows.pad(query.reshape(count, key.shape[1], -1, head_dim))
        keys, values = pool.write_side_by_side(layer, self.slots, self.places, self.read, key, value)
        out, _ = attend(folded, keys, values, self.bias, scale)
        out = self.rows.unpad(out).reshape(count, heads, tokens, -1)
        out = out.transpose(1, 2).reshape(1, count * tokens, heads, -1)
        return out if self.unpadding is None else out.index_select(1, self.unpadding)


def own_mask(layout: ForwardLayout) -> Tensor:
    """Return :func:`local_mask` on the CPU; that of few tokens is made once."""
    small = layout.num_tokens <= MOST_KEPT
    return padded_mask(layout, layout.num_tokens, torch.device("cpu")) if small else local_mask(layout)


@lru_cache(maxsize=512)
def padded_mask(layout: ForwardLayout, tokens: int, device: torch.device) -> Tensor:
    """Return :func:`local_mask` padded to ``[tokens, tokens]``; padding sees itself, so that its output is finite."""
    mask = torch.eye(tokens, dtype=torch.bool)
    mask[: layout.num_tokens, : layout.num_tokens] = local_mask(layout)
    return mask.to(device)


class SingleCall(NamedTuple):
    """The attention of one part in a call of its own: its keys in the pool, rows of queries, and bias on the scores."""

    part: Part
    read: int
    rows: Rows
    bias: Tensor

    @staticmethod
    def of(part: Part, query: Tensor, kv_heads: int) -> "SingleCall":
        tokens = part.layout.num_tokens
        rows = Rows.of(_folded(query, kv_heads), tokens, query.device)
        read = rounded_keys(part.length + tokens)
        return SingleCall(part, read, rows, _bias_of(part, rows, query, read))

    def attend(self, pool: KVPool, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        keys, values = pool.write(layer, self.part.slot, self.part.length, key, value, self.read)
        _, heads, tokens, head_dim = query.shape
        rows = self.rows
        # if folded, head n * G + g becomes rows g * T ... of head n
        if rows.number == tokens and heads != keys.shape[1]:  # not folded: the heads of a group share keys and values
            folded = query.reshape(keys.shape[1], -1, tokens, head_dim)
            keys, values = (x.transpose(0, 1).expand(-1, folded.shape[1], -1, -1) for x in (keys, values))
        else:
            folded = query.reshape(1, keys.shape[1], rows.number, head_dim)
        out, _ = attend(rows.pad(folded), keys, values, self.bias, scale)
        return rows.unpad(out).reshape(1, heads, tokens, -1).transpose(1, 2)


def _bias_of(part: Part, rows: Rows, query: Tensor, read: int) -> Tensor:
    """Return the bias on the scores of a part that reads ``read`` keys, ``[1, 1, rows, read]``."""
    first = KEPT_PREFIX - part.length
    if part.layout.num_tokens > MOST_KEPT or first < 0 or read > part.length + part.layout.num_tokens + BLOCK:
        return _bias(part.layout, rows, query.dtype, query.device, part.length, read)
    return _kept_bias(part.layout, rows, query.dtype, query.device)[..., first : first + read]


def _folded(query: Tensor, kv_heads: int) -> int:
    """Return how many query heads of a group are folded into the rows of one head.

    All are folded, so that keys are read once for the group. None are (1 is returned) if torch's kernel, which runs one
    thread per head, would leave threads idle, and for a long prompt chunk, whose bias would be large.
    """
    spread = has_flash(query.device) and torch.get_num_threads() > kv_heads
    return 1 if spread or query.shape[2] > MOST_KEPT else query.shape[1] // kv_heads
