"""A run's folder of checkpoints: what is in it, how a new one is published, which one a run goes on from.

``FOLDER/iter_0000100/`` is one checkpoint, ``FOLDER/latest_checkpointed_iteration.txt`` (the tracker, as Megatron-LM
names it) says which one is the newest. A checkpoint is written into ``.iter_0000100.partial-XXXXXXXX``, closed by its
manifest, renamed, and only then named by the tracker; each step is on the disk before the next begins. A process that
is killed anywhere in between leaves the checkpoint before, the tracker that names it, and perhaps a hidden folder,
which the next start removes. Its name is drawn anew for every save: a writer that outlives a killed run finds its
folder gone and can do no harm.
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
DIGITS = 18  # of an iteration


def checkpoint_folder(folder: str | Path, iteration: int) -> Path:
    """Where the checkpoint of ``iteration`` lives."""
    return Path(folder) / folder_name(iteration)


def saved_iterations(folder: str | Path) -> list[int]:
    """The iterations that have a folder, ascending; whether it is whole is another question."""
    return sorted(int(path.name[5:]) for path in Path(folder).glob("iter_*") if path.name[5:].isdecimal())


# ---- writing


def new_partial(folder: str | Path, iteration: int) -> Path:
    """An empty hidden folder to write the checkpoint of ``iteration`` into."""
    target = checkpoint_folder(folder, iteration)
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    partial.mkdir(parents=True)
    return partial


def remove_leftovers(folder: str | Path) -> None:
    """Remove what a killed save or pruning left behind."""
    for kind in ("partial", "removed"):
        for path in Path(folder).glob(f".iter_*.{kind}-*"):
            shutil.rmtree(path, ignore_errors=True)
    for path in Path(folder).glob(f".{TRACKER}.*"):
        path.unlink(missing_ok=True)


def publish(partial: Path, iteration: int, files: dict[str, FileEntry], keep_last: int | None) -> list[Path]:
    """Make a checkpoint of what lies in ``partial``, and prune older ones.

    Args:
        partial: the folder of :func:`new_partial`, every file but the manifest written and sealed.
        iteration: of the checkpoint.
        files: the sealed files by name.
        keep_last: whole checkpoints to keep, this one included; None: all.

    Returns:
        Folders that are no checkpoints any more and wait to be deleted, which may take a while (:func:`delete`).
    """
    folder = partial.parent
    write_manifest(partial, iteration, files)
    removed = move_into_place(partial, checkpoint_folder(folder, iteration))
    point_tracker(folder, iteration)
    return removed if keep_last is None else removed + prune(folder, iteration, keep_last)


def move_into_place(partial: Path, target: Path) -> list[Path]:
    """Rename; a checkpoint of the same iteration (a damaged one that was passed over) gives way."""
    removed = [_remove(target)] if target.exists() else []
    partial.rename(target)
    sync(target.parent)
    return removed


def point_tracker(folder: Path, iteration: int) -> None:
    """Let the tracker name ``iteration``; who reads it sees the old number or the new one."""
    replace_text(folder / TRACKER, str(iteration))


def prune(folder: Path, newest: int, keep_last: int) -> list[Path]:
    """Remove the oldest whole checkpoints until ``keep_last`` are left; damaged ones neither count nor go."""
    older = [i for i in saved_iterations(folder) if i < newest and _damage(folder, i) is None]
    surplus = older[: max(0, len(older) - (keep_last - 1))]
    return [_remove(checkpoint_folder(folder, iteration)) for iteration in surplus]


def _remove(checkpoint: Path) -> Path:
    """Under another name: a half deleted folder must not look like a checkpoint."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed-{secrets.token_hex(4)}")
    checkpoint.rename(hidden)
    sync(checkpoint.parent)
    return hidden


def delete(removed: list[Path]) -> None:
    """Give the disk back what :func:`publish` left; if this is cut off, the next start does it."""
    for path in removed:
        shutil.rmtree(path, ignore_errors=True)


# ---- choosing


def restart_points(folder: str | Path) -> tuple[list[int], list[str]]:
    """Where a run can go on from.

    Returns:
        The iterations whose checkpoint is whole, the best first: the one that the tracker names, then older ones. Where
        the tracker is missing or garbled: all, the newest first. Empty where nothing was ever published.
        And what was passed over, as sentences.

    Raises:
        UserError: there are checkpoints, or a tracker, and not one whole checkpoint to go on from.
    """
    named, passed_over = _tracker(folder)
    iterations = [i for i in saved_iterations(folder) if named is None or i <= named]
    if named is not None and named not in iterations:
        passed_over.append(f"{Path(folder) / TRACKER} names iteration {named}, which has no folder")
    whole = []
    for iteration in reversed(iterations):
        damage = _damage(folder, iteration)
        if damage is None:
            whole.append(iteration)
        elif not whole:
            passed_over.append(damage)
    if not whole and passed_over:
        raise no_whole_checkpoint(folder, passed_over)
    return whole, passed_over


def no_whole_checkpoint(folder: str | Path, damage: list[str]) -> UserError:
    """The error where nothing is left to go on from."""
    return UserError(
        f"{folder}: no checkpoint in it is whole: {'; '.join(damage)}; restore one, or start anew in another folder"
    )


def _tracker(folder: str | Path) -> tuple[int | None, list[str]]:
    """The iteration that the tracker names, and what is wrong with the tracker."""
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
    """The iteration that a run would go on from; None where nothing was saved yet.

    Raises:
        UserError: no checkpoint is whole.
    """
    whole, _ = restart_points(folder)
    return whole[0] if whole else None
