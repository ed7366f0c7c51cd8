"""The assignment of tokens to context-parallel ranks, used by batches, attention and metrics.

The S clean positions are cut into 2 x CP chunks, and rank r holds chunks r and 2 x CP - 1 - r (zigzag). A late chunk
sees many keys and an early one few, so all ranks have the same attention work. The mask token of a position is on the
rank of its clean token. S is a multiple of 2 x CP x B and documents start at block boundaries, so no block is cut: the
masks of a block see each other on their own rank, and only clean keys and values are communicated, as in plain AR
training. If only chosen blocks have masks (``data/blocks.py``), there are M masks in the order of their blocks. M is
also a multiple of 2 x CP x B, so the masks are cut like the positions and each chunk has the same number of them.

A rank's *keys* are all clean tokens, in the order of an all-gather (rank by rank), then its own masks. Its *queries*
are its own clean tokens, one slice of the clean keys, then its own masks. Whether one token may attend to another does
not depend on the order of tokens, so the visibility metadata of the keys describes the queries too.
"""

import torch
from torch import Tensor


def own_positions(seq_length: int, rank: int, size: int) -> Tensor:
    """Return the positions whose tokens ``rank`` of ``size`` ranks holds: int64 ``[S / CP]``."""
    if size == 1:
        return torch.arange(seq_length)
    chunks = torch.arange(seq_length).reshape(2 * size, -1)
    return chunks[[rank, 2 * size - 1 - rank]].flatten()


def own_tokens(seq_length: int, rank: int, size: int, doubled: bool, mask_length: int | None = None) -> Tensor:
    """Return the indices of the tokens that ``rank`` holds, in its order: int64 ``[(S + M) / CP]``.

    Args:
        seq_length: S, the number of clean tokens.
        rank: The context-parallel rank.
        size: CP.
        doubled: Whether the sequence has masks; if not, M is 0.
        mask_length: M, the number of masks; by default S.
    """
    return torch.cat([own_positions(seq_length, rank, size), *_own_masks(seq_length, rank, size, doubled, mask_length)])


def key_tokens(seq_length: int, rank: int, size: int, doubled: bool, mask_length: int | None = None) -> Tensor:
    """Return the indices of the tokens that are keys on ``rank``: all clean tokens, then its own masks.

    The arguments are those of :func:`own_tokens`.

    Returns:
        int64 ``[S + M / CP]``.
    """
    clean = [own_positions(seq_length, r, size) for r in range(size)]
    return torch.cat([*clean, *_own_masks(seq_length, rank, size, doubled, mask_length)])


def _own_masks(seq_length: int, rank: int, size: int, doubled: bool, mask_length: int | None) -> list[Tensor]:
    masks = seq_length if mask_length is None else mask_length
    return [own_positions(masks, rank, size) + seq_length] if doubled else []


def own_clean_tokens(queries: int, keys: int, size: int) -> int:
    """Return how many of a rank's queries are clean tokens: ``keys - queries`` are clean tokens of the other ranks."""
    return queries if size == 1 else (keys - queries) // (size - 1)


def query_slices(queries: int, keys: int, rank: int, size: int) -> tuple[slice, ...]:
    """Return the slices of the keys (:func:`key_tokens`) that are the rank's queries."""
    if size == 1:
        return (slice(0, queries),)
    clean = own_clean_tokens(queries, keys, size)
    return slice(rank * clean, (rank + 1) * clean), slice(keys - (queries - clean), keys)
