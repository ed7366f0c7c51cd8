"""Signals: whoever gets one, all ranks save the same iteration and leave; the launcher is told; the run goes on."""

import os
import signal
import socket
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.conftest import THOROUGH
from tests.launch.launching import CONFIG, TINY, catches, children, losses, started, steps, wait_for
from tests.ranks import free_port
from tests.ranks import started as forked
from tests.training.small_runs import small
from tidar_megatron.checkpoint.folder import latest_iteration, saved_iterations
from tidar_megatron.errors import Interrupted
from tidar_megatron.program import INTERRUPTED_STATUS
from tidar_megatron.training import signals
from tidar_megatron.training.loop import pretrain
from tidar_megatron.training.signals import RUN_STATE
from tidar_megatron.training.trainer import Trainer


def program(shards, folder, iterations=10_000):
    """The training program's arguments."""
    flags = ["--config", CONFIG, *TINY, "--train-iters", iterations, "--train-data", shards[0]]
    return [*flags, "--save", folder, "--load", folder]


def go_on(shards, folder, until, log):
    """Two ranks, forked, to iteration ``until``."""
    with forked(["tools/pretrain.py", *program(shards, folder, until)], log, count=2) as ranks:
        assert [rank.wait(400) for rank in ranks] == [0, 0], log.read_text()[-4000:]


pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="examples/launch.sh reads Linux's /proc"),
]


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """An uninterrupted run of two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    go_on(shards, folder, 40, folder / "log")
    assert (folder / RUN_STATE).read_text() == "finished\n"
    return folder


@contextmanager
def two_ranks(shards, folder, log, launcher):
    """Two ranks that have made three steps, launched or forked; gives the process that is to get the signal."""
    if launcher:
        with started(["examples/launch.sh", *program(shards, folder)], log, GPUS_PER_NODE=2) as run:
            wait_for(lambda: len(steps(folder)) >= 3, 240, "three steps", log)
            (agent,) = children(run.pid)
            assert len(children(agent)) == 2
            yield run
            assert run.wait(240) == 1  # torchrun's; the ranks' own stands in its log
        assert f"exitcode  : {INTERRUPTED_STATUS}" in log.read_text()
    else:
        with forked(["tools/pretrain.py", *program(shards, folder)], log, count=2) as ranks:
            wait_for(lambda: len(steps(folder)) >= 3, 240, "three steps", log)
            yield ranks[1]
            assert [rank.wait(240) for rank in ranks] == [INTERRUPTED_STATUS] * 2, log.read_text()[-4000:]


@pytest.mark.parametrize("whom", ["one rank", "launch.sh"] if THOROUGH else ["one rank"])  # .ci/run is thorough
def test_all_ranks_save_and_the_run_goes_on(shards, tmp_path, whole, whom):
    """Whoever gets the signal: launch.sh with torchrun's agent, or one rank, which tells the other."""
    folder, log = tmp_path / "run", tmp_path / "log"
    with two_ranks(shards, folder, log, launcher=whom == "launch.sh") as run:
        assert not (folder / RUN_STATE).exists()
        for _ in range(2):  # twice is not worse than once
            run.send_signal(signal.SIGTERM)
    text = log.read_text()
    assert "SIGTERM)" not in text, text[-4000:]
    assert (folder / RUN_STATE).read_text() == "interrupted\n"
    last = latest_iteration(folder)
    assert saved_iterations(folder) == [last] == [len(steps(folder))]
    assert f"stopping after iteration {last}: it received a signal; --load resumes it" in text
    until = max(last + 2, 6)
    go_on(shards, folder, until, log)
    assert (folder / RUN_STATE).read_text() == "finished\n"
    assert [row["iteration"] for row in steps(folder)] == list(range(1, until + 1))
    both = min(until, 40)
    assert losses(folder)[:both] == losses(whole)[:both]


def test_a_signal_during_the_imports_and_to_every_process_of_the_job(shards, tmp_path):
    """Asked before its first step, a run makes one, saves and leaves; the helpers of a save survive the signals."""
    folder, log = tmp_path / "run", tmp_path / "log"
    folder.mkdir()
    (folder / RUN_STATE).write_text("finished\n")  # of an earlier attempt
    command = [sys.executable, "tools/pretrain.py", *program(shards, folder), "--save-interval", 1]
    with started(command, log) as run:
        wait_for(lambda: catches(run.pid, signal.SIGUSR1), 120, "the handlers", log, every=0.005)
        run.send_signal(signal.SIGUSR1)
        assert "libtorch" not in Path(f"/proc/{run.pid}/maps").read_text()  # that early
        assert run.wait(240) == INTERRUPTED_STATUS, log.read_text()[-4000:]
    assert (folder / RUN_STATE).read_text() == "interrupted\n"
    assert saved_iterations(folder) == [1] == [len(steps(folder))]
    with forked(command[1:], log) as run:
        wait_for(lambda: (latest_iteration(folder) or 0) >= 4, 240, "saves", log)
        assert not (folder / RUN_STATE).exists()
        while run.poll() is None:
            with suppress(ProcessLookupError):  # it has just ended
                os.killpg(run.pid, signal.SIGUSR1)  # `forked` made it the leader of a session
            time.sleep(0.05)
        assert run.returncode == INTERRUPTED_STATUS, log.read_text()[-4000:]
    assert (folder / RUN_STATE).read_text() == "interrupted\n"
    assert latest_iteration(folder) == len(steps(folder))


def test_without_a_folder_nothing_is_kept_and_it_says_so(shards, tmp_path):
    log = tmp_path / "log"
    with forked(["tools/pretrain.py", *program(shards, tmp_path)[:-4]], log) as run:
        wait_for(lambda: "step" in log.read_text(), 240, "a step", log)
        run.send_signal(signal.SIGTERM)
        assert run.wait(240) == INTERRUPTED_STATUS
    assert "nothing is saved: there is no --save" in log.read_text()


def test_what_the_launcher_is_told(shards, tmp_path, monkeypatch):
    """Only a save that was asked for says "interrupted", only the last iteration "finished", and nothing stays."""

    def state(**training):
        run = {"save": str(tmp_path), "load": str(tmp_path)}
        try:
            pretrain(small(shards, checkpoint=run, training={"eval_interval": 100, **training}))
        except (Interrupted, ZeroDivisionError) as error:
            raised = type(error)
        else:
            raised = None
        path = tmp_path / RUN_STATE
        return raised, latest_iteration(tmp_path), path.read_text().strip() if path.exists() else None

    assert state(exit_interval=3) == (None, 3, None)
    monkeypatch.setattr(signals, "ignore", lambda: None)  # pytest still wants to hear them
    with monkeypatch.context() as asked:
        asked.setattr(signals, "received", lambda: True)
        assert state() == (Interrupted, 4, "interrupted")
        assert state() == (Interrupted, 5, "interrupted")  # every attempt gets on
        assert state(train_iters=6) == (None, 6, "finished")  # asked at the end: nothing is left to requeue for
    assert state(exit_duration_in_mins=1e-9) == (Interrupted, 7, "interrupted")
    with monkeypatch.context() as crashing:
        crashing.setattr(Trainer, "step", lambda self: 1 / 0)
        assert state() == (ZeroDivisionError, 7, None)
    assert state() == (None, 8, "finished")
    assert state() == (None, 8, "finished")  # started once more by mistake


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_waiting_for_ranks_that_do_not_come_can_be_ended(shards, tmp_path, number):
    port = free_port()

    def listens():
        with socket.socket() as caller:
            return caller.connect_ex(("127.0.0.1", port)) == 0

    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with forked(["tools/pretrain.py", *program(shards, tmp_path / "run")], tmp_path / "log", **alone) as run:
        wait_for(listens, 120, "rank 0 keeps the store", tmp_path / "log")
        wait_for(lambda: not catches(run.pid, signal.SIGTERM), 120, "rank 0 waits for rank 1", tmp_path / "log")
        run.send_signal(number)
        assert run.wait(20) == -number
