"""The slowest rank and its share; two ranks that really differ are in tests/faults/."""

import pytest
import torch

from tidar_megatron.distributed.platform import stopwatch
from tidar_megatron.training.straggler import slowest


@pytest.mark.parametrize(
    ("seconds", "rank", "share"),
    [([1.0, 3.0], 1, 3.0), ([2.0, 1.0, 1.0], 0, 2.0), ([1.0, 1.0, 2.0, 4.0], 3, 4.0), ([1.0, 1.0], 0, 1.0)],
)
def test_slowest(seconds, rank, share):
    assert slowest(seconds) == {"slowest_rank": rank, "slowest_over_median": share}


def test_a_stopwatch_counts_to_its_stop_and_not_to_its_reading(monkeypatch):
    clock = iter([10.0, 12.5, 99.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    seconds = stopwatch(torch.device("cpu"))()
    assert (seconds(), seconds()) == (2.5, 2.5)
