"""A run's folder of checkpoints: list them, publish and prune them, choose the one to resume from.

``FOLDER/iter_0000100/`` is one checkpoint; ``FOLDER/latest_checkpointed_iteration.txt`` (the tracker, named as in
Megatron-LM) names the newest one. A checkpoint is written into ``.iter_0000100.partial-XXXXXXXX``, closed by its
manifest and renamed, and only then does the tracker name it. Each step is flushed to the disk before the next begins. A
process that is killed in between leaves the previous checkpoint, the tracker that names it, and perhaps a hidden
folder, which the next start removes. Every save draws a new random name for that folder, so a writer that outlives a
killed run finds its folder removed and does no harm.
"""

import secrets
import shutil
from pathlib import Path

from tidar_megatron.checkpoint.integrity import (
    Damaged,
    FileEntry,
    check_sizes,
    folder_name,
    write_manifest,
)
from tidar_megatron.errors import UserError
from tidar_megatron.files import replace_text, sync

TRACKER = "latest_checkpointed_iteration.txt"
DIGITS = 18  # the most digits of an iteration in the tracker


def checkpoint_folder(folder: str | Path, iteration: int) -> Path:
    """Return the folder of the checkpoint of ``iteration``."""
    return Path(folder) / folder_name(iteration)


def saved_iterations(folder: str | Path) -> list[int]:
    """Return the iterations that have a folder, intact or damaged, in ascending order."""
    return sorted(int(path.name[5:]) for path in Path(folder).glob("iter_*") if path.name[5:].isdecimal())


# ---- writing


def new_partial(folder: str | Path, iteration: int) -> Path:
    """Create and return an empty hidden folder to write the checkpoint of ``iteration`` into."""
    target = checkpoint_folder(folder, iteration)
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    partial.mkdir(parents=True)
    return partial


def remove_leftovers(folder: str | Path) -> None:
    """Remove the hidden files and folders that a killed save or pruning left."""
    for kind in ("partial", "removed"):
        for path in Path(folder).glob(f".iter_*.{kind}-*"):
            shutil.rmtree(path, ignore_errors=True)
    for path in Path(folder).glob(f".{TRACKER}.*"):
        path.unlink(missing_ok=True)


def publish(partial: Path, iteration: int, files: dict[str, FileEntry], keep_last: int | None) -> list[Path]:
    """Publish the files in ``partial`` as a checkpoint, and prune older ones.

    Args:
        partial: A folder from :func:`new_partial` in which every file but the manifest is written and sealed.
        iteration: The iteration of the checkpoint.
        files: The sealed files by name.
        keep_last: The number of intact checkpoints to keep, including this one; None keeps all.

    Returns:
        The folders of removed checkpoints, for :func:`delete`, which may take a while.
    """
    folder = partial.parent
    write_manifest(partial, iteration, files)
    removed = move_into_place(partial, checkpoint_folder(folder, iteration))
    point_tracker(folder, iteration)
    return removed if keep_last is None else removed + prune(folder, iteration, keep_last)


def move_into_place(partial: Path, target: Path) -> list[Path]:
    """Rename ``partial`` to ``target``, and hide a damaged checkpoint of that iteration; return the hidden folders."""
    removed = [_remove(target)] if target.exists() else []
    partial.rename(target)
    sync(target.parent)
    return removed


def point_tracker(folder: Path, iteration: int) -> None:
    """Make the tracker name ``iteration``, atomically."""
    replace_text(folder / TRACKER, str(iteration))


def prune(folder: Path, newest: int, keep_last: int) -> list[Path]:
    """Hide the oldest intact checkpoints until ``keep_last`` are left, and return the hidden folders.

    Damaged checkpoints are neither counted nor removed.
    """
    older = [i for i in saved_iterations(folder) if i < newest and _damage(folder, i) is None]
    surplus = older[: max(0, len(older) - (keep_last - 1))]
    return [_remove(checkpoint_folder(folder, iteration)) for iteration in surplus]


def _remove(checkpoint: Path) -> Path:
    """Hide a checkpoint under another name, because a partly deleted folder must not look like a checkpoint."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed-{secrets.token_hex(4)}")
    checkpoint.rename(hidden)
    sync(checkpoint.parent)
    return hidden


def delete(removed: list[Path]) -> None:
    """Delete the folders that :func:`publish` returned; if this is interrupted, the next start does it."""
    for path in removed:
        shutil.rmtree(path, ignore_errors=True)


# ---- choosing


def restart_points(folder: str | Path) -> tuple[list[int], list[str]]:
    """Return the iterations that a run can resume from, and the checkpoints that were skipped.

    Only file sizes are compared here, not hashes.

    Returns:
        The iterations of intact checkpoints, the best first: the one that the tracker names, then older ones; all of
        them, the newest first, if the tracker is missing or garbled. The list is empty if nothing was ever published.
        The second list says, one sentence each, what was skipped and why.

    Raises:
        UserError: There are checkpoints, or a tracker, but no intact checkpoint.
    """
    named, passed_over = _tracker(folder)
    iterations = [i for i in saved_iterations(folder) if named is None or i <= named]
    if named is not None and named not in iterations:
        passed_over.append(f"{Path(folder) / TRACKER} names iteration {named}, which has no folder")
    intact = []
    for iteration in reversed(iterations):
        damage = _damage(folder, iteration)
        if damage is None:
            intact.append(iteration)
        elif not intact:
            passed_over.append(damage)
    if not intact and passed_over:
        raise no_intact_checkpoint(folder, passed_over)
    return intact, passed_over


def no_intact_checkpoint(folder: str | Path, damage: list[str]) -> UserError:
    """Return the error for a folder without an intact checkpoint."""
    return UserError(
        f"{folder}: no checkpoint in it is intact: {'; '.join(damage)}; restore one, or start from scratch in another "
        "folder"
    )


def _tracker(folder: str | Path) -> tuple[int | None, list[str]]:
    """Return the iteration that the tracker names, if any, and what is wrong with the tracker."""
    path = Path(folder) / TRACKER
    try:
        text = path.read_text(errors="replace").strip()
    except FileNotFoundError:
        return None, [f"{path} is missing"] if saved_iterations(folder) else []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not (text.isascii() and text.isdecimal() and len(text) <= DIGITS):
        return None, [f"{path} holds {text[:40]!r}, not an iteration"]
    return int(text), []


def _damage(folder: str | Path, iteration: int) -> str | None:
    try:
        check_sizes(checkpoint_folder(folder, iteration))
    except Damaged as damage:
        return str(damage)
    return None


def latest_iteration(folder: str | Path) -> int | None:
    """Return the iteration that a run would resume from; None if nothing was saved yet.

    Raises:
        UserError: No checkpoint is intact.
    """
    intact, _ = restart_points(folder)
    return intact[0] if intact else None
