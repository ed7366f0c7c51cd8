"""Durable and atomic file writes, SHA-256 of a file, and the cache folder that all runs share."""

import hashlib
import os
import tempfile
from pathlib import Path


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to the disk; a rename is durable only once its folder is flushed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Write a small UTF-8 file and flush it to the disk before returning."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def replace_text(path: Path, text: str) -> None:
    """Replace a small file atomically: a concurrent reader sees either the old text or the new text."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write_durably(fresh, text)
    os.replace(fresh, path)
    sync(path.parent)


def cache_folder() -> Path:
    """Return the folder of files that all runs share: ``$TIDAR_CACHE``, else ``tidar-megatron`` in the user's cache.

    It is a temporary folder where the user has no home. The folder may not exist yet.
    """
    if given := os.environ.get("TIDAR_CACHE"):
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tidar-megatron"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / f"tidar-megatron-{os.getuid()}"
