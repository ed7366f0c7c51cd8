"""Forward and backward of attention over one tile, with the log-sum-exp for merging tiles (online softmax).

The backward takes the *merged* output and log-sum-exp, so each tile yields its part of the true gradient. On a CPU,
torch's flash kernel computes both directions. On a GPU, torch's memory-efficient kernel computes the forward. Elsewhere
plain torch operations do, which materialize the scores of one tile in float32.

Shapes: n batch, g heads, r rows (queries x heads of a group), k keys, d channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

HIDDEN = -1e30  # the bias that masks a score; not -inf, which gives NaN for a row that sees nothing in a tile


def hiding(dtype: torch.dtype) -> float:
    """Return the bias that masks a score: :data:`HIDDEN`, or the lowest safe value if ``dtype`` cannot hold it."""
    return max(HIDDEN, torch.finfo(dtype).min / 4)


_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_efficient = torch.ops.aten._scaled_dot_product_efficient_attention
HALF = (torch.bfloat16, torch.float16)
FEW_KEYS = 64  # in half precision: the flash kernel's backward takes up to 16 times as long for so few keys


def has_flash(device: torch.device) -> bool:
    """Return whether torch's flash kernel for the CPU supports this device."""
    return device.type == "cpu"


def has_efficient(query: Tensor) -> bool:
    """Return whether torch's memory-efficient kernel for CUDA supports these queries."""
    return query.device.type == "cuda" and query.dtype != torch.float64 and query.shape[-1] % 8 == 0


def aligned(tokens: int) -> int:
    """Return the row length of a bias over ``tokens`` keys: the memory-efficient kernel needs rows of 16 numbers."""
    return -(-tokens // 16) * 16


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute attention over one tile, or over a batch of tiles.

    Args:
        query: ``[n, g, r, d]``.
        key: ``[n, g, k, d]``.
        value: ``[n, g, k, d]``.
        bias: The bias on the scores, ``[n or 1, 1, r, k]`` in the query's dtype; None for none.
        scale: The factor on the scores.
        causal: Whether row i sees only the keys up to i; supported only where :func:`has_flash` is True.

    Returns:
        The output, with the query's shape and dtype, and the log-sum-exp ``[n, g, r]``, float32 or float64.
    """
    assert key.shape[1] == query.shape[1]  # the kernel accepts fewer heads and silently computes wrong results
    assert bias is None or bias.dtype == query.dtype  # the same holds for another dtype
    if has_flash(query.device):
        return _forward(query, key, value, 0.0, causal, attn_mask=bias, scale=scale)
    assert not causal
    if has_efficient(query):
        if bias is not None:
            bias = _with_aligned_rows(bias).expand(*query.shape[:3], key.shape[2])
        out, lse, _, _ = _efficient(query, key, value, bias, True, scale=scale)
        return out, lse[..., : query.shape[2]]  # the kernel rounds the rows up
    q, k, v = (_flat(tensor) for tensor in (query, key, value))
    scores = _scores(q, k, bias, query.shape[:2], scale)
    lse = scores.logsumexp(-1)
    out = torch.bmm((scores - lse.unsqueeze(-1)).exp_().to(v.dtype), v)
    return out.view(query.shape), lse.view(query.shape[:3])


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    scale: float,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute this tile's part of the gradients of query, key and value.

    Args:
        grad: The gradient of the merged output, ``[n, g, r, d]``.
        query: ``[n, g, r, d]``.
        key: ``[n, g, k, d]``.
        value: ``[n, g, k, d]``.
        out: The merged output of all tiles, ``[n, g, r, d]``.
        lse: The merged log-sum-exp of all tiles, ``[n, g, r]``.
        bias: As for :func:`attend`.
        scale: As for :func:`attend`.
        causal: As for :func:`attend`.

    Returns:
        The gradients, with the shapes of query, key and value.
    """
    if has_flash(query.device) and (causal or query.dtype not in HALF or key.shape[2] > FEW_KEYS):
        heads = query.shape[1]
        parts = 1 if causal else _parts(*query.shape[:3])
        g, q, o, z = (_split(tensor, parts) for tensor in (grad, query, out, lse))
        bias = bias if bias is None or parts == 1 else _split(bias.expand(-1, heads, -1, -1), parts)
        k, v = (_shared(tensor, parts) for tensor in (key, value))
        dq, dk, dv = _backward(g, q, k, v, o, z, 0.0, causal, attn_mask=bias, scale=scale)
        if parts == 1:
            return dq, dk, dv
        return dq.reshape(query.shape), *(part.unflatten(1, (heads, parts)).sum(2) for part in (dk, dv))
    g, q, k, v = (_flat(tensor) for tensor in (grad, query, key, value))
    weights = (_scores(q, k, bias, query.shape[:2], scale) - lse.reshape(*q.shape[:2], 1)).exp_()
    into_value = torch.bmm(weights.to(g.dtype).transpose(1, 2), g)
    along = (grad * out).sum(-1, dtype=weights.dtype).reshape(*q.shape[:2], 1)
    into_scores = weights.mul_(_product(g, v.transpose(1, 2)) - along).mul_(scale).to(q.dtype)
    into_query, into_key = torch.bmm(into_scores, k), torch.bmm(into_scores.transpose(1, 2), q)
    return into_query.view(query.shape), into_key.view(key.shape), into_value.view(value.shape)


def _parts(batch: int, heads: int, rows: int) -> int:
    """Return into how many separate heads to split the rows, since the kernel's backward runs one thread per head.

    The parts share keys and values (as a view); each has its own gradients of them, which are summed afterwards.
    """
    parts = -(-torch.get_num_threads() // (batch * heads))
    while rows % parts:
        parts -= 1
    return parts


def _split(rows: Tensor, parts: int) -> Tensor:
    """Reshape ``[n, g, r, ...]`` to ``[n, g * parts, r / parts, ...]``."""
    return rows if parts == 1 else rows.unflatten(2, (parts, -1)).flatten(1, 2)


def _shared(keys: Tensor, parts: int) -> Tensor:
    """Repeat ``[n, g, k, d]`` to ``[n, g * parts, k, d]``; this is a view for one head, the case that matters."""
    return keys if parts == 1 else keys.unsqueeze(2).expand(-1, -1, parts, -1, -1).flatten(1, 2)


def _flat(tensor: Tensor) -> Tensor:
    """Reshape ``[n, g, ...]`` to ``[n * g, ...]``; torch.bmm would copy other layouts itself, and more slowly."""
    return tensor.reshape(-1, *tensor.shape[2:])


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, batch: torch.Size, scale: float) -> Tensor:
    scores = _product(query, key.transpose(1, 2)).mul_(scale)
    if bias is not None:
        scores.view(*batch, *scores.shape[1:]).add_(bias)
    return scores


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return the batched product, in float32 for half-precision factors: a softmax amplifies the rounding of scores."""
    if left.dtype not in HALF:
        return torch.bmm(left, right)
    if left.device.type == "cuda":
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())


def _with_aligned_rows(bias: Tensor) -> Tensor:
    if bias.shape[2] == 1 or bias.stride(2) % 16 == 0:
        return bias
    columns = bias.shape[-1]
    return F.pad(bias, (0, aligned(columns) - columns))[..., :columns]
