"""What the chunked attention backend executes for one sequence: its tiles, counted.

A masked key inside a tile that is executed costs as much as a visible one, so this, not the mask's area, is what a GPU
does. One document fills the window: the most work that a packed sequence can be. Without causal tiles, which the
backend takes where K/V heads are not grouped: FlexAttention, which a GPU takes, has none either.
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
    masks: int  # queries x keys of the different masks
    keys: int  # keys that the rank holds: under context parallelism all clean tokens and its own masks
    calls: int  # attention kernels


@functools.lru_cache
def tiles(
    seq_length: int, block_size: int, chunk_size: int, rank: int = 0, size: int = 1, chosen: int | None = None
) -> Tiles:
    """The tiles of a doubled sequence on context-parallel rank ``rank`` of ``size``.

    With masks of ``chosen`` blocks alone, of those in the middle of their strata; any other draw costs about as much.
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
    """Those of the rank with more work, of the first and the last; the zigzag leaves little between the ranks."""
    ends = {0, size - 1}
    return max((tiles(seq_length, block_size, chunk_size, rank, size, chosen) for rank in ends), key=lambda t: t.area)
