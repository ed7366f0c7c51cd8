"""What a forward costs on this machine: timed once for a model, and kept."""

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
ROUNDS, SECONDS = 5, 4.0  # no more rounds after so many seconds, but two
CHECKED, OFF = (1, 8, 16, 32), 1.3  # what is kept is timed anew where one of these takes so many times as long


@dataclass
class Costs:
    """Seconds of a forward, the output layer over its rows included.

    ``seconds[i][j]``: of ``sizes[i]`` tokens behind ``contexts[j]``; between them, and beyond, they are on a line.
    """

    sizes: list[int]
    contexts: list[int]
    seconds: list[list[float]]

    def of(self, tokens: ArrayLike, context: ArrayLike) -> np.ndarray:
        """Of so many tokens behind so many, each a number or an array of them; float64."""
        # more tokens and more context never take less: where they seem to, a line beyond what was timed would go to 0
        table = np.maximum.accumulate(np.maximum.accumulate(np.array(self.seconds), axis=0), axis=1)
        row, next_row, share = _between(self.sizes, tokens)
        column, next_column, part = _between(self.contexts, context)
        near, far = (
            table[rows, column] + part * (table[rows, next_column] - table[rows, column]) for rows in (row, next_row)
        )
        return np.asarray(near + share * (far - near))


def _between(places: Sequence[int], at: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The place to the left, the next, how far on the way to it: more than 1 behind the last, 0 before the first."""
    known, last = np.array(places), len(places) - 1
    left = np.clip(np.searchsorted(known, at, side="right") - 1, 0, max(last - 1, 0))
    right = np.minimum(left + 1, last)
    return left, right, np.maximum(0.0, (np.asarray(at) - known[left]) / np.maximum(known[right] - known[left], 1))


class Clock:
    """:class:`Costs` as they turn out to be: a step is more than a forward, and the machine not what it was when timed.

    How many times as long a step took is kept by its size, in half octaves, and by batch; the median of the last
    counts, for now and then a step is disturbed. Sizes that were not seen of late follow those that were: the machine
    may have been busy then.
    """

    KEPT = 31  # steps of a size
    OLD = 512  # steps since a size was seen, of such a batch

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        # by batch, by size: tokens, context and seconds
        self._steps: defaultdict[int, defaultdict[int, deque[tuple[int, float, float]]]]
        self._steps = defaultdict(lambda: defaultdict(lambda: deque(maxlen=self.KEPT)))
        self._count: defaultdict[int, int] = defaultdict(int)  # steps, by batch
        self._last: dict[tuple[int, int], int] = {}  # of these the last of a size, by batch and size

    def observe(self, batch: int, context: float, tokens: int, seconds: float) -> None:
        """A step of so many tokens, all sequences together."""
        batch, size = _octaves(batch), _octaves(tokens)
        self._count[batch] += 1
        if self._last.get((batch, size), 0) <= self._count[batch] - self.OLD:
            self._steps[batch][size].clear()
        self._steps[batch][size].append((tokens, context, seconds))
        self._last[batch, size] = self._count[batch]

    def guesses(self, batch: int, tokens: int) -> bool:
        """Whether it knows steps of such a batch, but none of about so many tokens."""
        seen = self._seen(batch)
        return bool(seen) and _octaves(tokens) not in seen

    def _seen(self, batch: int) -> dict[int, deque[tuple[int, float, float]]]:
        """Steps by size, of late."""
        octave = _octaves(batch)
        oldest = self._count[octave] - self.OLD
        return {size: steps for size, steps in self._steps[octave].items() if self._last[octave, size] > oldest}

    def curve(self, batch: int, context: float, most: int) -> np.ndarray:
        """Of 0, 1, 2, ... ``most`` tokens, all sequences of the batch together, behind so many; float64."""
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
        near *= counts / (counts + 4)  # how sure
        ratios = (near @ medians + 1e-5) / (near.sum(axis=1) + 1e-5)
        return timed * ratios[np.rint(2 * np.log2(np.maximum(every, 1))).astype(int)]


@cache
def _octaves(number: int) -> int:
    return round(2 * math.log2(max(1, number)))


def load_costs(model: DecodeModel) -> Costs:
    """:func:`measure_costs`, kept in a file per machine, threads, model and dtype (in ``TIDAR_CACHE``).

    What is kept is held against a few forwards: it may have been timed while the machine was busy, or is by now.
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
        pass  # measured again next time
    return costs


def _costs_file(model: DecodeModel) -> Path:
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else processor()
    shape = model.causal_lm.config.to_json_string()
    what = [device, torch.get_num_threads(), torch.__version__, str(model.dtype), shape, SIZES, CONTEXTS]
    return cache_folder() / f"costs-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}.json"


@cache
def processor() -> str:
    """The CPU, as Linux names it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            return next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def measure_costs(model: DecodeModel) -> Costs:
    """Time forwards of a few sizes behind a few contexts, in turns; the best of each: what disturbs only ever adds."""
    limit = model.context_limit
    sizes = [size for size in SIZES if size < limit] or [1]
    contexts = [context for context in CONTEXTS if context + sizes[-1] <= limit] or [max(0, limit - sizes[-1])]
    seconds = _best_seconds(model, [(size, context) for size in sizes for context in contexts], ROUNDS)
    return Costs(sizes, contexts, [[seconds[size, context] for context in contexts] for size in sizes])


def _still_holds(costs: Costs, model: DecodeModel) -> bool:
    """Whether a few forwards take what they took."""
    context, *_ = costs.contexts
    few = [size for size in CHECKED if size in costs.sizes]
    now = _best_seconds(model, [(size, context) for size in few], ROUNDS)
    return all(1 / OFF < now[size, context] / costs.of(size, context) < OFF for size in few)


@torch.inference_mode()
def _best_seconds(model: DecodeModel, forwards: Sequence[tuple[int, int]], rounds: int) -> dict[tuple[int, int], float]:
    """Of forwards of so many tokens behind so many."""
    most, longest = (max(numbers) for numbers in zip(*forwards, strict=True))
    runner = Forwards(model, 1, most + longest)
    token = 0 if model.mask_token_id != 0 else 1
    for size, context in forwards:  # until they are captured, where they will be
        for _ in range((WARM_UP + 1) * runner.is_static):
            runner.run([Part(0, context, [token] * size, ForwardLayout(size))])
    seconds = dict.fromkeys(forwards, math.inf)
    begin = time.perf_counter()
    for number in range(rounds):
        if number >= 2 and time.perf_counter() - begin > SECONDS:
            break
        for size, context in forwards:
            parts = [Part(0, context, [token] * size, ForwardLayout(size))]
            for _ in range(2):  # the second finds the caches warm, as decoding does
                start = time.perf_counter()
                hidden, _ = runner.run(parts)
                model.logits(hidden[: min(size, 32)]).argmax(-1).tolist()
                seconds[size, context] = min(seconds[size, context], time.perf_counter() - start)
    return seconds
