"""What became of drafts, of late: how often they are accepted, and for which outcomes branches would have been there.

Learned while text is made, of all sequences of an engine together; the planner (``planner.py``) reckons with it.
"""

import math
from collections import defaultdict, deque
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Acceptance:
    """How often a draft is accepted, by its offset in the block that drafted it, if all drafts before it were.

    Old evidence fades, so the text at hand counts most. What was never seen is believed to be as its neighbour.
    ``better`` and ``worse`` are how much better, in nats, the latest drafts are explained by odds that are e times as
    high, or as low (Page's cumulative sums): where one is large the text has become another, and what was learned may
    be wrong.
    """

    FADE = 0.5 ** (1 / 400)  # half is forgotten after 400 drafts at an offset
    PRIOR, WEIGHT = 0.7, 2.0
    ENOUGH, KEPT = 16, 6.0  # drafts at an offset before others are a surprise; that still count after one
    counts: dict[tuple[bool, int], list[float]] = field(default_factory=dict)
    better: float = 0.0
    worse: float = 0.0

    def observe(self, offset: int, own: bool, accepted: int, rejected: bool) -> None:
        """What became of a block's drafts: so many in turn were accepted, and the one after them, if ``rejected``, not.

        ``offset`` is the first one's (1: right after the certain token), in the outcome's own branch or a shorter one.
        """
        for place in range(offset, offset + accepted + rejected):
            stayed = place < offset + accepted
            seen = self.counts.get((own, place))
            if seen is None:
                seen = self.counts[own, place] = [0.0, 0.0]
            good, count = seen
            if count > self.ENOUGH:
                gain, loss = _NATS[int(100 * good / count)]
                self.better = max(0.0, self.better + stayed - gain)
                self.worse = max(0.0, self.worse - stayed - loss)
            seen[0] = good * self.FADE + stayed
            seen[1] = count * self.FADE + 1

    @property
    def knows_little(self) -> bool:
        """Whether fewer drafts were seen than make others a surprise."""
        return self.counts.get((True, 1), (0.0, 0.0))[1] < self.ENOUGH

    def forget(self) -> None:
        """Most of it: what comes next decides."""
        self.better = self.worse = 0.0
        for seen in self.counts.values():
            share = min(1.0, self.KEPT / seen[1])
            seen[0] *= share
            seen[1] *= share

    def of(self, offset: int, own: bool) -> float:
        """The probability believed."""
        return self.upto(offset + 1, own)[offset]

    def upto(self, count: int, own: bool) -> list[float]:
        """Of the offsets below ``count``."""
        believed = [self.PRIOR]
        for offset in range(1, count):
            believed.append(self._with_prior(offset, True, believed[-1]))
        return believed if own else [self._with_prior(offset, False, prior) for offset, prior in enumerate(believed)]

    def _with_prior(self, offset: int, own: bool, prior: float) -> float:
        good, seen = self.counts.get((own, offset), (0.0, 0.0))
        return (good + self.WEIGHT * prior) / (seen + self.WEIGHT)


# By how likely acceptance is believed to be, in percent: what odds that are e times as high, or as low, cost each time.
_NATS = [
    (math.log1p(p * (math.e - 1)), math.log1p(p * (1 / math.e - 1)))
    for p in (min(0.95, max(0.03, percent / 100)) for percent in range(101))
]


class Outcomes:
    """What drafts claimed and what became of them, of late: which says what other plans would have had branches for."""

    KEPT, ENOUGH = 160, 16  # blocks of a length

    def __init__(self) -> None:
        # by number of drafts
        self._blocks: defaultdict[int, deque[tuple[list[float], int]]] = defaultdict(lambda: deque(maxlen=self.KEPT))
        self._arrays: dict[int, tuple[np.ndarray, ...]] = {}
        self._ranks: dict[int, tuple[np.ndarray, np.ndarray] | None] = {}
        self._lags: dict[tuple[int, int], np.ndarray | None] = {}

    def observe(self, confidences: list[float], accepted: int) -> None:
        """Of a block's drafts, and how many were accepted, the certain token included."""
        self._blocks[len(confidences)].append((confidences, accepted))
        if self._lags:
            for found in (self._arrays, self._ranks, self._lags):
                found.clear()

    def lags(self, count: int, branches: int) -> np.ndarray | None:
        """With that many drafts and branches for the likeliest outcomes: how much shorter the branch to go on from is.

        Probabilities of 0, 1, ... ``count`` - 1 tokens shorter, and of none at all. None: too little was seen.
        """
        if (count, branches) not in self._lags:
            self._lags[count, branches] = self._find_lags(count, branches)
        return self._lags[count, branches]

    def _find_lags(self, count: int, branches: int) -> np.ndarray | None:
        if count not in self._ranks:
            self._ranks[count] = self._ranked(count)
        ranked = self._ranks[count]
        if ranked is None:
            return None
        order, accepted = ranked
        has_branch = np.zeros(order.shape, dtype=bool)
        np.put_along_axis(has_branch, order[:, :branches], True, axis=1)
        places = np.arange(1, count + 1)
        longest = np.where(has_branch & (places <= accepted[:, None]), places, 0).max(axis=1)
        lag = np.where(longest == 0, count, accepted - longest)
        return np.bincount(lag, minlength=count + 1) / len(lag)

    def _ranked(self, count: int) -> tuple[np.ndarray, np.ndarray] | None:
        """The outcomes of each block, the likeliest first, and the one that came true; longer blocks are cut."""
        for drafts, blocks in self._blocks.items():
            if drafts not in self._arrays:
                self._arrays[drafts] = tuple(np.array(column) for column in zip(*blocks, strict=True))
        long_enough = [arrays for drafts, arrays in self._arrays.items() if drafts >= count - 1]
        if sum(len(accepted) for _, accepted in long_enough) < self.ENOUGH:
            return None
        claimed = np.concatenate([confidences[:, : count - 1] for confidences, _ in long_enough])
        accepted = np.minimum(np.concatenate([accepted for _, accepted in long_enough]), count)
        one = np.ones((len(accepted), 1))
        chances = np.cumprod(np.hstack([one, claimed]), axis=1) * np.hstack([1 - claimed, one])  # as ranked_outcomes
        # of equal ones the longest first, as there too
        return np.argsort(chances, axis=1, kind="stable")[:, ::-1], accepted
