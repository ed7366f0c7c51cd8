"""The verdicts on a step, one rank's and all ranks'; their state."""

import json
import math

import pytest

from tidar_megatron.config import HealthConfig
from tidar_megatron.errors import Diverged
from tidar_megatron.training.health import Health


class Alone:
    """Nobody else has seen anything worse than ``others``."""

    others = 0

    def largest(self, number):
        return max(number, self.others)


def health(**limits):
    made = Health(HealthConfig(**limits), Alone())
    made.said = []
    made.on_trouble = made.said.append
    return made


def test_what_is_no_number_is_skipped_and_not_remembered():
    watched = health(loss_spike_window=4)
    for loss, norm in ((math.nan, 1.0), (1.0, math.inf), (-math.inf, 1.0), (1.0, math.nan)):
        assert not watched.approve(1, "joint", loss, norm)
    assert watched.log_values() == {"skipped_iterations": 4, "loss_spikes": 0}
    assert watched.approve(2, "joint", 1.0, 1.0)
    assert watched.state_dict()["losses"] == [1.0] and watched.state_dict()["in_a_row"] == 0


def test_another_rank_sees_it():
    watched = health()
    watched._ranks.others = 2
    assert not watched.approve(5, "joint", 1.0, 1.0)
    assert watched.said == ["step 5: loss 1 or gradient norm 1 is NaN or infinite on some rank; skipped, 1 in a row"]


def test_only_skips_in_a_row_end_a_run():
    watched = health(max_skipped_iterations_in_a_row=2)
    for step in range(6):
        watched.approve(step, "joint", math.nan if step % 2 else 1.0, 1.0)
    with pytest.raises(Diverged, match=r"^step 7: loss nan .*2 steps in a row"):
        watched.approve(7, "joint", math.nan, 1.0) or watched.approve(7, "joint", math.nan, 1.0)


def test_the_joint_objective_is_no_spike_of_the_warm_ups():
    watched = health(loss_spike_window=4, loss_spike_action="skip")
    for step in range(8):
        assert watched.approve(step, "AR", 1.0, 1.0)
    assert not watched.approve(8, "AR", 3.1, 1.0)
    assert watched.approve(9, "AR", 2.9, 1.0)
    for step in range(10, 14):
        assert watched.approve(step, "joint", 50.0, 1.0)
    assert not watched.approve(14, "joint", 151.0, 1.0)


def test_told_and_still_learned_from():
    """A new level is accepted in the end where spikes are only told."""
    watched = health(loss_spike_window=4)
    losses = [1.0] * 4 + [10.0] * 5
    assert all(watched.approve(step, "joint", loss, 1.0) for step, loss in enumerate(losses))
    assert watched.spikes == len(watched.said) == 2  # the median of 1, 1, 10, 10 is 5.5
    assert watched.said[0] == "step 4: loss 10 is a spike, the median of the last 4 is 1"


def test_state():
    watched = health(loss_spike_window=4, loss_spike_action="skip")
    for step in range(4):
        watched.approve(step, "joint", 1.0, 1.0)
    watched.approve(4, "joint", math.nan, 1.0)
    resumed = health(loss_spike_window=4, loss_spike_action="skip")
    resumed.load_state_dict(json.loads(json.dumps(watched.state_dict())))
    assert resumed.state_dict() == watched.state_dict()
    assert not resumed.approve(5, "joint", 4.0, 1.0)
    shorter = health(loss_spike_window=2)
    shorter.load_state_dict(watched.state_dict())
    assert shorter.state_dict()["losses"] == [1.0, 1.0]
