"""Who is named, and that the store is never worth a run; ranks that really hang are in tests/faults/."""

import threading

import pytest
import torch.distributed as dist

from tidar_megatron.distributed import heartbeat
from tidar_megatron.distributed.heartbeat import Heartbeat
from tidar_megatron.errors import UserError

GLOO = "[gloo/transport/tcp/pair.cc:1] Connection closed by peer"


class Gone:
    """The store of an agent that has left."""

    def set(self, *arguments):
        raise dist.DistNetworkError("Broken pipe")

    check = get = set


@pytest.fixture
def rank(monkeypatch):
    """Makes the heartbeat of one of three ranks over one store."""
    store = dist.HashStore()
    monkeypatch.setattr(heartbeat, "GRACE", 0.2)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)

    def make(number, store=store):
        monkeypatch.setattr(dist, "get_rank", lambda: number)
        monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
        return Heartbeat()

    return make


@pytest.mark.slow
def test_those_that_wake_name_the_one_that_does_not(rank, monkeypatch):
    monkeypatch.setattr(heartbeat, "GRACE", 2.0)
    ranks = [rank(number) for number in range(3)]
    for number, beating in enumerate(ranks):
        for step in range(1, 6 - (number == 1)):
            beating.beat(step)
    said = {}
    broken = UserError("a save failed")
    broken.__cause__ = RuntimeError(GLOO)
    blaming = [
        threading.Thread(target=lambda n=n, e=e: said.update({n: str(ranks[n].blame(e))}))
        for n, e in ((0, dist.DistError("timed out")), (2, broken))
    ]
    for thread in blaming:
        thread.start()
    for thread in blaming:
        thread.join()
    who = "rank 1 does not answer, it hangs or has died in step 4"
    assert said == {
        0: f"rank 0, step 5: a collective failed: {who} (timed out)",
        2: f"rank 2, step 5: a collective failed: {who} ({GLOO})",
    }


def test_other_errors_are_nobody_elses(rank):
    assert rank(0).blame(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert rank(0).blame(UserError("--save x: Permission denied")) is None


def test_a_store_that_is_gone(rank, monkeypatch):
    monkeypatch.setattr(dist, "PrefixStore", lambda name, store: store)
    alone = rank(0, Gone())
    alone.beat(7)
    assert "rank 0, step 7: a collective failed: no silent rank was found" in str(alone.blame(RuntimeError(GLOO)))
