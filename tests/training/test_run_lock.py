"""Of two runs that save into one folder exactly one goes on; a dead one's lock does not stop the next."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import threading
import time

import pytest

from tests.training.small_runs import losses, small
from tidar_megatron.checkpoint.folder import saved_iterations
from tidar_megatron.errors import UserError
from tidar_megatron.training import run_lock, signals, trainer
from tidar_megatron.training.loop import pretrain
from tidar_megatron.training.run_lock import _this_process, take_lock
from tidar_megatron.training.trainer import Trainer


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT", 0.05)
    monkeypatch.setattr(run_lock, "STALE", 0.5)
    monkeypatch.setattr(run_lock, "MISSING", 0.3)


def held_by(folder, content=None, number=1, **changes):
    """A lock file of another process."""
    holder = dataclasses.replace(_this_process(), pid=1, process_start="0", **changes)
    path = folder / f".lock-{number:06d}"
    path.write_text(json.dumps(dataclasses.asdict(holder)) if content is None else content)
    return path


def numbers(folder):
    return sorted(path.name for path in folder.glob(".lock-*"))


@contextlib.contextmanager
def renewed(path):
    """As its holder does, on another machine."""
    over = threading.Event()

    def beat():
        while not over.wait(0.03):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    yield
    over.set()
    thread.join()


def other_process(folder, wait):
    """A process that holds ``folder``."""

    def hold():
        take_lock(folder)
        wait.wait()
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=hold, daemon=True)
    process.start()
    while not any(path.stat().st_size for path in folder.glob(".lock-*")):
        time.sleep(0.01)
    return process


def test_held_released_and_taken_again(tmp_path):
    for number in (1, 2, 3):
        lock = take_lock(tmp_path / "run")
        lock.check()
        assert numbers(tmp_path / "run") == [f".lock-{number:06d}"]
        lock.release()
        assert not lock.lost
    assert json.loads((tmp_path / "run" / ".lock-000003").read_text())["released"]


def test_a_living_process_is_refused_and_a_killed_one_is_not(tmp_path):
    wait = multiprocessing.get_context("fork").Event()
    process = other_process(tmp_path, wait)
    with pytest.raises(
        UserError, match=rf"--save .*: another run is using this folder: host \S+, process {process.pid}, since "
    ):
        take_lock(tmp_path)
    os.kill(process.pid, signal.SIGSTOP)  # it does not renew the lock, and is not gone
    time.sleep(0.6)
    with pytest.raises(UserError, match="is using this folder"):
        take_lock(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    began = time.monotonic()
    while True:  # a zombie is dead too: nobody has waited for it
        with contextlib.suppress(UserError):
            take_lock(tmp_path).release()
            break
    assert time.monotonic() - began < 0.4  # and nobody watched for STALE seconds
    process.join()


@pytest.mark.process
def test_another_process_with_the_same_id_is_dead(tmp_path):
    sleeping = subprocess.Popen(["sleep", "60"])
    try:
        path = held_by(tmp_path)
        holder = json.loads(path.read_text()) | {"pid": sleeping.pid}
        path.write_text(json.dumps(holder))
        take_lock(tmp_path).release()
    finally:
        sleeping.kill()
        sleeping.wait()


ELSEWHERE = {"host": "node7", "machine": "another boot"}


@pytest.mark.parametrize("content", [None, "", '{"host": "no'])
def test_another_machine_is_watched(tmp_path, content, capsys):
    path = held_by(tmp_path, content, **ELSEWHERE, job="cluster 123")
    with renewed(path), pytest.raises(UserError, match="another run is using this folder: ") as refused:
        take_lock(tmp_path)
    if content is None:
        assert "host node7, SLURM job 123, process 1, since " in str(refused.value)
    began = time.monotonic()
    lock = take_lock(tmp_path)  # nobody renews it any more
    assert time.monotonic() - began >= 0.5
    assert numbers(tmp_path) == [".lock-000002"]
    lock.release()
    assert content is not None or "held by host node7" in capsys.readouterr().err


def test_a_requeued_job_takes_over_at_once_and_a_second_step_of_it_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "STALE", 1000.0)
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "one")
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    held_by(tmp_path, host="node7", machine="x", job="one 123", attempt=1)
    take_lock(tmp_path).release()
    for job, attempt in (("one 123", 2), ("two 123", 1), ("one 124", 1)):
        path = held_by(tmp_path, None, 10, host="node7", machine="x", job=job, attempt=attempt)
        with renewed(path), pytest.raises(UserError, match="is using this folder"):
            take_lock(tmp_path)


def test_who_was_taken_over_finds_out(tmp_path):
    lock = take_lock(tmp_path)
    held_by(tmp_path, None, 2, **ELSEWHERE)
    with pytest.raises(UserError, match=r"lost: another run took it over .*host node7"):
        lock.check()
    lock.release()
    assert json.loads((tmp_path / ".lock-000002").read_text())["host"] == "node7"
    removed = take_lock(tmp_path / "other")
    (tmp_path / "other" / ".lock-000001").unlink()
    while not removed.lost:  # its thread looks
        time.sleep(0.01)
    removed.release()
    assert not numbers(tmp_path / "other")


def test_a_file_system_that_comes_back_empty_for_a_moment_ends_no_run(tmp_path):
    folder = tmp_path / "run"
    lock = take_lock(folder)
    for elsewhere in (tmp_path / "aside", folder / "aside"):  # the folder is away, then it is there and empty
        away = folder if elsewhere.parent == tmp_path else folder / ".lock-000001"
        away.rename(elsewhere)
        time.sleep(0.15)  # some looks
        lock.check()
        elsewhere.rename(away)
        time.sleep(0.15)
    lock.check()
    assert not lock.lost
    lock.release()


def test_a_lock_that_another_run_made_anew_is_lost(tmp_path):
    """As after `rm .lock-*` and a second start: the new lock has the number of the old one."""
    lock = take_lock(tmp_path)
    path = held_by(tmp_path, **ELSEWHERE)
    with pytest.raises(UserError, match=r"lost: another run took it over .*host node7"):
        lock.check()
    lock.release()
    assert not json.loads(path.read_text())["released"]


def race(folder, start, winners):
    start.wait()
    tries, end = 0, time.monotonic() + 60
    while tries < 40 or (winners[2] < 8 and time.monotonic() < end):  # a busy machine needs more
        tries += 1
        with contextlib.suppress(UserError):
            lock = take_lock(folder)
            with winners.get_lock():
                winners[0] += 1
                inside = winners[0]
                winners[1] = max(winners[1], inside)
                winners[2] += 1
            time.sleep(0.001)
            lock.check()
            with winners.get_lock():
                winners[0] -= 1
            lock.release()
    os._exit(0)


def test_of_many_starters_exactly_one_wins(tmp_path):
    """Eight processes hammer one folder, whose first lock is a dead process's."""
    held_by(tmp_path)
    context = multiprocessing.get_context("fork")
    start, winners = context.Event(), context.Array("i", 3)  # inside now, the most at once, times taken
    processes = [context.Process(target=race, args=(tmp_path, start, winners), daemon=True) for _ in range(8)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert winners[1] == 1
    assert winners[2] >= 8
    assert len(numbers(tmp_path)) == 1
    assert not list(tmp_path.glob("..lock*"))


def test_a_run_that_watches_a_lock_can_be_ended(shards, tmp_path, monkeypatch):
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}

    def watch(folder):
        handlers.append(signal.getsignal(signal.SIGTERM))
        raise UserError("watched")

    handlers = []
    monkeypatch.setattr(trainer, "take_lock", watch)
    signals.install()
    try:
        with pytest.raises(UserError, match="watched"):
            pretrain(small(shards, checkpoint={"save": str(tmp_path)}))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert handlers == [signal.SIG_DFL]


@pytest.mark.slow
def test_a_run_holds_its_folder(shards, tmp_path):
    """Refused while another holds it; released however a run ends; whoever lost it saves nothing any more."""
    run = {"save": str(tmp_path), "load": str(tmp_path), "save_interval": 2}
    path = held_by(tmp_path, **ELSEWHERE)
    before = sorted(tmp_path.iterdir())
    with renewed(path), pytest.raises(UserError, match="another run is using this folder: host node7"):
        pretrain(small(shards, checkpoint=run))
    assert sorted(tmp_path.iterdir()) == before
    path.unlink()
    pretrain(small(shards, checkpoint=run, training={"exit_interval": 4}))
    (path,) = tmp_path.glob(".lock-*")
    assert json.loads(path.read_text())["released"]
    for override in ("seed", "nothing"):  # a start that fails releases it too
        with pytest.raises(UserError):
            pretrain(small(shards, checkpoint={**run, "override_fingerprint": [override]}, model={"num_layers": 1}))
        (path,) = tmp_path.glob(".lock-*")
        assert json.loads(path.read_text())["released"]
    real = Trainer.step

    def step(self):
        if self.iteration == 5:  # before the save of iteration 6
            held_by(tmp_path, None, 99, **ELSEWHERE)
        return real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_lock, "BEAT", 1000.0)  # only the save looks
        patch.setattr(Trainer, "step", step)
        with pytest.raises(UserError, match="another run") as lost:
            pretrain(small(shards, checkpoint=run))
    assert "iteration 6 is not saved: the lock on" in str(lost.value)
    assert saved_iterations(tmp_path) == [2, 4]
    (tmp_path / ".lock-000099").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "lock_lost", property(lambda self: self.iteration == 5))
        with pytest.raises(UserError, match=r"another run has taken over this folder, .* so iteration 5 is not saved"):
            pretrain(small(shards, checkpoint=run))
    assert saved_iterations(tmp_path) == [2, 4]
    assert max(losses(tmp_path)) == 5
