"""Processes and ranks without the imports: each is forked from a server that has torch, megatron.core and the trainer.

An interpreter that imports them takes 6 to 25 seconds; a fork takes 0.05. Every process is the real program, with its
own standard streams, environment, signals and exit status. The server is ``multiprocessing``'s, one for each worker of
pytest, and starts with the first process that a test asks for. Nothing that a fork would break exists in it: no
process group and no pool of threads (tests/preloaded.py). What only a new interpreter shows is tested with one: the
imports (test_streams.py::test_a_real_process), and torchrun (tests/training/test_layout_check.py, tests/launch).
"""

import ctypes
import io
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.preloaded"])


class Process:
    """One program in a process of its own; the part of ``subprocess.Popen``'s interface that the tests use.

    Args:
        arguments: as python would get them: ``tools/x.py``, ``-m module`` or ``-c code``, then the program's own.
        output: the file that its standard output is appended to.
        errors: that of its standard error; default: that of its output.
        variables: added to this process's environment.
        stdin: what it reads.
        prepare: called before the program starts; must be picklable.
    """

    def __init__(self, arguments, output, errors=None, *, variables=None, stdin=b"", session=False, prepare=None):
        sys.audit("tests.ranks.Process", *map(str, arguments))
        environment = {**os.environ, **{name: str(value) for name, value in (variables or {}).items()}}
        program = [str(argument) for argument in arguments]
        files = str(output), str(errors or output)
        self._process = SERVER.Process(target=_be, args=(program, environment, files, stdin, session, prepare))
        self._process.start()
        self.pid = self._process.pid
        self.sentinel = self._process.sentinel

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        """Return the exit status, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked program", timeout)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


class ForkedSubprocess:
    """A stand-in for the module ``subprocess``, for a module whose programs are to be forked."""

    DEVNULL, TimeoutExpired = subprocess.DEVNULL, subprocess.TimeoutExpired

    @staticmethod
    def Popen(command, *, stdin, stdout, stderr, env, start_new_session):  # noqa: N802
        assert command[0] == sys.executable and stdin == subprocess.DEVNULL
        return Process(command[1:], stdout.name, stderr.name, variables=env, session=start_new_session)


def run(*arguments, timeout=300, input=b"", largest_file=None, **variables):
    """Run one program to its end and return a ``subprocess.CompletedProcess`` with its text."""
    prepare = _Largest(largest_file) if largest_file else None
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = Process(arguments, out, err, variables=variables, stdin=input, prepare=prepare)
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(arguments, status, *(path.read_text() for path in (out, err)))


def run_ranks(count, *arguments, timeout=300, prepare=None):
    """Run a program on ``count`` ranks, as ``torchrun --standalone`` would; return rank 0's ``CompletedProcess``.

    Once a rank has failed the others are ended; the output of all becomes the assertion's message.
    """
    with tempfile.TemporaryDirectory() as folder:
        logs = [(Path(folder, f"{rank}.out"), Path(folder, f"{rank}.err")) for rank in range(count)]
        ranks = start_ranks(count, arguments, logs, prepare)
        waiting, end = {rank.sentinel: rank for rank in ranks}, time.monotonic() + timeout
        try:
            while waiting and time.monotonic() < end:
                ready = [waiting.pop(sentinel) for sentinel in wait(list(waiting), end - time.monotonic())]
                if any(rank.wait() for rank in ready):
                    end = min(end, time.monotonic() + 15)  # the others say what they have to say
                    break
            wait_for_all(ranks, end)
        finally:
            for rank in ranks:
                rank.kill()
        statuses = [rank.wait() for rank in ranks]
        said = [[path.read_text() for path in paths] for paths in logs]
    assert statuses == [0] * count, "\n".join(
        [f"statuses: {statuses}", *(text[-4000:] for pair in said for text in pair)]
    )
    return subprocess.CompletedProcess(arguments, 0, *said[0])


def wait_for_all(processes, end):
    """Wait until each of the processes has ended, but not beyond the time ``end``."""
    for process in processes:
        process._process.join(max(0, end - time.monotonic()))


def start_ranks(count, arguments, logs, prepare=None, **variables):
    """Start ``count`` ranks of a program; ``logs``: for each the file of its output, or a pair with that of its errors.

    ``prepare``: called with the rank, in it, before the program starts; must be picklable.
    """
    port, ranks = free_port(), []
    for rank in range(count):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **variables}
        files = logs[rank] if isinstance(logs[rank], tuple) else (logs[rank],)
        ranks.append(Process(arguments, *files, variables=place, prepare=_Prepare(prepare, rank) if prepare else None))
    return ranks


def free_port():
    """Return a port of this machine that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def started(arguments, log, count=1, **variables):
    """The ``count`` ranks of a program, their output in ``log``; killed if they outlive the block.

    A single one is no rank, and has a session of its own.
    """
    Path(log).write_text("")
    if count > 1:
        processes = start_ranks(count, arguments, [log] * count, **variables)
    else:
        processes = [Process(arguments, log, variables=variables, session=True)]
    try:
        yield processes if count > 1 else processes[0]
    finally:
        for process in processes:
            process.kill()


class _Largest:
    """Let writes beyond ``size`` bytes of a file fail, as on a full disk."""

    def __init__(self, size):
        self.size = size

    def __call__(self):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


class _Prepare:
    def __init__(self, function, rank):
        self.function, self.rank = function, rank

    def __call__(self):
        self.function(self.rank)


def _be(program, environment, files, stdin, session, prepare):
    """Be the program, in a process that has just been forked. Its SystemExit becomes the exit status."""
    assert "tests.preloaded" in sys.modules, "the server failed to import it: python -m tests.preloaded says why"
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: killed with the server, which ends with the tests
    if session:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    _streams(files, stdin, environment.get("PYTHONIOENCODING", "utf-8"))
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    if prepare is not None:
        prepare()
    if program[0] == "-m":
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    elif program[0] == "-c":
        sys.argv = ["-c", *program[2:]]
        exec(compile(program[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = program
        runpy.run_path(str(ROOT / program[0]), run_name="__main__")


def _streams(files, stdin, encoding):
    """Put files in the place of the standard streams, as Python opens them when it starts."""
    with tempfile.TemporaryFile() as given:
        given.write(stdin)
        given.seek(0)
        os.dup2(given.fileno(), 0)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, file in enumerate(files, 1):
        if number == 2 and file == files[0]:
            os.dup2(1, 2)
            continue
        descriptor = os.open(file, flags)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = sys.__stdin__ = open(0, encoding=encoding, closefd=False)  # noqa: SIM115
    for number, name, buffered in ((1, "stdout", False), (2, "stderr", True)):
        errors = "backslashreplace" if number == 2 else "strict"
        raw = open(number, "wb", closefd=False)  # noqa: SIM115
        stream = io.TextIOWrapper(raw, encoding, errors, line_buffering=buffered, write_through=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
