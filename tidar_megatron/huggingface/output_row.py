"""The mask token's row of an exported output layer: engines that do not know the mask token must not emit it."""

import torch
from torch import Tensor

ROWS_AT_ONCE = 1024


def rows_mixed(vocab_size: int) -> int:
    """Return how many other rows :func:`mask_output_row` is the mean of: half of them."""
    return max(1, (vocab_size - 1) // 2)


def mask_output_row(head: Tensor, mask_token_id: int) -> Tensor:
    """Return a row ``[hidden]`` for the mask token of an untied output layer whose logit is never the largest.

    It is the mean of n other rows, so its logit is the mean of theirs, whatever the hidden state: below the largest,
    and with a probability of at most 1 / (n + 1) at any temperature. A row outside the convex hull of the others has
    the largest logit for some hidden state, and the row that was learned is outside. These n are the half that is
    nearest to the learned row: what no text has lies there, so on text the row is about as improbable as the learned.

    Args:
        head: the output layer, ``[vocabulary, hidden]``.
        mask_token_id: which row it is for.
    """
    own = head[mask_token_id].double()  # some rows at a time: a vocabulary in float64 is large
    distances = torch.cat([(rows.double() - own).square().sum(1) for rows in head.split(ROWS_AT_ONCE)])
    distances[mask_token_id] = torch.inf
    nearest = distances.argsort(stable=True)[: rows_mixed(len(head))]
    total = sum((head[some].double().sum(0) for some in nearest.split(ROWS_AT_ONCE)), torch.zeros_like(own))
    return (total / len(nearest)).to(head.dtype)
