"""Which plan gives the most tokens per second on this machine, for this model, on this text.

Two things decide: what a forward of T tokens costs behind P committed ones (``costs.py``), and how often drafts are
accepted, which :class:`Acceptance` learns while text is made. From both the :class:`Planner` computes the rate of every
plan - K drafts, branches for the m likeliest outcomes or for all, two forwards in turn, or plain autoregression -
corrects it by what the plan gave where it was followed, and takes the best. A plan changes how fast the text comes,
never what it says.
"""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
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

    FADE = 0.5 ** (1 / 400)  # half is forgotten after 400 drafts at an offset
    PRIOR, WEIGHT = 0.7, 2.0
    counts: dict[tuple[bool, int], list[float]] = field(default_factory=dict)

    def observe(self, offset: int, own: bool, was_accepted: bool) -> None:
        """A draft at ``offset`` (1: the first after the certain token), of the outcome's own branch or a shorter."""
        seen = self.counts.setdefault((own, offset), [0.0, 0.0])
        seen[0] = seen[0] * self.FADE + was_accepted
        seen[1] = seen[1] * self.FADE + 1

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
    seconds: float = 0.0  # of a step, for one sequence
    believed_tokens: float = 1.0  # tokens per forward before they are corrected by what was had

    @property
    def rate(self) -> float:
        """Tokens per second of one sequence."""
        return self.tokens_per_forward / self.seconds

    @property
    def key(self) -> tuple[int, int | None]:
        """The plan alone."""
        return self.draft_length, self.branches

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
        return Candidate(1, branches, seconds=cost(1))
    believed = {own: [acceptance.of(k, own) for k in range(K)] for own in (True, False)}
    none, size = K - 1, K
    moves = np.zeros((size, size))
    gained, spent, held = np.zeros(size), np.zeros(size), np.zeros(size)
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
        spent[state] = cost(int(held[state]))
        for n, p in enumerate(outcomes, 1):
            shorter = [r for r in own if r <= n]
            moves[state, min(n - shorter[-1], none) if shorter else none] += p
        if hits is not None and own and count > len(own) and moves[state, 0] < 1:
            moves[state, 1:] *= (1 - hits) / (1 - moves[state, 0])
            moves[state, 0] = hits
    # shares of the states: s = s @ moves, and they add up to 1
    shares = np.linalg.solve((np.eye(size) - moves + 1).T, np.ones(size))
    tokens, forward_tokens, seconds = (float(shares @ values) for values in (gained, held, spent))
    return Candidate(K, branches, tokens, forward_tokens, seconds, tokens)


class Cost:
    """Seconds that a sequence pays for its tokens in a step of ``batch`` alike, behind ``context`` tokens."""

    def __init__(self, costs: Costs, context: float, batch: int, most_tokens: int) -> None:
        self._curve, self._batch = costs.curve(context, most_tokens * batch), batch

    def __call__(self, tokens: int) -> float:
        return self._curve[tokens * self._batch] / self._batch

    def of_step(self, tokens: int) -> float:
        """Of a step of so many tokens, all sequences together."""
        return self._curve[min(tokens, len(self._curve) - 1)]


@dataclass
class Record:
    """What was had of something, beside what was believed of it; old sums fade."""

    FADE = 0.5 ** (1 / 256)
    had: float = 0.0
    believed: float = 0.0

    def add(self, had: float, believed: float) -> None:
        self.had = self.had * self.FADE + had
        self.believed = self.believed * self.FADE + believed

    def ratio(self, weight: float, otherwise: float) -> float:
        """Had over believed, where ``otherwise`` stands for so much that was believed."""
        return (self.had + weight * otherwise) / (self.believed + weight)


class Planner:
    """Chooses for all sequences of an engine.

    Args:
        costs: of this machine and model.
        block_size: what the model was trained with; the largest K that is tried.
    """

    BRANCHES = (None, 0, 1, 2, 3)
    PROBE = 128  # plain steps after which drafts are tried again
    TRIAL, NEAR = 24, 0.9  # steps that plans expected to be nearly the best are followed, to know better

    def __init__(self, costs: Costs, block_size: int) -> None:
        self.costs = costs
        self.lengths = sorted({k for k in (2, 3, 4, 6, 8, 12, 16, 24, 32) if k <= block_size} | {block_size})
        self.acceptance = Acceptance()
        self.choice = Candidate(block_size, 1)
        self._most_tokens = self.lengths[-1] * (1 + self.lengths[-1])
        self._ranks: list[float] = []  # of the outcomes, by the drafts' own confidences: how often each came true
        self._tokens: dict[object, Record] = {}  # by plan; None: of all that draft
        self._seconds: dict[object, Record] = {}  # by plan and batch; None: of all
        self._tried: dict[object, int] = {}  # steps, by plan and batch
        self._choices: dict[tuple[int, int], tuple[Candidate, Cost]] = {}  # by batch and context
        self._batch, self._context = 1, 0.0
        self._steps, self._next = 0, 0
        self._cost = Cost(costs, 0, 1, self._most_tokens)

    def candidates(self, batch: int | None = None, context: float | None = None) -> list[Candidate]:
        """Every plan with what is expected of it now, the best first."""
        batch, context = batch or self._batch, self._context if context is None else context
        cost = Cost(self.costs, context, batch, self._most_tokens)
        found = [expect(1, None, self.acceptance, None, cost)]
        for K in self.lengths:
            for branches in self.BRANCHES:
                if K > 1 and (branches is None or branches < K):
                    found.append(expect(K, branches, self.acceptance, self._hit_rate(branches), cost))
        return sorted((self._corrected(candidate, batch) for candidate in found), key=lambda one: -one.rate)

    def _corrected(self, plan: Candidate, batch: int) -> Candidate:
        """By what it gave and took so far; what was never followed, by what the others did."""
        tokens = 1.0
        if plan.draft_length > 1:
            usual = self._tokens.get(None, Record()).ratio(20, 1.0)
            tokens = self._tokens.get(plan.key, Record()).ratio(60, usual)
        usual = self._seconds.get(None, Record()).ratio(4 * plan.seconds, 1.0)
        seconds = self._seconds.get((plan.key, batch), Record()).ratio(8 * batch * plan.seconds, usual)
        return replace(plan, tokens_per_forward=plan.tokens_per_forward * tokens, seconds=plan.seconds * seconds)

    def begin(self, batch: int, context: float) -> None:
        """Before a forward: choose again after some steps, or where batch and context make forwards cost otherwise."""
        if self._steps >= self._next:
            self._forget()
            self._next = max(self._steps + 4, min(2 * self._steps, self._steps + 512))
        place = batch, int(2 * math.log2(1 + context / 512))
        self._batch, self._context = batch, context
        if place not in self._choices:
            found = self.candidates()
            best = next((plan for plan in found if self._is_worth_a_trial(plan, found[0])), found[0])
            if best is not found[0]:
                self._next = min(self._next, self._steps + self.TRIAL)
            self._choices[place] = best, Cost(self.costs, context, batch, self._most_tokens)
        self.choice, self._cost = self._choices[place]

    def _forget(self) -> None:
        """Machine and text change: what was found of plans that are not followed grows old as well."""
        self._choices.clear()
        for record in (*self._tokens.values(), *self._seconds.values()):
            record.had, record.believed = 0.9 * record.had, 0.9 * record.believed
        self._tried = {key: steps // 2 for key, steps in self._tried.items()}

    def _is_worth_a_trial(self, plan: Candidate, best: Candidate) -> bool:
        tried = self._tried.get((plan.key, self._batch), 0)
        return plan is not best and plan.rate > self.NEAR * best.rate and tried < self.TRIAL and self._steps > 64

    def end(self, tokens: int, seconds: float) -> None:
        """After a step of so many tokens, all of whose sequences followed the choice."""
        self._steps += 1
        key = self.choice.key, self._batch
        self._tried[key] = self._tried.get(key, 0) + 1
        believed = self._cost.of_step(tokens)
        for of in (key, None):
            self._seconds.setdefault(of, Record()).add(min(seconds, 4 * believed), believed)

    def observe(self, drafts: Drafts, plan: Plan, accepted: int) -> None:
        """What became of the drafts of a sequence that ``plan`` verified."""
        if self.choice.draft_length > 1:
            for of in (self.choice.key, None):
                self._tokens.setdefault(of, Record()).add(accepted, self.choice.believed_tokens)
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
