"""Recent draft statistics: acceptance rates by offset, and the outcomes that N branches would have covered.

The statistics are learned during generation from all sequences of an engine; the planner (``planner.py``) uses them.
"""

import math
from collections import defaultdict, deque
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Acceptance:
    """The conditional acceptance rate of drafts, by offset in their block, given that all earlier drafts were accepted.

    Counts decay exponentially, so recent text dominates. An offset without data takes the estimate of the offset before
    it as its prior.

    ``better`` and ``worse`` are Page's CUSUM statistics for change detection, in nats: the log-likelihood ratio of the
    latest drafts under acceptance odds e times as high (or as low) as estimated. A large value means that the text has
    changed and that the estimates may be stale.
    """

    FADE = 0.5 ** (1 / 400)  # decay per draft: a half-life of 400 drafts at an offset
    PRIOR, WEIGHT = 0.7, 2.0  # acceptance rate assumed without data, and how many drafts it counts for
    ENOUGH, KEPT = 16, 6.0  # drafts at an offset before CUSUM uses it; drafts that still count after a reset
    counts: dict[tuple[bool, int], list[float]] = field(default_factory=dict)
    better: float = 0.0
    worse: float = 0.0

    def observe(self, offset: int, own: bool, accepted: int, rejected: bool) -> None:
        """Record the outcome of a block's drafts.

        Args:
            offset: The offset of the first draft in its block (1: directly after the certain token).
            own: Whether the drafts come from the outcome's own branch, not from a shorter one.
            accepted: How many drafts in a row were accepted.
            rejected: Whether the draft after them was rejected, as opposed to there being none.
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
        """Return whether fewer drafts were seen than change detection needs."""
        return self.counts.get((True, 1), (0.0, 0.0))[1] < self.ENOUGH

    def forget(self) -> None:
        """Reduce the weight of all counts to at most :attr:`KEPT` drafts, so that new drafts dominate."""
        self.better = self.worse = 0.0
        for seen in self.counts.values():
            share = min(1.0, self.KEPT / seen[1])
            seen[0] *= share
            seen[1] *= share

    def of(self, offset: int, own: bool) -> float:
        """Return the estimated acceptance probability at ``offset``."""
        return self.upto(offset + 1, own)[offset]

    def upto(self, count: int, own: bool) -> list[float]:
        """Return the estimated acceptance probabilities of the offsets 0 to ``count - 1``."""
        believed = [self.PRIOR]
        for offset in range(1, count):
            believed.append(self._with_prior(offset, True, believed[-1]))
        return believed if own else [self._with_prior(offset, False, prior) for offset, prior in enumerate(believed)]

    def _with_prior(self, offset: int, own: bool, prior: float) -> float:
        good, seen = self.counts.get((own, offset), (0.0, 0.0))
        return (good + self.WEIGHT * prior) / (seen + self.WEIGHT)


# By estimated acceptance rate in percent: log(1 + p * (e - 1)) and log(1 + p * (1/e - 1)), the normalizers of the
# likelihood ratio under odds that are e times as high, or as low.
_NATS = [
    (math.log1p(p * (math.e - 1)), math.log1p(p * (1 / math.e - 1)))
    for p in (min(0.95, max(0.03, percent / 100)) for percent in range(101))
]


class Copies:
    """Statistics of copying: how often the text matches, by the length of the match, and which copies are accepted.

    Where text matches, the model's own drafts are better than elsewhere. So copies are compared with the drafts that
    were made instead of copies after as long a match.

    Averages decay exponentially. Those of matches that are not used return to :attr:`PRIOR`, so that copying is tried
    again now and then.
    """

    PRIOR = (0.0, 0.1, 0.3, 0.7, 0.75)  # by the length of the match: the chance of a copied draft after accepted ones
    WEIGHT = 4.0  # of the prior, in drafts
    DRAFTED = 2.0  # tokens that a forward accepts of the model's own drafts, before any was seen
    FADE, RETURN = 0.1, 0.003  # the weight of the latest observation; of the prior, each time that a match is not used
    SEEN = 0.025  # the weight of the latest step in the shares of steps

    def __init__(self) -> None:
        self._accepted = [chance * self.WEIGHT for chance in self.PRIOR]
        self._tried = [self.WEIGHT for _ in self.PRIOR]
        self._drafted = [self.DRAFTED for _ in self.PRIOR]
        self._steps = [0.0 for _ in self.PRIOR]  # the share of steps with a match of this length
        self._steps[0] = 1.0

    def saw(self, match: int) -> None:
        """Record the match of a step, 0 for none."""
        for length in range(len(self._steps)):
            self._steps[length] += self.SEEN * ((length == match) - self._steps[length])

    def drafted(self, match: int, accepted: int) -> None:
        """Record how many tokens a forward accepted of the model's own drafts, the certain token included.

        ``match`` is the length of the match that could have been copied instead, 0 for none.
        """
        self._drafted[match] += self.FADE * (accepted - self._drafted[match])

    def observe(self, match: int, accepted: int, num_drafts: int) -> None:
        """Record how many tokens of ``num_drafts`` a forward accepted, the certain token included.

        ``match`` is the length of the match that the drafts were copied after.
        """
        for sums, new in ((self._accepted, accepted - 1), (self._tried, min(accepted, num_drafts - 1))):
            sums[match] = (1 - self.FADE) * sums[match] + new

    def chance(self, match: int) -> float:
        """Return the probability that a copied draft is accepted after those before it."""
        return self._accepted[match] / max(self._tried[match], 1e-9)

    def tokens(self, match: int, count: int) -> float:
        """Return the expected tokens of a forward that verifies the certain token and ``count - 1`` copied ones."""
        chance = self.chance(match)
        return (1 - chance**count) / (1 - chance) if chance < 1 else count

    def beside_drafts(self, match: int, count: int, alternates: bool) -> bool:
        """Return whether a forward accepts more of copies after a match of this length than of the model's own drafts.

        If the plan ``alternates``, own drafts take a forward of their own, which gives one token.
        """
        own = (1 + self._drafted[match]) / 2 if alternates else self._drafted[match]
        if self.tokens(match, count) > own:
            return True
        self._pass_over(match)
        return False

    def beside_plain(self, match: int, prices: dict[int, float]) -> int:
        """Return the number of tokens to verify where the model itself drafts nothing, 1 for no copies.

        Args:
            match: The length of the match.
            prices: By the number of tokens, the seconds of a step that verifies them over those of a plain step.
        """
        best = self._fastest(match, prices)
        if best == 1:
            self._pass_over(match)
        return best

    def _fastest(self, match: int, prices: dict[int, float]) -> int:
        return max(prices, key=lambda count: self.tokens(match, count) / prices[count])

    def _pass_over(self, match: int) -> None:
        """Move the statistics of a match that is not used a little towards the prior."""
        for sums, prior in ((self._accepted, self.PRIOR[match]), (self._tried, 1.0)):
            sums[match] += self.RETURN * (prior * self.WEIGHT - sums[match])

    def gain(self, own: float, count: int) -> float:
        """Return the tokens that copying adds to a forward of a plan.

        Args:
            own: The tokens per forward that the plan's own drafts give.
            count: K of the plan.
        """
        mean = sum(share * one for share, one in zip(self._steps, self._drafted, strict=True))
        more = 0.0
        for match, share in enumerate(self._steps):
            more += share * max(self.tokens(match, count) - own * self._drafted[match] / max(mean, 1.0), 0.0)
        return more

    def plain(self, prices: dict[int, float]) -> tuple[float, dict[int, float]]:
        """Return the expected tokens per forward of plain steps with copies, and the share of forwards by their size.

        Args:
            prices: As in :meth:`beside_plain`.
        """
        expected, shares = 0.0, dict.fromkeys(prices, 0.0)
        for match, share in enumerate(self._steps):
            best = self._fastest(match, prices)
            expected += share * self.tokens(match, best)
            shares[best] += share
        return expected, shares


class Outcomes:
    """Confidences and outcomes of recent blocks, to estimate which outcomes other plans would have had branches for."""

    KEPT, ENOUGH = 160, 16  # blocks kept per draft length; blocks needed for an estimate

    def __init__(self) -> None:
        # keyed by the number of drafts
        self._blocks: defaultdict[int, deque[tuple[list[float], int]]] = defaultdict(lambda: deque(maxlen=self.KEPT))
        self._arrays: dict[int, tuple[np.ndarray, ...]] = {}
        self._ranks: dict[int, tuple[np.ndarray, np.ndarray] | None] = {}
        self._lags: dict[tuple[int, int], np.ndarray | None] = {}

    def observe(self, confidences: list[float], accepted: int) -> None:
        """Record the confidences of a block's drafts and how many tokens were accepted, the certain token included."""
        self._blocks[len(confidences)].append((confidences, accepted))
        if self._lags:
            for found in (self._arrays, self._ranks, self._lags):
                found.clear()

    def lags(self, count: int, branches: int) -> np.ndarray | None:
        """Estimate how much shorter than the outcome the longest usable branch is.

        Args:
            count: The number of drafts, the certain token included.
            branches: The number of branches, which belong to the likeliest outcomes.

        Returns:
            Probabilities, float64 ``[count + 1]``: that the branch is 0, 1, ..., ``count - 1`` tokens shorter, and
            that there is none. None if too few blocks were seen.
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
        """Return the outcomes of each block, likeliest first, and the actual outcome; longer blocks are truncated."""
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
        # ties go to the longest outcome, as in ranked_outcomes
        return np.argsort(chances, axis=1, kind="stable")[:, ::-1], accepted
