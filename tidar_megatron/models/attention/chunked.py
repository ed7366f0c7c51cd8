"""The portable backend: the tiles of ``tiles.py`` one by one, merged through their log-sum-exps.

No mask is larger than a chunk, no keys or values are copied, and grouped-query attention folds the G query heads of a
K/V head into the rows of a tile (token by token, so that a slice of tokens stays a slice of rows), so K and V are never
expanded. Kept for the backward: q, k, v, the output and its log-sum-exp.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tidar_megatron.models.attention.kernels import HIDDEN, attend, attend_backward
from tidar_megatron.models.attention.tiles import Blocks, Tiling, make_tilings


class ChunkedPlan:
    """The tilings of a batch, and their masks on the device."""

    def __init__(self, visibility: Tensor, queries: tuple[slice, ...], chunk_size: int, device: str) -> None:
        self.tilings = make_tilings(visibility, queries, chunk_size)
        self._masks = [[mask.to(device, non_blocking=True) for mask in tiling.masks] for tiling in self.tilings]
        self._biases: dict[tuple, list[list[Tensor]]] = {}

    def biases(self, dtype: torch.dtype, heads_per_group: int) -> list[list[Tensor]]:
        """What the masks add to scores, ``[rows, 1, queries * G, keys]``; made once for all layers."""
        key = dtype, heads_per_group
        if key not in self._biases:
            self._biases[key] = [
                [_bias(mask.repeat_interleave(heads_per_group, dim=1), dtype) for mask in masks]
                for masks in self._masks
            ]
        return self._biases[key]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """As :func:`tidar_megatron.models.attention.hybrid_attention`."""
        groups = key.shape[1]
        biases = self.biases(query.dtype, query.shape[1] // groups)
        if len(self.tilings) == 1:  # rows alike, also where one row of metadata stands for the batch
            out = _Tiles.apply(query, key, value, self.tilings[0], biases[0], scale)
            assert isinstance(out, Tensor)
            return out
        parts = [
            _Tiles.apply(query[tiling.rows], key[tiling.rows], value[tiling.rows], tiling, bias, scale)
            for tiling, bias in zip(self.tilings, biases, strict=True)
        ]
        return torch.cat(parts)


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, HIDDEN).unsqueeze(1)


def _fold(heads: Tensor, groups: int) -> Tensor:
    """``[b, h, t, d]`` -> ``[b, g, t * G, d]``; without a copy where there is nothing to fold."""
    if heads.shape[1] == groups:
        return heads
    return heads.unflatten(1, (groups, -1)).transpose(2, 3).contiguous().flatten(2, 3)


def _unfold(rows: Tensor, heads: int) -> Tensor:
    """The way back; a copy laid out as ``[t, b, h, d]``, which is what the output projection reads."""
    groups = rows.shape[1]
    if heads == groups:
        return rows
    tokens_first = rows.unflatten(2, (-1, heads // groups)).permute(2, 0, 1, 3, 4).contiguous()  # [t, b, g, G, d]
    return tokens_first.flatten(2, 3).permute(1, 2, 0, 3)


def _squares(rows: Tensor, batch_row: int, start: int, blocks: Blocks, heads_per_group: int) -> Tensor:
    """``[b, g, rows(, d)]`` -> the blocks of one row of the batch, a view ``[count, g, size * G(, d)]``."""
    first, size = start * heads_per_group, blocks.size * heads_per_group
    part = rows[batch_row, :, first : first + size * blocks.count]
    return part.unflatten(1, (blocks.count, size)).transpose(0, 1)


class _Tiles(torch.autograd.Function):
    """Attention over the tiles of a tiling, whose rows are the whole batch given."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, tiling: Tiling, biases: list[Tensor], scale: float
    ) -> Tensor:
        b, heads, t, d = query.shape
        groups = key.shape[1]
        G = heads // groups
        query = _fold(query, groups)
        wide = torch.float32 if query.dtype in (torch.bfloat16, torch.float16) else query.dtype
        # laid out as the output projection reads it where nothing is folded
        out = (
            query.new_zeros(t, b, heads, d, dtype=wide).permute(1, 2, 0, 3)
            if G == 1
            else query.new_zeros(query.shape, dtype=wide)
        )
        lse = query.new_full((b, groups, t * G), -torch.inf, dtype=wide)
        for blocks in tiling.blocks:
            for row in range(b):
                q = _squares(query, row, blocks.queries, blocks, G)
                k, v = (_squares(tensor, row, blocks.keys, blocks, 1) for tensor in (key, value))
                part, part_lse = attend(q, k, v, None, scale)
                _squares(out, row, blocks.queries, blocks, G).copy_(part)
                _squares(lse, row, blocks.queries, blocks, G).copy_(part_lse)
        for tile in tiling.tiles:
            rows = slice(tile.queries.start * G, tile.queries.stop * G)
            bias = None if tile.mask is None else biases[tile.mask]
            part, part_lse = attend(query[:, :, rows], key[:, :, tile.keys], value[:, :, tile.keys], bias, scale)
            if tile.first:
                out[:, :, rows], lse[:, :, rows] = part, part_lse
            else:
                _merge(out[:, :, rows], lse[:, :, rows], part, part_lse)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.tiling, ctx.biases, ctx.scale, ctx.heads = tiling, biases, scale, heads
        return _unfold(out, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        groups = key.shape[1]
        G = ctx.heads // groups
        grad = _fold(grad, groups)
        # sums over many tiles, so in float32 at least
        d_query, d_key, d_value = (torch.zeros_like(tensor, dtype=lse.dtype) for tensor in (query, key, value))
        for blocks in ctx.tiling.blocks:
            for row in range(len(query)):
                g, q, o, z = (_squares(x, row, blocks.queries, blocks, G) for x in (grad, query, out, lse))
                k, v = (_squares(x, row, blocks.keys, blocks, 1) for x in (key, value))
                dq, dk, dv = attend_backward(g, q, k, v, o, z, None, ctx.scale)
                _squares(d_query, row, blocks.queries, blocks, G).copy_(dq)
                _squares(d_key, row, blocks.keys, blocks, 1).copy_(dk)
                _squares(d_value, row, blocks.keys, blocks, 1).copy_(dv)
        for tile in ctx.tiling.tiles:
            rows = slice(tile.queries.start * G, tile.queries.stop * G)
            bias = None if tile.mask is None else ctx.biases[tile.mask]
            g, q, o, z = (x[:, :, rows] for x in (grad, query, out, lse))
            dq, dk, dv = attend_backward(g, q, key[:, :, tile.keys], value[:, :, tile.keys], o, z, bias, ctx.scale)
            if tile.first:
                d_query[:, :, rows] = dq
            else:
                d_query[:, :, rows] += dq
            d_key[:, :, tile.keys] += dk
            d_value[:, :, tile.keys] += dv
        d_query = _unfold(d_query.to(query.dtype), ctx.heads)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None, None


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add a tile's result to what its rows have, in place: softmax over both sets of keys."""
    share = torch.sigmoid(part_lse - lse)  # exp(part_lse) / (exp(part_lse) + exp(lse))
    torch.logaddexp(lse, part_lse, out=lse)
    out.lerp_(part.to(out.dtype), share.unsqueeze(-1))
