"""Asked to leave: SIGTERM and SIGUSR1 set a flag, and a file in the run's folder tells the launcher how a run ended.

The training program installs the handlers first of all, so this module imports nothing heavy: a signal that comes
while torch is being imported must not end the process. The loop asks after each step whether any rank has the flag;
then all ranks save the same iteration and leave with status 75. A run that was asked during its start still makes one
step, so that a job that is stopped and requeued again and again gets on.

torchrun's own status cannot tell "saved, start me again" from a crash: it returns 1 for both. So the main process
writes one word into ``run_state``: ``interrupted`` after the save of a run that was asked to leave, or whose
``--exit-duration-in-mins`` are over, ``finished`` after
the last iteration. The file is removed when a run starts; a crash leaves none. A launcher that reads it removes it
before it starts the program, because a program that never got as far as its first line cannot.
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
REASONS = {1: "its time is over (--exit-duration-in-mins)", 2: "a signal asked for it"}

STARTED = time.monotonic()  # this module is the first that the program imports

_received: signal.Signals | None = None


def install() -> None:
    """From now on SIGTERM and SIGUSR1 are only noted, however often they come."""
    for number in SIGNALS:
        signal.signal(number, _note)


def ignore() -> None:
    """The run is leaving: torchrun's SIGTERM to those that are not yet gone must not change their exit status."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _note(number: int, frame: FrameType | None) -> None:
    global _received
    _received = signal.Signals(number)


def received() -> bool:
    """Whether this process was asked to leave."""
    return _received is not None


def reason_to_leave(exit_duration_in_mins: float | None) -> int:
    """Why this process should save and leave: one of :data:`REASONS`; 0 while there is none."""
    if received():
        return 2
    return int(exit_duration_in_mins is not None and time.monotonic() - STARTED > 60 * exit_duration_in_mins)


@contextmanager
def mortal() -> Iterator[None]:
    """While this process waits for the others to appear there is nothing to save: SIGTERM and SIGINT end it at once.

    Waiting happens outside of Python, where a handler would not be heard. SIGUSR1 is still noted. A program that has
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
    """Processes started in this block never hear SIGUSR1; one that comes for this process is noted after it.

    SLURM may signal every process of a job, and W&B's would end of it. (SIGTERM must get through: it is how such
    helpers are ended.)
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


def write_run_state(folder: str | Path, state: str) -> None:
    """Tell the launcher how the run ended; whoever reads the file sees one whole word."""
    replace_text(Path(folder) / RUN_STATE, state + "\n")


def clear_run_state(folder: str | Path) -> None:
    """Forget what an earlier attempt said."""
    (Path(folder) / RUN_STATE).unlink(missing_ok=True)
