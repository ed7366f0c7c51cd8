"""Write and seal one rank's files of a checkpoint; megatron-core decides which tensors go into which file.

megatron-core's own writers are not used: they start processes from processes (if one is killed, the rest wait
indefinitely), and they collect the results through a server that re-imports the program at the first save, which takes
ten seconds or more. Instead the rank itself writes or, for an asynchronous save, one process that is forked from it.
The fork sees a copy-on-write snapshot of the memory, so CPU tensors are not copied in advance; GPU tensors are copied
to the host before the fork. The forked process also hashes the files, so that hashing blocks no step.
"""

import contextlib
import ctypes
import gc
import inspect
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

# megatron-core reads here what was written when it finalizes a save; a rank has at most one save in progress
RESULTS: queue.SimpleQueue = queue.SimpleQueue()
filesystem_async._results_queue = RESULTS


@dataclass
class Report:
    """The files that one rank has written, or the error that stopped it."""

    files: dict[str, FileEntry] = field(default_factory=dict)  # by name
    results: dict[int, Any] = field(default_factory=dict)  # megatron-core's write results, by file number
    error: Exception | None = None


def write(request: Any, folder: Path, texts: dict[str, str]) -> Report:
    """Write and seal this rank's files; an error is returned in the report, not raised.

    Args:
        request: megatron-core's ``AsyncRequest``, with its tensors on the host (:func:`staged`).
        folder: The folder to write into.
        texts: The contents of further small files, by name.
    """
    report = Report()
    try:
        for name, text in texts.items():
            write_durably(folder / name, text)
            report.files[name] = seal(folder / name)
        if request.async_fn is None:
            return report  # other ranks save everything that this rank holds
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
                use_fsync=False,  # seal() syncs the file, after the last buffer is flushed
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
    """Return ``request`` with its tensors copied to the host, into pageable memory.

    megatron-core would copy into page-locked memory. A process that is forked while its parent holds such memory may
    crash (Megatron-LM issue 1861), and the memory is not given back.
    """
    if request.async_fn is None or request.preload_fn is None:
        return request
    rank, _, results = request.async_fn_args
    preload = request.preload_fn  # a functools.partial
    call = inspect.signature(preload.func).bind(*preload.args, **preload.keywords)
    call.arguments["non_blocking"] = False
    buckets = preload.func(*call.args, **call.kwargs)
    return request._replace(async_fn_args=[rank, buckets, results], preload_fn=None)


class InBackground:
    """A forked process that runs ``work`` and sends its report back; its memory is separate from this process."""

    def __init__(self, work: Callable[[], Report]) -> None:
        context = multiprocessing.get_context("fork")
        self._receiving, sending = context.Pipe(duplex=False)
        self._process = context.Process(target=_child, args=(work, sending, os.getpid()), daemon=True)
        self._process.start()
        sending.close()  # only the child holds this end now, so that its death closes the pipe

    def done(self) -> bool:
        """Return whether the process has sent a report, of success or failure, or has died."""
        return self._receiving.poll()

    def report(self) -> Report:
        """Wait for the report and return it; if the process was killed, the report says so."""
        try:
            report = self._receiving.recv()
        except EOFError:
            report = Report(error=RuntimeError("the process that wrote the checkpoint was killed"))
        self._process.join()
        self._receiving.close()
        return report

    def abandon(self) -> None:
        """Kill the process; the files it has written are unusable."""
        self._process.kill()
        self._process.join()
        self._receiving.close()


def _child(work: Callable[[], Report], sending: Connection, parent: int) -> None:
    gc.disable()  # the parent's objects must not be finalized here, above all those that live on a GPU
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # they concern the run, which waits for this save before it exits
    _die_with(parent)
    report = work()
    try:
        sending.send(report)
    except Exception:  # an error that cannot be pickled
        sending.send(Report(error=RuntimeError(str(report.error))))


def _die_with(parent: int) -> None:
    """Make this process die with its parent, so that a killed run leaves no writer behind (Linux only)."""
    with contextlib.suppress(OSError, AttributeError):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
