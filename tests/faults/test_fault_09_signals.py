"""SIGTERM to whomever and whenever: all ranks save the same step and leave, and the run goes on."""

import contextlib
import os
import signal
import time
from pathlib import Path

from tests.faults.data_runs import begin, ids_of
from tests.launch.launching import catches, children, descendants, steps, wait_for
from tidar_megatron.checkpoint.folder import checkpoint_folder, latest_iteration
from tidar_megatron.checkpoint.integrity import check_hashes

FOREVER = ("--train-iters", 100000)


def check_saved(run, log):
    """All ranks have saved the last step of the log and said so; what was trained on, once each."""
    wait_for(lambda: (run / "run_state").exists(), 60, "the word of the run", log)
    assert (run / "run_state").read_text() == "interrupted\n"
    last = latest_iteration(run)
    check_hashes(checkpoint_folder(run, last))
    assert [row["iteration"] for row in steps(run)] == list(range(1, last + 1))
    assert sorted(ids_of(run)) == list(range(1, last + 1))
    assert all(len(samples) == 4 for samples in ids_of(run).values())
    assert f"stopping after iteration {last}: it received a signal" in Path(log).read_text()
    return last


def listens(rank, agent):
    """Whether a rank has its own handlers: until it is a program of its own, it has those of torchrun."""
    own = Path(f"/proc/{rank}/cmdline").read_bytes() != Path(f"/proc/{agent}/cmdline").read_bytes()
    return own and catches(rank, signal.SIGTERM)


def lives(process):
    """Whether it is still there, and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_one_run_asked_in_many_ways(shards, tmp_path):
    """Fault 9: SIGTERM to torchrun twice, to one rank during import, to every process during saves: all save and leave

    One run, four lives: the data is built by two threads; saves are synchronous, then asynchronous.
    """
    run, log = tmp_path / "run", tmp_path / "log"
    with begin(run, shards[0], log, 2, "--num-workers", 2, *FOREVER) as job:
        wait_for(lambda: len(steps(run)) >= 3, 170, "steps", log)
        for _ in range(2):
            job.send_signal(signal.SIGTERM)
            time.sleep(0.02)
        assert job.wait(100) != 0
    saved = [check_saved(run, log)]

    with begin(run, shards[0], log, 2, "--num-workers", 2, *FOREVER) as job:
        ranks = wait_for(lambda: len(children(job.pid)) == 2 and children(job.pid), 120, "ranks", log, every=0.01)
        wait_for(lambda: listens(ranks[1], job.pid), 120, "the handlers", log, every=0.005)
        os.kill(ranks[1], signal.SIGTERM)
        assert "libtorch" not in Path(f"/proc/{ranks[1]}/maps").read_text()  # that early
        assert job.wait(170) != 0
    saved.append(check_saved(run, log))
    assert saved[1] == saved[0] + 1  # asked before its first step, a life makes one

    for how in ("--no-async-save", "--async-save"):
        with begin(run, shards[0], log, 2, "--save-interval", 1, how, *FOREVER) as job:
            wait_for(lambda: (latest_iteration(run) or 0) >= saved[-1] + 2, 170, "saves", log, every=0.02)
            ranks = children(job.pid)
            while any(map(lives, ranks)):  # whatever phase their saves are in, the writers' processes included
                for process in [job.pid, *ranks, *descendants(ranks[0]), *descendants(ranks[1])]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGTERM)
                time.sleep(0.002)
            assert job.wait(60) != 0
        saved.append(check_saved(run, log))
    assert sorted(set(saved)) == saved


def test_the_time_of_a_program(shards, tmp_path):
    """Fault 9: --exit-duration-in-mins: all ranks save the same step and leave"""
    run, log = tmp_path / "run", tmp_path / "log"
    with begin(run, shards[0], log, 2, "--exit-duration-in-mins", 0.3, *FOREVER) as job:
        assert job.wait(170) == 1, log.read_text()[-4000:]  # torchrun's; the ranks' own is 75
    last = latest_iteration(run)
    said = log.read_text()
    assert f"stopping after iteration {last}: its time is up (--exit-duration-in-mins); --load resumes it" in said
    assert "exitcode  : 75" in said
    assert (run / "run_state").read_text() == "interrupted\n"
    assert [row["iteration"] for row in steps(run)] == list(range(1, last + 1))
