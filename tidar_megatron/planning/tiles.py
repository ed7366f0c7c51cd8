"""What the chunked attention backend executes, from the geometry alone: sizes of tiles, no tensor of them.

A masked key inside a tile that is executed costs as much as a visible one, so this, not the mask's area, is what a GPU
does. The one rule of :mod:`tidar_megatron.attention_mask` is asked, as the backend asks it, but only for the first and
the last query of each block: in a chunk of consecutive tokens no other query sees a key that those do not, and none
misses a key that those all see. One document fills the window: the most work that a packed sequence can be.
"""

import functools
from dataclasses import dataclass

import torch

from tidar_megatron.attention_mask import may_attend, training_layout
from tidar_megatron.context_parallel import key_tokens, own_tokens


@dataclass(frozen=True)
class Tiles:
    """Sums over the chunks of one sequence's queries on one context-parallel rank."""

    area: int  # queries x keys executed
    copied_keys: int  # keys of chunks that see several ranges of them, whose K and V are therefore copied
    bias: int  # queries x keys of chunks that need a mask
    keys: int  # keys that the rank holds: under context parallelism all clean tokens and its own masks
    calls: int  # attention kernels


@functools.lru_cache
def tiles(seq_length: int, block_size: int, chunk_size: int, rank: int = 0, size: int = 1) -> Tiles:
    """The tiles of a doubled sequence of 2 * ``seq_length`` tokens on context-parallel rank ``rank`` of ``size``."""
    with torch.device("cpu"):
        visibility = training_layout(torch.zeros(seq_length, dtype=torch.int64), torch.arange(seq_length), block_size)
        own = own_tokens(seq_length, rank, size, doubled=True)
        keys = visibility[key_tokens(seq_length, rank, size, doubled=True)]
        area = copied = bias = calls = 0
        for chunk in own.split(chunk_size):
            block = chunk // block_size
            edge = torch.ones(len(chunk) + 1, dtype=torch.bool)
            edge[1:-1] = block[1:] != block[:-1]
            seen = may_attend(visibility[chunk[edge[:-1] | edge[1:]]], keys)
            some = seen.any(0)
            count = int(some.sum())
            ranges = int(torch.diff(some.int(), prepend=torch.zeros(1, dtype=torch.int32)).eq(1).sum())
            area += len(chunk) * count
            copied += count if ranges > 1 else 0
            bias += 0 if bool(seen[:, some].all()) else len(chunk) * count
            calls += 1
    return Tiles(area, copied, bias, len(keys), calls)


@functools.lru_cache
def largest_tiles(seq_length: int, block_size: int, chunk_size: int, size: int) -> Tiles:
    """Those of the rank with more work, of the first and the last; the zigzag leaves little between the ranks."""
    ends = {0, size - 1}
    return max((tiles(seq_length, block_size, chunk_size, rank, size) for rank in ends), key=lambda t: t.area)
