"""What a plan is expected to give: tokens per forward, from a Markov chain over its drafts, and seconds."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from tidar_megatron.inference.acceptance import Acceptance, Outcomes
from tidar_megatron.inference.costs import Clock
from tidar_megatron.inference.drafting import Branches, Linear, Policy, likeliest_outcomes

# the kinds of plans by the work of their steps: plain ones, two alternating forwards, or branches
PLAIN, ALTERNATING, BRANCHING = KINDS = range(3)


@dataclass(frozen=True)
class Candidate:
    """A plan and its expected performance; ``branches`` is None for all outcomes, 0 for two alternating forwards."""

    draft_length: int  # K; 1 is plain autoregression
    branches: int | None
    tokens_per_forward: float = 1.0
    sizes: np.ndarray = field(default_factory=lambda: np.ones(1, dtype=int))  # the sizes of its forwards, in tokens
    shares: np.ndarray = field(default_factory=lambda: np.ones(1))  # the fraction of its forwards of each size
    seconds: float = 0.0  # the latency of a step, divided by the number of sequences

    @property
    def rate(self) -> float:
        """The throughput in tokens per second, for one sequence's share of a step."""
        return self.tokens_per_forward / self.seconds

    @property
    def forward_tokens(self) -> float:
        """The average number of tokens in a forward, masks included."""
        return float(self.shares @ self.sizes)

    def at(self, cost: "Cost") -> "Candidate":
        """Return this candidate with its ``seconds`` set according to ``cost``."""
        return replace(self, seconds=float(self.shares @ cost(self.kind, self.sizes)))

    @property
    def key(self) -> tuple[int, int | None]:
        """The plan as (draft length, branches), without estimates."""
        return self.draft_length, self.branches

    @property
    def kind(self) -> int:
        """The kind of work of its steps, one of :data:`KINDS`."""
        return PLAIN if self.draft_length == 1 else ALTERNATING if self.branches == 0 else BRANCHING

    @property
    def name(self) -> str:
        """The plan's name in the table of :meth:`Planner.explain`."""
        if self.draft_length == 1:
            return "ar"
        how = {None: "all branches", 0: "linear"}.get(self.branches, f"{self.branches} branches")
        return f"{how}, K={self.draft_length}"

    @cached_property
    def policy(self) -> Policy:
        """The policy that follows this plan."""
        if self.draft_length == 1:
            return Policy()
        return Linear(self.draft_length) if self.branches == 0 else Branches(self.draft_length, self.branches)


def expect(
    draft_length: int, branches: int | None, acceptance: Acceptance, outcomes: Outcomes | None = None
) -> Candidate:
    """Return the expected steady-state performance of a plan, modeled as a Markov chain over the source of its drafts.

    State 0: the drafts come from their outcome's own branch. State j: from a branch that is j tokens shorter. The last
    state: there are no drafts. The stationary distribution weights the tokens gained and the forward size per state.

    Args:
        draft_length: K of the plan.
        branches: The number of branches; None for all outcomes, 0 for two alternating forwards.
        acceptance: The acceptance rates.
        outcomes: Statistics of which outcomes had a branch. Where they have too little data, the likeliest outcomes
            follow from ``acceptance``.
    """
    K = draft_length
    if K == 1:
        return Candidate(1, branches)
    believed = {own: acceptance.upto(K, own) for own in (True, False)}
    none, size = K - 1, K
    moves = np.zeros((size, size))
    gained, held = np.zeros(size), np.zeros(size, dtype=int)
    for state in range(size):
        odds = [] if state == none else believed[state == 0][state + 1 :]
        chances, reached = [], 1.0
        for odd in odds:
            chances.append(reached * (1 - odd))
            reached *= odd
        chances.append(reached)  # chances[n - 1]: the probability that exactly n tokens are accepted
        count = len(chances)
        if branches == 0:
            own: tuple[int, ...] = (1,) if state == none else ()
        elif branches is None or branches >= count:
            own = tuple(range(1, count + 1))
        else:
            own = likeliest_outcomes(odds, branches)
        gained[state] = sum(n * p for n, p in enumerate(chances, 1))
        held[state] = count + len(own) * K
        lags = outcomes.lags(count, branches) if outcomes and branches and count > branches else None
        if lags is not None:
            moves[state, :count] = lags[:-1]
            moves[state, none] += lags[-1]
            continue
        for n, p in enumerate(chances, 1):
            shorter = [r for r in own if r <= n]
            moves[state, min(n - shorter[-1], none) if shorter else none] += p
    moves *= 0.999
    moves[:, none] += 0.001  # new texts start without drafts; this also makes the stationary distribution unique
    # the stationary distribution: s = s @ moves, with sum(s) = 1
    shares = np.linalg.solve((np.eye(size) - moves + 1).T, np.ones(size))
    return Candidate(K, branches, float(shares @ gained), held, shares)


class Cost:
    """The latency per sequence, in seconds, of a step with ``batch`` equal sequences of ``context`` committed tokens.

    A call takes the kind of plan and the numbers of tokens per sequence, an int array, and returns float64 seconds of
    the same shape.
    """

    def __init__(self, clock: Clock, context: float, batch: int, most_tokens: int) -> None:
        self._curves = [clock.curve(kind, batch, context, most_tokens) for kind in KINDS]
        self._batch = batch

    def __call__(self, kind: int, tokens: np.ndarray) -> np.ndarray:
        return np.asarray(self._curves[kind][tokens] / self._batch)
