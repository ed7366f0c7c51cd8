"""A checkpoint of one layout, continued in another: the same weights and moments, the same samples, the same losses."""

import json

import pytest
import torch

from tests.faults.checkpoint_jobs import LAYOUTS, job, run_jobs, tensors
from tests.ranks import run_ranks
from tests.training.small_runs import losses
from tidar_megatron.checkpoint.folder import checkpoint_folder

STOP, STEPS = 4, 8
TOLERANCE = 2e-5  # relative, of losses and gradient norms: sums in another order
COPY = "optimizer.state.param."


def settings(**more):
    training = {"train_iters": STEPS, "global_batch_size": 8, "eval_interval": 1000, **more.pop("training", {})}
    model = {"num_layers": 4}
    return {"training": training, "model": model, "tidar": {"block_size": 4, "ar_warmup_fraction": 0.25}, **more}


def start(shards, folder, layout):
    """A run that stops at ``STOP``."""
    stopping = settings(training={"exit_interval": STOP}, parallel=layout, checkpoint={"save": str(folder)})
    return [job(shards, **stopping)]


def change(shards, source, folder, layout):
    """What another layout makes of it: saved again at once, and continued."""
    again = settings(parallel=layout, checkpoint={"load": str(source), "save": str(folder / "again")})
    further = settings(parallel=layout, checkpoint={"load": str(source), "save": str(folder / "further")})
    return [job(shards, **again, resave=True), job(shards, **further)]


def check(source, folder, reference):
    """Weights and moments bitwise; losses of the steps after within ``TOLERANCE``."""
    before, after = (tensors(checkpoint_folder(f, STOP)) for f in (source, folder / "again"))
    weights = [name for name in before if not name.startswith("optimizer.")]
    assert len(weights) == 10  # layers are stacked
    for weight in weights:
        assert torch.equal(before[weight], after[weight]), weight
        for moment in ("exp_avg", "exp_avg_sq"):
            name = f"optimizer.state.{moment}.{weight}"
            assert before[name].any()
            assert torch.equal(before[name], after[name]), name
        if COPY + weight in after:  # the distributed optimizer's own copy
            assert torch.equal(after[COPY + weight], before[weight]), weight
    further = losses(folder / "further")
    assert list(further) == list(range(STOP + 1, STEPS + 1))
    for step, values in further.items():
        assert values == pytest.approx(reference[step], rel=TOLERANCE), step


def test_every_change_of_layout(shards, tmp_path):
    """Fault 3: resumed in another layout (DP, TP, PP, VPP, CP, distributed optimizer): weights and moments equal"""
    one = tmp_path / "one"
    whole = job(shards, **settings(checkpoint={"save": str(tmp_path / "whole")}))
    run_jobs([whole, *start(shards, one, {})])
    reference = losses(tmp_path / "whole")
    todo = []
    for name, layout in LAYOUTS.items():
        todo += start(shards, tmp_path / name, layout) + change(shards, one, tmp_path / f"one to {name}", layout)
    (tmp_path / "jobs.json").write_text(json.dumps(todo))
    run_ranks(2, "tests/faults/checkpoint_jobs.py", tmp_path / "jobs.json")
    for name in LAYOUTS:
        run_jobs(change(shards, tmp_path / name, tmp_path / f"{name} to one", {}))
    for name in LAYOUTS:
        check(one, tmp_path / f"one to {name}", reference)
        check(tmp_path / name, tmp_path / f"{name} to one", reference)


@pytest.mark.parametrize("there", [False, True], ids=["plain to distributed", "distributed to plain"])
def test_main_weights_in_float32(shards, tmp_path, there):
    """Fault 3: bfloat16 with the distributed optimizer turned on or off: the float32 weights and moments equal"""
    bf16 = {"training": {"bf16": True, "exit_interval": STOP}}
    for folder, before, distributed in (("first", None, there), ("second", "first", not there)):
        checkpoint = {"save": str(tmp_path / folder)} | ({"load": str(tmp_path / before)} if before else {})
        sections = settings(**bf16, parallel={"use_distributed_optimizer": distributed}, checkpoint=checkpoint)
        run_jobs([job(shards, **sections, resave=before is not None)])
    first, second = (tensors(checkpoint_folder(tmp_path / name, STOP)) for name in ("first", "second"))
    copies = (COPY, "optimizer.state.fp32_param.")
    mine, theirs = copies if there else copies[::-1]
    names = [name.removeprefix(mine) for name in first if name.startswith(mine)]
    assert len(names) == 10
    for name in names:
        assert torch.equal(first[mine + name], second[theirs + name]), name
        for moment in ("exp_avg", "exp_avg_sq"):
            key = f"optimizer.state.{moment}.{name}"
            assert torch.equal(first[key], second[key]), key
