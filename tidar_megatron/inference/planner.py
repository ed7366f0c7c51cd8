"""Which plan gives the most tokens per second on this machine, for this model, on this text.

Two things decide: what a forward of T tokens costs behind P committed ones (``costs.py``), and how often drafts are
accepted, which :class:`Acceptance` learns while text is made. From both the :class:`Planner` computes the rate of every
plan - K drafts, branches for the m likeliest outcomes or for all, two forwards in turn, or plain autoregression - and
takes the best. A plan changes how fast the text comes, never what it says.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from tidar_megatron.inference.attention import Plan
from tidar_megatron.inference.costs import Costs, load_costs
from tidar_megatron.inference.drafting import Branches, Drafts, Linear, Policy, likeliest_outcomes, ranked_outcomes
from tidar_megatron.inference.model import DecodeModel


@dataclass
class Acceptance:
    """How often a draft is accepted, by its offset in the block that drafted it, if all drafts before it were.

    Old evidence fades, so the text at hand counts most. What was never seen is believed to be as its neighbour.
    """

    HALF_LIFE = 200.0  # drafts at an offset
    PRIOR, WEIGHT = 0.7, 2.0
    counts: dict[tuple[bool, int], list[float]] = field(default_factory=dict)

    def observe(self, offset: int, own: bool, was_accepted: bool) -> None:
        """A draft at ``offset`` (1: the first after the certain token), of the outcome's own branch or a shorter."""
        seen = self.counts.setdefault((own, offset), [0.0, 0.0])
        fade = 0.5 ** (1 / self.HALF_LIFE)
        seen[0] = seen[0] * fade + was_accepted
        seen[1] = seen[1] * fade + 1

    def of(self, offset: int, own: bool) -> float:
        """The probability believed."""
        neighbour = (offset - 1, True) if own else (offset, True)
        prior = self.PRIOR if neighbour[0] < 1 else self.of(*neighbour)
        good, seen = self.counts.get((own, offset), (0.0, 0.0))
        return (good + self.WEIGHT * prior) / (seen + self.WEIGHT)


@dataclass(frozen=True)
class Candidate:
    """A plan and what it is expected to do: ``branches`` None for all outcomes, 0 for two forwards in turn."""

    draft_length: int  # K; 1 is plain autoregression
    branches: int | None
    tokens_per_forward: float = 1.0
    forward_tokens: float = 1.0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second of one sequence."""
        return self.tokens_per_forward / self.seconds

    @property
    def name(self) -> str:
        """As the options name it."""
        if self.draft_length == 1:
            return "ar"
        how = {None: "all branches", 0: "linear"}.get(self.branches, f"{self.branches} branches")
        return f"{how}, K={self.draft_length}"

    @cached_property
    def policy(self) -> Policy:
        """What follows it."""
        if self.draft_length == 1:
            return Policy()
        return Linear(self.draft_length) if self.branches == 0 else Branches(self.draft_length, self.branches)


def expect(
    draft_length: int, branches: int | None, acceptance: Acceptance, hits: float | None, cost: "Cost"
) -> Candidate:
    """The long run of a plan, a Markov chain over what its drafts come from.

    State 0: drafts of their own branch; j: of a branch that is j tokens shorter; the last: none.

    Args:
        draft_length, branches: the plan.
        acceptance: of the drafts.
        hits: how often the outcome had a branch, if known; else as ``acceptance`` has it.
        cost: seconds of a forward of so many tokens.
    """
    K = draft_length
    if K == 1:
        return Candidate(1, branches, seconds=cost(1, drafts=False))
    believed = {own: [acceptance.of(k, own) for k in range(K)] for own in (True, False)}
    none, size = K - 1, K
    moves = torch.zeros(size, size, dtype=torch.float64)
    gained, spent, held = [0.0] * size, [0.0] * size, [0.0] * size
    for state in range(size):
        odds = [] if state == none else believed[state == 0][state + 1 :]
        outcomes, reached = [], 1.0
        for odd in odds:
            outcomes.append(reached * (1 - odd))
            reached *= odd
        outcomes.append(reached)  # of 1, 2, ... accepted
        count = len(outcomes)
        if branches == 0:
            own: tuple[int, ...] = (1,) if state == none else ()
        elif branches is None or branches >= count:
            own = tuple(range(1, count + 1))
        else:
            own = likeliest_outcomes(odds, branches)
        gained[state] = sum(n * p for n, p in enumerate(outcomes, 1))
        held[state] = count + len(own) * K
        spent[state] = cost(held[state], drafts=bool(own))
        for n, p in enumerate(outcomes, 1):
            shorter = [r for r in own if r <= n]
            lag = n - max(shorter) if shorter else none
            moves[state, min(lag, none)] += p
        if hits is not None and own and count > len(own) and moves[state, 0] < 1:
            moves[state, 1:] *= (1 - hits) / (1 - moves[state, 0])
            moves[state, 0] = hits
    share = torch.zeros(size, dtype=torch.float64)
    share[none] = 1.0
    moves = (moves + torch.eye(size, dtype=torch.float64)) / 2  # lazy, so that a cycle of two settles
    for _ in range(7):
        moves = moves @ moves  # 128 steps in the end
    weights = (share @ moves).tolist()
    tokens, seconds = (sum(w * x for w, x in zip(weights, values, strict=True)) for values in (gained, spent))
    return Candidate(K, branches, tokens, sum(w * x for w, x in zip(weights, held, strict=True)), seconds)


class Cost:
    """Seconds that a sequence pays for its tokens in a step of ``batch`` alike.

    ``beside`` its forward a step takes so many seconds where it drafts nothing, and where it drafts.
    """

    def __init__(self, costs: Costs, context: float, batch: int, beside: Sequence[float]) -> None:
        self._costs, self._context, self._batch, self._beside = costs, context, batch, beside
        self._known: dict[float, float] = {}

    def __call__(self, tokens: float, drafts: bool) -> float:
        if tokens not in self._known:
            self._known[tokens] = self._costs.of(tokens * self._batch, self._context)
        return (self._known[tokens] + self._beside[drafts]) / self._batch


class Planner:
    """Chooses for all sequences of an engine.

    Args:
        costs: of this machine and model.
        block_size: what the model was trained with; the largest K that is tried.
    """

    BRANCHES = (None, 0, 1, 2, 3)
    PROBE = 128  # plain steps after which drafts are tried again

    def __init__(self, costs: Costs, block_size: int) -> None:
        self.costs = costs
        self.lengths = sorted({k for k in (2, 3, 4, 6, 8, 12, 16, 24, 32) if k <= block_size} | {block_size})
        self.acceptance = Acceptance()
        self._ranks: list[float] = []  # of the outcomes, by the drafts' own confidences: how often each came true
        self._beside = [(0.0, 1.0), (0.0, 1.0)]  # of steps without and with masks: sum and count, both fading
        self._batch, self._context, self._scale = 1, 0.0, costs.of(16, 0)
        self._steps, self._next = 0, 0
        self.choice = Candidate(block_size, 1)

    def candidates(self) -> list[Candidate]:
        """Every plan with what is expected of it now, the best first."""
        beside = [total / count for total, count in self._beside]
        cost = Cost(self.costs, self._context, self._batch, beside)
        found = [expect(1, None, self.acceptance, None, cost)]
        for K in self.lengths:
            for branches in self.BRANCHES:
                if K > 1 and (branches is None or branches < K):
                    found.append(expect(K, branches, self.acceptance, self._hit_rate(branches), cost))
        return sorted(found, key=lambda candidate: -candidate.rate)

    def begin(self, batch: int, context: float) -> None:
        """Before a forward: choose again after some steps, or where batch and context make forwards cost otherwise."""
        scale = self.costs.of(16 * batch, context)
        if self._steps >= self._next or not 0.85 <= scale / self._scale <= 1.18:
            self._scale = scale
            self._batch, self._context = batch, context
            self._next = max(self._steps + 4, min(2 * self._steps, self._steps + 256))
            self.choice = self.candidates()[0]

    def end(self, tokens: int, drafts: bool, context: float, seconds: float) -> None:
        """After a forward of so many tokens, with masks or without: what the step cost beyond what was timed."""
        self._steps += 1
        (total, count), fade = self._beside[drafts], 0.95
        self._beside[drafts] = fade * total + seconds - self.costs.of(tokens, context), fade * count + 1

    def observe(self, drafts: Drafts, plan: Plan, accepted: int) -> None:
        """What became of the drafts of a sequence that ``plan`` verified."""
        for place in range(1, min(accepted + 1, plan.num_drafts)):
            self.acceptance.observe(drafts.lag + place, drafts.lag == 0, place < accepted)
        if drafts.lag == 0 and 1 < plan.num_drafts == len(drafts.confidences) + 1:
            ranked = ranked_outcomes(drafts.confidences)
            self._ranks += [0.0] * (len(ranked) - len(self._ranks))
            self._ranks = [0.995 * seen for seen in self._ranks]
            self._ranks[ranked.index(accepted)] += 1

    def _hit_rate(self, branches: int | None) -> float | None:
        """How often the outcome is among so many of the likeliest."""
        return sum(self._ranks[:branches]) / sum(self._ranks) if branches and sum(self._ranks) > 10 else None

    def explain(self, count: int = 8) -> str:
        """The best plans, and plain autoregression, and why, as a table."""
        lines = [f"{'plan':22} {'tokens/forward':>14} {'tokens in it':>12} {'ms':>7} {'tokens/s':>9}"]
        found = self.candidates()
        for c in [c for n, c in enumerate(found) if n < count or c.draft_length == 1]:
            milliseconds = c.seconds * self._batch * 1e3
            lines.append(
                f"{c.name:22} {c.tokens_per_forward:14.2f} {c.forward_tokens:12.1f} {milliseconds:7.2f} {c.rate:9.0f}"
            )
        seen = ", ".join(f"{self.acceptance.of(k, True):.2f}" for k in range(1, self.lengths[-1]))
        return "\n".join([*lines, f"accepted by offset: {seen}"])


class Planned(Policy):
    """The policy of a sequence that follows a planner."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        longest = planner.lengths[-1]
        self.most_tokens = longest * (1 + longest)
        self._plain = 0

    @property
    def draft_length(self) -> int:  # type: ignore[override]
        """K of the plan chosen now."""
        return self.planner.choice.draft_length

    @property
    def drafts_at_once(self) -> bool:  # type: ignore[override]
        """Whether the plan chosen now drafts."""
        return self.planner.choice.draft_length > 1

    @property
    def wants_confidences(self) -> bool:  # type: ignore[override]
        """Always: also what other plans would have done is learned from them."""
        return True

    def plan(self, drafts: Drafts) -> Plan:
        """As the planner chose."""
        choice = self.planner.choice
        if choice.draft_length > 1:
            return choice.policy.plan(drafts)
        self._plain += 1
        if len(drafts.tokens) == 1 and self._plain % Planner.PROBE == 0:
            return Plan(1, (1,), self.planner.lengths[-1])
        return Plan(len(drafts.tokens))

    def observe(self, drafts: Drafts, plan: Plan, accepted: int) -> None:
        """Tell the planner."""
        self.planner.observe(drafts, plan, accepted)


def planner_of(model: DecodeModel) -> Planner:
    """The model's planner, which remembers over requests; made anew where torch has another number of threads."""
    threads = torch.get_num_threads()
    known = vars(model).get("_planner")
    if known is None or known[0] != threads:
        known = threads, Planner(load_costs(model), model.block_size or 8)
        vars(model)["_planner"] = known
    planner: Planner = known[1]
    return planner
