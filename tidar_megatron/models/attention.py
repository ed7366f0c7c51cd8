"""One call for attention. Which backend serves it is nobody else's business.

Every backend derives from the predicate of :mod:`tidar_megatron.attention_mask`; none knows the layout of the doubled
sequence. ``dense`` materialises the whole mask and is the reference. ``chunked`` walks over chunks of queries, asks the
predicate which keys a chunk can see at all, and attends to those alone, so its cost follows the mask's area: for the
doubled sequence a clean chunk skips what lies after it and the whole mask half, a mask chunk skips all masks but its
own and the clean tokens after it.

Shapes: b batch, h query heads, g K/V heads (GQA: never expanded), t queries, k keys, d channels of a head.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar_megatron.attention_mask import may_attend


def hybrid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Tensor,
    *,
    queries: tuple[slice, ...] | None = None,
    backend: str,
    chunk_size: int,
    scale: float,
) -> Tensor:
    """Softmax attention under the rule.

    Args:
        query: ``[b, h, t, d]``.
        key, value: ``[b, g, k, d]``; h is a multiple of g.
        visibility: metadata of the keys, int32 ``[b, k, 4]``, or ``[1, k, 4]`` shared by the batch.
        queries: which of the keys are the queries (context parallelism); default: all of them.
        backend: ``dense`` or ``chunked``.
        chunk_size: queries per chunk (``chunked``).
        scale: factor on the scores.

    Returns:
        ``[b, h, t, d]``.
    """
    queries = queries or (slice(0, query.shape[2]),)
    if backend == "dense":
        mask = may_attend(_rows(visibility, queries), visibility).unsqueeze(1)
        return _attend(query, key, value, mask, scale)
    return _chunked(query, key, value, _plans(visibility, queries, chunk_size, query.dtype), scale)


def _rows(visibility: Tensor, queries: tuple[slice, ...]) -> Tensor:
    rows = [visibility[:, part] for part in queries]
    return torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)


@dataclass(frozen=True)
class ChunkPlan:
    """What one chunk of queries attends to."""

    queries: slice
    keys: tuple[slice, ...]  # disjoint ranges of keys that some query of the chunk sees
    bias: Tensor | None  # [b, 1, queries, keys], 0 or -inf in the query's dtype; None where all is visible


def _chunked(query: Tensor, key: Tensor, value: Tensor, plans: list[ChunkPlan], scale: float) -> Tensor:
    outputs = []
    for plan in plans:
        keys, values = (
            torch.cat([tensor[:, :, s] for s in plan.keys], dim=2) if len(plan.keys) > 1 else tensor[:, :, plan.keys[0]]
            for tensor in (key, value)
        )
        outputs.append(_attend(query[:, :, plan.queries], keys, values, plan.bias, scale))
    return torch.cat(outputs, dim=2)


def make_plans(
    visibility: Tensor, chunk_size: int, dtype: torch.dtype, queries: tuple[slice, ...] | None = None
) -> list[ChunkPlan]:
    """Ask the predicate, chunk of queries by chunk of queries, so that no [t, k] mask ever exists."""
    plans = []
    rows = _rows(visibility, queries) if queries else visibility
    tokens = rows.shape[1]
    for start in range(0, tokens, chunk_size):
        chunk = slice(start, min(start + chunk_size, tokens))
        mask = may_attend(rows[:, chunk], visibility)  # [b, queries, k]
        keys = _ranges(mask.flatten(0, 1).any(0))
        seen = torch.cat([mask[:, :, s] for s in keys], dim=-1).unsqueeze(1)
        bias = None if bool(seen.all()) else torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        plans.append(ChunkPlan(chunk, keys, None if bias is None else bias.masked_fill_(~seen, float("-inf"))))
    return plans


def _ranges(wanted: Tensor) -> tuple[slice, ...]:
    """A bool vector -> the maximal runs of True as slices."""
    edges = torch.diff(wanted.int(), prepend=wanted.new_zeros(1).int(), append=wanted.new_zeros(1).int())
    starts, stops = (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()
    return tuple(slice(start, stop) for start, stop in zip(starts, stops, strict=True))


# Plans are made once per batch and shared by all layers, also when a layer is recomputed from a detached view.
# A kept tensor cannot be freed, so its address names its contents as long as it stands here.
_RECENT_PLANS: OrderedDict[tuple, tuple[Tensor, list[ChunkPlan]]] = OrderedDict()
_KEPT_PLANS = 2


def _plans(visibility: Tensor, queries: tuple[slice, ...], chunk_size: int, dtype: torch.dtype) -> list[ChunkPlan]:
    contents = (visibility.device, visibility.data_ptr(), visibility._version, visibility.shape, visibility.stride())
    key = (*contents, *((rows.start, rows.stop) for rows in queries), chunk_size, dtype)
    if key not in _RECENT_PLANS:
        _RECENT_PLANS[key] = (visibility, make_plans(visibility, chunk_size, dtype, queries))
        if len(_RECENT_PLANS) > _KEPT_PLANS:
            _RECENT_PLANS.popitem(last=False)
    return _RECENT_PLANS[key][1]
