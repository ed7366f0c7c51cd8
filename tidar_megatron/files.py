"""Files that must be on the disk when their name is, and what was timed or found once and is kept for all runs."""

import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tidar_megatron.errors import UserError


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


def check_free(option: str, folder: str | Path) -> None:
    """Refuse a folder to write that holds something already, or is none.

    Raises:
        UserError: names ``option``, the flag that gave it.
    """
    folder = Path(folder)
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        raise UserError(f"{option} {folder}: {error.strerror}; choose another folder") from None
    if taken:
        raise UserError(f"{option} {folder}: exists and is not empty; choose another folder or remove it")


@contextmanager
def new_folder(folder: str | Path, last: str) -> Iterator[Path]:
    """A hidden folder to write into, which becomes ``folder`` when the block ends; if that raises, nothing is left.

    All is on the disk before the name is. A folder that is there and empty is filled rather than replaced, for it may
    be a mount, or where a shell stands.

    Args:
        folder: what it holds gives way: see :func:`check_free`.
        last: the file without which the folder means nothing; where an empty one is filled, it comes last.
    """
    folder = Path(folder).resolve()
    there = folder.is_dir()
    fill = there and not any(folder.iterdir())
    mark = secrets.token_hex(4)
    partial = (folder if fill else folder.parent) / f".{folder.name}.partial-{mark}"
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in [*sorted(partial.rglob("*")), partial]:
            sync(path)
        if fill:
            for path in sorted(partial.iterdir(), key=lambda path: path.name == last):
                path.rename(folder / path.name)
            sync(folder)
        else:
            if there:
                _replace(partial, folder, folder.with_name(f".{folder.name}.replaced-{mark}"))
            else:
                partial.rename(folder)
            sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(fresh: Path, folder: Path, old: Path) -> None:
    folder.rename(old)
    try:
        fresh.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)  # of a network's file system somebody may still read it


def cache_folder() -> Path:
    """``$TIDAR_CACHE``, else ``tidar-megatron`` in the user's cache, if there is one; it need not exist."""
    if given := os.environ.get("TIDAR_CACHE"):
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tidar-megatron"
    except RuntimeError:  # a user without a home, as containers have them
        return Path(tempfile.gettempdir()) / f"tidar-megatron-{os.getuid()}"
