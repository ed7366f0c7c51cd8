"""The selector: a small head that walks a block of drafts and chooses among the likeliest tokens of each mask.

The masks of a block are decided in one forward: no mask sees the token that another will choose, nor the certain token,
which autoregression chooses in the same forward. The selector sees what was chosen before, at a cost of its rank per
candidate. The score of candidate c at an offset with logits l, state h and predecessor a (embeddings e)::

    l(c) + 4 / sqrt(r) * <(A e(a)) * (G h + g), C e(c)>

It is trained beside the pairs, with the data's tokens as predecessors (DSpark's Markov head, arXiv 2607.05147, and
DFlash2's path selector are close).
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tidar_megatron.adapter import SELECTOR_SCALE


class Selector(nn.Module):
    """The weights of the selector.

    Args:
        hidden_size: The width of states and embeddings.
        rank: r.
        dtype: The dtype of the weights.
    """

    def __init__(self, hidden_size: int, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = SELECTOR_SCALE / math.sqrt(rank)
        self.previous = nn.Parameter(torch.empty(rank, hidden_size, dtype=dtype))  # A
        self.candidate = nn.Parameter(torch.empty(rank, hidden_size, dtype=dtype))  # C
        self.gate = nn.Parameter(torch.empty(rank, hidden_size, dtype=dtype))  # G
        self.gate_bias = nn.Parameter(torch.empty(rank, dtype=dtype))  # g

    def forward(self, logits: Tensor, state: Tensor, previous: Tensor, candidates: Tensor) -> Tensor:
        """Return the scores ``[n, c]``, float32 or float64.

        Args:
            logits: The candidates' logits ``[n, c]``, float32 or float64.
            state: The masks' hidden states ``[n, h]``.
            previous: The embeddings of the tokens before, ``[n, h]``.
            candidates: The embeddings of the candidates, ``[n, c, h]``.
        """
        gate = F.linear(state, self.gate, self.gate_bias)
        wanted = F.linear(previous, self.previous) * gate
        offered = F.linear(candidates, self.candidate)
        return logits + self.scale * (offered @ wanted.unsqueeze(-1)).squeeze(-1).to(logits.dtype)


def selector_loss(
    selector: Selector,
    states: Tensor,
    table: Tensor,
    top_ids: Tensor,
    top_logits: Tensor,
    previous: Tensor,
    wanted: Tensor,
    weights: Tensor,
    group: dist.ProcessGroup,
    chunk: int = 512,
) -> Tensor:
    """Return the weighted sum of the selector's cross-entropies; it is differentiable in the selector's weights alone.

    A mask whose wanted token is not among its candidates does not count.

    Args:
        selector: The selector.
        states: The masks' hidden states ``[n, h]``.
        table: This rank's rows of the output layer, ``[V / TP, h]``: the embeddings of the tokens.
        top_ids: The ids of the candidates, ``[n, c]``.
        top_logits: Their logits, ``[n, c]``.
        previous: The data's token before each mask's place, ``[n]``.
        wanted: The token that each mask should draft, ``[n]``.
        weights: The masks' weights in the sum, ``[n]``.
        group: The ranks that share the vocabulary. Each computes the same sum, so no gradient needs to be reduced.
        chunk: Masks whose candidates' embeddings exist at a time.
    """

    def of(rows: slice) -> Tensor:
        embeddings = token_rows(table, torch.cat([previous[rows, None], top_ids[rows]], dim=1), group)
        scores = selector(top_logits[rows], states[rows].detach(), embeddings[:, 0], embeddings[:, 1:])
        hit = top_ids[rows] == wanted[rows, None]
        found = hit.any(-1)
        losses = F.cross_entropy(scores, hit.int().argmax(-1), reduction="none")
        return (losses * weights[rows] * found).sum()

    parts = [slice(first, first + chunk) for first in range(0, len(states), chunk)]
    sums = [checkpoint(of, rows, use_reentrant=False, preserve_rng_state=False) for rows in parts]
    return torch.stack(sums).sum()


@torch.no_grad()
def token_rows(table: Tensor, ids: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the rows ``[..., h]`` of a table that is sharded by rows, for ids ``[...]``."""
    size, part = group.size(), len(table)
    if size == 1:
        return table.detach()[ids]
    own = ids - group.rank() * part
    mine = (own >= 0) & (own < part)
    rows = table[own.clamp(0, part - 1)] * mine.unsqueeze(-1)
    dist.all_reduce(rows, group=group)
    return rows
