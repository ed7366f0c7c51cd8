"""Streaming of weights into and out of a distributed checkpoint, one tensor at a time, never the full model in memory.

megatron-core itself decides the contents of a checkpoint: the model is built on the meta device, where it takes no
memory, and its ``sharded_state_dict`` gives the key and offset of each parameter. torch writes and reads checkpoints
through planners, which it asks for one tensor after another.
"""

import dataclasses
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from tidar_megatron.checkpoint.integrity import Damaged
from tidar_megatron.checkpoint.pickles import read_metadata, weights_only
from tidar_megatron.config import ParallelConfig, ResolvedConfig
from tidar_megatron.distributed.fake import play_rank
from tidar_megatron.models.gpt import build_model
from tidar_megatron.models.parameters import VOCABULARY, is_draft_weight


@dataclass(frozen=True)
class UnshardedModel:
    """The layout of a full (unsharded) model in its checkpoints.

    Attributes:
        vocab_size: The number of token ids in use, without padding.
        shapes: parameter name -> shape, with the padded vocabulary.
        pieces: parameter name -> where it is stored: one piece, or two for the fused gate and up projections.
        objects: The stored objects that are not tensors.
        num_query_groups: The number of query groups.
        num_attention_heads: The number of query heads.
    """

    vocab_size: int
    shapes: dict[str, torch.Size]
    pieces: dict[str, list[ShardedTensor]]
    objects: list[ShardedObject]
    num_query_groups: int
    num_attention_heads: int


def unsharded_model(config: ResolvedConfig) -> UnshardedModel:
    """Return the full model of a resolved configuration, built with layers that need no GPU packages.

    Of a run that trains draft weights, it has these alone, as its checkpoints do.
    """
    local = dataclasses.replace(config.model, transformer_impl="local", moe_grouped_gemm=False)
    config = dataclasses.replace(config, model=local, parallel=ParallelConfig())
    with play_rank(config.parallel, 0, 1) as ranks:
        (model,) = build_model(config, config.vocab_size, ranks)
        pieces: dict[str, list[ShardedTensor]] = {}
        objects = []
        for name, entry in model.sharded_state_dict().items():
            if is_draft_weight(name) != config.trains_drafts:
                continue
            if isinstance(entry, ShardedObject):
                objects.append(entry)
            else:
                pieces[name] = list(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
        shapes = {name: parameter.shape for name, parameter in model.named_parameters() if name in pieces}
        transformer = model.config
    assert shapes.keys() == pieces.keys()
    return UnshardedModel(
        config.vocab_size, shapes, pieces, objects, transformer.num_query_groups, transformer.num_attention_heads
    )


def _chunk(piece: ShardedTensor) -> ChunkStorageMetadata:
    leading = (1,) * piece.prepend_axis_num  # all layers, and experts, are stored under one key
    return ChunkStorageMetadata(torch.Size(piece.global_offset), torch.Size((*leading, *piece.local_shape)))


# --- into a checkpoint -------------------------------------------------------------------------------------------
class _Writing(SavePlanner):
    def __init__(self, unsharded: UnshardedModel, read: Callable[[str], Tensor]) -> None:
        self._read = read
        self._sources: dict[MetadataIndex, tuple[str, int, int]] = {}  # parameter, piece number, number of pieces
        self._items: list[WriteItem] = []
        self._last: tuple[str, Tensor] | None = None
        for name, pieces in unsharded.pieces.items():
            for number, piece in enumerate(pieces):
                chunk = _chunk(piece)
                index = MetadataIndex(piece.key, chunk.offsets)
                data = TensorWriteData(chunk, TensorProperties(dtype=piece.dtype), torch.Size(piece.global_shape))
                self._items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
                self._sources[index] = (name, number, len(pieces))
        self._items += [WriteItem(MetadataIndex(o.unique_key), WriteItemType.BYTE_IO) for o in unsharded.objects]

    def set_up_planner(self, state_dict: object, storage_meta: object = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        return SavePlan(self._items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return torch_checkpoint.default_planner.create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:  # a layer's extra state, which is empty
            stream = io.BytesIO()
            torch.save([None], stream)
            return stream
        data = write_item.tensor_data
        assert data is not None
        name, number, pieces = self._sources[MetadataIndex(write_item.index.fqn, write_item.index.offset)]
        if self._last is None or self._last[0] != name:
            self._last = None  # free the memory before reading the next one
            self._last = name, self._read(name)
        return self._last[1].chunk(pieces)[number].reshape(data.chunk.sizes).contiguous()


class _Files(torch_checkpoint.FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # torch's would store the folder's name, which is temporary


def write_weights(folder: Path, unsharded: UnshardedModel, read: Callable[[str], Tensor]) -> None:
    """Write the files of a checkpoint that has only weights.

    Args:
        folder: The folder to write to; it must exist and be empty.
        unsharded: The model, from :func:`unsharded_model`.
        read: A function that returns a full parameter by its name, in the model's dtype.

    Raises:
        OSError: The files cannot be written.
    """
    writer = _Files(folder, thread_count=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is disabled on purpose
        try:
            torch_checkpoint.save({}, storage_writer=writer, planner=_Writing(unsharded, read), no_dist=True)
        except CheckpointException as error:  # torch's wrapper around the actual exception
            raise next(iter(error.failures.values()))[0] from None
    nothing = io.BytesIO()  # the state that is not tensors
    torch.save({}, nothing)
    (folder / "common.pt").write_bytes(nothing.getvalue())  # on a full disk torch.save does not raise an OSError
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


# --- out of a checkpoint -----------------------------------------------------------------------------------------
class _Reading(LoadPlanner):
    """A planner that reads into one tensor."""

    def __init__(self, target: Tensor) -> None:
        self._target = target

    def set_up_planner(self, state_dict: object, metadata: object = None, is_coordinator: bool = False) -> None:
        raise NotImplementedError

    create_local_plan = create_global_plan = finish_plan = load_bytes = set_up_planner

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        piece = self._target
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            piece = piece.narrow(axis, start, length)
        return piece

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


class WeightReader:
    """The weights of a checkpoint by their names in the model, read on demand.

    Vocabulary parameters are read without their padding, which may differ between checkpoints.

    Args:
        folder: The checkpoint's folder.
        unsharded: The model, from :func:`unsharded_model`.

    Raises:
        Damaged: The checkpoint was not written by this package, or has another model.
    """

    def __init__(self, folder: Path, unsharded: UnshardedModel) -> None:
        self._metadata = read_metadata(folder)
        self._stored, self._vocab_size = unsharded.pieces, unsharded.vocab_size
        self._reader = torch_checkpoint.FileSystemReader(folder)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        for name, pieces in self._stored.items():
            for piece in pieces:
                found = getattr(self._metadata.state_dict_metadata.get(piece.key), "size", None)
                wanted = tuple(piece.global_shape)
                if name in VOCABULARY and found and found[0] >= unsharded.vocab_size:
                    wanted = (found[0], *wanted[1:])
                if found is None or tuple(found) != wanted:
                    holds = "is missing" if found is None else f"has the shape {tuple(found)}, not {wanted}"
                    raise Damaged(f"{folder}: {name} {holds}")

    def read(self, name: str) -> Tensor:
        """Return a full parameter, in the dtype in which it was saved."""
        parts = []
        with weights_only():
            for piece in self._stored[name]:
                chunk, shape = _chunk(piece), torch.Size(piece.local_shape)
                if name in VOCABULARY:
                    shape = torch.Size((self._vocab_size, *shape[1:]))
                    chunk = ChunkStorageMetadata(chunk.offsets, shape)
                entry = self._metadata.state_dict_metadata[piece.key]
                target = torch.empty(chunk.sizes, dtype=entry.properties.dtype)
                plan = LoadPlan(create_read_items_for_chunk_list(piece.key, entry, [chunk]))
                self._reader.read_data(plan, _Reading(target)).wait()
                parts.append(target.reshape(shape))
        return torch.cat(parts) if len(parts) > 1 else parts[0]
