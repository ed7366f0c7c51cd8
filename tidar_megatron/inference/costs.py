"""What a forward costs on this machine: timed once for a model, and kept."""

import hashlib
import json
import math
import os
import platform
import time
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

import numpy as np
import torch

from tidar_megatron.inference.attention import Part, Plan
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.static import Forwards

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

    def of(self, tokens: int, context: float) -> float:
        """Of so many tokens behind so many."""
        row, share = _between(self.sizes, tokens)
        column, part = _between(self.contexts, context)
        near, far = (
            row_of[column] + part * (row_of[min(column + 1, len(row_of) - 1)] - row_of[column])
            for row_of in (self.seconds[row], self.seconds[min(row + 1, len(self.sizes) - 1)])
        )
        return near + share * (far - near)

    def curve(self, context: float, most: int) -> np.ndarray:
        """Of 0, 1, 2, ... ``most`` tokens behind so many, float64."""
        known = [size for size in self.sizes if size < most] + [most]
        return np.interp(np.arange(most + 1), known, [self.of(size, context) for size in known])


def _between(places: Sequence[int], at: float) -> tuple[int, float]:
    """The place to the left, and how far on the way to the next: more than 1 behind the last, 0 before the first."""
    left = min(max(bisect_right(places, at) - 1, 0), max(len(places) - 2, 0))
    return left, max(0.0, (at - places[left]) / (places[left + 1] - places[left])) if len(places) > 1 else 0.0


class Clock:
    """:class:`Costs` as they turn out to be: a step is more than a forward, and the machine not what it was when timed.

    How many times as long a step took is kept by its size, in half octaves, and by batch; the median of the last
    counts, for now and then a step is disturbed. Sizes far from any that was seen follow those that were.
    """

    KEPT = 31  # steps of a size

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        # by batch, by size: tokens, context and seconds
        self._steps: defaultdict[int, defaultdict[int, deque[tuple[int, float, float]]]]
        self._steps = defaultdict(lambda: defaultdict(lambda: deque(maxlen=self.KEPT)))

    def observe(self, batch: int, context: float, tokens: int, seconds: float) -> None:
        """A step of so many tokens, all sequences together."""
        self._steps[_octaves(batch)][_octaves(tokens)].append((tokens, context, seconds))

    def curve(self, batch: int, context: float, most: int) -> list[float]:
        """As :meth:`Costs.curve`, for the batch."""
        timed = self._costs.curve(context, most)
        seen = self._steps.get(_octaves(batch))
        if not seen:
            return timed.tolist()
        sizes, counts = np.array(list(seen)), np.array([len(steps) for steps in seen.values()])
        ratios_of = ([took / self._costs.of(tokens, at) for tokens, at, took in steps] for steps in seen.values())
        medians = np.array([median(ratios) for ratios in ratios_of])
        near = np.maximum(8.0 ** -abs(np.arange(_octaves(most) + 1)[:, None] - sizes), 1e-4)
        near *= counts / (counts + 4)  # how sure
        ratios = (near @ medians + 1e-5) / (near.sum(axis=1) + 1e-5)
        return (timed * ratios[[_octaves(tokens) for tokens in range(most + 1)]]).tolist()


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
        path.with_suffix(f".{os.getpid()}").write_text(json.dumps(vars(costs)))
        path.with_suffix(f".{os.getpid()}").replace(path)
    except OSError:
        pass  # measured again next time
    return costs


def _costs_file(model: DecodeModel) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tidar-megatron"
    root = Path(os.environ.get("TIDAR_CACHE") or home)
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else processor()
    shape = model.causal_lm.config.to_json_string()
    what = [device, torch.get_num_threads(), torch.__version__, str(model.dtype), shape, SIZES, CONTEXTS]
    return root / f"costs-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}.json"


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
    seconds = dict.fromkeys(forwards, math.inf)
    begin = time.perf_counter()
    for number in range(rounds):
        if number >= 2 and time.perf_counter() - begin > SECONDS:
            break
        for size, context in forwards:
            parts = [Part(0, context, [token] * size, Plan(size))]
            for _ in range(2):  # the second finds the caches warm, as decoding does
                start = time.perf_counter()
                hidden, _ = runner.run(parts)
                model.logits(hidden[: min(size, 32)]).argmax(-1).tolist()
                seconds[size, context] = min(seconds[size, context], time.perf_counter() - start)
    return seconds
