"""Which plan gives the most tokens per second on this machine, for this model, on this text.

Two things decide: what a forward of T tokens costs behind P committed ones (``costs.py``), and how often drafts are
accepted, which is learned while text is made (``acceptance.py``). From both the :class:`Planner` computes the rate of
every plan - K drafts, branches for the m likeliest outcomes or for all, two forwards in turn, or plain autoregression -
corrects it by what the plan gave where it was followed, and takes the best. A plan changes how fast the text comes,
never what it says.
"""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import PreTrainedModel

from tidar_megatron.inference.acceptance import Acceptance, Outcomes
from tidar_megatron.inference.costs import Clock, Costs, load_costs
from tidar_megatron.inference.drafting import Branches, Drafts, Linear, Policy, likeliest_outcomes
from tidar_megatron.inference.forward import ForwardLayout
from tidar_megatron.inference.model import DecodeModel

LONGEST = 255  # drafts that are tried: with a branch of each, a forward holds 2**16 tokens


@dataclass(frozen=True)
class Candidate:
    """A plan and what it is expected to do: ``branches`` None for all outcomes, 0 for two forwards in turn."""

    draft_length: int  # K; 1 is plain autoregression
    branches: int | None
    tokens_per_forward: float = 1.0
    sizes: np.ndarray = field(default_factory=lambda: np.ones(1, dtype=int))  # of its forwards, in tokens
    shares: np.ndarray = field(default_factory=lambda: np.ones(1))  # how many of its forwards are of which size
    seconds: float = 0.0  # of a step, for one sequence

    @property
    def rate(self) -> float:
        """Tokens per second of one sequence."""
        return self.tokens_per_forward / self.seconds

    @property
    def forward_tokens(self) -> float:
        """In the mean."""
        return float(self.shares @ self.sizes)

    def at(self, cost: "Cost") -> "Candidate":
        """With its seconds."""
        return replace(self, seconds=float(self.shares @ cost(self.sizes)))

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
    draft_length: int, branches: int | None, acceptance: Acceptance, outcomes: Outcomes | None = None
) -> Candidate:
    """The long run of a plan, a Markov chain over what its drafts come from.

    State 0: drafts of their own branch; j: of a branch that is j tokens shorter; the last: none.

    Args:
        draft_length, branches: the plan.
        acceptance: of the drafts.
        outcomes: which had a branch, if known; else the likeliest are as ``acceptance`` has it.
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
        chances.append(reached)  # of 1, 2, ... accepted
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
    moves[:, none] += 0.001  # texts begin now and then; and so no state holds for ever
    # shares of the states: s = s @ moves, and they add up to 1
    shares = np.linalg.solve((np.eye(size) - moves + 1).T, np.ones(size))
    return Candidate(K, branches, float(shares @ gained), held, shares)


class Cost:
    """Seconds that a sequence pays for its tokens in a step of ``batch`` alike, behind ``context`` tokens."""

    def __init__(self, clock: Clock, context: float, batch: int, most_tokens: int) -> None:
        self._curve, self._batch = clock.curve(batch, context, most_tokens * batch), batch

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        return np.asarray(self._curve[tokens * self._batch] / self._batch)


@dataclass
class _Place:
    """What was chosen for a batch and a context, the steps since the last look, and after how many to look again."""

    choice: Candidate
    steps: int = 0
    look_after: int = 0
    plain_after: int = 0  # steps in all, from which on plain ones may be tried


class Planner:
    """Chooses for all sequences of an engine.

    Args:
        costs: of this machine and model.
        block_size: what the model was trained with; the largest K that is tried.
    """

    BRANCHES = (None, 0, 1, 2, 3)
    PROBE = 256  # plain steps after which drafts that are known to be useless are tried again
    SELDOM = 1024  # steps between two looks, where little is new
    SURPRISE = 12.0  # nats of each sequence after which most of what was learned is forgotten
    SUSPICION, CHECK = 0.5, 16  # nats from which on, as where little is known, drafts are tried again sooner
    AT_ONCE = 16  # what is learned from together: two of a sequence's step
    TRIAL = 12  # steps that try what is not known: offsets beyond the blocks chosen, the time of plain steps

    def __init__(self, costs: Costs, block_size: int) -> None:
        self.lengths = sorted({k for k in (2, 3, 4, 6, 8, 12, 16, 24, 32) if k <= block_size} | {block_size})
        self.acceptance = Acceptance()
        self.outcomes = Outcomes()
        self.clock = Clock(costs)
        self.choice = Candidate(block_size, 1)
        self._most_tokens = self.lengths[-1] * (1 + self.lengths[-1])
        self._gave: dict[tuple[int, int | None], list[float]] = {}  # tokens and steps, by plan
        self._expected: list[Candidate] = []  # what is expected of every plan, since the last look
        self._places: dict[tuple[int, int], _Place] = {}  # by batch and context
        self._here = _Place(self.choice)
        self._batch, self._context = 1, 0.0
        # steps in all, those when what is learned began, those at the last look; and those of one token
        self._steps, self._start, self._looked, self._plain = 0, 0, 0, 0
        self._next_trial = self.SELDOM
        # what is still to be learned from: steps as the clock takes them, and what became of drafts, by plan
        self._timed: list[tuple[int, float, int, float]] = []
        self._seen: list[tuple[tuple[int, int | None], int, list[float], int, int]] = []

    def candidates(self) -> list[Candidate]:
        """Every plan with what is expected of it now, the best first."""
        self._learn()
        if not self._expected or self._steps - self._looked >= min(
            max(4, (self._steps - self._start) // 4), self.SELDOM
        ):
            self._looked = self._steps
            self._gave = {key: [0.9 * tokens, 0.9 * steps] for key, (tokens, steps) in self._gave.items()}
            plans = [(K, m) for K in self.lengths for m in self.BRANCHES if K > 1 and (m is None or m < K)]
            found = [self._corrected(expect(*plan, self.acceptance, self.outcomes)) for plan in plans]
            self._expected = [Candidate(1, None), *found]
        cost = Cost(self.clock, self._context, self._batch, self._most_tokens)
        return sorted((plan.at(cost) for plan in self._expected), key=lambda candidate: -candidate.rate)

    def _corrected(self, plan: Candidate) -> Candidate:
        """By what it gave where it was followed."""
        tokens, steps = self._gave.get(plan.key, (0.0, 0.0))
        weight = 200  # steps: text varies so much that few of them say little
        return replace(plan, tokens_per_forward=(tokens + weight * plan.tokens_per_forward) / (steps + weight))

    def begin(self, batch: int, context: float) -> None:
        """Before a forward: choose again after some steps, or where batch and context make forwards cost otherwise."""
        self._batch, self._context = batch, context
        if len(self._timed) + len(self._seen) >= self.AT_ONCE:
            self._learn()
        place = batch, int(2 * math.log2(1 + context / 512))
        if place not in self._places:
            self._places[place] = _Place(self.choice)
        self._here = here = self._places[place]
        if here.steps >= here.look_after:
            chosen, here.steps = self._choose(here), 0
            is_new = chosen.key != here.choice.key
            here.look_after = self.TRIAL if is_new else min(2 * here.look_after + 4, self.SELDOM)
            here.choice = chosen
        self.choice = here.choice

    def _choose(self, here: _Place) -> Candidate:
        """The best, or what is there if about as good; now and then what may be better than it is known to be."""
        found = self.candidates()
        best, plain = found[0], next(plan for plan in found if plan.draft_length == 1)
        if best is plain:
            return best
        # a batch's plain steps may be far faster than its larger ones suggest: they are one call (attention.py)
        is_time = self._steps >= here.plain_after and self.clock.guesses(self._batch, self._batch)
        if is_time and 2 * plain.rate > best.rate:
            here.plain_after = self._steps + 8 * self.TRIAL
            return plain
        # shorter blocks say nothing of the offsets beyond them
        if best.draft_length < self.lengths[-1] and self._steps >= self._next_trial:
            self._next_trial = self._steps + self.TRIAL + self.SELDOM
            return next(plan for plan in found if plan.draft_length == self.lengths[-1] and plan.branches)
        present = next(plan for plan in found if plan.key == here.choice.key)
        return present if present.rate > 0.98 * best.rate else best

    def wants_a_probe(self) -> bool:
        """Whether a plain step shall draft, to see whether that is worth it by now."""
        self._plain += 1
        is_sure = self.acceptance.better < self.SUSPICION and not self.acceptance.knows_little
        steps = self.PROBE if is_sure else self.CHECK
        return self._plain % (steps * self._batch) == 0

    def end(self, tokens: int, seconds: float | None) -> None:
        """After a step of so many tokens; ``seconds`` if all its sequences followed the choice and read no prompt."""
        self._steps += 1
        self._here.steps += 1
        if seconds is not None:
            self._timed.append((self._batch, self._context, tokens, seconds))

    def observe(self, drafts: Drafts, layout: ForwardLayout, accepted: int) -> None:
        """What became of the drafts of a sequence that ``layout`` verified; :meth:`_learn` learns from it later."""
        if self.choice.draft_length > 1 or layout.num_drafts > 1:
            self._seen.append((self.choice.key, drafts.lag, drafts.confidences, layout.num_drafts, accepted))

    def _learn(self) -> None:
        """From some steps at once: between two forwards no cache is warm, and a step waits for what is done there."""
        for timed in self._timed:
            self.clock.observe(*timed)
        seen, self._timed, self._seen = self._seen, [], []
        for key, lag, confidences, num_drafts, accepted in seen:
            if key[0] > 1:
                gave = self._gave.setdefault(key, [0.0, 0.0])
                gave[0] += accepted
                gave[1] += 1
            if num_drafts == 1:
                continue
            self.acceptance.observe(lag + 1, lag == 0, accepted - 1, accepted < num_drafts)
            if lag == 0 and num_drafts == len(confidences) + 1:
                self.outcomes.observe(confidences, accepted)
            good_news = self.acceptance.better if key[0] < self.lengths[-1] else 0.0  # else of no use
            if max(good_news, self.acceptance.worse) > self.SURPRISE * self._batch:
                self._forget()

    def _forget(self) -> None:
        """Begin anew: the text has become another."""
        self.acceptance.forget()
        self.outcomes = Outcomes()
        self._gave.clear()
        self._expected.clear()
        self._places.clear()
        self._start = self._steps
        self._next_trial = self._steps + self.SELDOM

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

    planner: Planner  # of the engine that serves the sequence

    def __init__(self, longest: int) -> None:
        """Args: ``longest``, the largest K of any plan (:func:`longest_draft`)."""
        self.most_tokens = longest * (1 + longest)

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

    def layout(self, drafts: Drafts) -> ForwardLayout:
        """As the planner chose."""
        choice = self.planner.choice
        if choice.draft_length > 1:
            return choice.policy.layout(drafts)
        if len(drafts.tokens) == 1 and self.planner.wants_a_probe():
            return ForwardLayout(1, (1,), self.planner.lengths[-1])
        return ForwardLayout(len(drafts.tokens))

    def observe(self, drafts: Drafts, layout: ForwardLayout, accepted: int) -> None:
        """Tell the planner."""
        self.planner.observe(drafts, layout, accepted)


def longest_draft(model: DecodeModel) -> int:
    """Return the largest K that a planner tries with this model."""
    return min(model.block_size or 8, LONGEST)


def planner_of(model: DecodeModel) -> Planner:
    """Return the planner that all engines of a model share, so that it remembers from one request to the next.

    Costs depend on device, dtype and torch's number of threads, so there is a planner for each of these.
    """
    key = torch.get_num_threads(), model.device, model.dtype, model.block_size
    kept = _PLANNERS.setdefault(model.causal_lm, {})
    if key not in kept:
        kept[key] = Planner(load_costs(model), longest_draft(model))
    return kept[key]


def forget_planner(model: DecodeModel) -> None:
    """Forget what was learned of a model: its next request begins with a new planner."""
    _PLANNERS.pop(model.causal_lm, None)


_PLANNERS: WeakKeyDictionary[PreTrainedModel, dict[tuple[Any, ...], Planner]] = WeakKeyDictionary()
