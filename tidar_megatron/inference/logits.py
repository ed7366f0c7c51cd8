"""Logits of some rows of a forward, and what greedy decoding needs of them on the host."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Best(NamedTuple):
    """The likeliest token of each row of logits, on the host."""

    tokens: list[int]
    logits: list[float]  # NaN where any logit of the row is
    probabilities: list[float] | None = None

    @classmethod
    def of(cls, logits: Tensor, probabilities: bool) -> "Best":
        """Return the likeliest tokens of ``logits [rows, V]``, with a single copy from the device.

        ``probabilities`` is whether to compute theirs too, which reads all logits once more.
        """
        highest, places = logits.max(-1)
        highest = highest.double()
        columns = [highest, places.double()]
        if probabilities:
            columns.append((highest - logits.float().logsumexp(-1)).exp())
        values, tokens, *likely = torch.stack(columns).tolist()
        return cls([int(token) for token in tokens], values, *likely)

    def pick(self, start: int, rows: Sequence[int]) -> "Best":
        """Return the rows at ``start + rows``."""
        places = [start + row for row in rows]
        return Best(
            [self.tokens[place] for place in places],
            [self.logits[place] for place in places],
            self.probabilities and [self.probabilities[place] for place in places],
        )


class Rows(NamedTuple):
    """Logits ``[rows, V]``, and their likeliest tokens if those are on the host already."""

    logits: Tensor
    best: Best | None = None

    def pick(self, start: int, rows: Sequence[int]) -> "Rows":
        """Return the rows at ``start + rows``."""
        return Rows(pick(self.logits, start, rows), self.best and self.best.pick(start, rows))


def pick(tensor: Tensor, start: int, rows: Sequence[int]) -> Tensor:
    """Return the rows at ``start + rows``; a view if ``rows`` is a range."""
    if isinstance(rows, range):
        return tensor[start + rows.start : start + rows.stop]
    return tensor[[start + row for row in rows]]
