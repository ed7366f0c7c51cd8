"""Draft weights in the engine: pairs on the rows of masks alone, and the selector that walks a block of drafts.

Clean rows get the bits that they have without draft weights: a pair adds to the mask rows of a product's output, in
place. So the AR output is the base model's own. ``adapters.py`` loads them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar_megatron.inference.logits import Best

# the rows of masks in a forward: adjacent ones, their numbers (int64), or which rows they are (bool, in static shapes)
MaskRows: TypeAlias = slice | Tensor


class Pair(NamedTuple):
    """The two weights beside a linear layer: ``a [rank, inputs]``, and ``b [outputs, rank]`` with the scale in it."""

    a: Tensor
    b: Tensor

    def add(self, out: Tensor, x: Tensor, masks: MaskRows) -> None:
        """Add ``b a x`` to the mask rows of ``out`` ``[rows, outputs]``, in place; ``x`` is ``[rows, inputs]``."""
        if isinstance(masks, slice):
            rows = out[masks]
            torch.addmm(rows, F.linear(x[masks], self.a), self.b.t(), out=rows)
        elif masks.dtype == torch.bool:
            added = out + F.linear(F.linear(x, self.a), self.b)  # of a clean row it may overflow, and is not taken
            out.copy_(torch.where(masks.unsqueeze(-1), added, out))
        else:
            out.index_add_(0, masks, F.linear(F.linear(x[masks], self.a), self.b))


LayerPairs = dict[str, Pair]  # by the module's name in the adapter's file


class Drafted(NamedTuple):
    """The drafts that a selector offers for the masks of one branch.

    Attributes:
        ids: The candidates of each mask, int64 ``[n, c]``.
        scores: Their scores after each candidate of the mask before, float32 ``[n, c, c]``; of the first mask all rows
            are those after the certain token.
    """

    ids: Tensor
    scores: Tensor

    def split(self, sizes: list[int]) -> list["Drafted"]:
        """Return those of several sequences apart, given their numbers of masks."""
        return [Drafted(*parts) for parts in zip(self.ids.split(sizes), self.scores.split(sizes), strict=True)]

    def likeliest(self) -> Best:
        """Return the walk that takes the best candidate after the one before, and its probabilities."""
        highest, places = self.scores.max(-1)
        chances = (highest - self.scores.logsumexp(-1)).exp().tolist()
        ids, best, found, place = self.ids.tolist(), places.tolist(), Best([], [], []), 0
        tops = highest.tolist()
        for offset, candidates in enumerate(ids):
            before, place = place, best[offset][place]
            found.tokens.append(candidates[place])
            found.logits.append(tops[offset][before])
            assert found.probabilities is not None
            found.probabilities.append(chances[offset][before])
        return found


@dataclass(frozen=True)
class Selector:
    """The selector's weights (``models/selector.py``), its projections of the embeddings as tables.

    Attributes:
        previous, candidate: ``[V, rank]``.
        gate: ``[rank, h]``.
        gate_bias: ``[rank]``.
        scale: The factor on what a candidate's score gains.
        candidates: The number of likeliest tokens that are scored.
    """

    previous: Tensor
    candidate: Tensor
    gate: Tensor
    gate_bias: Tensor
    scale: float
    candidates: int

    def score(self, logits: Tensor, states: Tensor, firsts: Sequence[int], certain: Sequence[int]) -> Drafted:
        """Return candidates and scores of the masks of several sequences.

        Args:
            logits: Of the masks, ``[n, V]``.
            states: The masks' hidden states, ``[n, h]``.
            firsts: The row of each sequence's first mask.
            certain: The certain token of each sequence.
        """
        top, ids = logits.topk(min(self.candidates, logits.shape[-1]), -1)
        before = torch.cat([ids[:1], ids[:-1]])
        before[list(firsts)] = torch.tensor(certain, device=ids.device)[:, None]
        gate = F.linear(states, self.gate, self.gate_bias)
        wanted = self.previous[before] * gate.unsqueeze(1)
        added = wanted @ self.candidate[ids].transpose(1, 2)
        return Drafted(ids, top.float().unsqueeze(1) + self.scale * added.float())


@dataclass(frozen=True)
class DraftWeights:
    """The draft weights of a model, ready for its forward.

    Attributes:
        rank: The rank of the pairs.
        row: The input of mask tokens, ``[h]``.
        layers: The pairs of each layer.
        selector: The selector, if there is one.
    """

    rank: int
    row: Tensor
    layers: list[LayerPairs]
    selector: Selector | None

    def embed(self, hidden: Tensor, masks: MaskRows) -> Tensor:
        """Return the embeddings ``[rows, h]`` with the masks' own input."""
        if isinstance(masks, Tensor) and masks.dtype == torch.bool:
            return torch.where(masks.unsqueeze(-1), self.row, hidden)
        hidden[masks] = self.row
        return hidden
