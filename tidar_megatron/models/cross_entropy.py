"""The output layer fused with the cross-entropy of its logits, computed one chunk of tokens at a time.

The loss is a sum whose weights are known before the forward. So a chunk's gradients are computed right after its
losses, in the buffer of its logits, which the next chunk then overwrites: the logits of all tokens never exist at once,
in forward or in backward. The two gradients are stored until the backward; each is as large as its tensor.

The vocabulary may be sharded over the ranks of a group (tensor parallelism): each rank holds its own rows of the
weight, and computes the corresponding columns of the logits.

The vocabulary is padded, so the weight has more rows than there are ids. The products include the padding rows, because
a matrix product is fast at the padded width. The softmax excludes them: their logits are set to minus infinity, so
their probabilities and gradients are exactly zero. The last ranks may hold only padding.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def chunk_tokens(hidden_size: int) -> int:
    """Return the number of tokens in a chunk.

    The weight's gradient, ``V * h`` numbers, is read and written once per chunk, for ``6 * chunk * V * h`` FLOPs. A
    larger chunk is better until that traffic is small compared with the products. The logits of ``h / 2`` tokens are
    half as large as that gradient, which is held anyway.
    """
    return min(max(hidden_size // 2, 128), 1024)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weights: Tensor,
    group: dist.ProcessGroup,
    vocab_size: int,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute ``-log softmax(hidden @ weight.T)[label]`` of each token, and the weighted sum over the tokens.

    Products are computed in the dtype of ``hidden``, the softmax in float32 (in float64 for float64 ``hidden``).

    Args:
        hidden: the hidden states ``[n, h]``, contiguous, the same on all ranks of the group. Their gradient is only
            this rank's part of a sum over the group; the caller reduces it.
        weight: this rank's rows of the output layer, ``[V / TP, h]`` in the dtype of ``hidden``.
        labels: int64 ``[n]``, from 0 to ``vocab_size`` - 1.
        loss_weights: the tokens' weights in the sum, float32 ``[n]``.
        group: the ranks that share the vocabulary, in the order of their parts.
        vocab_size: the number of ids; the full weight's rows from there to V are padding, which is excluded from the
            softmax and gets a gradient of zeros.
        chunk: tokens whose logits exist at a time; by default :func:`chunk_tokens`.

    Returns:
        The weighted sum, and the losses ``[n]`` without a gradient; both float32 (or float64), and the same on all
        ranks of the group. The sum can be differentiated only once, in ``hidden`` and ``weight``: a second backward
        through it raises RuntimeError, even if the graph was retained.
    """
    chunk = chunk or chunk_tokens(hidden.shape[1])
    return _LinearCrossEntropy.apply(
        hidden, weight, labels, loss_weights, group, vocab_size, chunk, torch.is_grad_enabled()
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_weights: Tensor,
        group: dist.ProcessGroup,
        vocab_size: int,
        chunk: int,
        grad_enabled: bool,  # inside a Function it is always disabled
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        losses = hidden.new_empty(len(hidden), dtype=exact)
        loss_weights = loss_weights.to(exact)
        hidden_needs, weight_needs = (grad_enabled and needs for needs in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if hidden_needs else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if weight_needs else None
        buffer = hidden.new_empty(min(chunk, len(hidden)), len(weight))
        for first in range(0, len(hidden), chunk):
            rows = slice(first, first + chunk)
            states = hidden[rows]
            logits = torch.mm(states, weight.t(), out=buffer[: len(states)])
            mask_padding(logits, vocab_size, group)
            column, mine = own_columns(labels[rows], len(weight), group)
            exponentials, losses[rows], total = exponentiate(logits, column, mine, group)
            if hidden_needs or weight_needs:
                exponentials.scatter_add_(-1, column.unsqueeze(-1), -(total * mine).unsqueeze(-1))
                logits.copy_(exponentials.mul_((loss_weights[rows] / total).unsqueeze(-1)))
            del exponentials  # for bfloat16 logits a separate tensor: freed before the products
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, logits.t(), states)
        del buffer, logits
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(losses)
        return (losses * loss_weights).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        # In place, because a copy of the weight's gradient would be large. Torch detects it in a second backward.
        grad_hidden, grad_weight = (None if grad is None else grad.mul_(grad_sum) for grad in ctx.saved_tensors)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute ``total += left @ right`` in place; ``total`` may have a wider dtype than the product."""
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, out=total)
    elif left.device.type == "cuda":  # the product is not rounded to the factors' dtype
        total += torch.mm(left, right, out_dtype=total.dtype)
    else:
        total += left @ right


def mask_padding(logits: Tensor, vocab_size: int, group: dist.ProcessGroup) -> None:
    """Set the logits of the vocabulary's padding to minus infinity, in place.

    Args:
        logits: ``[..., V / TP]``, this rank's columns of the padded vocabulary.
        vocab_size: the number of ids that the model has; the columns after them are padding.
        group: the ranks that share the vocabulary.
    """
    own = max(vocab_size - group.rank() * logits.shape[-1], 0)
    logits[..., own:].fill_(-torch.inf)  # a slice needs no mask and no synchronization


def own_columns(labels: Tensor, part: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Locate labels among this rank's ``part`` columns of the logits.

    Returns:
        The column of each label, int64, arbitrary but valid for a label of another rank; and bool, whether the label
        is on this rank. Both have the shape of ``labels``.
    """
    columns = labels - group.rank() * part
    mine = (columns >= 0) & (columns < part)
    return columns.clamp(0, part - 1), mine


def exponentiate(
    logits: Tensor, column: Tensor, mine: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the numerators and denominators of the softmax, and the cross-entropies.

    Args:
        logits: ``[n, V / TP]``, minus infinity for padding; overwritten, unless they are bfloat16.
        column, mine: the position of each label, from :func:`own_columns`.
        group: the ranks that share the vocabulary.

    Returns:
        The numerators ``exp(logit - largest of the row)``, ``[n, V / TP]``, in the memory of the logits unless they
        are bfloat16; the cross-entropies ``[n]``; and the denominators ``[n]``, sums over the full vocabulary. All are
        float32, or float64 for float64 logits.
    """
    shifted = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top = shifted.amax(-1)
    if group.size() > 1:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    shifted.sub_(top.unsqueeze(-1))  # torch's operations of two dtypes are slow on a CPU
    target = shifted.gather(-1, column.unsqueeze(-1)).squeeze(-1).masked_fill(~mine, 0.0)
    exponentials = shifted.exp_()
    sums = torch.stack([exponentials.sum(-1), target])
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
    total, target = sums
    return exponentials, total.log() - target, total
