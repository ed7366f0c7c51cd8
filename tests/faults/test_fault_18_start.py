"""What goes wrong as a job starts: a folder in use, and ranks that die, hang or refuse before the first step."""

import signal

import pytest

from tests.faults.starting_jobs import all_jobs

pytestmark = pytest.mark.timeout(450)  # ten jobs, one after the other
KILLED = -signal.SIGKILL
GONE = "no heartbeat, it hangs or has died (while "


@pytest.fixture(scope="module")
def jobs(shards, tmp_path_factory):
    """What became of every job of starting_jobs.py."""
    folder = tmp_path_factory.mktemp("jobs")
    return all_jobs(shards[0], folder)


def errors(said):
    return [[line for line in log.splitlines() if line.startswith("error: ")] for log in said]


def test_a_folder_in_use(jobs):
    """Fault 18: two live runs into one --save: one goes on, one is refused in one line; a killed one is no hurdle"""
    statuses, said = jobs["second"]
    assert statuses == [2, 2]
    ((line,), none) = errors(said)
    assert ": another run is using this folder: host " in line and ", process " in line and ", since " in line
    assert not none
    assert jobs["living"][0] == [75, 75]
    assert jobs["killed"][0] == [KILLED, KILLED]
    assert sorted([jobs["one"][0], jobs["other"][0]]) == [[0, 0], [2, 2]]  # started together, after a killed one


@pytest.mark.parametrize(
    ("job", "statuses", "line"),
    [
        (
            "killed before it joins",
            [1, 1, KILLED],
            "rank 2: has not joined (within 0.2 minutes; its own log may say why, "
            "--distributed-timeout-minutes gives more time)",
        ),
        ("killed while it waits", [1, KILLED, 1], "rank 1: " + GONE),
        ("killed while groups are made", [1, KILLED, 1], f"rank 1: {GONE}"),
        (
            "rank 0 killed while groups are made",
            [KILLED, 1, 1],
            "rank 0, or the agent that keeps the job's store, has died",
        ),
        ("stopped while groups are made", [1, 1, None], f"rank 2: {GONE}"),
        ("killed while loading", [1, KILLED, 1], f"rank 1: {GONE}"),
    ],
)
def test_a_rank_that_is_gone(jobs, job, statuses, line):
    """Fault 18: a rank that dies or hangs before the first step: the others end soon, each says which in one line"""
    found, said = jobs[job]
    assert found == statuses, said
    for log, status in zip(said, statuses, strict=True):
        if status == 1:
            assert log.count("\n") == 1 and log.startswith("error: rank ") and line in log, log


@pytest.mark.parametrize("job", ["fails while loading", "fails as it reads the data"])
def test_a_rank_that_fails(jobs, job):
    """Fault 18: a rank with a defect before the first step: its traceback is its own, the others say its error"""
    statuses, said = jobs[job]
    assert statuses == [1, 1, 1]
    (failed,) = [rank for rank, log in enumerate(said) if "Traceback" in log]
    assert failed == (2 if "loading" in job else 1)
    for rank, log in enumerate(said):
        if rank != failed:
            assert log.count("\n") == 1 and log.startswith(f"error: rank {rank}, ")
            assert f": rank {failed} (" in log and "RuntimeError: a defect" in log


def test_a_rank_that_refuses(jobs):
    """Fault 18: bad input that one rank alone meets is said by it and by rank 0; what all meet is said once"""
    statuses, said = jobs["refuses alone"]
    assert statuses == [2, 2, 2]
    assert said[0] == said[2] and not said[1]
    assert said[0].startswith("error: rank 2 (") and said[0].count("\n") == 1
    assert said[0].endswith(": --train-data /node/disk: there is no such folder\n")
    statuses, said = jobs["all refuse"]
    assert statuses == [2, 2, 2]
    assert said == ["error: --train-data /node/disk: there is no such folder\n", "", ""]
