"""The loss of draft weights: the frozen output layer fused with what a draft should be, chunk by chunk.

A mask token's label is the data's token, or it learns from the clean token before its place: the teacher, whose
distribution p decides in decoding whether the draft is accepted. With q the draft's distribution:

===========  =========================================================================================================
``ce``       ``-log q(label)``; the label is the data's token
``argmax``   the same with the teacher's likeliest token as the label: what greedy decoding accepts
``kl``       ``KL(p || q)``
``tv``       ``1 - sum min(p, q)``, the probability that speculative sampling rejects the draft
``hybrid``   ``l KL + (1 - l) TV`` with ``l = exp(-3 sum min(p, q))``, detached: TV's gradient vanishes where p and q
             hardly overlap, so it begins as KL (LK losses, arXiv 2602.23881)
===========  =========================================================================================================

A draft is used only if all drafts before it in its block are accepted, and the mask at offset 0 drafts nothing: its
place is that of the certain token. So offsets are weighted (``offset_weights``):

===========  =========================================================================================================
``none``     all alike, offset 0 too
``reach``    by how far a draft gets: ``sum over m >= j of product over 1 <= i <= m of r_i`` with ``r = (1 + a) / 2``, a
             the draft's estimated acceptance, detached (D-PACE, arXiv 2605.18810); 0 for offset 0
``decay``    ``exp(-j / 4)`` (as DFlash, arXiv 2602.06036); 0 for offset 0
===========  =========================================================================================================

As in ``cross_entropy.py``, a chunk's gradient is computed right after its losses; the logits of the teacher and of the
drafts exist for one chunk at a time. The vocabulary may be sharded.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tidar_megatron.models.cross_entropy import chunk_tokens, exponentiate, mask_padding, own_columns
from tidar_megatron.models.draft_metrics import vocab_parallel_argmax

Kind = Literal["ce", "argmax", "kl", "tv", "hybrid"]
Weighting = Literal["none", "reach", "decay"]
DECAY = 4.0  # offsets after which the weight is 1 / e
# A chunk's logits on a CPU, in float32: glibc maps and unmaps larger tensors than 32 MB each time, and touching their
# fresh pages takes longer than computing their values.
CHUNK_LOGITS = 6 << 20


@dataclass(frozen=True)
class DraftFigures:
    """The figures of each mask token; no gradient flows through them.

    Attributes:
        losses: The loss without its weights, float32 ``[n]``.
        weights: The mask's weight in the sum, that of its offset included, float32 ``[n]``.
        wanted: The label, or the teacher's likeliest token, int64 ``[n]``.
        top_ids: The likeliest tokens of the draft, int64 ``[n, top]``, likeliest first.
        top_logits: Their logits, float32 ``[n, top]``.
    """

    losses: Tensor
    weights: Tensor
    wanted: Tensor
    top_ids: Tensor
    top_logits: Tensor


def linear_draft_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weights: Tensor,
    block_size: int,
    kind: Kind,
    weighting: Weighting,
    group: dist.ProcessGroup,
    vocab_size: int,
    teacher: Tensor | None = None,
    top: int = 0,
    chunk: int | None = None,
) -> tuple[Tensor, DraftFigures]:
    """Compute the weighted sum of the losses of mask tokens.

    Args:
        hidden: The masks' hidden states ``[n, h]``, the B masks of a block after each other. Their gradient is only
            this rank's part of a sum over the group; the caller reduces it.
        weight: This rank's rows of the frozen output layer, ``[V / TP, h]``.
        labels: The data's tokens, int64 ``[n]``.
        loss_weights: The masks' weights in the sum, float32 ``[n]``.
        block_size: B.
        kind: What a draft learns from.
        weighting: How offsets in a block are weighted.
        group: The ranks that share the vocabulary.
        vocab_size: The number of ids; the full weight's rows after them are padding.
        teacher: The hidden states of the clean token before each mask's place, ``[n, h]``; needed except for ``ce``.
        top: The number of likeliest tokens to return.
        chunk: Tokens whose logits exist at a time, rounded to whole blocks.

    Returns:
        The sum, differentiable once in ``hidden``, float32 (float64 for float64 states); and the figures.
    """
    tokens = chunk_tokens(hidden.shape[1]) // (1 if kind == "ce" else 2)
    if hidden.device.type == "cpu":
        tokens = min(tokens, CHUNK_LOGITS // len(weight))
    blocks = max((chunk or tokens) // block_size, 1)
    needs_grad = torch.is_grad_enabled()
    total, *seen = _LinearDraftLoss.apply(
        hidden,
        weight.detach(),
        labels,
        loss_weights,
        teacher,
        block_size,
        kind,
        weighting,
        group,
        vocab_size,
        top,
        blocks * block_size,
        needs_grad,
    )
    return total, DraftFigures(*seen)


def offset_weights(accepted: Tensor, weighting: Weighting) -> Tensor:
    """Return the weights of the masks of blocks, ``[blocks, B]``; those of a block that is accepted have the mean 1.

    Args:
        accepted: The estimated acceptance of each draft, ``[blocks, B]``.
        weighting: How to weight.
    """
    B = accepted.shape[1]
    if weighting == "none" or B == 1:
        return torch.ones_like(accepted)
    if weighting == "decay":
        weights = torch.exp(-torch.arange(B, device=accepted.device, dtype=accepted.dtype) / DECAY)
        weights[0] = 0.0
        return (weights / weights.mean()).expand_as(accepted)
    weights = ((1 + accepted[:, 1:]) / 2).cumprod(1).flip(1).cumsum(1).flip(1) / ((B - 1) / 2)
    return F.pad(weights, (1, 0))


class _LinearDraftLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_weights: Tensor,
        teacher: Tensor | None,
        block_size: int,
        kind: Kind,
        weighting: Weighting,
        group: dist.ProcessGroup,
        vocab_size: int,
        top: int,
        chunk: int,
        needs_grad: bool,
    ) -> tuple[Tensor, ...]:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        n = len(hidden)
        losses, weights = (torch.empty(n, dtype=exact, device=hidden.device) for _ in range(2))
        wanted = labels.clone()
        top_ids = torch.empty(n, top, dtype=torch.int64, device=hidden.device)
        top_logits = torch.empty(n, top, dtype=exact, device=hidden.device)
        grad = torch.empty_like(hidden) if needs_grad and ctx.needs_input_grad[0] else None
        buffer = hidden.new_empty(min(chunk, n), len(weight))
        for first in range(0, n, chunk):
            rows = slice(first, first + chunk)
            judged = None
            if teacher is not None and kind != "ce":
                judged = teacher[rows] @ weight.t()
                mask_padding(judged, vocab_size, group)
                wanted[rows] = vocab_parallel_argmax(judged, group)
            logits = torch.mm(hidden[rows], weight.t(), out=buffer[: len(wanted[rows])])
            mask_padding(logits, vocab_size, group)
            if top:
                top_logits[rows], top_ids[rows] = vocab_parallel_topk(logits, top, group)
            if judged is None or kind == "argmax":
                loss, slope, total, accepted = _of_labels(logits, wanted[rows], group)
            else:
                log_q, log_p = _log_softmax(logits, group), _log_softmax(judged, group)
                loss, slope, total, accepted = _of(kind, log_q, log_p, group)
            losses[rows] = loss
            weights[rows] = offset_weights(accepted.view(-1, block_size), weighting).flatten() * loss_weights[rows]
            if grad is not None:
                logits.copy_(slope.mul_((weights[rows] / total).unsqueeze(-1)))
                torch.mm(logits, weight, out=grad[rows])
            del slope  # freed before the next products
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(losses, weights, wanted, top_ids, top_logits)
        return (losses * weights).sum(), losses, weights, wanted, top_ids, top_logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (None if grad is None else grad.mul_(grad_sum), *[None] * 12)


_Figures = tuple[Tensor, Tensor, Tensor, Tensor]


def _of_labels(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> _Figures:
    """Return the cross-entropies ``[n]`` of logits, which are overwritten; the rest as :func:`_of`."""
    column, mine = own_columns(labels, logits.shape[-1], group)
    slope, loss, total = exponentiate(logits, column, mine, group)
    slope.scatter_add_(-1, column.unsqueeze(-1), -(total * mine).unsqueeze(-1))
    return loss, slope, total, (-loss).exp()


def _of(kind: Kind, log_q: Tensor, log_p: Tensor, group: dist.ProcessGroup) -> _Figures:
    """Return the losses ``[n]``, a divisor ``[n]`` times their slopes by the logits, that divisor, and the acceptance.

    The slopes are ``[n, V / TP]``, the acceptance ``[n]``.
    """
    q, p = log_q.exp(), log_p.exp()
    surplus = (q > p).to(q)
    kl, accepted, over = _sum(
        torch.stack(
            [
                torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1),
                torch.minimum(p, q).sum(-1),
                (q * surplus).sum(-1),
            ]
        ),
        group,
    )
    one = torch.ones_like(kl)
    if kind == "kl":
        return kl, q - p, one, accepted
    of_tv = q * (surplus - over.unsqueeze(-1))
    if kind == "tv":
        return 1 - accepted, of_tv, one, accepted
    share = torch.exp(-3 * accepted)
    slope = torch.lerp(of_tv, q - p, share.unsqueeze(-1))
    return torch.lerp(1 - accepted, kl, share), slope, one, accepted


def _log_softmax(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return log-probabilities over the full vocabulary, float32 or float64, given ``[n, V / TP]`` logits."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top = x.amax(-1)
    if group.size() > 1:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    x = x - top.unsqueeze(-1)
    return x.sub_(_sum(x.exp().sum(-1), group).log_().unsqueeze(-1))


def _sum(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    if group.size() > 1:
        dist.all_reduce(part, group=group)
    return part


def vocab_parallel_topk(logits: Tensor, count: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return the ``count`` largest logits over the full vocabulary and their ids, ``[n, count]``, largest first.

    Args:
        logits: This rank's columns ``[n, V / TP]``, with the vocabulary's padding masked.
        count: At most V.
        group: The ranks that share the vocabulary.
    """
    size, part = group.size(), logits.shape[-1]
    values, ids = logits.topk(min(count, part), -1)
    if size == 1:
        return values, ids
    parts = [torch.empty_like(values) for _ in range(size)], [torch.empty_like(ids) for _ in range(size)]
    dist.all_gather(parts[0], values.contiguous(), group=group)
    dist.all_gather(parts[1], ids + group.rank() * part, group=group)
    values, place = torch.cat(parts[0], -1).topk(count, -1)
    return values, torch.cat(parts[1], -1).gather(-1, place)
