"""Fault 4: another number of workers on a resume gives the same order."""

import json

from tests.faults.data_runs import finish, ids_of, kill_after

STEPS = 16


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["iteration"]: (line["loss"], line["grad_norm"]) for line in lines if "loss" in line}


def test_workers_from_none_to_two_to_three(shards, tmp_path):
    """Fault 4: SIGKILL, and --num-workers 0, then 2, then 3: the samples and the losses of every step are the same to
    the bit."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    finish(whole, shards[0], tmp_path / "whole.log", 1, "--train-iters", STEPS, "--num-workers", 1)
    kill_after(resumed, shards[0], tmp_path / "0.log", 5, "--train-iters", STEPS, "--num-workers", 0)
    kill_after(resumed, shards[0], tmp_path / "2.log", 10, "--train-iters", STEPS, "--num-workers", 2)
    finish(resumed, shards[0], tmp_path / "3.log", 1, "--train-iters", STEPS, "--num-workers", 3)
    assert ids_of(resumed) == ids_of(whole)
    assert losses(resumed) == losses(whole)
    assert len(losses(whole)) == STEPS
