"""The latency of forwards on this machine, timed once per model and cached on disk."""

import hashlib
import json
import math
import platform
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike

from tidar_megatron.files import cache_folder, replace_text
from tidar_megatron.inference.forward import ForwardLayout, Part
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.static import WARM_UP, Forwards

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 72, 104, 136, 208, 272)  # tokens of a forward
CONTEXTS = (64, 1024)
ROUNDS, SECONDS = 5, 4.0  # timing rounds, and seconds after which no further round starts (at least two run)
CHECKED, OFF = (1, 8, 16, 32), 1.3  # sizes that are checked, and the ratio from which cached timings are stale


@dataclass
class Costs:
    """A table of forward latencies in seconds, the output layer included.

    ``seconds[i][j]`` is the latency of ``sizes[i]`` new tokens after ``contexts[j]`` cached ones. Other points are
    interpolated, and extrapolated above, linearly.
    """

    sizes: list[int]
    contexts: list[int]
    seconds: list[list[float]]

    def of(self, tokens: ArrayLike, context: ArrayLike) -> np.ndarray:
        """Return the interpolated seconds, float64, for ``tokens`` new tokens after ``context`` cached ones.

        The arguments are numbers or arrays and broadcast.
        """
        # Force monotonicity: more tokens or context never take less time, and a falling line would extrapolate to 0.
        table = np.maximum.accumulate(np.maximum.accumulate(np.array(self.seconds), axis=0), axis=1)
        row, next_row, share = _between(self.sizes, tokens)
        column, next_column, part = _between(self.contexts, context)
        near, far = (
            table[rows, column] + part * (table[rows, next_column] - table[rows, column]) for rows in (row, next_row)
        )
        return np.asarray(near + share * (far - near))


def _between(places: Sequence[int], at: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the indices of the grid points left and right of ``at``, and the fraction of the way between them.

    The fraction is above 1 beyond the last grid point and 0 before the first.
    """
    known, last = np.array(places), len(places) - 1
    left = np.clip(np.searchsorted(known, at, side="right") - 1, 0, max(last - 1, 0))
    right = np.minimum(left + 1, last)
    return left, right, np.maximum(0.0, (np.asarray(at) - known[left]) / np.maximum(known[right] - known[left], 1))


class Clock:
    """A correction of :class:`Costs` by observed steps: a step does more than a forward, and the machine's load varies.

    The ratio of observed to timed seconds is tracked per batch size and step size, both in bins of half an octave. The
    median of the latest steps is used, because single steps are disturbed. Sizes without recent steps take the ratios
    of nearby sizes, weighted by distance.
    """

    KEPT = 31  # steps kept per size
    OLD = 512  # steps at the same batch size after which a size's steps are stale

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        # by batch, then by size: tokens, context and seconds of each step
        self._steps: defaultdict[int, defaultdict[int, deque[tuple[int, float, float]]]]
        self._steps = defaultdict(lambda: defaultdict(lambda: deque(maxlen=self.KEPT)))
        self._count: defaultdict[int, int] = defaultdict(int)  # number of steps, by batch
        self._last: dict[tuple[int, int], int] = {}  # the number of the last step, by batch and size

    def observe(self, batch: int, context: float, tokens: int, seconds: float) -> None:
        """Record a step.

        Args:
            batch: The number of sequences.
            context: Committed tokens per sequence, on average.
            tokens: The tokens of the forward, all sequences together.
            seconds: The duration of the step.
        """
        batch, size = _octaves(batch), _octaves(tokens)
        self._count[batch] += 1
        if self._last.get((batch, size), 0) <= self._count[batch] - self.OLD:
            self._steps[batch][size].clear()
        self._steps[batch][size].append((tokens, context, seconds))
        self._last[batch, size] = self._count[batch]

    def guesses(self, batch: int, tokens: int) -> bool:
        """Return whether steps of this batch size were observed recently, but none of about ``tokens`` tokens."""
        seen = self._seen(batch)
        return bool(seen) and _octaves(tokens) not in seen

    def _seen(self, batch: int) -> dict[int, deque[tuple[int, float, float]]]:
        """Return the recent steps of this batch size, by step size."""
        octave = _octaves(batch)
        oldest = self._count[octave] - self.OLD
        return {size: steps for size, steps in self._steps[octave].items() if self._last[octave, size] > oldest}

    def curve(self, batch: int, context: float, most: int) -> np.ndarray:
        """Return the expected seconds of a step with 0, 1, ..., ``most`` tokens, float64 ``[most + 1]``.

        Args:
            batch: The number of sequences.
            context: Committed tokens per sequence, on average.
            most: The largest number of tokens, all sequences together.
        """
        every = np.arange(most + 1)
        timed = self._costs.of(every, context)
        seen = self._seen(batch)
        if not seen:
            return timed
        tokens, at, took = np.array([step for steps in seen.values() for step in steps]).T
        slower = took / self._costs.of(tokens, at)
        sizes, counts = np.array(list(seen)), np.array([len(steps) for steps in seen.values()])
        medians = np.array([np.median(ratios) for ratios in np.split(slower, counts.cumsum()[:-1])])
        near = np.maximum(8.0 ** -abs(np.arange(_octaves(most) + 1)[:, None] - sizes), 1e-4)
        near *= counts / (counts + 4)  # a size with few steps weighs less
        ratios = (near @ medians + 1e-5) / (near.sum(axis=1) + 1e-5)
        return timed * ratios[np.rint(2 * np.log2(np.maximum(every, 1))).astype(int)]


@cache
def _octaves(number: int) -> int:
    return round(2 * math.log2(max(1, number)))


def load_costs(model: DecodeModel) -> Costs:
    """Load the costs of a model from the cache, or measure them (:func:`measure_costs`) and cache them.

    The cache (in ``TIDAR_CACHE``) has a file per machine, number of threads, model and dtype. Cached costs are checked
    against a few forwards, because the load of the machine may have changed since they were timed.
    """
    path = _costs_file(model)
    try:
        costs = Costs(**json.loads(path.read_text()))
        if _still_holds(costs, model):
            return costs
    except (OSError, ValueError, TypeError):
        pass
    costs = measure_costs(model)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(vars(costs)))
    except OSError:
        pass  # an unwritable cache: measure again next time
    return costs


def _costs_file(model: DecodeModel) -> Path:
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else processor()
    shape = model.causal_lm.config.to_json_string()
    what = [
        device,
        torch.get_num_threads(),
        torch.__version__,
        str(model.dtype),
        model.quantize,
        shape,
        SIZES,
        CONTEXTS,
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
    seconds = _best_seconds(model, [(size, context) for size in sizes for context in contexts], ROUNDS)
    return Costs(sizes, contexts, [[seconds[size, context] for context in contexts] for size in sizes])


def _still_holds(costs: Costs, model: DecodeModel) -> bool:
    """Return whether a few forwards still take about as long as recorded."""
    context, *_ = costs.contexts
    few = [size for size in CHECKED if size in costs.sizes]
    now = _best_seconds(model, [(size, context) for size in few], ROUNDS)
    return all(1 / OFF < now[size, context] / costs.of(size, context) < OFF for size in few)


@torch.inference_mode()
def _best_seconds(model: DecodeModel, forwards: Sequence[tuple[int, int]], rounds: int) -> dict[tuple[int, int], float]:
    """Return the minimum seconds of forwards, each given as (new tokens, cached tokens)."""
    most, longest = (max(numbers) for numbers in zip(*forwards, strict=True))
    runner = Forwards(model, 1, most + longest)
    token = 0 if model.mask_token_id != 0 else 1
    for size, context in forwards:  # warm up until CUDA graphs are captured, if they are used
        for _ in range((WARM_UP + 1) * runner.is_static):
            runner.run([Part(0, context, [token] * size, ForwardLayout(size))])
    seconds = dict.fromkeys(forwards, math.inf)
    begin = time.perf_counter()
    for number in range(rounds):
        if number >= 2 and time.perf_counter() - begin > SECONDS:
            break
        for size, context in forwards:
            parts = [Part(0, context, [token] * size, ForwardLayout(size))]
            for _ in range(2):  # the second run has warm caches, as decoding has
                start = time.perf_counter()
                hidden, _ = runner.run(parts)
                model.logits(hidden[: min(size, 32)]).max(-1).indices.tolist()  # argmax is 4 x slower
                seconds[size, context] = min(seconds[size, context], time.perf_counter() - start)
    return seconds
