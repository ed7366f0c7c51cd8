"""The portable backend: computes the tiles of ``tiles.py`` one by one and merges them with an online softmax.

Each tile returns its output and its log-sum-exp, which is all that a merge needs. No mask is larger than a chunk, and
no keys or values are copied. Grouped-query attention folds the G query heads of a K/V head into the rows of a tile
(token by token, so that a slice of tokens stays a slice of rows), so K and V are never expanded. The backward keeps
q, k, v, the output and its log-sum-exp.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tidar_megatron import attention_kernels as kernels
from tidar_megatron.attention_kernels import HIDDEN, attend, attend_backward
from tidar_megatron.models.attention.tiles import Squares, Tiling, make_tilings


class ChunkedSchedule:
    """The schedule of one batch: its tilings, and their masks on the device."""

    def __init__(self, visibility: Tensor, queries: tuple[slice, ...], chunk_size: int, device: str) -> None:
        self._make = partial(make_tilings, visibility, queries, chunk_size)
        self._device = torch.device(device)
        self._made: dict[tuple, list[tuple[Tiling, list[Tensor]]]] = {}

    def tilings(self, dtype: torch.dtype, heads_per_group: int) -> list[tuple[Tiling, list[Tensor]]]:
        """Return each tiling with the biases that its masks add to the scores, ``[rows, 1, queries * G, keys]``.

        The result is cached by ``dtype`` and ``heads_per_group`` (G). Causal tiles are used only for G = 1, where they
        are the fastest: folded heads would have to be unfolded for them.
        """
        key = dtype, heads_per_group
        if key not in self._made:
            tilings = self._make(causal=heads_per_group == 1 and kernels.has_flash(self._device))
            self._made[key] = [
                (tiling, [self._bias(mask, dtype, heads_per_group) for mask in tiling.masks]) for tiling in tilings
            ]
        return self._made[key]

    def _bias(self, mask: Tensor, dtype: torch.dtype, heads_per_group: int) -> Tensor:
        hidden = ~mask.to(self._device, non_blocking=True).repeat_interleave(heads_per_group, dim=1).unsqueeze(1)
        return torch.zeros(hidden.shape, dtype=dtype, device=self._device).masked_fill_(hidden, HIDDEN)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Compute :func:`tidar_megatron.models.attention.hybrid_attention` tile by tile."""
        tilings = self.tilings(query.dtype, query.shape[1] // key.shape[1])
        if len(tilings) == 1:
            out = _Tiles.apply(query, key, value, *tilings[0], scale)
            assert isinstance(out, Tensor)
            return out
        parts = [
            _Tiles.apply(query[tiling.rows], key[tiling.rows], value[tiling.rows], tiling, biases, scale)
            for tiling, biases in tilings
        ]
        return torch.cat(parts)


def _fold(heads: Tensor, groups: int) -> Tensor:
    """Fold ``[b, h, t, d]`` into ``[b, g, t * G, d]``, without a copy for G = 1."""
    if heads.shape[1] == groups:
        return heads
    return heads.unflatten(1, (groups, -1)).transpose(2, 3).contiguous().flatten(2, 3)


def _unfold(rows: Tensor, heads: int) -> Tensor:
    """Undo :func:`_fold`; for G > 1 a copy in the memory order ``[t, b, h, d]``, which the output projection reads."""
    groups = rows.shape[1]
    if heads == groups:
        return rows
    tokens_first = rows.unflatten(2, (-1, heads // groups)).permute(2, 0, 1, 3, 4).contiguous()  # [t, b, g, G, d]
    return tokens_first.flatten(2, 3).permute(1, 2, 0, 3)


class _Tiles(torch.autograd.Function):
    """Attention over the steps of one tiling, which covers all rows of its inputs."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, tiling: Tiling, biases: list[Tensor], scale: float
    ) -> Tensor:
        b, heads, t, d = query.shape
        groups = key.shape[1]
        G = heads // groups
        query = _fold(query, groups)
        wide = torch.float32 if query.dtype in (torch.bfloat16, torch.float16) else query.dtype
        # for G = 1, in the memory order that the output projection reads
        shape, order = ((t, b, heads, d), (1, 2, 0, 3)) if G == 1 else (query.shape, (0, 1, 2, 3))
        out = query.new_empty(shape, dtype=wide).permute(order)
        lse = query.new_empty((b, groups, t * G), dtype=wide)
        if not tiling.gapless:
            out.zero_()
            lse.fill_(-torch.inf)
        for call in _calls(tiling, b, G):
            bias = None if call.mask is None else biases[call.mask]
            k, v = call.keys(key), call.keys(value)
            part, part_lse = attend(call.queries(query), k, v, bias, scale, call.causal)
            if call.first_queries:
                call.queries(out).copy_(part)
                call.queries(lse).copy_(part_lse)
            else:
                _merge(call.queries(out), call.queries(lse), part, part_lse)
            del part  # frees its memory before the next part is allocated
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.tiling, ctx.biases, ctx.scale, ctx.heads = tiling, biases, scale, heads
        return _unfold(out, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        groups = key.shape[1]
        grad = _fold(grad, groups)
        # gradients are summed over many tiles, so they are accumulated in float32 or wider
        empty = torch.empty_like if ctx.tiling.gapless else torch.zeros_like
        d_query, d_key, d_value = (empty(tensor, dtype=lse.dtype) for tensor in (query, key, value))
        for call in _calls(ctx.tiling, len(query), ctx.heads // groups):
            bias = None if call.mask is None else ctx.biases[call.mask]
            g, q, o, z = (call.queries(tensor) for tensor in (grad, query, out, lse))
            k, v = call.keys(key), call.keys(value)
            dq, dk, dv = attend_backward(g, q, k, v, o, z, bias, ctx.scale, call.causal)
            _add(call.queries(d_query), dq, call.first_queries)
            _add(call.keys(d_key), dk, call.first_keys)
            _add(call.keys(d_value), dv, call.first_keys)
            del dq, dk, dv  # frees their memory before the next ones are allocated
        d_query = _unfold(d_query.to(query.dtype), ctx.heads)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None, None


class _Call(NamedTuple):
    """One call of the kernel: functions that view its part of ``[b, g, rows or keys(, d)]``, and its step's flags."""

    queries: Callable[[Tensor], Tensor]
    keys: Callable[[Tensor], Tensor]
    mask: int | None
    causal: bool
    first_queries: bool
    first_keys: bool


def _calls(tiling: Tiling, batch_rows: int, heads_per_group: int) -> Iterator[_Call]:
    """Yield the kernel calls of a tiling: one for each tile, and one for each batch row of each set of squares."""
    G = heads_per_group
    for step in tiling.steps:
        start, stop = step.queries.start * G, step.queries.stop * G
        if isinstance(step, Squares):
            for row in range(batch_rows):
                queries = partial(_squares, row=row, part=slice(start, stop), size=step.size * G)
                keys = partial(_squares, row=row, part=step.keys, size=step.size)
                yield _Call(queries, keys, None, False, step.first_queries, step.first_keys)
        else:
            assert not step.causal or G == 1  # the kernel counts rows
            queries, keys = (partial(_part, part=part) for part in (slice(start, stop), step.keys))
            yield _Call(queries, keys, step.mask, step.causal, step.first_queries, step.first_keys)


def _part(tensor: Tensor, part: slice) -> Tensor:
    return tensor[:, :, part]


def _squares(tensor: Tensor, row: int, part: slice, size: int) -> Tensor:
    """Return a view of the squares in one row of the batch, ``[count, g, size(, d)]``."""
    return tensor[row, :, part].unflatten(1, (-1, size)).transpose(0, 1)


def _add(total: Tensor, part: Tensor, first: bool) -> None:
    if first:
        total.copy_(part)
    else:
        total.add_(part)


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge a tile's result into ``out`` and ``lse`` in place: the softmax is then over both sets of keys."""
    share = torch.sigmoid(part_lse - lse)  # exp(part_lse) / (exp(part_lse) + exp(lse))
    torch.logaddexp(lse, part_lse, out=lse)
    out.lerp_(part.to(out.dtype), share.unsqueeze(-1))
