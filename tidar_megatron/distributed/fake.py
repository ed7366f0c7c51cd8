"""One process plays any rank of a layout of any size: torch's fake process group, in which collectives do nothing.

What a rank *holds* (parameters, buffers, the optimizer's shards) is then exactly what it holds in the real job, built
by the same code; on the meta device it takes no memory. What a rank *computes* has the right shapes, and with TP, PP,
CP or EP values that mean nothing.
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
    """Be ``rank`` of ``world_size`` for a while; what is built meanwhile lies on ``device`` (``meta`` or ``cpu``).

    It needs a process without a job of its own and without a GPU in sight (``CUDA_VISIBLE_DEVICES=``).
    """
    assert not dist.is_initialized(), "a process plays a rank or is one"
    assert not platform.has_gpu(), "hide the GPUs from it: CUDA_VISIBLE_DEVICES= before torch is imported"
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
