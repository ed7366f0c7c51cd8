"""Checkpoints hold pickles, and a pickle can be a program. Nothing in one is called that is not on a short list.

torch's distributed checkpoints have three kinds of them. ``.metadata`` is one pickle, which torch reads with plain
``pickle.load``: it is read here first, by an unpickler that knows the classes of our own checkpoints alone. The objects
inside of ``*.distcp`` files (layers' extra states) and megatron-core's ``common.pt`` are torch's archives: while a
checkpoint is loaded, ``torch.load`` is held to ``weights_only`` wherever it is called from, by torch's own switch.
"""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from tidar_megatron.checkpoint.integrity import Damaged

METADATA = ".metadata"

ALLOWED = {
    "collections": {"OrderedDict"},
    "torch": {"Size"},  # and torch's dtypes
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        allowed = name in ALLOWED.get(module, ())
        if allowed or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"asks for {module}.{name}, which no checkpoint of ours holds")


def read_metadata(folder: Path) -> Metadata:
    """The table of contents of a distributed checkpoint, and nothing executed.

    Raises:
        Damaged: it is missing, no table of contents, holds something that is not ours, or leads out of the folder.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as stream:
            metadata = _Unpickler(stream).load()
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except Exception as error:  # a garbled pickle raises anything
        raise Damaged(f"{path} is refused: {' '.join(str(error).split()) or type(error).__name__}") from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise Damaged(f"{path} is not the metadata of a distributed checkpoint")
    kinds = (TensorStorageMetadata, BytesStorageMetadata)
    if not all(isinstance(entry, kinds) for entry in metadata.state_dict_metadata.values()):
        raise Damaged(f"{path} is not the metadata of a distributed checkpoint")
    for stored in metadata.storage_data.values():
        name = getattr(stored, "relative_path", None)
        if not isinstance(name, str) or Path(name).name != name or getattr(stored, "transform_descriptors", None):
            raise Damaged(f"{path} is refused: it leads to {name!r}")
    return metadata


@contextmanager
def weights_only() -> Iterator[None]:
    """In this block ``torch.load`` builds tensors and plain containers alone, whatever its caller asks for."""
    switch = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before
