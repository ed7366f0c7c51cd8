"""The planner: choose what each forward holds, for the highest throughput on this machine, with this model and text.

Before each forward the :class:`Planner` decides for each sequence how many drafts to verify, the model's own or copied
ones, and which branches of masks to add (``choosing.py``). Where forwards are so short that a decision takes longer
than it saves, most forwards hold what suits the average draft. It knows the latency of forwards on this machine
(``costs.py``), and learns during generation how likely drafts are to be accepted (``acceptance.py``), what it gains
from having drafts, and the rate at which tokens come. A choice affects the speed of generation, never the output.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from tidar_megatron.inference.acceptance import Acceptance
from tidar_megatron.inference.choosing import WORTH, Contents, Prices, choose, outcomes_of, value_of
from tidar_megatron.inference.costs import Clock, Costs, TimedStep, batches_for, load_costs
from tidar_megatron.inference.drafting import likeliest_outcomes
from tidar_megatron.inference.model import DecodeModel

LONGEST = 255  # the largest K that is tried: with a branch per outcome, a forward has almost 2**16 tokens


class Gains:
    """The gain of a forward from drafts, in tokens: decayed means of :attr:`Contents.gains` by the number of drafts."""

    FADE, PROBED = 0.05, 0.2  # the weight of the latest observation, and of one after steps without drafts
    PRIOR = 0.6  # assumed of three drafts or more

    def __init__(self, most: int) -> None:
        self.means = [min(count / 3, 1.0) * self.PRIOR for count in range(most + 1)]
        self._seen = 0

    def observe(self, gains: Sequence[float], is_probe: bool) -> None:
        """Record what 1, 2, ... drafts gained in a forward; no shorter block gains more than a longer one."""
        self._seen += 1
        weight = max(self.PROBED if is_probe else self.FADE, 1 / (3 + self._seen))
        means = self.means
        for count, gain in enumerate(gains, start=1):
            means[count] += weight * (gain - means[count])
        for count in range(len(gains) + 1, len(means)):
            means[count] = max(means[count], means[count - 1])


FIRST_WAIT = 4  # steps until prices are updated for the first time


@dataclass
class _Place:
    """The prices and choices of a batch size and a context length.

    ``prices`` are those that the choices in ``chosen`` were made with, by the classes of the drafts at hand.
    """

    batch: int
    prices: Prices
    plain: list[float]  # seconds of a step by the tokens of each sequence, divided by the number of sequences
    drafting: list[float]  # the same of steps with masks
    tokens: float  # decayed sums, whose ratio is the rate
    seconds: float
    chosen: dict[tuple[tuple[int, ...], tuple[int, ...]], "_Choice"] = field(default_factory=dict)
    routine: dict[int, Contents] = field(default_factory=dict)  # by the number of the model's own drafts
    expected: dict[int, float] = field(default_factory=dict)  # decayed mean: its tokens, by the drafts it verifies
    advantage: float = 0.0  # decayed mean: the value of a decision above that of the routine, in tokens
    decisions: int = 0
    decides: bool = True  # whether each forward is decided
    # decayed mean: the drafts that a forward by routine accepted beyond those expected, over those expected
    surprise: float = 0.0
    taken: int = 0  # steps
    rounded: list[int] = field(default_factory=list)  # some of these prices
    updates: int = 0  # of the prices
    steps: int = 0  # steps since then
    wait: int = FIRST_WAIT  # steps until they are updated again
    without: int = 0  # choices in a row without masks
    patience: int = 4  # after as many for each sequence of a batch, the next one is a probe


class _Choice(NamedTuple):
    """A choice, its value above that of the routine in tokens, and the chances of the model's own drafts."""

    contents: Contents
    advantage: float
    chances: list[float]


class Planner:
    """The chooser of what forwards hold, for all sequences of an engine.

    Args:
        costs: The latencies on this machine for this model.
        block_size: The block size that the model was trained with, which is the largest K that is tried.
    """

    RATE = 0.99  # decay of the rate per choice
    SELDOM = 64  # steps between two updates of the prices in the steady state
    BATCH = 8  # the same, if the number of sequences has changed
    SLOW = 1.5  # a step that takes longer than expected by this factor brings the next update closer
    AGE = 0.9  # decay of what is known of drafts, per update
    SOON, PROBE = 4, 256  # choices without masks before drafts are tried again: at first, and at most
    LONGER = 64  # each such choice with masks has the longest branches
    TIMED = 12  # steps before an update that latencies are corrected by
    FINE, FRESH = 20, 8  # choices are made anew if prices change by about 1 / FINE tokens, and after as many updates
    KEPT = 4096  # choices that are kept for reuse
    SAMPLED = 31  # where forwards follow the routine, each 31st step is decided
    LEARNED = 64  # decisions before it is judged whether they are worth their time
    OPTIMISM = 2  # by which factor what decisions gain is overestimated, for they pick the best of estimates
    TYPICAL, ADVANTAGE = 0.03, 0.005  # weights of the latest decision in means over all
    SURPRISE, SLOW_MEAN = 0.02, 0.005  # weights of the latest forward by routine
    SURPRISED = 0.5  # the mean surprise from which a routine is given up

    def __init__(self, costs: Costs, block_size: int) -> None:
        shortest = min(4, max(2, block_size // 2))  # a block of one mask drafts nothing
        self.lengths = [block_size >> n for n in range(8, -1, -1) if block_size >> n >= shortest]
        self.acceptance = Acceptance()
        self.clock = Clock(costs)
        self.fresh, self.late = Gains(block_size - 1), Gains(block_size - 1)
        self.used: dict[str, list[float]] = {}  # decayed choices and tokens, by what forwards held
        self.deciding = 0.0  # decayed mean: the seconds of a decision, and of learning from it
        # decayed mean: the chance that each of the model's own drafts is reached and right, by offset
        self._reached = [0.5**offset for offset in range(1, block_size)]
        self._most_tokens = block_size * (1 + block_size)
        self._places: dict[tuple[int, int], _Place] = {}  # by bins of the batch size and the context length
        self._here: _Place | None = None
        self._timed: deque[TimedStep] = deque(maxlen=self.TIMED)  # the latest steps, which the clock has not yet seen
        self._batch, self._context = 1, 0.0
        self._has_masks = False  # whether any sequence of the step has masks
        self._decides = True  # whether the step is decided
        # whether nothing is weighed for sequences without drafts: their forwards have the certain token alone
        self.rests = False
        self.rested = 0  # sequences of the step that do
        self._drafted = 0  # choices with masks

    def begin(self, batch: int, context: float) -> None:
        """Prepare for a forward.

        Args:
            batch: The number of sequences.
            context: Committed tokens per sequence, on average.
        """
        self._batch, self._context, self._has_masks = batch, context, False
        key = batch.bit_length(), int(2 * math.log2(1 + context / 512))
        here = self._places.get(key)
        # of another number of sequences each has another share of a step
        if here is None or here.steps >= (here.wait if here.batch == batch else min(here.wait, self.BATCH)):
            here = self._update(key)
        self._here = here
        here.steps += 1
        here.taken += 1
        self._decides = here.decides or here.taken % self.SAMPLED == 0
        is_due = bool(self.lengths) and here.without + batch >= here.patience * batch  # a probe
        self.rests = not self._decides and not is_due and self._routine([])[1:4] == (1, (), 0)
        self.rested = 0

    def _update(self, key: tuple[int, int]) -> _Place:
        """Return the place of this key with prices of this moment; make it if there is none."""
        for step in self._timed:
            self.clock.observe(step)
        self._timed.clear()
        plain, drafting = (
            (self.clock.curve(has_masks, self._batch, self._context, self._most_tokens) / self._batch).tolist()
            for has_masks in (False, True)
        )
        place, before = self._places.get(key), self._here
        if place is None:  # as many tokens per plain step as where it was before
            tokens = 1.0 if before is None else before.tokens / before.seconds * before.plain[1]
            empty = Prices([], [], self.lengths, [], [])
            place = self._places[key] = _Place(self._batch, empty, plain, drafting, 2 * tokens, 2 * plain[1])
        else:
            place.wait = min(2 * place.wait, self.SELDOM if place.decides else 4 * self.SELDOM)
        place.batch, place.plain, place.drafting = self._batch, plain, drafting
        rate = place.tokens / place.seconds
        place.prices = Prices(
            [rate * seconds for seconds in plain],
            [rate * seconds for seconds in drafting],
            self.lengths,
            list(self.fresh.means),
            list(self.late.means),
        )
        # choices stay while prices are about the same: most take longer than looking them up
        about = [rate * plain[1], *(rate * drafting[1 + length] for length in self.lengths)]
        about += [means[length - 1] for means in (self.fresh.means, self.late.means) for length in self.lengths]
        rounded = [round(self.FINE * one) for one in about]
        place.updates += 1
        if rounded != place.rounded or place.updates % self.FRESH == 0:
            place.chosen.clear()
        place.routine.clear()
        place.decides = place.decisions < self.LEARNED or place.advantage >= self.OPTIMISM * rate * self.deciding
        place.rounded, place.steps = rounded, 0
        for shares in (self.acceptance.own, self.acceptance.copied):
            shares.age(self.AGE)
        for used in self.used.values():
            used[0] *= 0.9
            used[1] *= 0.9
        return place

    @property
    def drafts_at_once(self) -> bool:
        """Return whether the last forward of a prompt should have masks: always, to see what drafts are worth there."""
        return bool(self.lengths)

    def decides(self, has_drafts: bool) -> bool:
        """Return whether to :meth:`choose` for the next forward of a sequence, or to take the :meth:`routine`.

        Args:
            has_drafts: Whether the model's own drafts are at hand; those of a probe are always judged.
        """
        here = self._here
        assert here is not None  # begin() was called
        return self._decides or (has_drafts and here.patience > self.SOON)

    def routine(self, confidences: Sequence[float]) -> Contents:
        """Return contents that suit average chances; branches are for the likeliest outcomes by the confidences."""
        return self._with_probe(self._routine(confidences))

    def _routine(self, confidences: Sequence[float]) -> Contents:
        here, drafts = self._here, len(confidences)
        assert here is not None
        if drafts not in here.routine:
            here.routine[drafts] = choose(self._typical(drafts), [], here.prices)
        contents = here.routine[drafts]
        if not 0 < len(contents.branches) < contents.num_drafts:
            return contents
        likeliest = likeliest_outcomes(confidences[: contents.num_drafts - 1], len(contents.branches))
        return contents._replace(branches=likeliest)

    def _typical(self, drafts: int) -> list[float]:
        """Return the chance of each of the model's own drafts, given those before it, over all texts.

        It is not the mean chance: texts where drafts are good have most of those that are reached.
        """
        reached = [1.0, *self._reached[:drafts]]
        return [min(one / max(before, 1e-9), 1.0) for before, one in pairwise(reached)]

    def choose(self, own: Sequence[int], copied: Sequence[int], lag: int = 0) -> Contents:
        """Return what the next forward of a sequence should hold.

        Args:
            own: The classes of the model's own drafts (:class:`Acceptance`).
            copied: The classes of the copied drafts.
            lag: How many tokens shorter than the outcome the branch of the own drafts was.
        """
        here = self._here
        assert here is not None
        key = tuple(own), tuple(copied)
        choice = here.chosen.get(key)
        if choice is None:
            of_own, of_copied = self.acceptance.own, self.acceptance.copied
            choice = self._choice([of_own[c] for c in own], [of_copied[c] for c in copied])
            if len(here.chosen) < self.KEPT:
                here.chosen[key] = choice
        found = choice.contents
        here.decisions += 1
        here.advantage += max(self.ADVANTAGE, 1 / here.decisions) * (choice.advantage - here.advantage)
        reached = 1.0
        for offset, chance in enumerate(choice.chances):
            reached *= chance
            self._reached[offset] += self.TYPICAL * (reached - self._reached[offset])
        if own:
            is_probe = here.patience > self.SOON and not found.branches
            (self.late if lag else self.fresh).observe(found.gains, is_probe)
            if is_probe:
                lengths = [length for length in self.lengths if length - 2 < len(own)]
                pays = any(
                    found.gains[length - 2] > here.prices.drafting[1 + length] - here.prices.plain[1] + WORTH
                    for length in lengths
                )
                if lengths:  # else the text ends, and few drafts are left
                    here.patience = self.SOON if pays else min(2 * here.patience, self.PROBE)
                if found.num_drafts == 1:  # a draft is known better once it was verified
                    found = found._replace(num_drafts=2)
        return self._with_probe(found)

    def _choice(self, own: list[float], copied: list[float]) -> _Choice:
        assert self._here is not None
        prices = self._here.prices
        contents, routine = choose(own, copied, prices), self._routine(own)
        advantage = value_of(contents, own, copied, prices) - value_of(routine, own, copied, prices)
        return _Choice(contents, advantage, own)

    def _with_probe(self, found: Contents) -> Contents:
        """Return contents with masks if none had any for long, and longer branches now and then."""
        here = self._here
        assert here is not None
        if found.branches:
            here.without, here.patience = 0, self.SOON
            self._drafted += 1
            if self._drafted % self.LONGER == 0:
                found = found._replace(draft_length=self.lengths[-1])
        else:
            here.without += 1
            if here.without >= here.patience * self._batch and self.lengths:
                here.without, here.patience = 0, max(here.patience, self.SOON + 1)
                found = found._replace(branches=(found.num_drafts,), draft_length=self.lengths[-1])
        self._has_masks |= bool(found.branches)
        return found

    def spend(self, seconds: float) -> None:
        """Record the duration of a decision; one that was interrupted counts as four."""
        if not self.deciding:
            self.deciding = seconds
        self.deciding += self.TYPICAL * (min(seconds, 4 * self.deciding) - self.deciding)

    def observe(self, contents: Contents, accepted: int, decided: bool = True) -> None:
        """Record how many tokens a forward of a sequence accepted, the certain token included."""
        here = self._here
        assert here is not None
        seconds = (here.drafting if contents.branches else here.plain)[contents.num_tokens]
        here.tokens = here.tokens * self.RATE + accepted
        here.seconds = here.seconds * self.RATE + seconds
        drafts = min(contents.num_drafts, 2), len(contents.branches) == contents.num_drafts
        name = name_of(contents.copies, *drafts, len(contents.branches), contents.draft_length)
        used = self.used.setdefault(name, [0.0, 0.0])
        used[0] += 1
        used[1] += accepted
        if not decided and contents.num_drafts > 1:
            expected = here.expected.get(contents.num_drafts)
            if expected is None:
                _, expected = outcomes_of(self._typical(contents.num_drafts - 1), contents.num_drafts)
            here.expected[contents.num_drafts] = expected + self.SLOW_MEAN * (accepted - expected)
            surplus = (accepted - expected) / max(expected - 1, 0.5)
            here.surprise += self.SURPRISE * (surplus - here.surprise)
            if abs(here.surprise) > self.SURPRISED:  # another text: what was learned of it is old
                here.surprise, here.decides, here.decisions = 0.0, True, 0
                here.steps, here.wait = here.wait, FIRST_WAIT
                here.expected.clear()

    def end(self, tokens: int, seconds: float | None, beside: float = 0.0) -> None:
        """Record a step.

        Args:
            tokens: The tokens of the forward, all sequences together.
            seconds: The duration of the step; None unless the planner chose for all sequences and none read a prompt.
            beside: The part of it that is not the forward.
        """
        here = self._here
        if here is not None and self.rested:
            here.without += self.rested
            kept = self.RATE**self.rested
            here.tokens = here.tokens * kept + (1 - kept) / (1 - self.RATE)
            here.seconds = here.seconds * kept + (1 - kept) / (1 - self.RATE) * here.plain[1]
            for place in (0, 1):
                self.used.setdefault("ar", [0.0, 0.0])[place] += self.rested
        if seconds is None or here is None:
            return
        self._timed.append(TimedStep(self._has_masks, self._batch, self._context, tokens, seconds, beside))
        expected = (here.drafting if self._has_masks else here.plain)[-(-tokens // self._batch)] * self._batch
        if seconds > self.SLOW * expected:
            here.steps += self.SELDOM // 8

    @property
    def usual(self) -> str:
        """The name of what forwards held most often of late."""
        return max(self.used, key=lambda name: self.used[name][0], default="ar")

    def explain(self, count: int = 12) -> str:
        """Return a table of what forwards held of late, the ``count`` most frequent."""
        total = sum(steps for steps, _ in self.used.values()) or 1.0
        lines = [f"{'drafts and branches':30} {'share':>6} {'tokens/forward':>15}"]
        for name, (steps, tokens) in sorted(self.used.items(), key=lambda item: -item[1][0])[:count]:
            lines.append(f"{name:30} {steps / total:6.1%} {tokens / max(steps, 1e-9):15.2f}")
        drafts = ", ".join(f"{gain:.2f}" for gain in self.fresh.means[1:])
        return "\n".join([*lines, f"gain from 1, 2, ... drafts, in tokens: {drafts}"])


@cache
def name_of(copies: bool, num_drafts: int, every: bool, branches: int, draft_length: int) -> str:
    """Return a name for what a forward holds, such as ``2:8 after own drafts``.

    Args:
        copies: Whether its drafts are copied.
        num_drafts: 1 for the certain token alone, 2 for any drafts.
        every: Whether each outcome has a branch.
        branches: The number of branches.
        draft_length: K.
    """
    drafts = "" if num_drafts == 1 else " copies" if copies else " own drafts"
    if not branches:
        return f"verify{drafts}" if drafts else "ar"
    how = f"{'all' if every and drafts else branches}:{draft_length}"
    return f"{how} after{drafts}" if drafts else how


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
