"""The transformer-engine backend (CUDA): its fused causal kernel for clean tokens, FlexAttention for mask tokens.

Attention among clean tokens is plain causal attention over packed documents, which fused kernels do best. Those tokens
are passed as one row (the "thd" format) with the places where documents begin. Mask tokens need the visibility rule,
so ``flex.py`` serves them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tidar_megatron.attention_mask import is_clean, stretches
from tidar_megatron.models.attention.flex import FlexPlan


def fits(visibility: Tensor, queries: tuple[slice, ...]) -> bool:
    """Return whether all tokens are queries and the clean ones come first: true except in context parallelism.

    Args:
        visibility: metadata of the keys, int32 ``[b, k, 4]`` on the host.
        queries: which of the keys are the queries.
    """
    clean = is_clean(visibility)
    return queries == (slice(0, visibility.shape[1]),) and bool((clean[:, 1:] <= clean[:, :-1]).all())


@dataclass(frozen=True)
class FusedCleanPlan:
    """The places where the documents of one batch begin, and the plan of its mask tokens.

    Attributes:
        clean: the number of clean tokens in a row.
        longest: the length of the longest document.
        edges: the places where documents begin in the batch as one row, and its end; int32.
        masks: the plan of the mask tokens; None if there are none.
    """

    clean: int
    longest: int
    edges: Tensor
    masks: FlexPlan | None

    @staticmethod
    def of(visibility: Tensor) -> "FusedCleanPlan":
        """Return the plan of a batch that :func:`fits`, on the host.

        Args:
            visibility: metadata of the keys, int32 ``[b, k, 4]`` on the host.
        """
        clean = int(is_clean(visibility)[0].sum())
        total = visibility.shape[1]
        starts = [stretches(row[:clean], [])[:-1] + n * clean for n, row in enumerate(visibility)]
        edges = torch.cat([*starts, torch.tensor([len(visibility) * clean])]).int()
        masks = FlexPlan.of(visibility, (slice(clean, total),)) if total > clean else None
        return FusedCleanPlan(clean, int(edges.diff().max()), edges, masks)

    def map(self, function: Callable[[Tensor], Tensor]) -> "FusedCleanPlan":
        """Return the plan with ``function`` of each tensor: page-locked, or on a device."""
        masks = None if self.masks is None else self.masks.map(function)
        return FusedCleanPlan(self.clean, self.longest, function(self.edges), masks)

    def schedule(self) -> "FusedCleanSchedule":
        """Return the schedule on the device of the tensors."""
        return FusedCleanSchedule(self)


class FusedCleanSchedule:
    """The schedule of one batch: where its documents begin, and the BlockMask of its mask tokens."""

    def __init__(self, plan: FusedCleanPlan) -> None:
        self.clean, self.longest, self.edges = plan.clean, plan.longest, plan.edges
        self.masks = None if plan.masks is None else plan.masks.schedule()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Compute :func:`tidar_megatron.models.attention.hybrid_attention`: clean tokens fused, mask tokens in flex."""
        b, heads, _, d = query.shape
        rows = (x[:, :, : self.clean].transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [b * S, heads, d]
        fused = _fused(heads, key.shape[1], d, scale)
        clean = fused(
            *rows,
            cu_seqlens_q=self.edges,
            cu_seqlens_kv=self.edges,
            max_seqlen_q=self.longest,
            max_seqlen_kv=self.longest,
        )
        out = clean.reshape(b, self.clean, heads, d).transpose(1, 2)
        if self.masks is None:
            return out
        return torch.cat([out, self.masks.attend(query[:, :, self.clean :], key, value, scale)], dim=2)


@cache
def _fused(heads: int, groups: int, channels: int, scale: float) -> Any:
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        heads,
        channels,
        num_gqa_groups=groups,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal",
        softmax_scale=scale,
    )
