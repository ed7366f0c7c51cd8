"""A run that was stopped five times is, bit for bit, the run that was not."""

import json
import random

import pytest
import torch

from tests.faults.checkpoint_jobs import LAYOUTS, job, run_jobs, tensors
from tests.ranks import run_ranks
from tests.training.small_runs import losses
from tidar_megatron.checkpoint.folder import checkpoint_folder

STEPS, STOPS = 14, 5  # steps 1 to 4 are AR warm-up


def jobs(shards, folder, layout):
    """One run without a stop in ``folder``/whole, one with five in ``folder``/stopped."""
    common = {
        "parallel": layout,
        "tidar": {"block_size": 4, "ar_warmup_fraction": 0.3, "diffusion_block_fraction": 0.5},
        "model": {"num_layers": 4 if "virtual_pipeline_model_parallel_size" in layout else 2},
    }
    training = {"train_iters": STEPS, "global_batch_size": 8, "eval_interval": 1000}
    stops = sorted(random.Random(str(folder)).sample(range(1, STEPS), STOPS))
    run = {"save": str(folder / "stopped"), "load": str(folder / "stopped")}
    yield job(shards, **common, training=training, checkpoint={"save": str(folder / "whole")})
    for stop in stops:
        yield job(shards, **common, training={**training, "exit_interval": stop}, checkpoint=run)
    yield job(shards, **common, training=training, checkpoint=run)


def same(folder):
    whole, stopped = losses(folder / "whole"), losses(folder / "stopped")
    assert list(whole) == list(range(1, STEPS + 1))
    assert stopped == whole
    one, other = (tensors(checkpoint_folder(folder / name, STEPS)) for name in ("whole", "stopped"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    assert len(list((folder / "stopped").glob("iter_*"))) == STOPS + 1


def test_one_rank(shards, tmp_path):
    """Fault 1: stopped at 5 random steps, one rank: losses and weights bitwise equal"""
    run_jobs(jobs(shards, tmp_path, {}))
    same(tmp_path)


@pytest.mark.parametrize(
    ("ranks", "layouts"),
    [
        (2, {"DP2": {}, "DP2 distributed": LAYOUTS["DP2 distributed"], "CP2": LAYOUTS["CP2"]}),
        (4, {"TP2xPP2": {**LAYOUTS["TP2"], **LAYOUTS["PP2"]}}),
    ],
    ids=["two ranks", "four ranks"],
)
def test_layouts(shards, tmp_path, ranks, layouts):
    """Fault 1: stopped at 5 random steps, DP2, CP2, TP2xPP2: losses and weights bitwise equal"""
    todo = []
    for name, layout in layouts.items():
        (tmp_path / name).mkdir()
        todo += jobs(shards, tmp_path / name, layout)
    (tmp_path / "jobs.json").write_text(json.dumps(todo))
    run_ranks(ranks, "tests/faults/checkpoint_jobs.py", tmp_path / "jobs.json")
    for name in layouts:
        same(tmp_path / name)
