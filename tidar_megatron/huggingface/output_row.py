"""The mask token's row of an exported output layer, made so that engines unaware of the mask token do not emit it."""

import torch
from torch import Tensor

ROWS_AT_ONCE = 1024


def rows_mixed(vocab_size: int) -> int:
    """Return the number of other rows that :func:`mask_output_row` averages: half of them."""
    return max(1, (vocab_size - 1) // 2)


def mask_output_row(head: Tensor, mask_token_id: int) -> Tensor:
    """Return a row for the mask token of an untied output layer whose logit is never the largest.

    The row is the mean of n other rows. For every hidden state its logit is therefore the mean of their logits: it does
    not exceed the largest, and its probability is at most 1 / (n + 1) at any temperature. The learned row does not have
    this property: a row outside the convex hull of the others has the largest logit for some hidden state. The n rows
    are the half nearest to the learned row, among which are the rows of other tokens that text does not have, so on
    text the new row is about as improbable as the learned one.

    Args:
        head: The output layer, ``[vocabulary, hidden]``.
        mask_token_id: The id of the mask token.

    Returns:
        ``[hidden]``, in the dtype of ``head``.
    """
    own = head[mask_token_id].double()  # below, some rows at a time: the whole vocabulary in float64 is large
    distances = torch.cat([(rows.double() - own).square().sum(1) for rows in head.split(ROWS_AT_ONCE)])
    distances[mask_token_id] = torch.inf
    nearest = distances.argsort(stable=True)[: rows_mixed(len(head))]
    total = sum((head[some].double().sum(0) for some in nearest.split(ROWS_AT_ONCE)), torch.zeros_like(own))
    return (total / len(nearest)).to(head.dtype)
