"""Files that must be on the disk when their name is, and what was timed or found once and is kept for all runs."""

import hashlib
import os
import tempfile
from pathlib import Path


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Have a file's bytes on the disk, or a folder's names: a rename is durable only after its folder is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Write a small file; it is on the disk when this returns."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def replace_text(path: Path, text: str) -> None:
    """Write a small file anew; whoever reads it, at whatever moment, finds the old text or the new one, whole."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write_durably(fresh, text)
    os.replace(fresh, path)
    sync(path.parent)


def cache_folder() -> Path:
    """``$TIDAR_CACHE``, else ``tidar-megatron`` in the user's cache, if there is one; it need not exist."""
    if given := os.environ.get("TIDAR_CACHE"):
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tidar-megatron"
    except RuntimeError:  # a user without a home, as containers have them
        return Path(tempfile.gettempdir()) / f"tidar-megatron-{os.getuid()}"
