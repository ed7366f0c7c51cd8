"""Simulate one rank of any layout in a single process, with torch's fake process group, whose collectives do nothing.

The rank *holds* exactly what it holds in the real job (parameters, buffers, optimizer shards), because the same code
builds it; on the meta device it takes no memory. What the rank *computes* has the right shapes, but under TP, PP, CP or
EP the values are meaningless.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from tidar_megatron.config import ParallelConfig
from tidar_megatron.distributed import platform
from tidar_megatron.distributed.groups import Ranks, lay_out, shut_down


@contextmanager
def play_rank(
    parallel: ParallelConfig, rank: int, world_size: int, device: str = "meta", seed: int = 0
) -> Iterator[Ranks]:
    """Simulate ``rank`` of ``world_size`` in this block; tensors are created on ``device`` (``meta`` or ``cpu``).

    The process must not have joined a job, and must not see a GPU (``CUDA_VISIBLE_DEVICES=``).
    """
    assert not dist.is_initialized(), "torch.distributed is initialized: a process that is a rank cannot simulate one"
    assert not platform.has_gpu(), "hide the GPUs: set CUDA_VISIBLE_DEVICES= before torch is imported"
    platform.make_cpu_first_class()
    where = torch.device(device)
    try:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        with platform.pretend_current_device(where):
            ranks = lay_out(parallel, seed, where)
            with where:
                yield ranks
    finally:
        shut_down()
