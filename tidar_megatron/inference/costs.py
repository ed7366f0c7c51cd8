"""What a forward costs on this machine: timed once for a model, and kept."""

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from tidar_megatron.inference.attention import Part, Plan
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.static import Forwards

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 72, 104, 136, 208, 272)  # tokens of a forward
CONTEXTS = (64, 1024)
ROUNDS, SECONDS = 5, 4.0  # no more rounds after so many seconds, but two


@dataclass
class Costs:
    """Seconds of a forward, the output layer over its rows included.

    ``seconds[i][j]``: of ``sizes[i]`` tokens behind ``contexts[j]``; between them, and beyond, they are on a line.
    """

    sizes: list[int]
    contexts: list[int]
    seconds: list[list[float]]

    def curve(self, context: float, most: int) -> list[float]:
        """Of 0, 1, 2, ... ``most`` tokens behind so many."""
        column = np.array([_on_line(self.contexts, row, context) for row in self.seconds])
        found = np.interp(np.arange(most + 1), self.sizes, column)
        if len(self.sizes) > 1 and most > (last := self.sizes[-1]):
            slope = max(0.0, (column[-1] - column[-2]) / (last - self.sizes[-2]))
            found[last:] = column[-1] + slope * np.arange(most + 1 - last)
        return found.tolist()


def _on_line(places: Sequence[float], values: Sequence[float], at: float) -> float:
    """Beyond the last in proportion to the last two; never less than the first."""
    found = float(np.interp(at, places, values))
    if len(places) > 1 and at > places[-1]:
        found += (at - places[-1]) * (values[-1] - values[-2]) / (places[-1] - places[-2])
    return max(found, values[0])


def load_costs(model: DecodeModel) -> Costs:
    """:func:`measure_costs`, kept in a file per machine, threads, model and dtype (in ``TIDAR_CACHE``)."""
    path = _costs_file(model)
    try:
        return Costs(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
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


@torch.inference_mode()
def measure_costs(model: DecodeModel) -> Costs:
    """Time forwards of a few sizes behind a few contexts, in turns; the best of each: what disturbs only ever adds."""
    limit = model.context_limit
    sizes = [size for size in SIZES if size < limit] or [1]
    contexts = [context for context in CONTEXTS if context + sizes[-1] <= limit] or [max(0, limit - sizes[-1])]
    forwards = Forwards(model, 1, contexts[-1] + sizes[-1])
    token = 0 if model.mask_token_id != 0 else 1
    seconds = [[math.inf] * len(contexts) for _ in sizes]
    begin = time.perf_counter()
    for number in range(ROUNDS):
        if number >= 2 and time.perf_counter() - begin > SECONDS:
            break
        for i, size in enumerate(sizes):
            for j, context in enumerate(contexts):
                parts = [Part(0, context, [token] * size, Plan(size))]
                for _ in range(2):  # the second finds the caches warm, as decoding does
                    start = time.perf_counter()
                    hidden, _ = forwards.run(parts)
                    model.logits(hidden[: min(size, 32)]).argmax(-1).tolist()
                    seconds[i][j] = min(seconds[i][j], time.perf_counter() - start)
    return Costs(sizes, contexts, seconds)
