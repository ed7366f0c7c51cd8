"""Vocabulary-parallel ranks without processes."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist


@pytest.fixture(scope="module")
def ranks():
    """``ranks(n, function)``: the function's results on the n ranks of a group, each a thread of this process."""
    pools = {}

    def run(size, function):
        if size not in pools:
            store, pool = dist.HashStore(), ThreadPoolExecutor(size)
            join = lambda rank: dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=60))  # noqa: E731
            pools[size] = pool, list(pool.map(join, range(size)))
        pool, groups = pools[size]
        return list(pool.map(function, groups))

    yield run
    for pool, _ in pools.values():
        pool.shutdown()
