"""Checkpoint manifests: ``manifest.json`` holds the size and SHA-256 of every file; written last, checked first.

A checkpoint whose sizes agree with its manifest is *intact*: nothing is missing or truncated. Only the hashes tell
whether a byte has changed since; comparing them reads every file once.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tidar_megatron.files import sha256_of, sync, write_durably

FILE_NAME = "manifest.json"
FORMAT: Final = "tidar-checkpoint-1"

Count = Annotated[int, Field(ge=0)]  # a non-negative integer
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PlainName = Annotated[str, Field(pattern=r"^\.?[A-Za-z0-9_][A-Za-z0-9_.-]*$")]  # cannot leave the folder


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FileEntry(_Strict):
    """The size in bytes and the SHA-256 of a file when it was written."""

    bytes: Count
    sha256: Sha256


class Manifest(_Strict):
    """The manifest of a checkpoint; ``sha256`` covers its other fields, to detect changes of the manifest itself."""

    format: Literal["tidar-checkpoint-1"]
    iteration: Count
    files: dict[PlainName, FileEntry]
    sha256: Sha256

    def digest(self) -> str:
        """Return the value that ``sha256`` must have."""
        return hashlib.sha256(json.dumps(self.model_dump(exclude={"sha256"})).encode()).hexdigest()


class Damaged(Exception):  # noqa: N818 - describes a checkpoint
    """A checkpoint that does not match its manifest or cannot be read; the message names the file."""


def folder_name(iteration: int) -> str:
    """Return the name of a checkpoint's folder, as in Megatron-LM."""
    return f"iter_{iteration:07d}"


def seal(path: Path) -> FileEntry:
    """Flush a file that was just written to the disk, and return its manifest entry."""
    sync(path)
    return FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path))


def write_manifest(folder: Path, iteration: int, files: dict[str, FileEntry]) -> None:
    """Write the manifest of a checkpoint, and flush it and the folder's entries to the disk."""
    manifest = Manifest(format=FORMAT, iteration=iteration, files=dict(sorted(files.items())), sha256="0" * 64)
    manifest = manifest.model_copy(update={"sha256": manifest.digest()})
    write_durably(folder / FILE_NAME, manifest.model_dump_json(indent=1))
    sync(folder)


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint.

    Raises:
        Damaged: The manifest is missing or invalid, or belongs to another checkpoint.
    """
    path = folder / FILE_NAME
    try:
        manifest = Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise Damaged(f"{path} cannot be read: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (OSError, ValueError):
        raise Damaged(f"{path} cannot be read") from None
    if manifest.sha256 != manifest.digest():
        raise Damaged(f"{path} was changed: its SHA-256 does not match its contents")
    if folder.name != folder_name(manifest.iteration):
        raise Damaged(f"{folder} is the checkpoint of iteration {manifest.iteration}")
    return manifest


def check_sizes(folder: Path) -> Manifest:
    """Check the sizes of a checkpoint's files, and return its manifest.

    Raises:
        Damaged: A file is missing or has another size.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            raise Damaged(f"{folder / name} is missing") from None
        if size != entry.bytes:
            raise Damaged(f"{folder / name} has {size} bytes, its manifest says {entry.bytes}")
    return manifest


def check_hash(folder: Path, name: str) -> None:
    """Compare the hash of one file of a checkpoint with the manifest, before the file is parsed.

    Raises:
        Damaged: The file is missing, or differs from what was written.
    """
    files = read_manifest(folder).files
    if name not in files:
        raise Damaged(f"{folder / FILE_NAME} does not name {name}")
    _check_hash(folder / name, files[name])


def check_hashes(folder: Path, share: int = 0, shares: int = 1) -> None:
    """Compare the hashes of a checkpoint's files, or of reader ``share``'s part of them among ``shares`` readers.

    Raises:
        Damaged: A file differs from what was written.
    """
    manifest = check_sizes(folder)
    by_size = sorted(manifest.files, key=lambda name: -manifest.files[name].bytes)
    for name in by_size[share::shares]:
        _check_hash(folder / name, manifest.files[name])


def _check_hash(path: Path, entry: FileEntry) -> None:
    try:
        found = sha256_of(path)
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except OSError as error:
        raise Damaged(f"{path} cannot be read ({error.strerror})") from None
    if found != entry.sha256:
        raise Damaged(f"{path} was changed: its SHA-256 differs from its manifest")
