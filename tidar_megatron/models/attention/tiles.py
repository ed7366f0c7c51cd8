"""Which rectangles of queries x keys to compute: geometry only, on the host, from the metadata of a batch.

Queries and clean keys are laid on a grid of chunks. Each cell is empty, full (every query sees every key) or partial;
the rule is asked for the ends of stretches alone, which speak for all of their tokens. Empty cells cost nothing. Full
ones are joined into rectangles that need no mask, as large as they come: for a causal half these are the squares of a
binary tree, so that few rectangles are computed and few results merged. Partial ones (along the diagonal) have a mask
no larger than a chunk, and equal masks are kept once: a single document has two. Mask tokens see the masks of their
own block and no others: those pairs are a row of small squares, computed in one call.

      keys: clean
    +---+---+---+---+        # partial: a masked tile
    | # |   |   |   |        1 full, joined: an unmasked tile of 2 x 2 chunks
    | 2 | # |   |   |        2 full: unmasked tiles of one chunk
    | 1   1 | # |   |
    | 1   1 | 2 | # |        queries: clean tokens; those of masks look the same
    +---+---+---+---+
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tidar_megatron.attention_mask import is_clean, leaps, mask_blocks, may_attend, stretches

CALL = 128 * 128  # what a tile costs beyond its pairs of query and key, in pairs: a call, and merging its result


@dataclass(frozen=True)
class Tile:
    """One rectangle."""

    queries: slice
    keys: slice
    mask: int | None  # number of its mask in the tiling; None: every query sees every key
    first: bool  # none of these queries is in an earlier tile, or in a block of masks


@dataclass(frozen=True)
class Blocks:
    """Equal blocks of mask tokens, side by side: ``count`` squares of ``size``."""

    queries: int  # where the first one stands among the queries
    keys: int  # and among the keys
    size: int
    count: int


@dataclass(frozen=True)
class Tiling:
    """What some rows of a batch compute."""

    rows: slice
    tiles: tuple[Tile, ...]
    blocks: tuple[Blocks, ...]
    masks: tuple[Tensor, ...]  # bool [rows, queries, keys], or [1, queries, keys] for all of them

    @property
    def area(self) -> int:
        """Pairs of query and key computed in each row."""
        tiles = sum(_length(tile.queries) * _length(tile.keys) for tile in self.tiles)
        return tiles + sum(blocks.size**2 * blocks.count for blocks in self.blocks)

    @property
    def cost(self) -> int:
        """Of all rows, in pairs."""
        return self.area * _length(self.rows) + CALL * len(self.tiles)


def _length(part: slice) -> int:
    return part.stop - part.start


def make_tilings(visibility: Tensor, queries: tuple[slice, ...], chunk_size: int) -> list[Tiling]:
    """Tile a batch: rows alike together, others together or apart, whichever costs less.

    Args:
        visibility: metadata of the keys, int32 ``[b, k, 4]`` on the host.
        queries: which of the keys are the queries, one after the other.
        chunk_size: tokens of a chunk.
    """
    apart, start = [], 0
    for row in range(1, len(visibility) + 1):
        if row == len(visibility) or not torch.equal(visibility[row], visibility[start]):
            apart.append(_tile(visibility[start : start + 1], slice(start, row), queries, chunk_size))
            start = row
    if len(apart) > 1 and all(tiling.blocks == apart[0].blocks for tiling in apart):
        together = _tile(visibility, slice(0, len(visibility)), queries, chunk_size)
        if together.cost <= sum(tiling.cost for tiling in apart):
            return [together]
    return apart


def _tile(visibility: Tensor, rows: slice, queries: tuple[slice, ...], chunk_size: int) -> Tiling:
    asking = torch.cat([visibility[:, part] for part in queries], dim=1)
    segments, q_edges = _grid(asking, chunk_size, np.cumsum([_length(part) for part in queries]).tolist())
    _, k_edges = _grid(visibility, chunk_size, [])
    some, every = cells(asking, visibility, q_edges, k_edges)
    blocks = _blocks(visibility[0], queries)
    covered = np.zeros(asking.shape[1], dtype=bool)
    for each in blocks:
        covered[each.queries : each.queries + each.size * each.count] = True
    tiles: list[Tile] = []
    masks: dict[bytes, tuple[int, Tensor]] = {}

    def add(first_row: int, last_row: int, columns: NDArray[np.bool_], masked: bool) -> None:
        q = slice(q_edges[first_row], q_edges[last_row])
        for begin, end in _runs(columns):
            k = slice(k_edges[begin], k_edges[end])
            mask = None
            if masked:
                seen = may_attend(asking[:, q], visibility[:, k])
                content = bytes(str(seen.shape), "ascii") + np.packbits(seen.numpy()).tobytes()
                mask, _ = masks.setdefault(content, (len(masks), seen))
            tiles.append(Tile(q, k, mask, first=not covered[q].any()))
            covered[q] = True

    for row in range(len(q_edges) - 1):
        add(row, row + 1, some[row] & ~every[row], masked=True)

    def join(first_row: int, last_row: int) -> None:
        """The columns that all these rows see in full; then each half of the rows for what is left."""
        common: NDArray[np.bool_] = np.logical_and.reduce(every[first_row:last_row], axis=0)
        add(first_row, last_row, common, masked=False)
        every[first_row:last_row, common] = False
        if last_row - first_row > 1:
            middle = (first_row + last_row) // 2
            join(first_row, middle)
            join(middle, last_row)

    for begin, end in pairwise(segments):
        join(q_edges.index(begin), q_edges.index(end))
    return Tiling(rows, tuple(tiles), blocks, tuple(mask for _, mask in masks.values()))


def _grid(visibility: Tensor, chunk_size: int, more: Sequence[int]) -> tuple[list[int], list[int]]:
    """Segments of tokens that belong together, and these cut into chunks; both as edges from 0 to t."""
    tokens = visibility.shape[1]
    kinds = is_clean(visibility)
    change = torch.zeros(tokens, dtype=torch.bool)
    change[1:] = (kinds[:, 1:] != kinds[:, :-1]).any(0)
    leap = leaps(visibility).any(0)
    if int(leap.sum()) <= tokens // chunk_size:  # pieces of a context-parallel rank: tiles should not straddle them
        change |= leap
    segments = sorted({0, tokens, *more, *change.nonzero().flatten().tolist()})
    pairs = pairwise(segments)
    return segments, [edge for begin, end in pairs for edge in range(begin, end, chunk_size)] + [tokens]


def cells(
    asking: Tensor, visibility: Tensor, q_edges: Sequence[int], k_edges: Sequence[int]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which cells of a grid have a pair that sees, and in which all do, over all rows and clean keys.

    Args:
        asking: metadata of the queries, ``[b, t, 4]``.
        visibility: metadata of the keys, ``[b, k, 4]``.
        q_edges, k_edges: of the grid, from 0 to t and to k.

    Returns:
        Two bool arrays ``[query cells, key cells]``. Cells that hold mask keys see none of them here.
    """
    shape = len(q_edges) - 1, len(k_edges) - 1
    some, every = np.zeros(shape, dtype=bool), np.ones(shape, dtype=bool)
    for q_row, k_row in zip(asking, visibility, strict=True):
        q, k = stretches(q_row, q_edges), stretches(k_row, k_edges)
        clean = is_clean(k_row[k[:-1]])
        any_pair = may_attend(q_row[q[1:] - 1], k_row[k[:-1]]) & clean
        all_pairs = may_attend(q_row[q[:-1]], k_row[k[1:] - 1]) & clean
        q_starts, k_starts = (np.searchsorted(s.numpy(), e[:-1]) for s, e in ((q, q_edges), (k, k_edges)))
        some |= np.logical_or.reduceat(np.logical_or.reduceat(any_pair.numpy(), q_starts, 0), k_starts, 1)
        every &= np.logical_and.reduceat(np.logical_and.reduceat(all_pairs.numpy(), q_starts, 0), k_starts, 1)
    return some, every


def _blocks(row: Tensor, queries: tuple[slice, ...]) -> tuple[Blocks, ...]:
    """The blocks of mask tokens among the queries, those of one size side by side together."""
    found: list[Blocks] = []
    place = 0
    blocks = mask_blocks(row).tolist()
    masks = 0
    for part in queries:
        for begin, end in blocks:
            if part.start <= begin and end <= part.stop:
                masks += end - begin
                size, q = end - begin, place + begin - part.start
                last = found[-1] if found else None
                if last and (last.size, last.queries + last.size * last.count, last.keys + last.size * last.count) == (
                    size,
                    q,
                    begin,
                ):
                    found[-1] = Blocks(last.queries, last.keys, size, last.count + 1)
                else:
                    found.append(Blocks(q, begin, size, 1))
        place += _length(part)
    assert masks == sum(int((~is_clean(row[part])).sum()) for part in queries), "queries cut a block of masks"
    return tuple(found)


def _runs(wanted: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """A bool vector -> the maximal runs of True, from and up to."""
    edges = np.flatnonzero(np.diff(wanted.astype(np.int8), prepend=0, append=0))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
