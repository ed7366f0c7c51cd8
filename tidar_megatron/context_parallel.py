"""Which tokens a context-parallel rank holds: the one place that knows, for batches, attention and metrics alike.

The S clean positions are cut into 2 x CP chunks, and rank r holds chunks r and 2 x CP - 1 - r (zigzag): a late chunk
sees many keys and an early one few, so all ranks have the same attention work. The mask token of a position lives with
its clean token. S is a multiple of 2 x CP x B and documents start at block boundaries, so no block is ever cut: its
masks see each other on their own rank, and only clean keys and values travel, as in plain AR training. Where masks of
chosen blocks alone exist (``data/blocks.py``), M of them in the order of their blocks, each chunk has as many: M is a
multiple of 2 x CP x B as well, and the masks are cut as the positions are.

A rank's *keys* are all clean tokens, in the order in which an all-gather lays them (rank by rank), then its own masks;
its *queries* are its own clean tokens, one slice of those, then its own masks. The rule of who may attend to whom does
not care about the order of tokens, so the visibility metadata of the keys says everything about both.
"""

import torch
from torch import Tensor


def own_positions(seq_length: int, rank: int, size: int) -> Tensor:
    """The positions whose tokens ``rank`` holds: int64 ``[S / CP]``."""
    if size == 1:
        return torch.arange(seq_length)
    chunks = torch.arange(seq_length).reshape(2 * size, -1)
    return chunks[[rank, 2 * size - 1 - rank]].flatten()


def own_tokens(seq_length: int, rank: int, size: int, doubled: bool, mask_length: int | None = None) -> Tensor:
    """Which of the S or S + M tokens ``rank`` holds, and in which order: int64 ``[(S + M) / CP]``.

    M is ``mask_length``, by default S.
    """
    return torch.cat([own_positions(seq_length, rank, size), *_own_masks(seq_length, rank, size, doubled, mask_length)])


def key_tokens(seq_length: int, rank: int, size: int, doubled: bool, mask_length: int | None = None) -> Tensor:
    """Which of the S or S + M tokens are keys on ``rank``: all the clean ones, then its own masks: int64 ``[keys]``."""
    clean = [own_positions(seq_length, r, size) for r in range(size)]
    return torch.cat([*clean, *_own_masks(seq_length, rank, size, doubled, mask_length)])


def _own_masks(seq_length: int, rank: int, size: int, doubled: bool, mask_length: int | None) -> list[Tensor]:
    masks = seq_length if mask_length is None else mask_length
    return [own_positions(masks, rank, size) + seq_length] if doubled else []


def own_clean_tokens(queries: int, keys: int, size: int) -> int:
    """How many of a rank's queries are clean, from the two counts: ``keys - queries`` clean tokens are others'."""
    return queries if size == 1 else (keys - queries) // (size - 1)


def query_slices(queries: int, keys: int, rank: int, size: int) -> tuple[slice, ...]:
    """Where among the keys of :func:`key_tokens` the rank's queries stand."""
    if size == 1:
        return (slice(0, queries),)
    clean = own_clean_tokens(queries, keys, size)
    return slice(rank * clean, (rank + 1) * clean), slice(keys - (queries - clean), keys)
