"""Laying out groups anew: what held the earlier ones is gone, on every rank at once."""

import gc
import weakref

from tidar_megatron.config import ParallelConfig
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
