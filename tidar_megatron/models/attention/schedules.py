"""The schedules of attention, found by the metadata tensor that travels through megatron-core.

megatron-core passes one tensor from the model's forward to every layer, through pipeline stages and recomputation. It
arrives as the same tensor or as a view of it. So a schedule is found by the address of that tensor's data, and it
lives as long as the tensor that it was prepared for.
"""

import weakref

import torch.distributed as dist
from torch import Tensor

from tidar_megatron.context_parallel import query_slices
from tidar_megatron.models.attention.hybrid import AttentionPlan, AttentionSchedule, make_plan, make_schedule


class AttentionSchedules:
    """The schedules of the batches in flight, shared by all layers of this rank's model.

    Args:
        backend, chunk_size: see :func:`tidar_megatron.models.attention.make_schedule`.
        cp_group: the context-parallel group, whose ranks share a sequence.
    """

    def __init__(self, backend: str, chunk_size: int, cp_group: dist.ProcessGroup) -> None:
        self._backend, self._chunk_size, self._cp_group = backend, chunk_size, cp_group
        self._schedules: dict[tuple, AttentionSchedule] = {}

    def plan(self, on_host: Tensor, num_queries: int, masks_alone: bool = False) -> AttentionPlan | None:
        """Return what can be made of a batch's schedule on the host ahead of its step, in any thread.

        Args:
            on_host: the metadata, int32 ``[b, keys, 4]`` on the CPU.
            num_queries: tokens per row on this rank that are queries.
            masks_alone: whether these are the last keys, the rank's masks, without its clean tokens.
        """
        return make_plan(on_host, self._queries(on_host, num_queries, masks_alone), backend=self._backend)

    def prepare(
        self,
        visibility: Tensor,
        on_host: Tensor,
        num_queries: int,
        plan: AttentionPlan | None = None,
        masks_alone: bool = False,
    ) -> None:
        """Make the schedule of a batch before its forward, so that no layer has to read from the device.

        Args:
            visibility: the metadata that the model will receive, int32 ``[b, keys, 4]``.
            on_host: the same metadata on the CPU.
            num_queries: tokens per row on this rank that are queries.
            plan: what :meth:`plan` returned for the batch, copied to the device of ``visibility``.
            masks_alone: as for :meth:`plan`.
        """
        key = _contents(visibility)
        if key not in self._schedules:
            made = None if plan is None else plan.schedule()
            # detached: on a CPU the two are one tensor, and a schedule that refers to it would never be freed
            self._schedules[key] = made or self._make(
                on_host.detach(), num_queries, str(visibility.device), masks_alone
            )
            weakref.finalize(visibility, self._schedules.pop, key, None).atexit = False

    def find(self, visibility: Tensor, num_queries: int, masks_alone: bool = False) -> AttentionSchedule:
        """Return the schedule prepared for these metadata, or make one for this call alone.

        Args:
            visibility: the metadata, int32 ``[b, keys, 4]``: the tensor given to :meth:`prepare`, or a view of it.
            num_queries: tokens per row on this rank that are queries.
            masks_alone: as for :meth:`plan`.
        """
        schedule = self._schedules.get(_contents(visibility))
        return schedule or self._make(visibility.cpu(), num_queries, str(visibility.device), masks_alone)

    def _queries(self, on_host: Tensor, num_queries: int, masks_alone: bool) -> tuple[slice, ...]:
        keys = on_host.shape[1]
        if masks_alone:
            return (slice(keys - num_queries, keys),)
        return query_slices(num_queries, keys, self._cp_group.rank(), self._cp_group.size())

    def _make(self, on_host: Tensor, num_queries: int, device: str, masks_alone: bool) -> AttentionSchedule:
        queries = self._queries(on_host, num_queries, masks_alone)
        return make_schedule(on_host, queries, backend=self._backend, chunk_size=self._chunk_size, device=device)


def _contents(tensor: Tensor) -> tuple:
    return tensor.device, tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride()
