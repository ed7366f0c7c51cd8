"""The slowest rank and its share; two ranks that really differ are in tests/faults/."""

import pytest

from tidar_megatron.training.straggler import slowest


@pytest.mark.parametrize(
    ("seconds", "rank", "share"),
    [([1.0, 3.0], 1, 3.0), ([2.0, 1.0, 1.0], 0, 2.0), ([1.0, 1.0, 2.0, 4.0], 3, 4.0), ([1.0, 1.0], 0, 1.0)],
)
def test_slowest(seconds, rank, share):
    assert slowest(seconds) == {"slowest_rank": rank, "slowest_over_median": share}
