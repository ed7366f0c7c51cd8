"""The FlexAttention backend (CUDA): the rule is compiled into one kernel, which skips blocks that no query sees.

The BlockMask comes from the same cells as the chunked backend's tiles. Its plan is made on the host before the step, in
time that does not grow with the mask's area, and all layers share the BlockMask. The compiled kernel depends on shapes
alone: the metadata are its inputs, so other documents cause no recompilation. On a CPU flex_attention has a forward
only, enough to test the mask.
"""

from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class FlexPlan:
    """The tensors of one batch's BlockMask; what is made on the host, and copied to the device as a whole.

    Attributes:
        columns: the four columns of the queries' metadata, each int32 ``[b, t]``.
        key_columns: those of the keys, each int32 ``[b, k]``.
        partial: the kernel's blocks with visible and hidden pairs, as from :func:`_ordered`.
        full: its blocks with visible pairs only.
    """

    columns: tuple[Tensor, ...]
    key_columns: tuple[Tensor, ...]
    partial: tuple[Tensor, ...]
    full: tuple[Tensor, ...]

    @staticmethod
    def of(visibility: Tensor, queries: tuple[slice, ...]) -> "FlexPlan":
        """Return the plan of a batch, on the host.

        Args:
            visibility: metadata of the keys, int32 ``[b, k, 4]`` on the host.
            queries: which of the keys are the queries.
        """
        asking = torch.cat([visibility[:, part] for part in queries], dim=1)
        rows = [_blocks(a[None], v[None], queries) for a, v in zip(asking, visibility, strict=True)]
        some, every = (torch.from_numpy(np.stack(part)).unsqueeze(1) for part in zip(*rows, strict=True))
        columns, key_columns = (tuple(c.contiguous() for c in part.unbind(-1)) for part in (asking, visibility))
        return FlexPlan(columns, key_columns, _ordered(some & ~every), _ordered(every))

    def map(self, function: Callable[[Tensor], Tensor]) -> "FlexPlan":
        """Return the plan with ``function`` of each tensor: page-locked, or on a device."""
        return FlexPlan(*(tuple(map(function, part)) for part in vars(self).values()))

    def schedule(self) -> "FlexSchedule":
        """Return the schedule on the device of the tensors."""
        return FlexSchedule(self)


class FlexSchedule:
    """The schedule of one batch: its BlockMask."""

    def __init__(self, plan: FlexPlan) -> None:
        columns, key_columns = plan.columns, plan.key_columns

        def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return sees([column[b, q] for column in columns], [column[b, k] for column in key_columns])

        lengths = columns[0].shape[1], key_columns[0].shape[1]
        self.block_mask = BlockMask.from_kv_blocks(
            *plan.partial, *plan.full, BLOCK_SIZE=BLOCK, mask_mod=rule, seq_lengths=lengths
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


def _ordered(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the BlockMask form of bool ``[b, 1, rows, columns]``, as int32.

    The first tensor, ``[b, 1, rows]``, counts the wanted columns of each row; the second, ``[b, 1, rows, columns]``,
    lists all columns, the wanted ones first.
    """
    counts = wanted.sum(-1, dtype=torch.int32)
    order = wanted.int().argsort(dim=-1, descending=True, stable=True).int()
    return counts, order.contiguous()
