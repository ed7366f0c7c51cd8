"""The contents of a decode forward: the tokens of each sequence, packed side by side, and their attention.

A :class:`ForwardLayout` describes the tokens of one sequence in a forward. The mask among them comes from
:mod:`tidar_megatron.attention_mask`, once per layout. Every token of a decode step sees the whole committed prefix, so
only the local T x T part needs a mask, and this part does not depend on the prefix length.

The tokens of all sequences of a forward are packed into one row without padding, so each matrix product of the model
serves all of them. Attention, which ``attention.py`` registers with transformers, handles the sequences one by one, or
all in one call if each has the same number of tokens. Each sequence reads its own slot of the :class:`KVPool`, so
sequences cannot see each other, and they may differ in length and layout.

Shapes: T tokens of a sequence in the forward, P committed tokens before them, H query heads, N K/V heads (never
expanded), G = H / N, D head dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tidar_megatron.attention_kernels import attend, has_flash, hiding
from tidar_megatron.attention_mask import INDEX, decode_layout, may_attend
from tidar_megatron.inference.cache import KVPool


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


SHORT = 2048  # a prefix up to this length is part of the masked call: a second call would cost more than the mask
MOST_KEPT = 128  # masks of more tokens are not cached: they are large and belong to prompt chunks, used once


def _bias(layout: ForwardLayout, groups: int, dtype: torch.dtype, device: torch.device, prefix: int = 0) -> Tensor:
    """Return :func:`local_mask` as a bias on scores, repeated per query head of a group, with zeros for a prefix.

    The shape is ``[1, 1, G * T, prefix + T]``; the last P + T columns serve a prefix of length P. The bias has the
    dtype of the queries, because the kernel silently computes wrong results for any other.
    """
    hidden = ~local_mask(layout)
    bias = torch.zeros(len(hidden), prefix + len(hidden), dtype=dtype)
    bias[:, prefix:].masked_fill_(hidden, hiding(dtype))
    return bias.repeat(groups, 1)[None, None].to(device)


@lru_cache(maxsize=128)
def _kept_bias(layout: ForwardLayout, groups: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _bias(layout, groups, dtype, device, SHORT)


class Part(NamedTuple):
    """The part of a sequence in a forward: its drafts (or a prompt chunk), after ``length`` committed tokens."""

    slot: int
    length: int
    tokens: Sequence[int]
    layout: ForwardLayout


class Forward(Protocol):
    """The interface that a model's forward needs: the tokens of several sequences, packed, and their attention.

    ``starts`` holds the first row of each sequence; ``num_tokens`` is the number of rows.
    """

    starts: list[int]
    num_tokens: int

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
    """A :class:`Forward` over the parts of several sequences, packed without padding."""

    def __init__(self, pool: KVPool, parts: Sequence[Part]) -> None:
        self._pool, self._parts = pool, parts
        edges, place = [], 0
        for part in parts:
            assert len(part.tokens) == part.layout.num_drafts
            edges.append(place)
            place += part.layout.num_tokens
        self.starts: list[int] = edges
        self.num_tokens = place
        self._uniform: Uniform | None = None
        self._biases: list[_Bias | None] = [None] * len(parts)
        self.num_masks = sum(part.layout.num_masks for part in parts)

    def inputs(self, mask_token_id: int | None, device: torch.device) -> Tensor:
        """Return token ids and position ids; see :meth:`Forward.inputs`."""
        ids: list[int | None] = []
        positions: list[int] = []
        for part in self._parts:
            ids += [*part.tokens, *[mask_token_id] * part.layout.num_masks]
            positions += [part.length + offset for offset in position_offsets(part.layout)]
        return torch.tensor(ids + positions).to(device).view(2, 1, -1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Write K/V and compute attention; see :meth:`Forward.attend`."""
        if self.is_uniform:
            if self._uniform is None:
                self._uniform = self._as_uniform(query.shape[1] // key.shape[1], query)
            return self._uniform.attend(self._pool, layer, query, key, value, scale)
        if len(self._parts) == 1:
            return self._attend_part(0, layer, query, key, value, scale)
        outputs = []
        for number, (part, start) in enumerate(zip(self._parts, self.starts, strict=True)):
            rows = slice(start, start + part.layout.num_tokens)
            q, k, v = (tensor[:, :, rows] for tensor in (query, key, value))
            outputs.append(self._attend_part(number, layer, q, k, v, scale))
        return torch.cat(outputs, dim=1)

    def _attend_part(self, number: int, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        part = self._parts[number]
        keys, values = self._pool.write(layer, part.slot, part.length, key, value)
        if part.layout.num_tokens > 1 and self._biases[number] is None:
            self._biases[number] = _bias_of(part, _folded(query, key.shape[1]), query)
        return _attend(query, keys, values, part.length, self._biases[number], scale)

    @cached_property
    def is_uniform(self) -> bool:
        """Return whether one call can serve all: several small parts of one size, in adjacent slots and in order."""
        if len(self._parts) == 1:
            return False
        slot, size = self._parts[0].slot, self._parts[0].layout.num_tokens
        fits = all((p.layout.num_tokens, p.slot) == (size, slot + n) for n, p in enumerate(self._parts))
        return fits and size <= MOST_KEPT

    def _as_uniform(self, groups: int, query: Tensor) -> "Uniform":
        parts, dtype, device = self._parts, query.dtype, query.device
        lengths = torch.tensor([part.length for part in parts])
        local_bias: Tensor | None = None
        if (tokens := parts[0].layout.num_tokens) > 1:
            biases = [_kept_bias(part.layout, groups, dtype, device)[..., SHORT:] for part in parts]
            local_bias = biases[0] if len({part.layout for part in parts}) == 1 else torch.cat(biases)
        assert int(lengths.max()) + tokens <= self._pool.capacity
        places = lengths[:, None] + torch.arange(tokens)
        if local_bias is None:
            lengths = lengths + 1
        longest = int(lengths.max())
        return Uniform(
            slots=slice(parts[0].slot, parts[0].slot + len(parts)),
            places=places.to(device),
            longest=longest,
            prefix_bias=self._pool.hidden_behind(lengths.to(device), longest, dtype),
            local_bias=local_bias,
        )


@dataclass(frozen=True)
class Uniform:
    """The attention inputs, shared by all layers, of n sequences with T tokens each that are served in one call.

    Attributes:
        slots: The adjacent slots of the pool.
        places: The positions in the slots to write new keys and values to, int64 ``[n, T]``.
        longest: The longest prefix, to which all are padded.
        prefix_bias: The bias that hides the padding, ``[n, 1, 1, longest]``.
        local_bias: The bias among the new tokens, ``[n or 1, 1, G * T, T]``; None if T is 1, where the new token counts
            as part of the prefix.
    """

    slots: slice
    places: Tensor
    longest: int
    prefix_bias: Tensor
    local_bias: Tensor | None

    def attend(self, pool: KVPool, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Write K/V to the pool and compute attention; shapes as in :meth:`Forward.attend`, with tokens = n * T."""
        count = len(self.places)
        query, key, value = (x[0].unflatten(1, (count, -1)).transpose(0, 1) for x in (query, key, value))
        _, heads, tokens, head_dim = query.shape
        folded = query.reshape(count, key.shape[1], -1, head_dim)  # as in _attend
        keys, values = pool.write_side_by_side(layer, self.slots, self.places, self.longest, key, value)
        if self.local_bias is None:
            out, _ = attend(folded, keys, values, self.prefix_bias, scale)
        else:
            out, lse = attend(folded, key, value, self.local_bias, scale)
            if self.longest:
                out = _merged(out, lse, *attend(folded, keys, values, self.prefix_bias, scale))
        return out.reshape(count, heads, tokens, -1).transpose(1, 2).reshape(1, count * tokens, heads, -1)


class _Bias(NamedTuple):
    """The mask of one sequence: over all keys in one call, or, if ``apart``, over the new keys alone.

    If ``causal``, the kernel's causal mask takes the place of ``bias``.
    """

    bias: Tensor | None
    apart: bool
    causal: bool = False


def _folded(query: Tensor, kv_heads: int) -> int:
    """Return how many query heads of a group are folded into the rows of one head.

    All are folded, so that keys are read once for the group. None are (1 is returned) if torch's kernel, which runs one
    thread per head, would leave threads idle.
    """
    spread = has_flash(query.device) and torch.get_num_threads() > kv_heads
    return 1 if spread else query.shape[1] // kv_heads


def _bias_of(part: Part, groups: int, query: Tensor) -> _Bias:
    tokens, length = part.layout.num_tokens, part.length
    apart = length > SHORT or tokens > MOST_KEPT
    if apart and not part.layout.branches and groups == 1 and has_flash(query.device):
        return _Bias(None, True, True)
    if tokens > MOST_KEPT:
        return _Bias(_bias(part.layout, groups, query.dtype, query.device), True)
    kept = _kept_bias(part.layout, groups, query.dtype, query.device)
    return _Bias(kept[..., SHORT - (0 if apart else length) :], apart)


def _attend(query: Tensor, keys: Tensor, values: Tensor, length: int, masked: _Bias | None, scale: float) -> Tensor:
    """Compute attention of one sequence over its prefix, visible to all, and its new tokens, under the local mask.

    A long prefix has a call of its own; the two outputs are merged.
    """
    _, heads, tokens, head_dim = query.shape
    kv_heads, rows = keys.shape[1], _folded(query, keys.shape[1]) * tokens
    folded = query.reshape(kv_heads, -1, rows, head_dim)  # if folded, head n * G + g becomes rows g * T ... of head n
    keys, values = (x.transpose(0, 1).expand(-1, folded.shape[1], -1, -1) for x in (keys, values))
    if masked is None or not masked.apart:
        out, _ = attend(folded, keys, values, masked and masked.bias, scale)
    else:
        new = slice(length, None)
        out, lse = attend(folded, keys[:, :, new], values[:, :, new], masked.bias, scale, masked.causal)
        if length:
            out = _merged(out, lse, *attend(folded, keys[:, :, :length], values[:, :, :length], None, scale))
    return out.reshape(1, heads, tokens, -1).transpose(1, 2)


def _merged(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> Tensor:
    """Merge attention over two sets of keys into attention over their union, by their log-sum-exps (online softmax)."""
    return torch.lerp(out, other, torch.sigmoid(other_lse - lse).unsqueeze(-1).to(out.dtype))
