"""The work of the chunked attention backend for one sequence, counted from its tiles.

A masked key in an executed tile costs as much as a visible one, so the tiles, not the mask's area, are the work of a
GPU. The sequence is one document, the packed sequence with the most work. Causal tiles, which the backend uses only for
K/V heads that are not grouped, are left out: FlexAttention, the backend for a GPU, has none either.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import torch

from tidar_megatron.attention_mask import anywhere_layout, clean_tokens, training_layout
from tidar_megatron.context_parallel import key_tokens, own_tokens, query_slices
from tidar_megatron.data.blocks import strata
from tidar_megatron.models.attention.tiles import make_tilings

Queries = Literal["all", "clean", "masks"]  # clean tokens or masks alone are those of a pass of ``--train drafts``


@dataclass(frozen=True)
class Tiles:
    """Sums over the tiles of one sequence's queries on one context-parallel rank."""

    area: int  # queries x keys executed
    masks: int  # queries x keys of all distinct masks
    keys: int  # keys on the rank: under context parallelism all clean tokens and the rank's own mask tokens
    calls: int  # launches of an attention kernel


@functools.lru_cache
def tiles(
    seq_length: int,
    block_size: int,
    chunk_size: int,
    rank: int = 0,
    size: int = 1,
    chosen: int | None = None,
    anywhere: bool = False,
    which: Queries = "all",
) -> Tiles:
    """Count the tiles of a doubled sequence on context-parallel rank ``rank`` of ``size``.

    Args:
        seq_length: clean tokens of the sequence, S.
        block_size: tokens per block, B.
        chunk_size: tokens per chunk of the grid of tiles.
        rank: the context-parallel rank.
        size: the context-parallel size.
        chosen: the number of blocks with masks; by default all. The blocks (or starts) in the middle of their strata
            are taken; any other sample costs about as much.
        anywhere: whether blocks start anywhere.
        which: the queries; the keys of clean tokens are clean tokens then.
    """
    with torch.device("cpu"):
        document, index = torch.zeros(seq_length, dtype=torch.int64), torch.arange(seq_length)
        places = seq_length if anywhere else seq_length // block_size
        edges = torch.from_numpy(strata(places, chosen or seq_length // block_size))
        middle = (edges[:-1] + edges[1:] - 1) // 2
        if anywhere:
            of_masks = anywhere_layout(document[None], index[None], middle[None], block_size)[0]
        else:
            masks = (middle.unsqueeze(-1) * block_size + torch.arange(block_size)).flatten()
            of_masks = training_layout(document, index, block_size)[seq_length + masks]
        visibility = torch.cat([clean_tokens(document, index), of_masks])
        own = len(own_tokens(seq_length, rank, size, True, len(of_masks)))
        keys = visibility[key_tokens(seq_length, rank, size, True, len(of_masks))]
        own_masks = len(of_masks) // size
        if which == "clean":
            keys = keys[:seq_length]
            queries = query_slices(own - own_masks, seq_length, rank, size)
        elif which == "masks":
            queries = (slice(len(keys) - own_masks, len(keys)),)
        else:
            queries = query_slices(own, len(keys), rank, size)
        (tiling,) = make_tilings(keys[None], queries, chunk_size, causal=False)
    held = sum(mask.numel() for mask in tiling.masks)
    return Tiles(tiling.area, held, len(keys), len(tiling.steps))


@functools.lru_cache
def largest_tiles(
    seq_length: int,
    block_size: int,
    chunk_size: int,
    size: int,
    chosen: int | None = None,
    anywhere: bool = False,
    which: Queries = "all",
) -> Tiles:
    """Return :func:`tiles` of the first or the last rank, whichever has more work.

    Zigzag sharding balances the ranks, so these two suffice.
    """
    more = chosen, anywhere, which
    each = (tiles(seq_length, block_size, chunk_size, rank, size, *more) for rank in {0, size - 1})
    return max(each, key=lambda t: t.area)
