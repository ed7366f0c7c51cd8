"""Stop a run on SIGTERM, SIGUSR1 or a time limit, and tell the launcher through a file how the run ended.

The training program installs the handlers before anything else, so this module imports nothing heavy: a signal that
arrives while torch is imported must not end the process. After each step the loop checks whether any rank has received
a signal; then all ranks save the same iteration and exit with status 75. A run that receives a signal during its start
still makes one step, so that a job that is stopped and requeued repeatedly makes progress.

torchrun's own status cannot distinguish "saved, start me again" from a crash: it is 1 for both. So the main process
writes one word into ``run_state``: ``interrupted`` after the save of a run that a signal or ``--exit-duration-in-mins``
has stopped, ``finished`` after the last iteration. The file is removed when a run starts, and a crash leaves none. A
launcher that reads the file must remove it before it starts the program, in case the program fails before its first
line.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tidar_megatron.files import replace_text

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
RUN_STATE = "run_state"  # in the folder of --save
INTERRUPTED, FINISHED = "interrupted", "finished"
REASONS = {1: "its time is up (--exit-duration-in-mins)", 2: "it received a signal"}

STARTED = time.monotonic()  # the start of the program, because this module is imported first

_received: signal.Signals | None = None


def install() -> None:
    """Install handlers that only record SIGTERM and SIGUSR1."""
    for number in SIGNALS:
        signal.signal(number, _note)


def ignore() -> None:
    """Ignore the signals while the run exits: torchrun's SIGTERM must not change the exit status of a rank."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _note(number: int, frame: FrameType | None) -> None:
    global _received
    _received = signal.Signals(number)


def received() -> bool:
    """Return whether this process has received one of the signals."""
    return _received is not None


def reason_to_leave(exit_duration_in_mins: float | None) -> int:
    """Return why this process should save and exit: a key of :data:`REASONS`, or 0 if there is no reason.

    Args:
        exit_duration_in_mins: The time limit in minutes since the start of the program; None if there is none.
    """
    if received():
        return 2
    return int(exit_duration_in_mins is not None and time.monotonic() - STARTED > 60 * exit_duration_in_mins)


@contextmanager
def mortal() -> Iterator[None]:
    """Let SIGTERM and SIGINT end the process at once in this block, where it waits for other ranks and has no progress.

    The process waits outside Python, where Python's handlers do not run. SIGUSR1 is still recorded. A program that has
    not installed the handlers keeps its own.
    """
    if signal.getsignal(signal.SIGTERM) is not _note:
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def shielded() -> Iterator[None]:
    """Block SIGUSR1 in this block and in processes started there; this process receives a pending one afterwards.

    SLURM may signal every process of a job, and SIGUSR1 would end W&B's process and Inductor's. SIGTERM is not blocked,
    because it is how such helper processes are stopped.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


def write_run_state(folder: str | Path, state: str) -> None:
    """Tell the launcher how the run ended, by writing :data:`RUN_STATE` atomically."""
    replace_text(Path(folder) / RUN_STATE, state + "\n")


def clear_run_state(folder: str | Path) -> None:
    """Remove the state of an earlier attempt."""
    (Path(folder) / RUN_STATE).unlink(missing_ok=True)
