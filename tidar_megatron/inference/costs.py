"""The latency of forwards on this machine, timed once per model and cached on disk."""

import hashlib
import json
import math
import platform
import time
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from tidar_megatron.files import cache_folder, replace_text
from tidar_megatron.inference.forward import ForwardLayout, Part
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.static import WARM_UP, Forwards

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 72, 104, 136, 208, 272)  # tokens of a forward
CONTEXTS = (64, 1024)
# tokens of forwards that are timed where masks have weights of their own: all but one of them are masks
MASKED = (2, 9, 24, 72)
BATCHES = (8, 32)  # batch sizes that are timed besides 1, in forwards of up to SIZES[-1] tokens, if they can occur
ROUNDS, SECONDS = 5, 4.0  # timing rounds, and seconds after which no further round starts (at least two run)
CHECKED, OFF = (1, 8, 16, 32), 1.3  # sizes that are checked, and the ratio from which cached timings are stale


@dataclass
class Costs:
    """A table of forward latencies in seconds, the output layer included.

    ``seconds[i][j]`` is the latency of ``sizes[i]`` new tokens of one sequence after ``contexts[j]`` cached ones.
    ``batches`` holds rows ``[batch, sizes, seconds]``: the latency of ``batch`` sequences with ``sizes[i]`` new tokens
    each, after ``contexts[0]`` cached ones. ``masks`` holds what draft weights add to forwards of :data:`MASKED`
    tokens, in all sequences together; it is empty if masks have none. Other points are interpolated, and
    extrapolated above, linearly.
    """

    sizes: list[int]
    contexts: list[int]
    seconds: list[list[float]]
    batches: list[tuple[int, list[int], list[float]]] = field(default_factory=list)
    masks: list[float] = field(default_factory=list)

    def of_masks(self, tokens: ArrayLike) -> np.ndarray:
        """Return the seconds that draft weights add to a forward, in the shape of ``tokens``, its number of tokens."""
        if not self.masks:
            return np.zeros_like(np.asarray(tokens, float))
        return _Line(MASKED[: len(self.masks)], np.array(self.masks)).at(tokens)

    def of(self, tokens: ArrayLike, context: float, batch: int = 1) -> np.ndarray:
        """Return the seconds of a forward over ``batch`` sequences, float64 in the shape of ``tokens``.

        Args:
            tokens: The new tokens of each sequence, a number or an array.
            context: The cached tokens of each sequence.
            batch: The number of sequences.
        """
        if batch == 1:
            return self._of_one(tokens, context)
        short = self._of_one(tokens, self.contexts[0])
        longer = self._of_one(tokens, context) - short  # what a longer context adds, for each sequence
        if self.batches:
            rows = [self._columns[0], *self._of_batches]
            near, far, share = _between([1, *(number for number, _, _ in self.batches)], batch)
            short = rows[near].at(tokens) + share * (rows[far].at(tokens) - rows[near].at(tokens))
        else:
            short = self._of_one(np.multiply(tokens, batch), self.contexts[0])
        return np.asarray(short + batch * longer)

    def _of_one(self, tokens: ArrayLike, context: float) -> np.ndarray:
        near, far, share = _between(self.contexts, context)
        short = self._columns[near].at(tokens)
        return np.asarray(short if near == far else short + share * (self._columns[far].at(tokens) - short))

    @cached_property
    def _columns(self) -> list["_Line"]:
        # Force monotonicity: more context never takes less time, as more tokens do not.
        table = np.maximum.accumulate(np.array(self.seconds), axis=1)
        return [_Line(self.sizes, column) for column in table.T]

    @cached_property
    def _of_batches(self) -> list["_Line"]:
        return [_Line(sizes, np.array(seconds)) for _, sizes, seconds in self.batches]


class _Line:
    """Seconds by the number of tokens: linear between ``sizes`` and beyond the last, and never falling."""

    FAR = 2.0**20

    def __init__(self, sizes: Sequence[int], seconds: np.ndarray) -> None:
        rising = np.maximum.accumulate(seconds)  # a falling line would extrapolate to 0
        slope = (rising[-1] - rising[-2]) / (sizes[-1] - sizes[-2]) if len(sizes) > 1 else 0.0
        self._sizes = np.array([*sizes, sizes[-1] + self.FAR])
        self._seconds = np.append(rising, rising[-1] + slope * self.FAR)

    def at(self, tokens: ArrayLike) -> np.ndarray:
        return np.asarray(np.interp(np.asarray(tokens), self._sizes, self._seconds))


def _between(places: Sequence[int], at: float) -> tuple[int, int, float]:
    """Return the indices of the grid points left and right of ``at``, and the fraction of the way between them.

    The fraction is above 1 beyond the last grid point and 0 before the first.
    """
    last = len(places) - 1
    left = min(max(bisect_right(places, at) - 1, 0), max(last - 1, 0))
    right = min(left + 1, last)
    return left, right, max(0.0, (at - places[left]) / max(places[right] - places[left], 1))


@dataclass(frozen=True)
class TimedStep:
    """A step that was timed.

    Attributes:
        has_masks: Whether any sequence had masks.
        batch: The number of sequences.
        context: Committed tokens per sequence, on average.
        tokens: The tokens of the forward, all sequences together.
        seconds: The duration of the step.
        beside: The part of it that is not the forward: planning, choosing tokens.
    """

    has_masks: bool
    batch: int
    context: float
    tokens: int
    seconds: float
    beside: float = 0.0


@dataclass
class _Bin:
    """The latest steps of about one size: the ratios of observed to timed seconds, and the number of the last step."""

    ratios: deque[float]
    last: int = 0
    median: float | None = None


class Clock:
    """A correction of :class:`Costs` by observed steps: a step does more than a forward, and the machine's load varies.

    The ratio of observed to timed seconds is tracked by batch size, with and without masks, and by step size in bins of
    half an octave. The median of the latest steps is used, because single steps are disturbed. Sizes without recent
    steps take the ratios of nearby sizes, weighted by distance, and of steps of the other kind.
    What a step takes beside its forward depends on the number of sequences and not on its size, so it is added.
    """

    KEPT = 31  # steps kept per size
    OLD = 512  # steps at the same batch size after which a size's steps are stale
    OTHER_KIND = 1  # steps of the other kind weigh as little as a size that is so many half octaves away

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self._bins: defaultdict[int, dict[tuple[bool, int], _Bin]] = defaultdict(dict)  # by batch; (has masks, size)
        self._count: defaultdict[int, int] = defaultdict(int)  # number of steps, by batch
        # seconds of a sequence beside the forward, by batch and whether there are masks
        self._beside: defaultdict[tuple[int, bool], deque[float]] = defaultdict(lambda: deque(maxlen=self.KEPT))

    def observe(self, step: TimedStep) -> None:
        """Record a step."""
        expected = float(self.costs.of(step.tokens / step.batch, step.context, step.batch))
        if step.has_masks:
            expected += float(self.costs.of_masks(step.tokens))
        octave = octaves(step.batch)
        count = self._count[octave] = self._count[octave] + 1
        seen = self._bins[octave].setdefault((step.has_masks, octaves(step.tokens)), _Bin(deque(maxlen=self.KEPT)))
        if seen.last <= count - self.OLD:
            seen.ratios.clear()
        seen.ratios.append((step.seconds - step.beside) / expected)
        self._beside[octave, step.has_masks].append(step.beside / step.batch)
        seen.last, seen.median = count, None

    def curve(self, has_masks: bool, batch: int, context: float, most: int) -> np.ndarray:
        """Return the seconds of a step with 0, 1, ..., ``most`` tokens of each sequence, float64 ``[most + 1]``.

        Args:
            has_masks: Whether the step has masks.
            batch: The number of sequences.
            context: Committed tokens per sequence, on average.
            most: The largest number of tokens of a sequence.
        """
        every = np.arange(most + 1)
        timed = self.costs.of(every, context, batch)
        if has_masks:
            timed = timed + self.costs.of_masks(every * batch)
        octave = octaves(batch)
        seen = {key: b for key, b in self._bins[octave].items() if b.last > self._count[octave] - self.OLD}
        if not seen:
            return timed
        for one in seen.values():
            if one.median is None:
                one.median = median(one.ratios)
        medians, counts = np.array([(one.median, len(one.ratios)) for one in seen.values()]).T
        kinds, sizes = np.array(list(seen)).T
        away = abs(np.arange(octaves(most * batch) + 1)[:, None] - sizes) + self.OTHER_KIND * (kinds != has_masks)
        near = np.maximum(8.0**-away, 1e-4)
        near *= np.minimum(counts / 8, 1.0) ** 2  # a size with few steps weighs less
        ratios = (near @ medians + 1e-5) / (near.sum(axis=1) + 1e-5)
        beside = self._beside[octave, has_masks] or self._beside[octave, not has_masks]
        size = np.rint(2 * np.log2(np.maximum(every * batch, 1))).astype(int)
        return np.asarray(timed * ratios[size] + batch * median(beside))


@cache
def octaves(number: int) -> int:
    """Return the bin of a number, in half octaves: 0 for 1, 2 for 2, 3 for 3, 4 for 4."""
    return round(2 * math.log2(max(1, number)))


class Timed(NamedTuple):
    """A forward to time: new and cached tokens of each sequence, and whether all new ones but the first are masks."""

    size: int
    context: int
    has_masks: bool = False


def load_costs(model: DecodeModel, batch_size: int = 1) -> Costs:
    """Load the costs of a model from the cache, or measure them (:func:`measure_costs`) and cache them.

    The cache (in ``TIDAR_CACHE``) has a file per machine, number of threads, model and dtype. Cached costs are checked
    against a few forwards, because the load of the machine may have changed since they were timed.

    Args:
        model: The model.
        batch_size: The largest number of sequences in a forward.
    """
    path = _costs_file(model)
    cached = _read_costs(path)
    costs = cached if cached is not None and _still_holds(cached, model) else measure_costs(model)
    if missing := batches_for(batch_size)[len(costs.batches) :]:
        costs = replace(costs, batches=[*costs.batches, *measure_batches(model, costs, missing)])
    if costs is not cached:
        with suppress(OSError):  # an unwritable cache: measure again next time
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, json.dumps(asdict(costs)))
    return costs


def _read_costs(path: Path) -> Costs | None:
    try:
        costs = Costs(**json.loads(path.read_text()))
        costs.of(1, 1, 2)  # a file of another form fails
        return costs
    except (OSError, ValueError, TypeError, LookupError):
        return None


def _costs_file(model: DecodeModel) -> Path:
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else processor()
    shape = model.causal_lm.config.to_json_string()
    what = [
        device,
        torch.get_num_threads(),
        torch.__version__,
        str(model.dtype),
        model.quantize,
        *([model.drafts.rank] if model.drafts is not None else []),
        *(["compiled"] if model.lean is not None and model.lean.is_compiled else []),
        shape,
        SIZES,
        CONTEXTS,
        BATCHES,
        MASKED,
    ]
    return cache_folder() / f"costs-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}.json"


@cache
def processor() -> str:
    """Return the CPU's model name, as Linux reports it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            return next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def measure_costs(model: DecodeModel) -> Costs:
    """Time forwards of several sizes and context lengths, interleaved; keep the minimum, since noise only adds time."""
    limit = model.context_limit
    sizes = [size for size in SIZES if size < limit] or [1]
    contexts = [context for context in CONTEXTS if context + sizes[-1] <= limit] or [max(0, limit - sizes[-1])]
    plain = [Timed(size, context) for size in sizes for context in contexts]
    masked = [size for size in MASKED if size < sizes[-1]] if model.drafts is not None else []
    kinds = [Timed(size, contexts[0], has_masks) for size in masked for has_masks in (False, True)]
    seconds = _best_seconds(model, plain, ROUNDS)
    extra = _best_seconds(model, kinds, ROUNDS) if kinds else {}
    return Costs(
        sizes,
        contexts,
        [[seconds[Timed(size, context)] for context in contexts] for size in sizes],
        masks=[
            max(extra[with_masks] - extra[without], 0.0)
            for without, with_masks in zip(kinds[::2], kinds[1::2], strict=True)
        ],
    )


def batches_for(batch_size: int) -> tuple[int, ...]:
    """Return those of :data:`BATCHES` that tell about forwards of up to ``batch_size`` sequences."""
    return tuple(batch for smaller, batch in pairwise((1, *BATCHES)) if batch_size > smaller)


def measure_batches(
    model: DecodeModel, costs: Costs, batches: Sequence[int]
) -> list[tuple[int, list[int], list[float]]]:
    """Time forwards of several sequences, as :attr:`Costs.batches` holds them, after the shortest context."""
    context, rows = costs.contexts[0], []
    for batch in batches:
        sizes = [size for size in costs.sizes if batch * size <= SIZES[-1]]
        seconds = _best_seconds(model, [Timed(size, context) for size in sizes], ROUNDS, batch)
        rows.append((batch, sizes, list(seconds.values())))
    return rows


def _still_holds(costs: Costs, model: DecodeModel) -> bool:
    """Return whether a few forwards still take about as long as recorded."""
    context, *_ = costs.contexts
    few = [size for size in CHECKED if size in costs.sizes]
    kinds = [Timed(size, context) for size in few]
    if len(costs.masks) > 1:
        kinds.append(Timed(MASKED[1], context, True))
    now = _best_seconds(model, kinds, ROUNDS)

    def recorded(kind: Timed) -> float:
        return float(costs.of(kind.size, context) + costs.of_masks(kind.size) * kind.has_masks)

    return all(1 / OFF < now[kind] / recorded(kind) < OFF for kind in kinds)


@torch.inference_mode()
def _best_seconds(model: DecodeModel, forwards: Sequence[Timed], rounds: int, batch: int = 1) -> dict[Timed, float]:
    """Return the minimum seconds of forwards."""
    most, longest = max(one.size for one in forwards), max(one.context for one in forwards)
    runner = Forwards(model, batch, most + longest)
    token = 0 if model.mask_token_id != 0 else 1

    def parts(size: int, context: int, has_masks: bool) -> list[Part]:
        layout = ForwardLayout(1, (1,), size - 1) if has_masks else ForwardLayout(size)
        return [Part(slot, context, [token] * layout.num_drafts, layout) for slot in range(batch)]

    for one in forwards:  # warm up until CUDA graphs are captured, if they are used
        for _ in range((WARM_UP + 1) * runner.is_static):
            runner.run(parts(*one))
    seconds = dict.fromkeys(forwards, math.inf)
    begin = time.perf_counter()
    for number in range(rounds):
        if number >= 2 and time.perf_counter() - begin > SECONDS:
            break
        for one in forwards:
            made = parts(*one)
            for _ in range(2):  # the second run has warm caches, as decoding has
                start = time.perf_counter()
                hidden, _ = runner.run(made)
                rows = batch * min(one.size, 16 if batch > 1 else 32)
                model.logits(hidden[:rows]).max(-1).indices.tolist()  # argmax is 4 x slower
                seconds[one] = min(seconds[one], time.perf_counter() - start)
    return seconds
