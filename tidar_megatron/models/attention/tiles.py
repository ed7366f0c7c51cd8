"""The tiles of attention: which rectangles of queries x keys to compute, from the metadata of a batch, on the host.

The clean tokens of a document see each other causally: one causal call, if documents are long and the kernel supports
it. Mask tokens see the mask tokens of their own block and no others: a row of small squares, in one call. Everything
else lies on a grid of chunks. Each of its cells is empty, full (every query sees every key) or partial. The rule is
evaluated at the ends of stretches only, which decide for all of their tokens. Empty cells cost nothing. Full cells are
joined into rectangles as large as possible, which need no mask: below a diagonal these are the squares of a binary
tree, so few rectangles are computed and few results merged. Partial cells have a mask no larger than a chunk, and
equal masks are stored once.

    +---+---+---+---+
    | # |   |   |   |        # partial: a masked tile
    | 2 | # |   |   |        1 full, joined: an unmasked tile of 2 x 2 chunks
    | 1   1 | # |   |        2 full: unmasked tiles of one chunk
    | 1   1 | 2 | # |
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

CALL = 128 * 128  # the fixed cost of a call (overhead and merging its result), in pairs of query and key


@dataclass(frozen=True)
class Tile:
    """One rectangle of queries x keys."""

    queries: slice
    keys: slice
    mask: int | None  # the index of its mask in the tiling; None: every query sees every key
    causal: bool  # there are as many keys as queries, and query n sees the keys up to n
    first_queries: bool  # none of these queries is in an earlier step
    first_keys: bool  # none of these keys is in an earlier step

    @property
    def area(self) -> int:
        """The number of pairs of query and key computed."""
        n = _length(self.queries)
        return n * (n + 1) // 2 if self.causal else n * _length(self.keys)


@dataclass(frozen=True)
class Squares:
    """Equal unmasked squares along a diagonal, each of ``size`` queries and ``size`` keys, computed in one call."""

    queries: slice  # the queries of all squares
    keys: slice  # the keys of all squares
    size: int
    first_queries: bool
    first_keys: bool

    @property
    def area(self) -> int:
        """The number of pairs of query and key computed."""
        return _length(self.queries) * self.size


@dataclass(frozen=True)
class Tiling:
    """The steps that some rows of a batch compute."""

    rows: slice
    steps: tuple[Tile | Squares, ...]
    masks: tuple[Tensor, ...]  # bool [rows, queries, keys], or [1, queries, keys] for all rows
    gapless: bool  # each step's queries are all new or all covered before, so are its keys; in the end all are covered

    @property
    def area(self) -> int:
        """The number of pairs of query and key computed in each row."""
        return sum(step.area for step in self.steps)

    @property
    def cost(self) -> int:
        """The estimated cost of all rows, in pairs of query and key."""
        return self.area * _length(self.rows) + CALL * len(self.steps)


def _length(part: slice) -> int:
    return part.stop - part.start


def make_tilings(visibility: Tensor, queries: tuple[slice, ...], chunk_size: int, causal: bool = True) -> list[Tiling]:
    """Tile a batch: consecutive equal rows share a tiling; different rows share one only if that costs less.

    Args:
        visibility: metadata of the keys, int32 ``[b, k, 4]`` on the host.
        queries: which of the keys are the queries, in the order of the queries.
        chunk_size: tokens per chunk.
        causal: whether the kernel supports causal tiles; masked tiles replace them otherwise.

    Returns:
        Tilings that cover the rows of the batch in order.
    """
    queries = tuple(part for part in queries if _length(part))
    pairs = pairwise(visibility)
    starts = [0, *(row for row, (one, next_one) in enumerate(pairs, 1) if not torch.equal(one, next_one))]
    squares = [own_blocks(visibility[start], queries) for start in starts]
    apart = [
        _tile(visibility[start : start + 1], slice(start, stop), queries, own, chunk_size, causal)
        for start, stop, own in zip(starts, [*starts[1:], len(visibility)], squares, strict=True)
    ]
    if len(apart) > 1 and all(own == squares[0] for own in squares):
        together = _tile(visibility, slice(0, len(visibility)), queries, squares[0], chunk_size, False)
        if together.cost <= sum(tiling.cost for tiling in apart):
            return [together]
    return apart


class _Steps:
    """A tiling under construction: its steps, its masks, and which queries and keys the steps cover so far."""

    def __init__(self, queries: int, keys: int) -> None:
        self.steps: list[Tile | Squares] = []
        self.gapless = True
        self._queries, self._keys = np.zeros(queries, dtype=bool), np.zeros(keys, dtype=bool)
        self._masks: dict[bytes, tuple[int, Tensor]] = {}

    def tile(self, queries: slice, keys: slice, mask: int | None = None, causal: bool = False) -> None:
        new = self._new(self._queries, queries), self._new(self._keys, keys)
        self.steps.append(Tile(queries, keys, mask, causal, *new))

    def squares(self, queries: slice, keys: slice, size: int) -> None:
        new = self._new(self._queries, queries), self._new(self._keys, keys)
        self.steps.append(Squares(queries, keys, size, *new))

    def mask(self, seen: Tensor) -> int:
        """Return the index of a mask, bool ``[rows, queries, keys]``; equal masks have one index."""
        content = bytes(str(seen.shape), "ascii") + np.packbits(seen.numpy()).tobytes()
        return self._masks.setdefault(content, (len(self._masks), seen))[0]

    def tiling(self, rows: slice) -> Tiling:
        gapless = self.gapless and bool(self._queries.all() and self._keys.all())
        return Tiling(rows, tuple(self.steps), tuple(mask for _, mask in self._masks.values()), gapless)

    def _new(self, known: NDArray[np.bool_], part: slice) -> bool:
        new = not known[part].any()
        self.gapless &= new or bool(known[part].all())
        known[part] = True
        return new


def _tile(
    visibility: Tensor,
    rows: slice,
    queries: tuple[slice, ...],
    squares: list[tuple[slice, slice, int]],
    chunk_size: int,
    causal: bool,
) -> Tiling:
    asking = torch.cat([visibility[:, part] for part in queries], dim=1)
    steps = _Steps(asking.shape[1], visibility.shape[1])
    for q, k, size in squares:
        steps.squares(q, k, size)
    diagonals = _diagonals(visibility[0], queries, chunk_size) if causal else []
    inner = np.cumsum([_length(part) for part in queries]).tolist()
    q_ends, k_ends = ([edge for parts in diagonals for edge in (parts[n].start, parts[n].stop)] for n in (0, 1))
    segments, q_edges = _grid(asking, chunk_size, [*inner, *q_ends])
    _, k_edges = _grid(visibility, chunk_size, k_ends)
    some, every = cells(asking, visibility, q_edges, k_edges)
    for q, k in diagonals:
        steps.tile(q, k, causal=True)
        done = slice(*np.searchsorted(q_edges, (q.start, q.stop))), slice(*np.searchsorted(k_edges, (k.start, k.stop)))
        some[done] = every[done] = False
    for row, q in enumerate(map(slice, q_edges, q_edges[1:])):
        for begin, end in _runs(some[row] & ~every[row]):
            k = slice(k_edges[begin], k_edges[end])
            steps.tile(q, k, steps.mask(may_attend(asking[:, q], visibility[:, k])))

    def join(first_row: int, last_row: int) -> None:
        """Add tiles for the columns that all these rows see in full, then do the same for each half of the rows."""
        common: NDArray[np.bool_] = np.logical_and.reduce(every[first_row:last_row], axis=0)
        for begin, end in _runs(common):
            steps.tile(slice(q_edges[first_row], q_edges[last_row]), slice(k_edges[begin], k_edges[end]))
        every[first_row:last_row, common] = False
        if last_row - first_row > 1:
            middle = (first_row + last_row) // 2
            join(first_row, middle)
            join(middle, last_row)

    for first, last in pairwise(segments):
        join(q_edges.index(first), q_edges.index(last))
    return steps.tiling(rows)


def _diagonals(row: Tensor, queries: tuple[slice, ...], chunk_size: int) -> list[tuple[slice, slice]]:
    """Return the clean tokens of each document that are queries, as a slice of the queries and a slice of the keys.

    The list is empty if the documents are shorter than a chunk on average.
    """
    found, place = [], 0
    for part in queries:
        edges = stretches(row[part], []).tolist()
        for begin, end in pairwise(edges):
            if is_clean(row[part.start + begin]):
                found.append((slice(place + begin, place + end), slice(part.start + begin, part.start + end)))
        place += _length(part)
    return found if len(found) * chunk_size <= sum(_length(q) for q, _ in found) else []


def _grid(visibility: Tensor, chunk_size: int, more: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the segments of tokens that belong together, and their chunks, both as edges from 0 to t."""
    tokens = visibility.shape[1]
    kinds = is_clean(visibility)
    change = torch.zeros(tokens, dtype=torch.bool)
    change[1:] = (kinds[:, 1:] != kinds[:, :-1]).any(0)
    leap = leaps(visibility).any(0)
    if int(leap.sum()) <= tokens // chunk_size:  # tiles should not straddle the pieces of a context-parallel rank
        change |= leap
    segments = sorted({0, tokens, *more, *change.nonzero().flatten().tolist()})
    pairs = pairwise(segments)
    return segments, [edge for begin, end in pairs for edge in range(begin, end, chunk_size)] + [tokens]


def cells(
    asking: Tensor, visibility: Tensor, q_edges: Sequence[int], k_edges: Sequence[int]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Find the cells of a grid with a visible pair in any row, and those where all pairs are visible in every row.

    Only clean keys count as visible: the squares of :func:`own_blocks` serve the mask keys.

    Args:
        asking: metadata of the queries, int32 ``[b, t, 4]``.
        visibility: metadata of the keys, int32 ``[b, k, 4]``.
        q_edges, k_edges: the edges of the grid, from 0 to t and from 0 to k.

    Returns:
        Two bool arrays ``[query cells, key cells]``: the cells with some, and with only, visible pairs.
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


def own_blocks(row: Tensor, queries: tuple[slice, ...]) -> list[tuple[slice, slice, int]]:
    """Return the blocks of mask tokens among the queries as (queries, keys, size); adjacent equal sizes are joined.

    Args:
        row: metadata of one row's keys, int32 ``[k, 4]``.
        queries: which of the keys are the queries; a block must lie in one of these parts.
    """
    found: list[tuple[slice, slice, int]] = []
    blocks, place, masks = mask_blocks(row).tolist(), 0, 0
    for part in queries:
        for begin, end in blocks:
            if part.start <= begin and end <= part.stop:
                size, q = end - begin, place + begin - part.start
                masks += size
                if found and (found[-1][0].stop, found[-1][1].stop, found[-1][2]) == (q, begin, size):
                    start_q, start_k = found[-1][0].start, found[-1][1].start
                    found[-1] = slice(start_q, q + size), slice(start_k, end), size
                else:
                    found.append((slice(q, q + size), slice(begin, end), size))
        place += _length(part)
    assert masks == sum(int((~is_clean(row[part])).sum()) for part in queries), "queries cut a block of masks"
    return found


def _runs(wanted: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the maximal runs of True in a bool vector, as (start, stop)."""
    edges = np.flatnonzero(np.diff(wanted.astype(np.int8), prepend=0, append=0))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
