"""How things are compared: side by side in one process, in turns, so that what disturbs one disturbs the other."""

import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from tidar_megatron.distributed.platform import device
from tidar_megatron.inference.costs import processor


@dataclass(frozen=True)
class Spread:
    """Of repeated measurements: the median, and the quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: list[float]) -> "Spread":
        """Of at least one value."""
        low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return Spread(statistics.median(values), low, high)


class Timings:
    """Seconds of several functions, one run of each a round."""

    def __init__(self, functions: Mapping[str, Callable[[], object]], repeats: int) -> None:
        """Run each once to warm up, then ``repeats`` rounds, every second one the other way round."""
        where = device()
        self.seconds: dict[str, list[float]] = {name: [] for name in functions}
        for number in range(repeats + 1):
            for name in list(functions)[:: 1 if number % 2 else -1]:
                gc.collect()
                synchronize(where)
                start = time.perf_counter()
                functions[name]()
                synchronize(where)
                if number:
                    self.seconds[name].append(time.perf_counter() - start)
            if number == 1:
                round_of = sum(seconds[0] for seconds in self.seconds.values())
                print(f"{', '.join(functions)}: {repeats} rounds of about {round_of:.2g} s", file=sys.stderr)

    def of(self, name: str) -> Spread:
        """Seconds of a function."""
        return Spread.of(self.seconds[name])

    def ratio(self, name: str, other: str) -> Spread:
        """How many times as long ``name`` takes as ``other``, from the pairs of each round."""
        return Spread.of([a / b for a, b in zip(self.seconds[name], self.seconds[other], strict=True)])


def synchronize(where: torch.device) -> None:
    """Wait for the device."""
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that tensors made during ``run`` held at one time; what kernels allocate inside is not seen."""
    where = device()
    if where.type == "cuda":
        torch.cuda.synchronize(where)
        torch.cuda.reset_peak_memory_stats(where)
        before = torch.cuda.memory_allocated(where)
        run()
        torch.cuda.synchronize(where)
        return torch.cuda.max_memory_allocated(where) - before
    with _LiveStorages() as live:
        run()
    return live.peak


def allocated_bytes(run: Callable[[], object]) -> int:
    """All bytes that ``run`` took from the allocator, at whatever time and for however long; kernels' own included."""
    where = device()
    if where.type == "cuda":
        before = torch.cuda.memory_stats(where)["allocated_bytes.all.allocated"]
        run()
        return torch.cuda.memory_stats(where)["allocated_bytes.all.allocated"] - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = seen.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0)


class _LiveStorages(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = {t.untyped_storage()._cdata for t in _tensors((args, tuple(kwargs.values())))}
        made = func(*args, **kwargs)
        self._live = {at: kept for at, kept in self._live.items() if not kept[0].expired()}
        for tensor in _tensors(made):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._live:
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return made


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, list | tuple) else []


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    where = device()
    shown = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron-core": version("megatron-core"),
    }
    return shown | ({"gpu": torch.cuda.get_device_name(where)} if where.type == "cuda" else {})


def rounded(spread: Spread) -> dict[str, float]:
    """For JSON."""
    return {name: round(value, 4) for name, value in asdict(spread).items()}
