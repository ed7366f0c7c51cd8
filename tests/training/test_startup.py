"""Which rank is named as a job starts, with threads for ranks; real ones are in tests/faults/."""

import contextlib
import threading
import time

import pytest
import torch.distributed as dist

from tidar_megatron.distributed import startup
from tidar_megatron.distributed.startup import Startup
from tidar_megatron.errors import LocalError, Stalled, UserError

GLOO = "[gloo/transport/tcp/pair.cc:1] Connection closed by peer"


class Job:
    """Ranks over one store, and how each was ended."""

    def __init__(self):
        self.store, self.ended = dist.HashStore(), {}

    def rank(self, number, world_size=3, patience=100.0):
        return Startup(self.store, number, world_size, patience, end=lambda *how: self.ended.update({number: how}))

    def wait(self, *ranks):
        end = time.monotonic() + 5
        while time.monotonic() < end and not set(ranks) <= set(self.ended):
            time.sleep(0.01)
        return [self.ended.get(rank) for rank in ranks]


@pytest.fixture
def job(monkeypatch):
    for name, seconds in {"BEAT": 0.02, "SILENT": 1.0, "HELD_UP": 0.5, "GRACE": 0.2, "ALIKE": 0.3}.items():
        monkeypatch.setattr(startup, name, seconds)
    return Job()


def leave(start, error=None):
    start.__exit__(type(error) if error else None, error, None)


def leave_quietly(start, error):
    with contextlib.suppress(Stalled, UserError):
        leave(start, error)


def stop(start):
    """As SIGKILL does."""
    start._leaving.set()
    start._over.set()
    start._thread.join()


@pytest.mark.slow
def test_they_meet_and_go_on(job):
    ranks = [job.rank(number) for number in range(3)]
    for start in ranks:
        start.meet()
    leave(ranks[1])
    time.sleep(1.2)  # a rank that has begun to train is not silent
    leave(ranks[0])
    leave(ranks[2])
    assert not job.ended


@pytest.mark.slow
@pytest.mark.parametrize(("gone", "others"), [(1, (0, 2)), (0, (1, 2))])
@pytest.mark.parametrize("broken", [False, True])
def test_a_silent_rank_is_named(job, gone, others, broken):
    ranks = [job.rank(number) for number in range(3)]
    for start in ranks:
        start.meet()
        start.phase = "loading"
    time.sleep(0.1)
    stop(ranks[gone])
    began = time.monotonic()
    if broken:  # a collective of one of the others has failed: the time is shorter
        threading.Thread(target=leave_quietly, args=(ranks[others[0]], RuntimeError(GLOO)), daemon=True).start()
    for rank, how in zip(others, job.wait(*others), strict=True):
        said = f"rank {rank}, loading: rank {gone}: no heartbeat, it hangs or has died (while loading)"
        assert how == (said, 1)
    assert (time.monotonic() - began < 0.9) == broken


def test_a_rank_that_never_comes(job):
    ranks = [job.rank(number, 12, patience=0.3) for number in (0, 2)]
    said, status = job.wait(0, 2)[0]
    assert said.startswith("rank 0, starting: ranks 1, 3, 4, 5, 6, 7, 8, 9, ..: has not joined (within 0.005 minutes; ")
    assert status == 1
    del ranks


@pytest.mark.slow
def test_a_phase_that_ends_as_the_last_one_does_is_watched(job):
    ranks = [job.rank(number, 2) for number in range(2)]
    for start in ranks:
        start.meet()
        start.phase = "loading --init-from runs/pretraining"
    time.sleep(0.1)
    stop(ranks[1])
    assert "rank 1: no heartbeat" in job.wait(0)[0][0]


class Clock:
    """What startup sees of time, with jumps."""

    sleep = staticmethod(time.sleep)

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


def test_a_job_that_was_suspended_accuses_nobody(job, monkeypatch):
    ranks = [job.rank(number, 2) for number in range(2)]
    for start in ranks:
        start.meet()
        stop(start)
    clock = Clock()
    monkeypatch.setattr(startup, "time", clock)
    ranks[0]._round, ranks[0]._seen = clock.now, {}
    ranks[0]._judge()
    clock.now += 600.0  # all ranks stood still
    ranks[0]._judge()
    assert not job.store.check([startup.VERDICT])
    for _ in range(12):  # now rank 0 goes on, and rank 1 does not
        ranks[0]._round = clock.now
        clock.now += 0.1
        ranks[0]._judge()
    assert job.store.check([startup.VERDICT])


def test_a_job_that_was_suspended_while_it_waits_goes_on(job, monkeypatch):
    start = job.rank(0, 2)
    stop(start)
    clock, waits = Clock(), iter([600.0, 0.02, 0.02])
    monkeypatch.setattr(startup, "time", clock)
    start._round = clock.now

    class Met:
        def wait(self, seconds):
            jump = next(waits, None)
            clock.now += jump or 0.0
            if jump == 0.02:
                start._round = clock.now  # the thread goes on as well
            return jump is None

    start._met = Met()
    start.meet()


def test_a_store_that_goes_after_the_start_ends_no_rank(job):
    class Going(dist.HashStore):
        gone = False

        def check(self, keys):
            if self.gone:
                raise dist.DistNetworkError("Broken pipe")
            return super().check(keys)

    job.store = Going()
    start = job.rank(1, 2)
    start._tell = lambda: setattr(job.store, "gone", start._over.is_set())  # gone in the last round
    leave(start)
    start._thread.join()
    assert not job.ended


def test_a_failure_is_told(job):
    ranks = [job.rank(number) for number in range(3)]
    ranks[2].phase = "reading the data"
    leave(ranks[2], KeyError("x"))
    (first, second) = job.wait(0, 1)
    assert first[1] == second[1] == 1
    assert first[0].startswith("rank 0, starting: rank 2 (")
    assert first[0].endswith("), reading the data: KeyError: 'x'")
    assert 2 not in job.ended


def test_a_refusal_of_one_rank(job):
    ranks = [job.rank(number) for number in range(3)]
    with pytest.raises(LocalError, match=r"rank 1 \(.*\), starting: --train-data x: gone"):
        leave(ranks[1], UserError("--train-data x: gone"))
    (main, other) = job.wait(0, 2)
    assert main[1] == 2 and main[0].endswith("--train-data x: gone")
    assert other == (None, 2)


def test_a_refusal_of_all_is_rank_0s_to_say(job):
    ranks = [job.rank(number) for number in range(2)]
    threading.Thread(target=leave_quietly, args=(ranks[1], UserError("x")), daemon=True).start()
    leave(ranks[0], UserError("x"))
    assert job.wait(1) == [(None, 2)]
    assert 0 not in job.ended


@pytest.mark.parametrize(
    "error",
    [UserError("unequal size, which gloo does not support"), PermissionError(13, "Permission denied", "/igloo/x")],
)
def test_what_names_gloo_without_being_its_failure(job, error):
    start = job.rank(0, 1)
    began = time.monotonic()
    leave(start, error)
    assert time.monotonic() - began < 0.5


def test_nobody_is_to_blame(job):
    ranks = [job.rank(number, 2) for number in range(2)]
    with pytest.raises(Stalled, match=r"rank 0, starting: a collective failed: no silent rank was found .*closed by"):
        leave(ranks[0], RuntimeError(GLOO))
    stop(ranks[1])
    stop(ranks[0])


def test_a_store_that_is_gone(job):
    class Gone:
        def set(self, *arguments):
            raise dist.DistNetworkError("Broken pipe")

    job.store = Gone()
    job.rank(1)
    assert job.wait(1) == [
        ("rank 1, starting: rank 0, or the agent that keeps the job's store, has died (Broken pipe)", 1)
    ]
