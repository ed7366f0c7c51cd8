"""Laying out groups anew: what held the earlier ones is gone, on every rank at once."""

import gc
import weakref

import pytest

from tidar_megatron.config import ParallelConfig
from tidar_megatron.distributed import groups
from tidar_megatron.distributed.groups import initialize, lay_out, shut_down


class Holder:
    """As a model does, it holds a group and is part of a cycle."""

    def __init__(self, group):
        self.group, self.itself = group, self


def test_holders_of_groups_in_cycles_are_gone_before_the_next_layout():
    """Where a rank's garbage collector came later than the others', their gloo threads ran in circles."""
    ranks = initialize(ParallelConfig(), seed=0)
    holder = weakref.ref(Holder(ranks.groups.tp))
    gc.disable()
    try:
        lay_out(ParallelConfig(), 0, ranks.device)
        assert holder() is None
    finally:
        gc.enable()
        shut_down()


@pytest.mark.parametrize(("backend", "orderly"), [("nccl", True), ("nccl", False), ("gloo", True), ("gloo", False)])
def test_a_failed_rank_does_not_wait_for_nccls_collectives(backend, orderly, monkeypatch):
    """Destroying an NCCL group waits for its collectives, which other ranks may never join."""
    ended = []
    monkeypatch.setattr(groups.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(groups.dist, "get_backend", lambda: backend)
    monkeypatch.setattr(groups.dist, "barrier", lambda: ended.append("barrier"))
    monkeypatch.setattr(groups.dist, "destroy_process_group", lambda *group: ended.append("destroy"))
    monkeypatch.setattr(groups.parallel_state, "_global_process_group_list", ["group"])
    monkeypatch.setattr(groups.parallel_state, "destroy_model_parallel", lambda: None)
    shut_down(orderly)
    expected = [] if backend == "nccl" and not orderly else ["destroy", "destroy"]
    assert ended == ["barrier"] * orderly + expected
