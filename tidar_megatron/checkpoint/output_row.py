"""The mask token's row of an exported output layer: engines that do not know the mask token must not emit it."""

import torch
from torch import Tensor

ROWS_AT_ONCE = 1024


def mask_output_row(head: Tensor, mask_token_id: int) -> Tensor:
    """Return the mask token's row for an untied output layer, ``[hidden]``, that can win nowhere: the others' mean.

    For any hidden state its logit is the mean of the others, so it is never the largest, and at any temperature its
    probability is at most that of a token among ``len(head)`` equal ones. Only rows within the convex hull of the
    others are below the largest for every hidden state, and of those the mean has the least bound: the ratio to
    the others' probabilities is at most ``exp(-entropy)`` of the weights with which a row mixes the others.

    Args:
        head: the output layer, ``[vocabulary, hidden]``; its row of the mask token does not matter.
        mask_token_id: which row it is for.
    """
    total = torch.zeros(head.shape[1], dtype=torch.float64)
    for others in (head[:mask_token_id], head[mask_token_id + 1 :]):
        for some in others.split(ROWS_AT_ONCE):  # a vocabulary in float64 is large
            total += some.double().sum(0)
    return (total / (len(head) - 1)).to(head.dtype)
