"""A rank that hangs is named by those that waited for it; so are a loader that hangs and a rank that is slow."""

from functools import partial

import pytest

from tests.faults.damage import damage_rank
from tests.faults.data_runs import SMALL
from tests.launch.launching import CONFIG, TINY, steps
from tests.ranks import start_ranks


def two_ranks(shards, folder, what, rank, *flags):
    """Two ranks, of which ``rank`` is damaged at step 4: their exit statuses and what they said."""
    run = ["--config", CONFIG, *TINY, *SMALL, "--train-data", shards[0], "--save", folder / "run", "--train-iters", 6]
    damage = [what, rank, 4]
    logs = [folder / f"rank-{number}.log" for number in (0, 1)]
    program = ["tools/pretrain.py", *run, *flags]
    ranks = start_ranks(2, program, logs, prepare=partial(damage_rank, *damage))
    try:
        waited_for = [process for number, process in enumerate(ranks) if what in ("slow", "loader") or number != rank]
        statuses = [process.wait(170) for process in waited_for]
    finally:
        for process in ranks:
            process.kill()
    return statuses, [log.read_text() for log in logs]


@pytest.mark.parametrize("how", ["sleeps", "stopped"])
def test_a_rank_that_hangs(shards, tmp_path, how):
    """Fault 12: one rank hangs or is stopped: the time-out fires, the error names the rank and the step"""
    statuses, logs = two_ranks(shards, tmp_path, how, 1, "--distributed-timeout-minutes", 0.2)
    assert statuses == [1], logs
    (line,) = [line for line in logs[0].splitlines() if line.startswith("error: ")]
    assert "rank 0, step 4: a collective failed: rank 1 does not answer, it hangs or has died in step 4" in line
    assert len(steps(tmp_path / "run")) == 3


def test_a_loader_that_hangs(shards, tmp_path):
    """Fault 12: the data of one rank hangs: the watchdog names the rank, the step and the data"""
    statuses, logs = two_ranks(shards, tmp_path, "loader", 1, "--data-timeout-minutes", 0.03)
    assert statuses == [1, 1], logs
    assert f"error: rank 1, step 4: no batch from {shards[0]} within 0.03 minutes (--data-timeout-minutes)" in logs[1]
    assert "error: rank 0, step 4: a collective failed: rank 1 does not answer" in logs[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_slow_rank(shards, tmp_path, rank):
    """Fault 12: a rank that is only slow is named in the log, with its time over the median"""
    statuses, logs = two_ranks(shards, tmp_path, "slow", rank)
    assert statuses == [0, 0], logs
    assert [row["slowest_rank"] for row in steps(tmp_path / "run")] == [rank] * 6
    assert all(row["slowest_over_median"] > 2 for row in steps(tmp_path / "run"))
    assert f"| slowest rank {rank} (" in logs[0]
