"""A folder that is written whole or not at all: what an import, an export and the preparation of data make."""

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
    """Refuse a folder to write that holds something already, or is none: before the work for it begins.

    Raises:
        UserError: names ``option``, the flag that gave it.
    """
    path = Path(folder)
    try:
        found = next(path.iterdir(), None) if path.exists() else None  # perhaps hidden, as a killed process leaves it
    except OSError as error:
        raise UserError(f"{option} {folder}: {error.strerror}; choose another folder") from None
    if found is not None:
        raise UserError(
            f"{option} {folder}: exists and is not empty ({found.name} is there); choose another folder or remove it"
        )


@contextmanager
def new_folder(option: str, folder: str | Path, last: str, replace: bool = False) -> Iterator[Path]:
    """A hidden folder to write into, which becomes ``folder`` when the block ends; if that raises, none of it is left.

    All is on the disk before the name is. A folder that is there and empty is filled, for it may be a mount, or where
    a shell stands; a process that is killed leaves the hidden folder.

    Args:
        option: the flag that gave ``folder``, for the error.
        folder: need not be there.
        last: the file without which the folder means nothing; where an empty one is filled, it comes last.
        replace: whether what ``folder`` holds gives way.

    Raises:
        UserError: an OSError of the block or of these steps; or ``folder`` holds something and ``replace`` is not
            given.
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
            f"{option} {folder}: nothing was written ({error}); mend that, or choose another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _publish(partial: Path, folder: Path, last: str, replace: bool) -> None:
    there = [path for path in folder.iterdir() if path != partial] if folder.is_dir() else None
    if there and not replace:
        raise FileExistsError(errno.ENOTEMPTY, "meanwhile it holds something", str(there[0]))
    if there:
        _replace(partial, folder)
    elif there is None:
        partial.rename(folder)
    else:
        _fill(partial, folder, last)
    with suppress(OSError):  # it is there
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
    shutil.rmtree(old, ignore_errors=True)  # of a network's file system somebody may still read it


def os_error(error: Exception) -> OSError:
    """The refusal of a file in the words of a Rust library (tokenizers, safetensors), as Python says it."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))
