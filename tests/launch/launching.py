"""What the tests of launching share: the quickstart's model made tinier, examples/launch.sh, and waiting."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import ROOT

CONFIG = "examples/quickstart/config.yaml"
# constant rate, no warm-up phase: then the losses do not depend on --train-iters
TINY = "--seq-length 64 --global-batch-size 4 --micro-batch-size 1 --log-interval 1 --eval-interval 1000000".split()
TINY += "--lr-decay-style constant --lr-warmup-iters 4 --ar-warmup-fraction 0".split()


def environment(**variables):
    """This process's environment, the programs of this Python first in the path, ``variables`` added."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, **{name: str(value) for name, value in variables.items()}}


@contextmanager
def started(command, log, **variables):
    """A process in a session of its own, its output in ``log``; asked to end, then killed, if it outlives the block."""
    with Path(log).open("w") as file:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env=environment(**variables),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_for(condition, seconds, what, log=None, every=0.2):
    """Poll until ``condition()`` is true, and give what it gave."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(every)
    told = f"\n{Path(log).read_text()[-6000:]}" if log and Path(log).exists() else ""
    raise AssertionError(f"not within {seconds} seconds: {what}{told}")


def steps(folder):
    """The logged steps of a run, in the order of the file."""
    path = Path(folder) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [row for row in rows if "loss" in row]


def losses(folder):
    """Both losses and the gradient's norm, step by step."""
    return [(row["ar_loss"], row["diffusion_loss"], row["grad_norm"]) for row in steps(folder)]


def children(pid):
    """The processes that a process has started."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def descendants(pid):
    """The processes that a process has started, those that these have started, and so on, as far as they live."""
    try:
        started_by_it = children(pid)
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [process for child in started_by_it for process in [child, *descendants(child)]]


def catches(pid, number):
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    (caught,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")]
    return int(caught, 16) >> (number - 1) & 1
