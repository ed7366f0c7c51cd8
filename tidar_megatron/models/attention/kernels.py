"""Attention of one tile, forward and backward, with the log-sum-exp that merges tiles.

The backward takes the *merged* output and log-sum-exp: then each tile gives its part of the true gradient. On a CPU
torch's flash kernel does both; elsewhere plain torch, which holds the scores of one tile.

Shapes: leading dimensions the same for all, r rows (queries x heads of a group), k keys, d channels.
"""

import torch
from torch import Tensor

HIDDEN = -1e30  # what a mask adds to a score. Not -inf: a row that sees nothing in a tile must stay a number

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def has_flash(device: torch.device) -> bool:
    """Whether torch's kernel serves this device."""
    return device.type == "cpu"


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """``query [n, g, r, d]``, ``key``/``value [n, g, k, d]``, ``bias [n or 1, 1, r, k]`` in the query's dtype.

    Returns:
        The output, as the query; the log-sum-exp ``[n, g, r]``, float32 or float64.
    """
    assert key.shape[1] == query.shape[1]  # the kernel takes less, and is wrong without a word
    assert bias is None or bias.dtype == query.dtype  # as above
    if has_flash(query.device):
        return _forward(query, key, value, 0.0, False, attn_mask=bias, scale=scale)
    scores = _scores(query, key, bias, scale)
    lse = scores.logsumexp(-1)
    return (scores - lse.unsqueeze(-1)).exp_().to(value.dtype) @ value, lse


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """This tile's part of the gradients of query, key and value, from the merged ``out`` and ``lse``."""
    if has_flash(query.device):
        return _backward(grad, query, key, value, out, lse, 0.0, False, attn_mask=bias, scale=scale)
    weights = (_scores(query, key, bias, scale) - lse.unsqueeze(-1)).exp_()
    into_value = weights.to(grad.dtype).transpose(-1, -2) @ grad
    along = (grad.to(weights.dtype) * out).sum(-1, keepdim=True)
    into_scores = weights.mul_((grad @ value.transpose(-1, -2)) - along).mul_(scale).to(query.dtype)
    return into_scores @ key, into_scores.transpose(-1, -2) @ query, into_value


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = query @ key.transpose(-1, -2)
    scores = scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores
    scores = scores.mul_(scale)
    return scores if bias is None else scores.add_(bias)
