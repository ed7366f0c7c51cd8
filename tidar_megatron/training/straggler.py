"""Find stragglers: measure each rank's own time per step, and compare the slowest rank with the median.

A rank's own time runs until its gradients are ready for the data-parallel reduction: the wait for its batches, forward
and backward. It excludes the wait for other ranks in the reductions before and after. So it distinguishes data-parallel
replicas; the ranks of one replica (TP, PP, CP) wait for each other within the forward, and share the time of their
slowest rank. On a GPU, forward and backward are timed with CUDA events.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tidar_megatron.distributed.groups import Ranks
from tidar_megatron.distributed.platform import stopwatch


class OwnTime:
    """A timer of this rank's own time per step, with a report over all ranks.

    Args:
        ranks: The ranks to compare.
        config: The model's megatron-core configuration; its ``finalize_model_grads_func`` is wrapped, because it is
            called when the gradients are ready.
    """

    def __init__(self, ranks: Ranks, config: Any) -> None:
        self._ranks = ranks
        self._outside, self._steps = 0.0, 0
        self._stop: Callable[[], Callable[[], float]] | None = None
        self._passes: list[Callable[[], float]] = []  # times of forward and backward, read only in report()
        finalize = config.finalize_model_grads_func

        def gradients_are_ready(*arguments: Any, **named: Any) -> Any:
            if self._stop is not None:
                self._passes.append(self._stop())
                self._stop = None
            return finalize(*arguments, **named)

        config.finalize_model_grads_func = gradients_are_ready

    def add(self, seconds: float) -> None:
        """Add seconds that a step spent outside forward and backward."""
        self._outside += seconds

    def start(self) -> None:
        """Start to time the forward and backward of a step."""
        self._steps += 1
        self._stop = stopwatch(self._ranks.device)

    def report(self) -> dict[str, float]:
        """Return the slowest rank since the last report, and its time over the median rank's. Collective.

        The result is as in :func:`slowest`, and empty in a job of one rank.
        """
        total, steps = self._outside + sum(seconds() for seconds in self._passes), max(1, self._steps)
        self._outside, self._steps, self._passes = 0.0, 0, []
        if self._ranks.world_size == 1:
            return {}
        mine = torch.tensor([total / steps], dtype=torch.float64, device=self._ranks.device)
        gathered = [torch.empty_like(mine) for _ in range(self._ranks.world_size)]
        dist.all_gather(gathered, mine)
        return slowest(torch.cat(gathered).tolist())


def slowest(seconds: list[float]) -> dict[str, float]:
    """Return ``slowest_rank`` and ``slowest_over_median``, the ratio of its time to the lower median of all ranks.

    Args:
        seconds: The time per step of each rank.
    """
    rank = max(range(len(seconds)), key=seconds.__getitem__)
    median = sorted(seconds)[(len(seconds) - 1) // 2]
    return {"slowest_rank": rank, "slowest_over_median": seconds[rank] / max(median, 1e-9)}
