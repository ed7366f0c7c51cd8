"""The time of a call on its device, by CUDA events on a GPU and by the clock on a CPU, and its peak memory on a GPU.

Only torch is imported, so that a bare machine can use it.
"""

import math
import statistics
import time
from collections.abc import Callable

import torch

SHORT = 5e-3  # seconds; a call below this is repeated within a sample
MOST_CALLS = 1000  # of a sample


def synchronize(where: torch.device) -> None:
    """Wait until the device has finished its work."""
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def peak_gpu_bytes(call: Callable[[], object], where: torch.device) -> int:
    """Return the peak of memory on a GPU during ``call``, beyond what was allocated before."""
    synchronize(where)
    torch.cuda.reset_peak_memory_stats(where)
    before = torch.cuda.memory_allocated(where)
    call()
    synchronize(where)
    return torch.cuda.max_memory_allocated(where) - before


def seconds_of(call: Callable[[], object], where: torch.device, calls: int = 1) -> float:
    """Return the seconds of one call, as the mean of ``calls`` calls in a row.

    On a GPU the time is taken on its stream, from the first kernel to the last. Time for which the GPU waits for the
    host in between is included, the wait of the host for the GPU is not.
    """
    synchronize(where)
    if where.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls
    with torch.cuda.device(where):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(calls):
            call()
        last.record()
        last.synchronize()
    return first.elapsed_time(last) / 1e3 / calls


def calls_per_sample(seconds: float) -> int:
    """Return how many calls of ``seconds`` each make a sample of at least :data:`SHORT`."""
    return min(MOST_CALLS, max(1, math.ceil(SHORT / max(seconds, 1e-9))))


def median_seconds(call: Callable[[], object], where: torch.device, samples: int = 5, warm_up: int = 2) -> float:
    """Return the median seconds of a call over several samples, after ``warm_up`` calls that are not timed."""
    for _ in range(warm_up):
        call()
    calls = calls_per_sample(seconds_of(call, where))
    return statistics.median(seconds_of(call, where, calls) for _ in range(samples))
