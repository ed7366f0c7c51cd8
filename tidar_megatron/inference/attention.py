"""Attention of the decode step inside a Hugging Face model.

A :class:`Plan` names the tokens of one forward. Who of them may attend to whom is asked of the one place that knows
(:mod:`tidar_megatron.attention_mask`), once per plan: every token of a decode step sees the whole committed prefix,
so only the local T x T part needs a mask and it does not depend on the prefix length.

The mask travels as a 4-D ``attention_mask``, which transformers hands through untouched, and meets
:func:`folded_attention`, registered in transformers' attention interface: the query heads that share a K/V head are
folded into the query length, so grouped-query attention never expands K/V.

Shapes: T tokens in the forward, P committed before them, H query heads, N K/V heads, G = H / N, D head dimension.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tidar_megatron.attention_mask import INDEX, decode_layout, may_attend

ATTENTION_NAME = "tidar_folded"


@dataclass(frozen=True)
class Plan:
    """What one forward holds: ``num_drafts`` draft tokens, then a block of ``draft_length`` masks for each branch.

    Branch r is the pre-draft for the outcome "exactly r drafts accepted"; the tokens lie as
    :func:`~tidar_megatron.attention_mask.decode_layout` writes them. Without branches it is a plain causal forward.
    """

    num_drafts: int
    branches: tuple[int, ...] = ()
    draft_length: int = 0

    @property
    def num_masks(self) -> int:
        return len(self.branches) * self.draft_length

    def rows_after(self, accepted: int) -> slice:
        """The rows that draft what follows the next certain token when ``accepted`` drafts were accepted.

        They belong to the branch of that outcome or, where it has none, to the longest shorter branch: it saw fewer
        drafts, all of them accepted. Its rows up to the certain token's own are skipped: autoregression is trusted
        there. Empty when no branch is left.
        """
        usable = [r for r in self.branches if r <= accepted]
        if not usable:
            return slice(0, 0)
        branch = max(usable)
        start = self.num_drafts + self.branches.index(branch) * self.draft_length
        return slice(start + accepted - branch + 1, start + self.draft_length)


@lru_cache(maxsize=512)
def position_offsets(plan: Plan, device: torch.device) -> Tensor:
    """Position ids less P: int64 ``[1, T]``."""
    layout = decode_layout(0, plan.num_drafts, plan.branches, plan.draft_length)
    return layout[None, :, INDEX].long().to(device)


def local_mask(plan: Plan) -> Tensor:
    """The predicate among the tokens of the forward: bool ``[T, T]``, the same for every prefix length."""
    layout = decode_layout(0, plan.num_drafts, plan.branches, plan.draft_length)
    return may_attend(layout, layout)


def _folded_local_mask(plan: Plan, groups: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """:func:`local_mask` as an additive term (0 or -inf), once for each query head of a group: ``[1, 1, G * T, T]``."""
    hidden = ~local_mask(plan)
    additive = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
    return additive.repeat(groups, 1)[None, None].to(device)


_cached_folded_local_mask = lru_cache(maxsize=512)(_folded_local_mask)
MAX_CACHED_DRAFTS = 64  # a prompt is a plan of its own length, used once: keep those (large) masks out of the cache


def decode_mask(plan: Plan, prefix_length: int, groups: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """The mask :func:`folded_attention` takes: ``[1, 1, G * T, P + T]`` in ``dtype``, None when all is visible (T = 1).

    It carries the dtype of the queries because scaled_dot_product_attention takes any other and computes nonsense.
    """
    if plan.num_drafts == 1 and not plan.branches:
        return None
    build = _cached_folded_local_mask if plan.num_drafts <= MAX_CACHED_DRAFTS else _folded_local_mask
    return F.pad(build(plan, groups, dtype, device), (prefix_length, 0))  # the prefix: all visible


def folded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention for transformers' interface, batch 1 and without dropout.

    Args:
        query: ``[1, H, T, D]``.
        key, value: ``[1, N, P + T, D]``, any strides.
        attention_mask: of :func:`decode_mask`.
        scaling: of the scores; D ** -0.5 when None.

    Returns:
        ``[1, T, H, D]`` and no weights.
    """
    heads, tokens, head_dim = query.shape[1:]
    # transformers hands no mask at all to an attention it does not know: its own generate() would look ahead.
    assert attention_mask is not None or tokens == 1, "wrapped for decoding: set_attn_implementation('sdpa') to use it"
    assert attention_mask is None or attention_mask.dtype == query.dtype
    folded = query.reshape(1, key.shape[1], -1, head_dim)  # [1, N, G * T, D]: head n * G + g becomes rows g * T ...
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=attention_mask, scale=scaling)
    return out.view(1, heads, tokens, -1).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, folded_attention)
