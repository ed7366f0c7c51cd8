"""What a forward costs on this machine: timed once for a model, and kept."""

import hashlib
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

import torch

from tidar_megatron.inference.attention import PackedForward, Part, Plan
from tidar_megatron.inference.cache import KVPool
from tidar_megatron.inference.model import DecodeModel

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 72, 104, 136, 208, 272)  # tokens of a forward
CONTEXTS = (64, 512, 2048)
ROUNDS = 5


@dataclass
class Costs:
    """Seconds of a forward, the output layer over its rows included.

    ``seconds[i][j]``: of ``sizes[i]`` tokens behind ``contexts[j]``; between them costs are interpolated.
    """

    sizes: list[int]
    contexts: list[int]
    seconds: list[list[float]]

    def of(self, tokens: float, context: float) -> float:
        """Of so many tokens behind so many; beyond the largest size in proportion to the last two."""
        column = [_between(self.contexts, row, context) for row in self.seconds]
        return _between(self.sizes, column, tokens)


def _between(places: Sequence[float], values: Sequence[float], at: float) -> float:
    """Linear, also beyond the ends (not below the first value)."""
    if len(places) == 1 or at <= places[0]:
        return values[0]
    right = next((n for n, place in enumerate(places) if place >= at), len(places) - 1)
    left = right - 1
    slope = (values[right] - values[left]) / (places[right] - places[left])
    return max(values[left] + slope * (at - places[left]), values[0])


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
    """Time forwards of a few sizes behind a few contexts; the median of each."""
    limit = model.context_limit
    sizes = [size for size in SIZES if size < limit] or [1]
    contexts = [context for context in CONTEXTS if context + sizes[-1] <= limit] or [max(0, limit - sizes[-1])]
    pool = KVPool(1, contexts[-1] + sizes[-1])
    token = 0 if model.mask_token_id != 0 else 1
    seconds: list[list[list[float]]] = [[[] for _ in contexts] for _ in sizes]
    for j, context in enumerate(contexts):
        for i, size in enumerate(sizes):
            packed = PackedForward(pool, [Part(0, context, [token] * size, Plan(size))])
            for number in range(ROUNDS + 1):  # one after the other, as decoding does: caches are warm
                start = time.perf_counter()
                hidden = model.forward(packed)
                model.logits(hidden[: min(size, 32)]).argmax(-1).tolist()
                if number:
                    seconds[i][j].append(time.perf_counter() - start)
    return Costs(sizes, contexts, [[median(times) for times in row] for row in seconds])
