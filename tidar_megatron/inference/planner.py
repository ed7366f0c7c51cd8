"""The planner: choose the plan with the highest throughput on this machine, for this model and text.

Two estimates determine the throughput: the latency of a forward with T tokens after P committed ones (``costs.py``),
and the acceptance rate of drafts, learned during generation (``acceptance.py``). From both, the :class:`Planner`
computes the throughput of every plan - K drafts, branches for the m likeliest outcomes or for all, two alternating
forwards, or plain autoregression, all with drafts copied from the text where those are better -, corrects it by the
tokens per step observed under the plan, and chooses the best. A plan affects the speed of generation, never the output.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import PreTrainedModel

from tidar_megatron.inference.acceptance import Acceptance, Copies, Outcomes
from tidar_megatron.inference.candidates import BRANCHING, PLAIN, Candidate, Cost, expect
from tidar_megatron.inference.costs import Clock, Costs, TimedStep, batches_for, load_costs, octaves
from tidar_megatron.inference.drafting import NOTHING, Copied, Copier, Drafts, Policy
from tidar_megatron.inference.forward import ForwardLayout
from tidar_megatron.inference.model import DecodeModel

LONGEST = 255  # the largest K that is tried: with a branch per outcome, a forward has almost 2**16 tokens


@dataclass
class _Place:
    """The choice for a batch size and context length, and when to reconsider it."""

    choice: Candidate
    steps: int = 0  # steps since the last decision
    look_after: int = 0  # steps after which to decide again
    total: int = 0  # steps in this place
    again: dict[tuple[int, int | None], int] = field(default_factory=dict)  # by plan tried: when it may be tried again
    kinds: set[int] = field(default_factory=set)  # the kinds of the plans that were tried
    prices: dict[int, float] = field(default_factory=lambda: {1: 1.0})  # of plain steps that verify copies, by size


class Planner:
    """The chooser of plans for all sequences of an engine.

    Args:
        costs: The latencies on this machine for this model.
        block_size: The block size that the model was trained with, which is the largest K that is tried.
    """

    BRANCHES = (None, 0, 1, 2, 3)
    PROBE = 256  # plain steps after which drafts that were not worth it are tried again
    SELDOM = 1024  # steps between two decisions in the steady state
    SURPRISE = 12.0  # CUSUM threshold in nats per recorded sequence at which most of the statistics are discarded
    SUSPICION, CHECK = 0.5, 16  # CUSUM level in nats at which, as with little data, drafts are tried again sooner
    AGAIN, TIMES = 128, 2  # a plan tried at step n of a place may be tried again at step 128 + 2 n: steps are disturbed
    TIMED = 12  # steps before a decision that its estimates of latency are corrected by
    AT_ONCE = 32  # records to learn from in one batch; a sequence adds two per step
    TRIAL = 12  # steps of a trial, fewer for a batch: of offsets beyond the chosen block, or of the latency of a plan
    WORTH = 1.03  # drafts are worth it from this ratio to the throughput of plain steps: estimates are off by as much
    # plans with this share of the best one's throughput are tried once, for estimates are off by as much; the best of a
    # kind that was never tried needs less, because the steps of other kinds say little about it
    CLOSE, CLOSE_KIND = 0.92, 0.5
    SPENT, HEADSTART = 0.1, 300  # trials may take a tenth of the steps, counted from 300 steps before the first

    def __init__(self, costs: Costs, block_size: int) -> None:
        self.lengths = sorted({k for k in (2, 3, 4, 6, 8, 12, 16, 24, 32) if k <= block_size} | {block_size})
        self.acceptance = Acceptance()
        self.outcomes = Outcomes()
        self.copies = Copies()
        self.clock = Clock(costs)
        self.choice = Candidate(block_size, 1)
        self._most_tokens = self.lengths[-1] * (1 + self.lengths[-1])
        self._gave: dict[tuple[int, int | None], list[float]] = {}  # observed tokens and steps, by plan
        self._expected: list[Candidate] = []  # the estimates of all plans, as of the last update
        self._news = True  # whether drafts were observed since that update
        self._places: dict[tuple[int, int], _Place] = {}  # by bins of the batch size and the context length
        self._here = _Place(self.choice)
        self._batch, self._context = 1, 0.0
        # total steps; their number at the last reset and at the last update of the estimates; calls of wants_a_probe
        self._steps, self._start, self._looked, self._plain = 0, 0, 0, 0
        self._next_trial, self._trials = self.SELDOM, 0
        self._followed: tuple[int, int | None] | None = None  # the plan of the last step
        self._turn = 0  # counts sequences that report
        self._probes = False  # whether a sequence of the step is a probe
        # the latest steps that the clock has not yet seen, and the outcomes of drafts that _learn has not yet processed
        self._timed: deque[TimedStep] = deque(maxlen=self.TIMED)
        self._seen: list[tuple[tuple[int, int | None], int, list[float], int, int]] = []

    def candidates(self) -> list[Candidate]:
        """Return every plan with its current estimates, highest throughput first."""
        self._learn()
        for step in self._timed:
            self.clock.observe(step)
        self._timed.clear()
        rest = min(max(8, (self._steps - self._start) // 2), self.SELDOM)
        if not self._expected or (self._news and self._steps - self._looked >= rest):
            self._looked, self._news = self._steps, False
            self._gave = {key: [0.9 * tokens, 0.9 * steps] for key, (tokens, steps) in self._gave.items()}
            plans = [(K, m) for K in self.lengths for m in self.BRANCHES if K > 1 and (m is None or m < K)]
            self._expected = [expect(*plan, self.acceptance, self.outcomes) for plan in plans]
        cost = Cost(self.clock, self._context, self._batch, self._most_tokens)
        sizes = np.array([1, *self.lengths])
        seconds = cost(PLAIN, sizes)
        self._here.prices = dict(zip(sizes.tolist(), (seconds / seconds[0]).tolist(), strict=True))
        tokens, shares = self.copies.plain(self._here.prices)
        plain = Candidate(1, None, tokens, np.array(list(shares)), np.array(list(shares.values())))
        found = [plain, *map(self._corrected, self._expected)]
        return sorted((plan.at(cost) for plan in found), key=lambda candidate: -candidate.rate)

    def _corrected(self, plan: Candidate) -> Candidate:
        """Return the plan with what copies add, and its tokens per forward averaged with those observed in its use."""
        tokens, steps = self._gave.get(plan.key, (0.0, 0.0))
        weight = 200  # the model's weight in steps: few observed steps say little, because text varies so much
        expected = plan.tokens_per_forward + self.copies.gain(plan.tokens_per_forward, plan.draft_length)
        return replace(plan, tokens_per_forward=(tokens + weight * expected) / (steps + weight))

    def begin(self, batch: int, context: float) -> None:
        """Prepare for a forward: decide again after enough steps, or if batch size or context length have changed.

        Args:
            batch: The number of sequences.
            context: Committed tokens per sequence, on average.
        """
        self._batch, self._context = batch, context
        if len(self._seen) >= (self.AT_ONCE if self.choice.draft_length > 1 else 1):  # probes are rare
            self._learn()
        place = batch.bit_length(), int(2 * math.log2(1 + context / 512))
        if place not in self._places:
            self._places[place] = _Place(self.choice)
        self._here = here = self._places[place]
        if here.steps >= here.look_after:
            chosen, here.steps = self._choose(here), 0
            is_new = chosen.key != here.choice.key
            trial = max(4, self.TRIAL - octaves(batch))
            here.look_after = trial if is_new else min(2 * here.look_after + 4, self.SELDOM)
            here.choice = chosen
            here.again[chosen.key] = self.AGAIN + self.TIMES * here.total
            here.kinds.add(chosen.kind)
        self.choice = here.choice

    def _choose(self, here: _Place) -> Candidate:
        """Return the best plan, or the current one if it is about as good; occasionally explore another."""
        found = self.candidates()
        best, plain = found[0], next(plan for plan in found if plan.draft_length == 1)
        if best.rate < self.WORTH * plain.rate:
            return plain
        # shorter blocks provide no data on the offsets beyond them
        if best.draft_length < self.lengths[-1] and self._steps >= self._next_trial:
            self._next_trial = self._steps + self.TRIAL + self.SELDOM
            return next(plan for plan in found if plan.draft_length == self.lengths[-1] and plan.branches)
        if self._trials * self.TRIAL <= self.SPENT * (self._steps + self.HEADSTART):
            due = [plan for plan in found if here.total >= here.again.get(plan.key, 0)]
            unknown = (plan for plan in due if plan.kind not in here.kinds and plan.rate > self.CLOSE_KIND * best.rate)
            plan = next(unknown, due[0] if due else best)
            if plan is not best and (plan.kind not in here.kinds or plan.rate > self.CLOSE * best.rate):
                self._trials += 1
                return plan
        present = next(plan for plan in found if plan.key == here.choice.key)
        return present if present.rate > 0.98 * best.rate else best

    def wants_a_probe(self) -> bool:
        """Return whether a plain step should draft, to check whether drafting has become worthwhile."""
        self._plain += 1
        is_sure = self.acceptance.better < self.SUSPICION and not self.acceptance.knows_little
        steps = self.PROBE if is_sure else self.CHECK
        probes = self._plain % (steps * self._batch) == 0
        self._probes |= probes
        return probes

    def end(self, tokens: int, seconds: float | None) -> None:
        """Record a step.

        Args:
            tokens: The tokens of the forward, all sequences together.
            seconds: The duration of the step; None unless all sequences followed the choice and none read a prompt.
        """
        self._steps += 1
        self._here.steps += 1
        self._here.total += 1
        probes, self._probes = self._probes, False
        # a step after a change of the plan is not typical
        is_settled, self._followed = self._followed == self.choice.key, self.choice.key
        if seconds is None:
            return
        kind, is_plain = self.choice.kind, self.choice.draft_length == 1
        is_larger = is_plain and tokens > self._batch  # with a probe, unless it was cut, or with copies
        step = TimedStep(BRANCHING if probes and is_larger else kind, self._batch, self._context, tokens, seconds)
        if is_larger and (probes or is_settled):
            self.clock.observe(step)
        elif is_settled:
            self._timed.append(step)

    def observe(self, drafts: Drafts, layout: ForwardLayout, accepted: int, match: int = 0) -> None:
        """Record the outcome of a sequence's drafts, for :meth:`_learn` to process later.

        Args:
            drafts: The verified drafts.
            layout: The layout of the forward that verified them.
            accepted: How many tokens were accepted, the certain token included.
            match: The length of the match that could be copied when they were drafted.
        """
        if layout.num_drafts > 1 and drafts.copied:
            self.copies.observe(drafts.copied, accepted, layout.num_drafts)
        elif layout.num_drafts > 1:
            self.copies.drafted(match, accepted)
        if self.choice.draft_length > 1:
            if self._followed == self.choice.key:  # else these are the drafts of the plan before
                gave = self._gave.setdefault(self.choice.key, [0.0, 0.0])
                gave[0] += accepted
                gave[1] += 1
            # learning takes time: of a batch, from two sequences a step in turn
            self._turn = (self._turn + 1) % (self._batch // 2 | 1)
            is_recorded = self._turn == 0
        else:
            is_recorded = layout.num_drafts > 1  # a probe
        if is_recorded and not drafts.copied:
            self._seen.append((self.choice.key, drafts.lag, drafts.confidences, layout.num_drafts, accepted))

    def copied(self, match: int) -> int:
        """Return how many tokens to copy after a match of this length; 0 if the model's own drafts are better."""
        self.copies.saw(match)
        length = self.choice.draft_length
        if not match:
            return 0
        if length == 1:
            return self.copies.beside_plain(match, self._here.prices) - 1
        return length - 1 if self.copies.beside_drafts(match, length, self.choice.branches == 0) else 0

    def _learn(self) -> None:
        """Process the recorded steps in one batch: work between forwards runs with cold caches and delays the step."""
        seen, self._seen = self._seen, []
        self._news |= bool(seen)
        for key, lag, confidences, num_drafts, accepted in seen:
            if num_drafts == 1:
                continue
            self.acceptance.observe(lag + 1, lag == 0, accepted - 1, accepted < num_drafts)
            if lag == 0 and num_drafts == len(confidences) + 1:
                self.outcomes.observe(confidences, accepted)
            # at the largest K, better acceptance cannot change the choice of K
            good_news = self.acceptance.better if key[0] < self.lengths[-1] else 0.0
            if max(good_news, self.acceptance.worse) > self.SURPRISE * min(self._batch, 2):
                self._forget()

    def _forget(self) -> None:
        """Discard the statistics, because the text has changed."""
        self.acceptance.forget()
        self.outcomes = Outcomes()
        self._gave.clear()
        self._expected.clear()
        for place in self._places.values():
            place.look_after = 0  # decide anew; what was tried there told about latencies, which are the same
        self._start = self._steps
        self._next_trial = self._steps + self.SELDOM

    def explain(self, count: int = 8) -> str:
        """Return a table of the ``count`` best plans and of plain autoregression, with their estimates."""
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
    """The policy of a sequence in mode ``auto``, which follows a planner.

    Args:
        longest: The largest K of any plan (:func:`longest_draft`).
        prompt: Token ids of the prompt, which drafts may be copied from.
    """

    planner: Planner  # the engine's, set when the sequence is queued

    def __init__(self, longest: int, prompt: Sequence[int] = ()) -> None:
        self.most_tokens = longest * (1 + longest)
        self._copier = Copier(prompt)
        self._probes = False  # whether the last layout was a probe, whose drafts are to be verified
        self._match = 0  # the length of the latest match

    @property
    def draft_length(self) -> int:  # type: ignore[override]
        """The draft length K of the plan that is currently chosen."""
        return self.planner.choice.draft_length

    @property
    def drafts_at_once(self) -> bool:  # type: ignore[override]
        """Return whether the plan that is currently chosen drafts."""
        return self.planner.choice.draft_length > 1

    @property
    def wants_confidences(self) -> bool:  # type: ignore[override]
        """Return True: the planner uses confidences to evaluate plans other than the chosen one."""
        return True

    def layout(self, drafts: Drafts) -> ForwardLayout:
        """Return the layout of the planner's current choice; plain steps occasionally draft as a probe."""
        choice = self.planner.choice
        self._probes = choice.draft_length == 1 and len(drafts.tokens) == 1 and self.planner.wants_a_probe()
        if choice.draft_length > 1:
            return choice.policy.layout(drafts)
        if self._probes:
            return ForwardLayout(1, (1,), self.planner.lengths[-1])
        return ForwardLayout(len(drafts.tokens))

    def look_up(self, emitted: Sequence[int]) -> Copied:
        """Return drafts copied from the text, where these promise more than the plan without them."""
        self._copier.append(emitted)
        found = self._copier.copy(self.planner.lengths[-1] - 1)
        self._match = found.match
        count = self.planner.copied(found.match)
        if not count or self._probes:
            return NOTHING
        tokens, chance = found.tokens[:count], self.planner.copies.chance(found.match)
        return Copied(tokens, found.match, [chance] * len(tokens))

    def observe(self, drafts: Drafts, layout: ForwardLayout, accepted: int) -> None:
        """Report the outcome to the planner."""
        self.planner.observe(drafts, layout, accepted, self._match)


def longest_draft(model: DecodeModel) -> int:
    """Return the largest K that a planner tries with this model."""
    return min(model.block_size or 8, LONGEST)


def planner_of(model: DecodeModel, batch_size: int = 1) -> Planner:
    """Return the planner that all engines of a model share, so that its statistics carry over between requests.

    Costs depend on device, dtype and torch's number of threads, so each combination has its own planner.

    Args:
        model: The model.
        batch_size: The largest number of sequences in a forward; costs of batches are loaded when they are needed.
    """
    key = torch.get_num_threads(), model.device, model.dtype, model.block_size
    kept = _PLANNERS.setdefault(model.causal_lm, {})
    if key not in kept:
        kept[key] = Planner(load_costs(model, batch_size), longest_draft(model))
    elif len(batches_for(batch_size)) > len(kept[key].clock.costs.batches):
        kept[key].clock.costs = load_costs(model, batch_size)
    return kept[key]


def forget_planner(model: DecodeModel) -> None:
    """Discard the planners of a model, so that its next request starts with a new one."""
    _PLANNERS.pop(model.causal_lm, None)


_PLANNERS: WeakKeyDictionary[PreTrainedModel, dict[tuple[Any, ...], Planner]] = WeakKeyDictionary()
