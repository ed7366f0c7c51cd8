"""Process groups and seeds. Only this module initializes torch.distributed and reads ``parallel_state``."""

import gc
import os
import random
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from tidar_megatron.config import ParallelConfig
from tidar_megatron.distributed import platform, startup
from tidar_megatron.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """The process groups, device and rank of this process."""

    groups: ProcessGroupCollection
    device: torch.device
    rank: int
    world_size: int

    @property
    def is_first_stage(self) -> bool:
        """Return whether this rank is in the first pipeline stage, which holds the embedding."""
        return self.groups.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Return whether this rank is in the last pipeline stage, which computes the logits and the loss."""
        return self.groups.pp.rank() == self.groups.pp.size() - 1

    def holds_embedding(self, vp_stage: int) -> bool:
        """Return whether this rank's model chunk ``vp_stage`` is the first of the model."""
        return self.is_first_stage and vp_stage == 0

    def holds_output(self, vp_stage: int, vp_size: int) -> bool:
        """Return whether this rank's model chunk ``vp_stage`` of ``vp_size`` is the last of the model."""
        return self.is_last_stage and vp_stage == vp_size - 1

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, the only process that writes files and prints."""
        return self.rank == 0

    def sum_over_data(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks that hold different tokens (data and context parallel), in place."""
        dist.all_reduce(values, group=self.groups.dp_cp)
        return values

    def sum_over_all(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over every rank, in place."""
        dist.all_reduce(values)
        return values

    def from_last_stage(self, values: torch.Tensor) -> torch.Tensor:
        """Give every pipeline stage the last stage's values, in place."""
        group = self.groups.pp
        if group.size() > 1:
            dist.broadcast(values, src=dist.get_process_group_ranks(group)[-1], group=group)
        return values

    def from_main(self, value: Any) -> Any:
        """Return rank 0's ``value``, which must be picklable, on every rank."""
        told = [value]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    def any_rank(self, flag: bool) -> bool:
        """Return, on every rank, whether ``flag`` is set on any rank of the job. Collective."""
        return bool(self.largest(flag))

    def largest(self, number: int) -> int:
        """Return, on every rank, the maximum of ``number`` (int32) over all ranks of the job. Collective."""
        value = torch.tensor([number], dtype=torch.int32, device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value.item())


def world_size_from_environment() -> int:
    """Return the number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank_from_environment() -> int:
    """Return the global rank of this process; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def initialize(parallel: ParallelConfig, seed: int) -> Ranks:
    """Join the job that torchrun describes in the environment (one process without it), and make the process groups.

    It may be called again with another layout in the same process: the old groups are destroyed first.

    Raises:
        UserError: This machine has fewer GPUs than processes.
    """
    platform.make_cpu_first_class()
    timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
    device = platform.device(int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"process {device.index} of this machine has no GPU: there are {torch.cuda.device_count()}; start as "
                "many processes as GPUs (--nproc-per-node), or set CUDA_VISIBLE_DEVICES= to train on the CPU"
            )
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        if "RANK" in os.environ:
            _join_process_group(timeout)
        else:  # no launcher: a job of one, without a port that could be taken
            dist.init_process_group(platform.backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return lay_out(parallel, seed, device)


def _join_process_group(timeout: timedelta) -> None:
    store = startup.store()
    if store is None:
        dist.init_process_group(platform.backend(), timeout=timeout)
    else:  # all ranks have already joined this store
        rank, world_size = rank_from_environment(), world_size_from_environment()
        store.set_timeout(timeout)
        dist.init_process_group(platform.backend(), store=store, rank=rank, world_size=world_size, timeout=timeout)


def lay_out(parallel: ParallelConfig, seed: int, device: torch.device) -> Ranks:
    """Make the process groups of a layout over the joined job; the groups of an earlier layout are destroyed first."""
    _end_groups()
    parallel_state.initialize_model_parallel(**group_sizes(parallel), create_gloo_process_groups=not is_played())
    groups = ProcessGroupCollection.use_mpu_process_groups()
    seed_everything(seed, groups.pp.rank())
    return Ranks(groups=groups, device=device, rank=dist.get_rank(), world_size=dist.get_world_size())


def is_played() -> bool:
    """Return whether this process only simulates a rank (``distributed/fake.py``), so that gloo has no peers."""
    return dist.get_backend() == "fake"


def group_sizes(parallel: ParallelConfig) -> dict[str, Any]:
    """Return the layout as keyword arguments of ``initialize_model_parallel``."""
    vpp = parallel.virtual_pipeline_model_parallel_size
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": vpp if (vpp or 1) > 1 else None,
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
        "distributed_timeout_minutes": parallel.distributed_timeout_minutes,
    }


def seed_everything(seed: int, pipeline_rank: int) -> None:
    """Seed all generators: differently per pipeline stage, equally on data-parallel ranks, as Megatron-LM does."""
    seed = seed + 100 * pipeline_rank
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def shut_down(orderly: bool = True) -> None:
    """Leave the job, and wait for the other ranks first, if ``orderly``.

    After a failure the other ranks may never answer, so nothing is waited for. NCCL's groups are not even destroyed:
    destroying one waits for its collectives. The process is about to exit, which ends them.
    """
    if not dist.is_initialized() or (not orderly and dist.get_backend() == "nccl"):
        return
    _end_groups(orderly)
    dist.destroy_process_group()


def _end_groups(orderly: bool = True) -> None:
    """Destroy the groups, which megatron-core only forgets: otherwise gloo's threads pile up with each layout."""
    groups = [group for group in parallel_state._global_process_group_list or [] if group is not None]
    if groups and orderly:
        dist.barrier()  # no rank still waits for a message in one of them
    for group in groups:
        dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
    # models refer to their groups in reference cycles; collect them now, on all ranks, because a gloo thread spins once
    # the other end of its connection is gone
    del groups
    gc.collect()
