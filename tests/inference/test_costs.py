"""The latency of forwards: what is timed, what lies between, and what observed steps correct."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from numpy.testing import assert_allclose  # numpy 1 starts a program as this is imported

from tests.inference.test_planner import MIDDLING
from tidar_megatron.inference import costs as timing
from tidar_megatron.inference.costs import Clock, Costs, TimedStep, load_costs
from tidar_megatron.inference.planner import forget_planner, planner_of


def test_costs_between_and_beyond_what_was_timed():
    for tokens, context, seconds in (
        (1, 64, 0.001),
        (1, 0, 0.001),
        (2, 64, 0.001 + 0.001 / 7),
        (8, 288, 0.0025),
        (512, 64, 0.03 + 0.026),
        (1, 960, 0.003),
    ):
        for most in (tokens, 600):
            assert MIDDLING.of(np.arange(most + 1), context)[tokens] == pytest.approx(seconds)
        assert MIDDLING.of(tokens, context) == pytest.approx(seconds)
    assert list(Costs([1], [0], [[0.5]]).of(np.arange(10), 9)) == [0.5] * 10
    noisy = Costs([1, 136, 272], [64, 1024], [[0.005, 0.0049], [0.0051, 0.005], [0.00505, 0.0051]])
    assert (noisy.of(np.array([1, 300, 9000]), 65536) >= 0.005).all()


def test_costs_of_batches():
    one = Costs([1, 8], [64, 1064], [[1.0, 2.0], [8.0, 16.0]])
    assert one.of(1, 64, 8) == one.of(8, 64)  # never timed: as many tokens of one sequence
    batches = replace(one, batches=[(8, [1, 8], [3.0, 24.0]), (32, [1, 4], [6.0, 30.0])])
    for tokens, batch, seconds in (
        (1, 8, 3.0),
        (8, 8, 24.0),
        (1, 32, 6.0),
        (4, 32, 30.0),
        (1, 20, 4.5),
        (1, 1, 1.0),
        (1, 2, 1 + 2 / 7),
        (1, 44, 7.5),
    ):
        assert batches.of(tokens, 64, batch) == pytest.approx(seconds)
    assert_allclose(batches.of(8, 64, 32), 62.0)  # beyond what was timed
    assert_allclose(batches.of([1, 8], 1064, 8), [3.0 + 8 * 1.0, 24.0 + 8 * 8.0])  # each reads a context of its own


def test_batches_are_timed_when_they_are_needed(trained, monkeypatch, tmp_path):
    """The cache then holds them beside what was timed before."""
    monkeypatch.setenv("TIDAR_CACHE", str(tmp_path))
    monkeypatch.setattr(timing, "SIZES", (1, 2, 40))
    monkeypatch.setattr(timing, "_still_holds", lambda costs, model: True)
    forget_planner(trained)
    planner = planner_of(trained)
    found = []
    for batch_size in (1, 2, 8, 9, 99):
        assert planner_of(trained, batch_size) is planner
        found.append([(batch, sizes) for batch, sizes, _ in planner.clock.costs.batches])
    assert found == [[], *[[(8, [1, 2])]] * 2, *[[(8, [1, 2]), (32, [1])]] * 2]
    monkeypatch.setattr(timing, "_best_seconds", lambda *_: pytest.fail("timed again"))
    kept = load_costs(trained, 99)
    assert json.dumps(asdict(kept)) == json.dumps(asdict(planner.clock.costs))
    forget_planner(trained)


def test_costs_are_timed_once_and_kept(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("TIDAR_CACHE", str(tmp_path))
    first = load_costs(trained)
    assert first.sizes[0] == 1 and all(seconds > 0 for row in first.seconds for seconds in row)
    assert first.sizes[-1] + first.contexts[-1] <= trained.context_limit
    monkeypatch.setattr(timing, "measure_costs", lambda model: 1 / 0)
    slow = Costs(first.sizes, first.contexts, [[1000 * seconds for seconds in row] for row in first.seconds])
    assert not timing._still_holds(slow, trained)
    monkeypatch.setattr(timing, "_still_holds", lambda costs, model: True)  # other tests keep the machine busy
    assert load_costs(trained) == first
    (path,) = tmp_path.iterdir()
    path.write_text("{")
    with pytest.raises(ZeroDivisionError):
        load_costs(trained)


def test_sizes_that_were_not_seen_of_late_are_not_believed():
    clock = Clock(MIDDLING)
    for _ in range(40):
        clock.observe(TimedStep(False, 1, 64, 8, 0.2))
    for _ in range(Clock.OLD):
        clock.observe(TimedStep(False, 1, 64, 1, 0.001))
    assert clock.curve(False, 1, 64, 8)[8] == pytest.approx(0.002, rel=0.01)
    clock.observe(TimedStep(False, 1, 64, 8, 0.003))
    assert clock.curve(False, 1, 64, 8)[8] == pytest.approx(0.003, rel=0.1)


def test_draft_weights_make_forwards_with_masks_dearer():
    """They are timed apart, so that plain steps are not taken for as slow as those with masks."""
    costs = replace(MIDDLING, masks=[0.001, 0.002])
    assert list(costs.of_masks([0, 2, 9, 16])) == [0.001, 0.001, 0.002, 0.003]
    assert list(MIDDLING.of_masks([2, 9])) == [0, 0]
    clock = Clock(costs)
    for _ in range(50):
        seconds = float(costs.of(9, 100)) + 0.002
        clock.observe(TimedStep(True, 1, 100, 9, 1.5 * seconds + 0.0001, 0.0001))
    assert_allclose(clock.curve(True, 1, 100, 9)[9], 1.5 * seconds + 0.0001, rtol=1e-3)
    assert_allclose(clock.curve(False, 1, 100, 9)[9], 1.5 * float(costs.of(9, 100)) + 0.0001, rtol=0.02)
