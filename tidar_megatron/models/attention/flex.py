"""The FlexAttention backend (CUDA): the rule is compiled into one kernel, which skips blocks that no query sees.

The BlockMask comes from the same cells as the chunked backend's tiles. It is built on the host, in time that does not
grow with the mask's area, and all layers share it. The compiled kernel depends on shapes alone: the metadata are its
inputs, so other documents cause no recompilation. On a CPU flex_attention has a forward only, enough to test the mask.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from tidar_megatron.attention_mask import sees
from tidar_megatron.models.attention.tiles import cells, own_blocks

BLOCK = 128  # queries, and keys, in one block of the kernel
VARIANTS = 64  # compiled variants of the kernel that a process may have


class FlexSchedule:
    """The schedule of one batch: its BlockMask."""

    def __init__(self, visibility: Tensor, queries: tuple[slice, ...], device: str) -> None:
        asking = torch.cat([visibility[:, part] for part in queries], dim=1)
        rows = [_blocks(a[None], v[None], queries) for a, v in zip(asking, visibility, strict=True)]
        some, every = (torch.from_numpy(np.stack(part)).unsqueeze(1) for part in zip(*rows, strict=True))
        columns = [part.contiguous().to(device, non_blocking=True) for part in asking.unbind(-1)]
        key_columns = [part.contiguous().to(device, non_blocking=True) for part in visibility.unbind(-1)]

        def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return sees([column[b, q] for column in columns], [column[b, k] for column in key_columns])

        partial, full = (_ordered(part, device) for part in (some & ~every, every))
        lengths = asking.shape[1], visibility.shape[1]
        self.block_mask = BlockMask.from_kv_blocks(
            *partial, *full, BLOCK_SIZE=BLOCK, mask_mod=rule, seq_lengths=lengths
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Compute :func:`tidar_megatron.models.attention.hybrid_attention` with FlexAttention."""
        grouped = query.shape[1] != key.shape[1]
        attention = compiled() if query.is_cuda else flex_attention
        out = attention(query, key, value, block_mask=self.block_mask, scale=scale, enable_gqa=grouped)
        assert isinstance(out, Tensor)
        return out


@cache
def compiled() -> Any:
    """Return the compiled kernel, which all layers and steps share.

    A run has one shape of sequences, and few variants of it: with and without masks and gradients, and smaller last
    micro-batches. By default torch runs the ninth variant uncompiled, with a warning at most, which would materialize
    all scores. The limit is raised, and passing it is an error (``fullgraph``).
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _blocks(
    asking: Tensor, visibility: Tensor, queries: tuple[slice, ...]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return, for one row, which blocks of the kernel hold a visible pair, and which hold visible pairs only."""
    q_edges, k_edges = ([*range(0, part.shape[1], BLOCK), part.shape[1]] for part in (asking, visibility))
    some, every = cells(asking, visibility, q_edges, k_edges)
    for q, k, size in own_blocks(visibility[0], queries):
        for start in range(0, q.stop - q.start, size):
            first, last = ([(part.start + start + at) // BLOCK for part in (q, k)] for at in (0, size - 1))
            some[first[0] : last[0] + 1, first[1] : last[1] + 1] = True
    every[:, -1] &= visibility.shape[1] % BLOCK == 0  # the last block reaches past the keys
    return some, every


def _ordered(wanted: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """Return the BlockMask form of bool ``[b, 1, rows, columns]``, as int32.

    The first tensor, ``[b, 1, rows]``, counts the wanted columns of each row; the second, ``[b, 1, rows, columns]``,
    lists all columns, the wanted ones first.
    """
    counts = wanted.sum(-1, dtype=torch.int32)
    order = wanted.int().argsort(dim=-1, descending=True, stable=True).int()
    return counts.to(device, non_blocking=True), order.contiguous().to(device, non_blocking=True)
