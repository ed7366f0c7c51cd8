"""One rank's part of a save: megatron-core says which tensors go into which file; here they are written and sealed.

megatron-core's own ways of writing do not do: they start processes from processes (one that is killed leaves the rest
waiting for ever), and collect the results through a server that re-imports the program at the first save, which takes
ten seconds and more. So the rank itself writes, or, for an asynchronous save, one process forked from it. A fork sees
the memory of its moment, copied only where training changes it: nothing is copied in advance on a CPU, and a GPU's
tensors are brought to the host before. Hashing happens beside the writing, so it blocks no step either.
"""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import queue
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async

from tidar_megatron.checkpoint.integrity import FileEntry, seal
from tidar_megatron.files import write_durably

# Where megatron-core looks for what was written, when a save is finished; one rank has one save under way.
RESULTS: queue.SimpleQueue = queue.SimpleQueue()
filesystem_async._results_queue = RESULTS


@dataclass
class Report:
    """What one rank has written."""

    files: dict[str, FileEntry] = field(default_factory=dict)  # by name
    results: dict[int, Any] = field(default_factory=dict)  # megatron-core's, by file
    error: Exception | None = None


def write(request: Any, folder: Path, texts: dict[str, str]) -> Report:
    """Write and seal this rank's files.

    Args:
        request: megatron-core's ``AsyncRequest``, its tensors on the host (:func:`staged`).
        folder: to write into.
        texts: further small files by name.
    """
    report = Report()
    try:
        for name, text in texts.items():
            write_durably(folder / name, text)
            report.files[name] = seal(folder / name)
        if request.async_fn is None:
            return report  # this rank holds nothing that no other rank holds
        transforms, buckets = request.async_fn.args[0], request.async_fn_args[1]
        for number, bucket in enumerate(buckets):
            written: queue.SimpleQueue = queue.SimpleQueue()
            waiting: queue.Queue = queue.Queue()
            waiting.put(number)
            filesystem_async.FileSystemWriterAsync.write_preloaded_data(
                transforms,
                local_proc_idx=number,
                write_bucket=bucket,
                results_queue=written,
                count_queue=waiting,
                use_fsync=False,  # sealing does it, after the last buffer is flushed
            )
            _, result = written.get_nowait()
            if isinstance(result, Exception):
                raise result
            report.results[number] = result
            report.files[bucket[1]] = seal(folder / bucket[1])
    except Exception as error:
        report.error = error
    return report


def staged(request: Any) -> Any:
    """``request`` with its tensors on the host."""
    if request.async_fn is None or request.preload_fn is None:
        return request
    rank, _, results = request.async_fn_args
    return request._replace(async_fn_args=[rank, request.preload_fn(), results], preload_fn=None)


class InBackground:
    """``work``, done by a forked process; nothing it does to its memory is seen here, only its report."""

    def __init__(self, work: Callable[[], Report]) -> None:
        context = multiprocessing.get_context("fork")
        self._receiving, sending = context.Pipe(duplex=False)
        self._process = context.Process(target=_child, args=(work, sending, os.getpid()), daemon=True)
        self._process.start()
        sending.close()  # the child holds the only end now: if it dies, that is noticed

    def done(self) -> bool:
        """Whether there is a report, good or bad."""
        return self._receiving.poll()

    def report(self) -> Report:
        """What was written; waits for it."""
        try:
            report = self._receiving.recv()
        except EOFError:
            report = Report(error=RuntimeError("the process that wrote the checkpoint was killed"))
        self._process.join()
        self._receiving.close()
        return report

    def abandon(self) -> None:
        """End it; what it wrote is worthless."""
        self._process.kill()
        self._process.join()
        self._receiving.close()


def _child(work: Callable[[], Report], sending: Connection, parent: int) -> None:
    gc.disable()  # nothing of the parent's may be finalised here, least of all what lives on a GPU
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # meant for the run: it waits for this save and then leaves
    _die_with(parent)
    report = work()
    try:
        sending.send(report)
    except Exception:  # an error that cannot be pickled
        sending.send(Report(error=RuntimeError(str(report.error))))


def _die_with(parent: int) -> None:
    """A killed run leaves no writer behind (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
