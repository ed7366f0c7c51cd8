"""Read the pickles in a checkpoint without executing code: only names on an allow list can be called.

A distributed checkpoint of torch has three kinds of pickles. ``.metadata`` is a plain pickle, which torch reads with
``pickle.load``, so this module reads it first, with an unpickler that allows only the classes of our own checkpoints.
The objects in ``*.distcp`` files (extra states of layers) and megatron-core's ``common.pt`` are torch archives: while a
checkpoint is loaded, torch's own switch forces every ``torch.load`` to ``weights_only``.
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
    "torch": {"Size"},  # and the dtypes
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
        raise pickle.UnpicklingError(f"asks for {module}.{name}, which is not allowed in a checkpoint")


def read_metadata(folder: Path) -> Metadata:
    """Return the metadata (the table of contents) of a distributed checkpoint, without executing code.

    Raises:
        Damaged: The file is missing or is not such metadata, contains a class that is not allowed, or names a file
            outside the folder.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as stream:
            metadata = _Unpickler(stream).load()
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except Exception as error:  # a garbled pickle can raise any exception
        raise Damaged(f"{path} is refused: {' '.join(str(error).split()) or type(error).__name__}") from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise Damaged(f"{path} is not the metadata of a distributed checkpoint")
    kinds = (TensorStorageMetadata, BytesStorageMetadata)
    if not all(isinstance(entry, kinds) for entry in metadata.state_dict_metadata.values()):
        raise Damaged(f"{path} is not the metadata of a distributed checkpoint")
    for stored in metadata.storage_data.values():
        name = getattr(stored, "relative_path", None)
        if not isinstance(name, str) or Path(name).name != name or getattr(stored, "transform_descriptors", None):
            raise Damaged(f"{path} is refused: it names the file {name!r}")
    return metadata


@contextmanager
def weights_only() -> Iterator[None]:
    """Restrict ``torch.load`` in this block to tensors and plain containers, whatever its caller requests."""
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
