"""Tools to compare functions: interleaved in one process, so that noise on the machine affects all of them equally."""

import gc
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from tidar_megatron.benchmark.timing import calls_per_sample, peak_gpu_bytes, seconds_of
from tidar_megatron.distributed.platform import device
from tidar_megatron.inference.costs import processor


@dataclass(frozen=True)
class Spread:
    """The median and the quartiles of repeated measurements."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: list[float]) -> "Spread":
        """Return the spread of one or more values."""
        low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return Spread(statistics.median(values), low, high)


class Timings:
    """The seconds of several functions, measured in rounds that run each function once."""

    def __init__(self, functions: Mapping[str, Callable[[], object]], repeats: int, warm: bool = False) -> None:
        """Run one round to warm up, then ``repeats`` rounds, in which the order alternates.

        On a GPU times are of CUDA events, and a short function is called several times a round. If ``warm``, each call
        that is timed follows one that is not, so that caches are as in a loop.
        """
        where = device()
        calls = dict.fromkeys(functions, 1)
        self.seconds: dict[str, list[float]] = {name: [] for name in functions}
        for number in range(repeats + 1):
            for name in list(functions)[:: 1 if number % 2 else -1]:
                gc.collect()
                if warm:
                    functions[name]()
                seconds = seconds_of(functions[name], where, calls[name])
                if number:
                    self.seconds[name].append(seconds)
                elif where.type == "cuda":  # the first call compiled and allocated, so another one says how long it is
                    calls[name] = calls_per_sample(seconds_of(functions[name], where))
            if number == 1:
                round_of = sum(seconds[0] for seconds in self.seconds.values())
                print(f"{', '.join(functions)}: {repeats} rounds of about {round_of:.2g} s", file=sys.stderr)

    def of(self, name: str) -> Spread:
        """Return the spread of a function's seconds."""
        return Spread.of(self.seconds[name])

    def ratio(self, name: str, other: str) -> Spread:
        """Return the spread of the ratio of ``name``'s time to ``other``'s, paired by round."""
        return Spread.of([a / b for a, b in zip(self.seconds[name], self.seconds[other], strict=True)])


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the peak bytes of tensors made during ``run``; on a CPU, memory that kernels allocate is not counted."""
    where = device()
    if where.type == "cuda":
        return peak_gpu_bytes(run, where)
    with _LiveStorages() as live:
        run()
    return live.peak


def allocated_bytes(run: Callable[[], object]) -> int:
    """Return the total bytes that ``run`` takes from the allocator, freed or not, including memory inside kernels."""
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
        return [] if value.is_mkldnn else [value]  # the weights that oneDNN laid out have no storage to ask
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, list | tuple) else []


def machine() -> dict[str, Any]:
    """Return a description of this machine and its software, to publish with figures measured on it."""
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
    """Return a spread as a dictionary of numbers rounded for JSON."""
    return {name: round(value, 4) for name, value in asdict(spread).items()}
