"""Save and load a run's checkpoints: the interface that the training loop uses.

Every call is collective. A save has three parts. All ranks prepare it; with ``--async-save`` they then continue
training. Each rank writes and seals its own files (``writer.py``). When all have finished, rank 0 publishes the
checkpoint (``folder.py``). Only then does the tracker name it and are older checkpoints pruned, so a run that dies
during a save resumes from the previous checkpoint. A rank that cannot write tells the others, and all ranks fail with
the same error.
"""

import dataclasses
import errno
import functools
import inspect
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import __version__ as megatron_version
from megatron.core import dist_checkpointing

from tidar_megatron.checkpoint import contents, folder
from tidar_megatron.checkpoint.contents import Trained
from tidar_megatron.checkpoint.fingerprint import Fingerprint, check_fingerprint, plain
from tidar_megatron.checkpoint.integrity import Damaged, FileEntry, seal
from tidar_megatron.checkpoint.own_parts import checked_by_volume
from tidar_megatron.checkpoint.writer import RESULTS, InBackground, Report, staged, write
from tidar_megatron.config import Config
from tidar_megatron.distributed.groups import Ranks
from tidar_megatron.distributed.platform import literals_as_they_are
from tidar_megatron.errors import UserError

NO_SPACE = 2**20  # free bytes below which a failed write counts as a full disk: torch's archives do not report why


@dataclass
class Resumed:
    """The position from which a run resumes."""

    iteration: int
    consumed_sequences: int
    states: dict[str, Any]  # the states of parts of the loop, by the names they were saved under


@dataclass
class _Pending:
    """A save in progress."""

    iteration: int
    partial: Path
    request: Any  # megatron-core's AsyncRequest
    background: InBackground | None = None


class Checkpoints:
    """The checkpoints of a run, saved to ``--save`` and loaded from ``--load``.

    Args:
        config: The resolved configuration.
        ranks: The process groups and rank of this process.
        fingerprint: The identity of the run (``fingerprint.py``).
        check_lock: A function that rank 0 calls before it publishes a checkpoint; if it raises a :class:`UserError`,
            the save fails with it.

    Attributes:
        on_published: A function that every rank calls with each published iteration.
    """

    def __init__(
        self, config: Config, ranks: Ranks, fingerprint: Fingerprint, check_lock: Callable[[], None] = lambda: None
    ) -> None:
        self.on_published: Callable[[int], None] = lambda iteration: None
        self._config, self._ranks, self._fingerprint = config, ranks, plain(fingerprint)
        self._check_lock = check_lock
        self._pending: _Pending | None = None
        self._deleting: threading.Thread | None = None
        self._prepared = False
        if config.checkpoint.save and ranks.is_main:
            folder.remove_leftovers(config.checkpoint.save)

    # ---- saving

    def save(self, run: Trained, iteration: int, consumed_sequences: int, states: dict[str, Any]) -> None:
        """Save the current state; with ``--async-save`` only start the save.

        Args:
            run: The tensors of the run.
            iteration: The number of optimizer steps so far.
            consumed_sequences: The number of packed sequences so far.
            states: The states of parts of the loop, by name, as JSON values; :meth:`load` returns them.

        Raises:
            UserError: This save, or the previous one, could not be written.
        """
        self.wait()
        partial = self._new_partial(iteration)
        self._pending = _Pending(iteration, partial, None)
        state = contents.State(
            iteration=iteration,
            consumed_sequences=consumed_sequences,
            states=states,
            fingerprint=self._fingerprint,
            layout=self._layout(),
            config=dataclasses.asdict(self._config),
            megatron_core=megatron_version,
        )
        try:
            request = self._prepare(run, partial)
        except Exception as error:  # only rank 0 writes a file here; the others wait for it, and end when it exits
            raise self._failure(self._reason(error)) from error
        self._pending.request = request
        work = functools.partial(write, request, partial, contents.texts_to_save(state))
        if self._config.checkpoint.async_save:
            self._pending.background = InBackground(work)
        else:
            self._finish(work())

    def maybe_finalize(self) -> None:
        """Publish an asynchronous save if every rank has written its part.

        Raises:
            UserError: The save could not be written.
        """
        if self._pending is None or self._pending.background is None:
            return
        if not self._ranks.any_rank(not self._pending.background.done()):
            self._finish(self._pending.background.report())

    @property
    def saving(self) -> bool:
        """Return whether a save is in progress."""
        return self._pending is not None

    def wait(self) -> None:
        """Wait until every rank has written its part, and publish the save.

        Raises:
            UserError: The save could not be written.
        """
        while self._pending is not None:
            self.maybe_finalize()
            time.sleep(0.01)
        if self._deleting is not None:
            self._deleting.join()  # frees disk space, and no other thread may run when the next writer is forked

    def close(self) -> None:
        """Abandon a save that is not published yet, at the end of the run."""
        if self._pending is not None and self._pending.background is not None:
            self._pending.background.abandon()
        self._pending = None

    def _new_partial(self, iteration: int) -> Path:
        partial: Path | None = None

        def make() -> None:
            nonlocal partial
            partial = folder.new_partial(self._config.checkpoint.save or "", iteration)

        problem = self._on_main(make)
        if problem:
            raise UserError(f"--save {self._config.checkpoint.save}: iteration {iteration} is not saved: {problem}")
        return Path(self._ranks.from_main(str(partial)))

    def _prepare(self, run: Trained, partial: Path) -> Any:
        settings: dict[str, Any] = {"async_strategy": "mcore"} if "async_strategy" in _PARAMETERS else {}
        settings["validate_access_integrity"] = not self._prepared  # the shards are the same at every save
        state = contents.tensors_to_save(run)
        with literals_as_they_are(), checked_by_volume():
            request = dist_checkpointing.save(state, str(partial), async_sharded_save=True, **settings)
        self._prepared = True
        return staged(request)

    def _finish(self, report: Report) -> None:
        """Gather what all ranks have written, and publish the checkpoint."""
        assert self._pending is not None
        save = self._pending
        problem = self._reason(report.error) if report.error else None
        reports: list[Any] = [None] * self._ranks.world_size
        dist.all_gather_object(reports, (problem, report.files))
        for said, _ in reports:
            if said:
                raise self._failure(said)
        if save.request.async_fn is not None:
            RESULTS.put(report.results)
        try:
            for finalize in save.request.finalize_fns:  # megatron-core gathers, writes .metadata and metadata.json
                finalize()
        except Exception as error:
            raise self._failure(self._reason(error)) from error
        files: dict[str, FileEntry] = {}
        for _, theirs in reports:
            files |= theirs
        problem = self._on_main(lambda: self._publish(save, files))
        if problem:
            raise self._failure(problem)
        self._pending = None
        self.on_published(save.iteration)

    def _publish(self, save: _Pending, files: dict[str, FileEntry]) -> None:
        for path in save.partial.iterdir():
            if path.name not in files:  # megatron-core's small files
                files[path.name] = seal(path)
        self._check_lock()
        removed = folder.publish(save.partial, save.iteration, files, self._config.checkpoint.keep_last)
        self._deleting = threading.Thread(target=folder.delete, args=(removed,), daemon=True)
        self._deleting.start()

    def _on_main(self, do: Callable[[], None]) -> str | None:
        """Call ``do`` on rank 0; return on every rank why it failed, or None."""
        problem: str | None = None
        if self._ranks.is_main:
            try:
                do()
            except (OSError, UserError) as error:
                problem = self._reason(error)
        return self._ranks.from_main(problem)

    def _reason(self, error: Exception) -> str:
        if isinstance(error, OSError) and error.errno:
            return os.strerror(error.errno)
        if isinstance(error, UserError):
            return str(error)
        partial = self._pending.partial if self._pending is not None else None
        if partial is not None and partial.exists() and shutil.disk_usage(partial).free < NO_SPACE:
            return os.strerror(errno.ENOSPC)
        return " ".join(f"{type(error).__name__}: {error}".split())

    def _failure(self, reason: str) -> UserError:
        """End the save, remove its folder, and return the error to raise."""
        assert self._pending is not None
        save, into = self._pending, self._config.checkpoint.save or ""
        self.close()
        if self._ranks.is_main:
            shutil.rmtree(save.partial, ignore_errors=True)
        intact = (
            [i for i in folder.restart_points(into)[0] if i != save.iteration] if folder.saved_iterations(into) else []
        )
        kept = f"iteration {intact[0]} is intact, --load {into} resumes it" if intact else "nothing was saved before"
        return UserError(f"--save {into}: iteration {save.iteration} is not saved: {reason}; {kept}")

    def _layout(self) -> dict[str, Any]:
        parallel = self._config.parallel
        names = [f.name for f in dataclasses.fields(parallel) if f.name.endswith("_parallel_size")]
        return {"world_size": self._ranks.world_size, **{name: getattr(parallel, name) for name in names}}

    # ---- loading

    def load(self, run: Trained) -> Resumed:
        """Load the best intact checkpoint of ``--load`` into ``run``, and print which checkpoints were skipped.

        If the run saves into the same folder, older checkpoints are pruned: a run that was killed after it published a
        checkpoint may not have pruned them.

        Raises:
            UserError: No checkpoint is intact, or the checkpoint belongs to another run.
        """
        source, settings = self._config.checkpoint.load, self._config.checkpoint
        assert source is not None
        checkpoint = contents.intact_checkpoint(source, settings.verify_checkpoint)
        state = contents.read_state(checkpoint, verify=False)  # intact_checkpoint has verified it
        check_fingerprint(source, state.fingerprint, self._fingerprint, settings.override_fingerprint)
        try:
            contents.load(checkpoint, run, same_layout=state.layout == self._layout())
        except Damaged as damage:
            raise UserError(f"--load {source}: {damage}") from None
        into, keep = settings.save, settings.keep_last
        if into and keep and Path(into).resolve() == Path(source).resolve():
            problem = self._on_main(lambda: folder.delete(folder.prune(Path(into), state.iteration, keep)))
            if problem:
                raise UserError(f"--save {into}: older checkpoints cannot be removed: {problem}")
        return Resumed(state.iteration, state.consumed_sequences, state.states)


_PARAMETERS = inspect.signature(dist_checkpointing.save).parameters  # megatron-core 0.19 adds async_strategy
