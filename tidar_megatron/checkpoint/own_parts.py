"""Save and load the distributed optimizer's state without gathering it: each rank writes and reads its own part.

A rank owns a range of each flattened weight. Such a range is a few boxes of the unflattened weight: the end of a row,
whole rows, the beginning of a row. Each box becomes a chunk of a tensor that has the weight's name and global shape, so
a checkpoint can be loaded in any layout, and by the plain optimizer.

None of megatron-core's formats (0.16.1 to 0.19.2) does both. ``fully_reshardable`` has the same tensors, but gathers
them on one rank of each data-parallel group, and every rank allocates all of them to load. ``dp_reshardable`` gathers
nothing, but only the data-parallel size may change. ``ShardedTensor`` refuses ``fully_sharded_model_space``.
"""

import math
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint import default_planner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes


def keep_own_parts(optimizer: MegatronOptimizer) -> None:
    """Make megatron-core's distributed optimizers save and load their own parts."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if type(part) is DistributedOptimizer:
            part.__class__ = OwnParts


@contextmanager
def checked_by_volume() -> Iterator[None]:
    """Replace torch's check that a tensor's chunks cover it: by their volume, instead of by comparing every two chunks.

    If 64 ranks share the optimizer of 8B parameters in 73 buckets, Adam's two moments and the float32 weights are 9,281
    chunks each, and torch's check takes 6 to 9 s for each of the three.
    """
    original = default_planner._validate_global_plan
    valid = original([], Metadata({}))  # torch changed its type

    def check(plan: list[Any], metadata: Metadata) -> Any:
        for name, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                volume = sum(chunk.sizes.numel() for chunk in entry.chunks)
                if volume != entry.size.numel():
                    raise ValueError(f"{name}: the ranks save {volume} of its {entry.size.numel()} elements")
        return valid

    default_planner._validate_global_plan = check
    try:
        yield
    finally:
        default_planner._validate_global_plan = original


class OwnParts(DistributedOptimizer):
    """The distributed optimizer with another way to save and load the format ``fully_reshardable``."""

    def sharded_param_state_fully_reshardable(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, metadata: dict[str, Any] | None = None
    ) -> dict[int, dict[str, dict[int, ShardedTensor]]]:
        """Return the chunks of this rank, by the number of the weight, the name of the state, and their own number.

        They are views of the optimizer's tensors, to write and to fill alike.
        """
        entries, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
        weights = {entry.data: entry for entry in nested_values(entries)}
        state = {}
        for number, (weight, start, stop) in enumerate(self._owned()):
            tensors = self._get_main_param_and_optimizer_states(weight)
            state[number] = {
                name: dict(enumerate(self._chunks(name, tensor.detach(), weights[weight], start, stop)))
                for name, tensor in tensors.items()
                if name != "step"
            }
        return state

    def load_parameter_state_from_fully_reshardable(self, state_dict: dict[int, Any]) -> None:
        """Set the optimizer's state from the loaded chunks."""
        for number, (weight, _, _) in enumerate(self._owned()):
            tensors = {
                name: torch.cat([chunks[n].flatten() for n in sorted(chunks)])
                for name, chunks in state_dict[number].items()
            }
            self._set_main_param_and_optimizer_states(weight, tensors)

    def _owned(self) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
        """Yield each weight of which this rank owns a part, and the range of that part in the flattened weight."""
        for ranges in self.gbuf_ranges:
            for buckets in ranges.values():
                for bucket in buckets:
                    for weight, found in bucket["param_map"].items():
                        yield weight, found["param"].start, found["param"].end

    def _chunks(
        self, name: str, owned: torch.Tensor, weight: ShardedTensor | ShardedTensorFactory, start: int, stop: int
    ) -> Iterator[ShardedTensor]:
        """Yield the chunks of ``owned``, the elements ``start`` to ``stop`` of a flattened weight's state."""
        parts = list(nested_values(weight.build())) if isinstance(weight, ShardedTensorFactory) else [weight]
        for part in parts:  # SwiGLU's weight is two tensors, each sharded on its own
            first = _position(part.data, weight.data)
            low, high = max(start, first), min(stop, first + part.data.numel())
            if low >= high:
                continue
            data, axes = owned[low - start : high - start], part.prepend_axis_num
            for offsets, sizes in boxes(tuple(part.data.shape), low - first, high - first):
                box, offsets = (1,) * axes + sizes, (0,) * axes + offsets
                here, data = data.split([math.prod(box), data.numel() - math.prod(box)])
                yield replace(
                    part,
                    key=f"optimizer.state.{name}.{part.key}",
                    data=here.view(box),
                    dtype=owned.dtype,
                    local_shape=box,
                    global_offset=tuple(map(operator.add, part.global_offset, offsets)),
                    axis_fragmentations=None,  # the boxes form no regular grid
                    prepend_axis_num=0,  # megatron-core (0.16.1 to 0.19.2) ignores it without a regular grid
                    # no other data-parallel rank has this part
                    replica_id=(*part.replica_id[:2], self.distributed_optimizer_instance_id),
                )


def _position(part: torch.Tensor, weight: torch.Tensor) -> int:
    """Return the position in the flattened weight at which a part of it begins."""
    same = part.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    if not (same and part.is_contiguous() and weight.is_contiguous()):
        raise NotImplementedError("a weight is saved as tensors that are not contiguous views of it")
    return int(part.storage_offset() - weight.storage_offset())


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Yield the boxes that are the elements ``start`` to ``stop`` of a row-major tensor, in their order."""
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows
    if first > last:  # within one row
        yield from _in_row(last, shape, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _in_row(first - 1, shape, start - (first - 1) * row, row)
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    if last * row < stop:
        yield from _in_row(last, shape, 0, stop - last * row)


def _in_row(row: int, shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    for offsets, sizes in boxes(shape[1:], start, stop):
        yield (row, *offsets), (1, *sizes)
