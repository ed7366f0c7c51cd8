"""The work of the chunked attention backend for one sequence, counted from its tiles.

A masked key in an executed tile costs as much as a visible one, so the tiles, not the mask's area, are the work of a
GPU. The sequence is one document, the packed sequence with the most work. Causal tiles, which the backend uses only for
K/V heads that are not grouped, are left out: FlexAttention, the backend for a GPU, has none either.
"""

import functools
from dataclasses import dataclass

import torch

from tidar_megatron.attention_mask import training_layout
from tidar_megatron.context_parallel import key_tokens, own_tokens, query_slices
from tidar_megatron.data.blocks import strata
from tidar_megatron.models.attention.tiles import make_tilings


@dataclass(frozen=True)
class Tiles:
    """Sums over the tiles of one sequence's queries on one context-parallel rank."""

    area: int  # queries x keys executed
    masks: int  # queries x keys of all distinct masks
    keys: int  # keys on the rank: under context parallelism all clean tokens and the rank's own mask tokens
    calls: int  # launches of an attention kernel


@functools.lru_cache
def tiles(
    seq_length: int, block_size: int, chunk_size: int, rank: int = 0, size: int = 1, chosen: int | None = None
) -> Tiles:
    """Count the tiles of a doubled sequence on context-parallel rank ``rank`` of ``size``.

    Args:
        seq_length: clean tokens of the sequence, S.
        block_size: tokens per block, B.
        chunk_size: tokens per chunk of the grid of tiles.
        rank: the context-parallel rank.
        size: the context-parallel size.
        chosen: the number of blocks with masks; by default all. The blocks in the middle of their strata are taken;
            any other sample costs about as much.
    """
    with torch.device("cpu"):
        visibility = training_layout(torch.zeros(seq_length, dtype=torch.int64), torch.arange(seq_length), block_size)
        edges = torch.from_numpy(strata(seq_length // block_size, chosen or seq_length // block_size))
        blocks = (edges[:-1] + edges[1:] - 1) // 2
        masks = (blocks.unsqueeze(-1) * block_size + torch.arange(block_size)).flatten()
        visibility = torch.cat([visibility[:seq_length], visibility[seq_length + masks]])
        own = own_tokens(seq_length, rank, size, True, len(masks))
        keys = visibility[key_tokens(seq_length, rank, size, True, len(masks))]
        queries = query_slices(len(own), len(keys), rank, size)
        (tiling,) = make_tilings(keys[None], queries, chunk_size, causal=False)
    held = sum(mask.numel() for mask in tiling.masks)
    return Tiles(tiling.area, held, len(keys), len(tiling.steps))


@functools.lru_cache
def largest_tiles(seq_length: int, block_size: int, chunk_size: int, size: int, chosen: int | None = None) -> Tiles:
    """Return :func:`tiles` of the first or the last rank, whichever has more work.

    Zigzag sharding balances the ranks, so these two suffice.
    """
    ends = {0, size - 1}
    return max((tiles(seq_length, block_size, chunk_size, rank, size, chosen) for rank in ends), key=lambda t: t.area)
