"""Which rank is slow? Each rank's own time of a step, and the slowest beside the median.

A rank's own time is what it needs until its gradients are ready to be summed over the data-parallel ranks: waiting for
its batches, forward and backward. The wait for the others in the sums before and after that is left out. So
data-parallel replicas are told apart; the ranks of one replica (TP, PP, CP) wait for each other within the forward, and
share their slowest's time. On a GPU the forward and backward are timed by the device.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tidar_megatron.distributed.groups import Ranks
from tidar_megatron.distributed.platform import stopwatch


class OwnTime:
    """This rank's own time, step by step, and the report over all ranks.

    Args:
        ranks: whose.
        config: megatron-core's of the model; it says what is called when the gradients are ready.
    """

    def __init__(self, ranks: Ranks, config: Any) -> None:
        self._ranks = ranks
        self._outside, self._steps = 0.0, 0
        self._stop: Callable[[], Callable[[], float]] | None = None
        self._passes: list[Callable[[], float]] = []  # of forward and backward; asked when they are reported, long past
        finalize = config.finalize_model_grads_func

        def gradients_are_ready(*arguments: Any, **named: Any) -> Any:
            if self._stop is not None:
                self._passes.append(self._stop())
                self._stop = None
            return finalize(*arguments, **named)

        config.finalize_model_grads_func = gradients_are_ready

    def add(self, seconds: float) -> None:
        """Spent on a step outside of forward and backward."""
        self._outside += seconds

    def start(self) -> None:
        """Forward and backward begin."""
        self._steps += 1
        self._stop = stopwatch(self._ranks.device)

    def report(self) -> dict[str, float]:
        """Of the steps since the last report: the slowest rank and its time over the median rank's. Collective."""
        total, steps = self._outside + sum(seconds() for seconds in self._passes), max(1, self._steps)
        self._outside, self._steps, self._passes = 0.0, 0, []
        if self._ranks.world_size == 1:
            return {}
        mine = torch.tensor([total / steps], dtype=torch.float64, device=self._ranks.device)
        gathered = [torch.empty_like(mine) for _ in range(self._ranks.world_size)]
        dist.all_gather(gathered, mine)
        return slowest(torch.cat(gathered).tolist())


def slowest(seconds: list[float]) -> dict[str, float]:
    """The slowest of ranks, and its time over the lower median's: of two, over the other's."""
    rank = max(range(len(seconds)), key=seconds.__getitem__)
    median = sorted(seconds)[(len(seconds) - 1) // 2]
    return {"slowest_rank": rank, "slowest_over_median": seconds[rank] / max(median, 1e-9)}
