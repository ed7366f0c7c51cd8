"""The output layer and the cross-entropy of its logits in one, a chunk of tokens at a time.

The loss is a sum whose weights are known before the forward. So a chunk's gradients are formed right after its losses,
in the buffer of its logits, which the next chunk then overwrites: the logits of all tokens never exist, in forward or
in backward. What is kept until the backward is the two gradients themselves, as large as what they belong to.

The vocabulary may be shared by the ranks of a group (tensor parallelism): each has the rows of the weight, and so the
columns of the logits, that are its own.

The weight has more rows than there are ids: the vocabulary is padded. The products take the padding rows along, because
a matrix product is fast at the padded width. The softmax does not: their logits are set to minus infinity, so their
probabilities and their gradients are exactly zero. The last ranks may hold padding alone.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def chunk_tokens(hidden_size: int) -> int:
    """Tokens of a chunk.

    The weight's gradient, ``V * h`` numbers, is read and written once a chunk, for ``6 * chunk * V * h`` FLOPs: the
    larger the chunk the better, until that traffic is small beside the products. A chunk of ``h / 2`` tokens has
    logits half as large as that gradient, which has to be held anyway.
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
    """``-log softmax(hidden @ weight.T)[label]`` of each token, and the weighted sum over the tokens.

    Products are taken in the dtype of ``hidden``, the softmax in float32 (in float64 where ``hidden`` is float64).

    Args:
        hidden: ``[n, h]``, contiguous, the same on all ranks of the group. Its gradient is only this rank's part of a
            sum over the group; the caller takes the sum.
        weight: ``[V / TP, h]`` in the dtype of ``hidden``.
        labels: int64 ``[n]``, from 0 to ``vocab_size`` - 1.
        loss_weights: float32 ``[n]``.
        group: the ranks that share the vocabulary, in the order of their parts.
        vocab_size: rows of the whole weight that are ids; the rows from there to V are padding, which has no part in
            the softmax and gets a gradient of zeros.
        chunk: tokens whose logits exist at a time; by default :func:`chunk_tokens`.

    Returns:
        The weighted sum, differentiable once and only once in ``hidden`` and ``weight``: a second backward through it
        raises RuntimeError, even where the graph was retained. And the losses ``[n]``, without a gradient. Both
        float32 (or float64), the same on all ranks of the group.
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
        grad_enabled: bool,  # inside of a Function it never is
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
                torch.mul(exponentials, (loss_weights[rows] / total).unsqueeze(-1), out=logits)
            del exponentials  # a tensor of its own beside bfloat16 logits: gone before the products
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
        # In place: a copy of the weight's gradient would be large. Torch sees it, and refuses a second backward.
        grad_hidden, grad_weight = (None if grad is None else grad.mul_(grad_sum) for grad in ctx.saved_tensors)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``; ``total`` may be more exact than the product."""
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, out=total)
    else:
        total += left @ right


def mask_padding(logits: Tensor, vocab_size: int, group: dist.ProcessGroup) -> None:
    """Set the logits of the vocabulary's padding to minus infinity, in place.

    Args:
        logits: ``[..., V / TP]``, of this rank's rows of the padded vocabulary.
        vocab_size: ids that the model has; what comes after them is padding.
        group: the ranks that share the vocabulary.
    """
    own = max(vocab_size - group.rank() * logits.shape[-1], 0)
    logits[..., own:].fill_(-torch.inf)  # a slice, so neither a mask nor a wait for the device


def own_columns(labels: Tensor, part: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Where among this rank's ``part`` columns each label is (int64, any column where not), and whether it is."""
    columns = labels - group.rank() * part
    mine = (columns >= 0) & (columns < part)
    return columns.clamp(0, part - 1), mine


def exponentiate(
    logits: Tensor, column: Tensor, mine: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Numerators and denominators of the softmax, and the cross-entropies.

    Args:
        logits: ``[n, V / TP]``, of padding minus infinity; overwritten, unless they are bfloat16.
        column, mine: of the labels, from :func:`own_columns`.
        group: the ranks that share the vocabulary.

    Returns:
        ``exp(logit - largest of the row)``, ``[n, V / TP]``, in the memory of the logits unless they are bfloat16;
        cross-entropies ``[n]``; and the sums ``[n]`` over the whole vocabulary, to divide the rows by. All float32, or
        float64 for such logits.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    top = logits.amax(-1).to(exact)
    if group.size() > 1:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    shifted = logits if logits.dtype == exact else torch.empty_like(logits, dtype=exact)
    torch.sub(logits, top.unsqueeze(-1), out=shifted)
    target = shifted.gather(-1, column.unsqueeze(-1)).squeeze(-1).masked_fill(~mine, 0.0)
    exponentials = shifted.exp_()
    sums = torch.stack([exponentials.sum(-1), target])
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
    total, target = sums
    return exponentials, total.log() - target, total
