"""Create a folder atomically: imports, exports and data preparation leave a complete folder or none."""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tidar_megatron.errors import UserError
from tidar_megatron.files import sync


def check_free(option: str, folder: str | Path) -> None:
    """Refuse an output folder that is not empty or is not a folder, before the work begins.

    Raises:
        UserError: The folder cannot be used; the message names ``option``, the flag that gave it.
    """
    path = Path(folder)
    try:
        found = next(path.iterdir(), None) if path.exists() else None  # also a hidden folder of a killed process
    except OSError as error:
        raise UserError(f"{option} {folder}: {error.strerror}; choose another folder") from None
    if found is not None:
        raise UserError(
            f"{option} {folder}: exists and is not empty ({found.name} is there); choose another folder or remove it"
        )


@contextmanager
def new_folder(option: str, folder: str | Path, last: str, replace: bool = False) -> Iterator[Path]:
    """Yield a hidden folder to write into; it becomes ``folder`` when the block ends, or is removed if it raises.

    The contents are flushed to the disk before the folder gets its name. An existing empty folder is filled, not
    replaced, because it may be a mount or a shell's working directory. A killed process leaves the hidden folder.

    Args:
        option: The flag that gave ``folder``, for the error message.
        folder: The folder to create; it may exist.
        last: The file that makes the folder valid; it is moved last into an existing empty folder.
        replace: Whether to replace an existing folder that is not empty.

    Raises:
        UserError: The block or the publication raised an OSError; or ``folder`` is not empty and ``replace`` is false.
    """
    target = Path(os.path.realpath(folder))
    partial_name = f".{target.name}.partial-{secrets.token_hex(4)}"
    inside = target.is_dir() and not any(target.iterdir())  # a mount has a file system of its own
    partial = (target if inside else target.parent) / partial_name
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in [*sorted(partial.rglob("*")), partial]:
            sync(path)
        _publish(partial, target, last, replace)
    except OSError as error:
        raise UserError(
            f"{option} {folder}: nothing was written ({error}); fix that, or choose another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _publish(partial: Path, folder: Path, last: str, replace: bool) -> None:
    there = [path for path in folder.iterdir() if path != partial] if folder.is_dir() else None
    if there and not replace:
        raise FileExistsError(errno.ENOTEMPTY, "it is no longer empty", str(there[0]))
    if there:
        _replace(partial, folder)
    elif there is None:
        partial.rename(folder)
    else:
        _fill(partial, folder, last)
    with suppress(OSError):  # the folder is already published
        sync(folder.parent)


def _fill(fresh: Path, folder: Path, last: str) -> None:
    moved = []
    try:
        for path in sorted(fresh.iterdir(), key=lambda path: path.name == last):
            if path.name == last:
                sync(folder)
            moved.append(path.rename(folder / path.name))
        sync(folder)
    except BaseException:
        for path in moved:
            path.rename(fresh / path.name)
        raise


def _replace(fresh: Path, folder: Path) -> None:
    old = folder.with_name(fresh.name.replace(".partial-", ".replaced-"))
    folder.rename(old)
    try:
        fresh.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)  # on a network file system another machine may still read it


def os_error(error: Exception) -> OSError:
    """Return the OSError for a file error that a Rust library (tokenizers, safetensors) reports in its own words."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))
