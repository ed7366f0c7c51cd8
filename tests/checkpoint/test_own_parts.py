"""The distributed optimizer's state: written by every rank, gathered by none, loaded in any layout."""

import json
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.conftest import THOROUGH
from tests.faults.checkpoint_jobs import job, run_jobs, tensors
from tests.ranks import run_ranks
from tests.training.small_runs import losses
from tidar_megatron.checkpoint import optimizer_state
from tidar_megatron.checkpoint.contents import read_state
from tidar_megatron.checkpoint.folder import checkpoint_folder
from tidar_megatron.checkpoint.own_parts import OwnParts, boxes
from tidar_megatron.checkpoint.pickles import read_metadata
from tidar_megatron.config import build_config
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.errors import UserError
from tidar_megatron.huggingface.convert import export_run
from tidar_megatron.planning.saves import checkpoint_bytes, gathered_otherwise, written_by
from tidar_megatron.planning.sizes import Sizes
from tidar_megatron.training import loop

STOP, STEPS = 2, 4
DISTRIBUTED = {"use_distributed_optimizer": True}
LAYOUTS = {
    "TP2": {**DISTRIBUTED, "tensor_model_parallel_size": 2},
    "PP2": {**DISTRIBUTED, "pipeline_model_parallel_size": 2},
    "CP2": {**DISTRIBUTED, "context_parallel_size": 2},
    "plain": {},
}
EP2 = {**DISTRIBUTED, "expert_model_parallel_size": 2}
EXPERTS = {"num_experts": 4, "moe_ffn_hidden_size": 48, "moe_aux_loss_coeff": 0.01}


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (4, 1, 3)])
def test_boxes_are_the_range_in_its_order(shape):
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    for start, stop in combinations(range(tensor.numel() + 1), 2):
        pieces = []
        for offsets, sizes in boxes(shape, start, stop):
            piece = tensor
            for axis, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
                piece = piece.narrow(axis, offset, size)
            pieces.append(piece.flatten())
        assert torch.cat(pieces).tolist() == list(range(start, stop))
        assert len(pieces) <= max(1, 2 * len(shape) - 1)


def run(shards, save, load=None, *, stop=None, parallel=DISTRIBUTED, model=None, resave=False, **checkpoint):
    """A job in bfloat16, so that only the optimizer has the float32 weights."""
    training = {"train_iters": STEPS, "global_batch_size": 8, "eval_interval": 1000, "bf16": True}
    if stop:
        training["exit_interval"] = stop
    checkpoint |= {"save": str(save)} | ({"load": str(load)} if load else {})
    sections = {"training": training, "parallel": parallel, "model": model or {}, "checkpoint": checkpoint}
    return job(shards, resave=resave, tidar={"block_size": 4, "ar_warmup_fraction": 0.25}, **sections)


def launch(ranks, jobs, folder, gather=False):
    path = folder / f"jobs_of_{ranks}_ranks.json"
    path.write_text(json.dumps({"gather": gather, "jobs": jobs}))
    run_ranks(ranks, "tests/checkpoint/test_own_parts.py", path)


def same(one, other, iteration):
    """Weights, float32 weights and both moments are equal bit for bit."""
    ours, theirs = (tensors(checkpoint_folder(folder, iteration)) for folder in (one, other))
    moments = [name for name in ours if "optimizer.state.exp_avg." in name]
    assert len(ours) == 4 * len(moments) and all(ours[name].any() for name in moments)
    for name, tensor in ours.items():
        other_name = name.replace(".param.", ".fp32_param.") if name not in theirs else name  # the plain optimizer's
        assert torch.equal(tensor, theirs[other_name]), name


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """An unbroken run of two data-parallel ranks, with a checkpoint at ``STOP`` and at its end."""
    folder = tmp_path_factory.mktemp("own_parts") / "whole"
    launch(2, [run(shards, folder, save_interval=STOP)], folder.parent)
    return folder


@pytest.mark.process
def test_a_resume_in_the_same_layout_is_bitwise(whole, shards, tmp_path):
    jobs = []
    for name, background in (("sync", False), ("async", True)):
        jobs.append(run(shards, tmp_path / name, stop=STOP, async_save=background))
        jobs.append(run(shards, tmp_path / name, tmp_path / name, async_save=background))
    launch(2, jobs, tmp_path)
    for name in ("sync", "async"):
        assert losses(tmp_path / name) == losses(whole)
        same(tmp_path / name, whole, STOP)
        same(tmp_path / name, whole, STEPS)


@pytest.mark.skipif(
    not THOROUGH, reason="takes 9 s: .ci/run and make test-slow run it; four ranks to two to one are tested always"
)
@pytest.mark.process
def test_other_layouts(whole, shards, tmp_path):
    jobs = []
    for name, layout in LAYOUTS.items():
        jobs.append(run(shards, tmp_path / name, whole, parallel=layout, resave=True))
        jobs.append(run(shards, tmp_path / f"{name} back", tmp_path / name, resave=True))
    jobs.append(run(shards, tmp_path / "experts", stop=STOP, parallel=EP2, model=EXPERTS))
    jobs.append(run(shards, tmp_path / "replicated", tmp_path / "experts", model=EXPERTS, resave=True))
    ep2 = {"expert_model_parallel_size": 2}
    jobs.append(run(shards, tmp_path / "plain experts", tmp_path / "experts", parallel=ep2, model=EXPERTS, resave=True))
    jobs.append(run(shards, tmp_path / "back", tmp_path / "plain experts", parallel=EP2, model=EXPERTS, resave=True))
    launch(2, jobs, tmp_path)
    for name in LAYOUTS:
        same(whole, tmp_path / name, STEPS)
        same(whole, tmp_path / f"{name} back", STEPS)
    for name in ("replicated", "plain experts", "back"):
        same(tmp_path / "experts", tmp_path / name, STOP)


@pytest.mark.process
def test_four_ranks_to_two_to_one(shards, tmp_path):
    four, two, one = (tmp_path / name for name in ("four", "two", "one"))
    launch(4, [run(shards, four, stop=STOP)], tmp_path)
    launch(2, [run(shards, two, four, resave=True)], tmp_path)
    run_jobs([run(shards, one, two, resave=True)])
    same(four, two, STOP)
    same(four, one, STOP)


@pytest.mark.process
def test_a_gathered_checkpoint_still_loads(whole, shards, tmp_path):
    """Checkpoints of earlier versions, which megatron-core gathered: one rank wrote the optimizer's state."""
    old, new = tmp_path / "old", tmp_path / "new"
    launch(2, [run(shards, old, stop=STOP)], tmp_path, gather=True)
    sizes = Sizes.of(build_config(read_state(checkpoint_folder(old, STOP)).config), 2)
    assert written(checkpoint_folder(old, STOP), "optimizer.") == {0: gathered_otherwise(sizes, 0)}
    same(old, whole, STOP)
    launch(2, [run(shards, new, old)], tmp_path)
    assert losses(new) == {step: loss for step, loss in losses(whole).items() if step > STOP}


def test_a_save_without_some_elements_is_refused(shards, tmp_path, monkeypatch):
    owned = OwnParts._owned
    monkeypatch.setattr(OwnParts, "_owned", lambda self: ((w, start, stop - 1) for w, start, stop in owned(self)))
    with pytest.raises(UserError, match=r"is not saved: .*the ranks save (\d+) of its \d+ elements; nothing was saved"):
        run_jobs([run(shards, tmp_path / "run", stop=STOP)])


def written(checkpoint, prefix=""):
    """The bytes of the tensors that each rank wrote."""
    metadata = read_metadata(checkpoint)
    bytes_of = Counter()
    for index, place in metadata.storage_data.items():
        entry = metadata.state_dict_metadata[index.fqn]
        if index.fqn.startswith(prefix) and hasattr(entry, "chunks"):
            (chunk,) = (chunk for chunk in entry.chunks if chunk.offsets == index.offset)
            rank = int(place.relative_path.split("_")[2])
            bytes_of[rank] += chunk.sizes.numel() * entry.properties.dtype.itemsize
    return bytes_of


@pytest.mark.process
def test_each_rank_writes_what_the_planner_says(whole):
    checkpoint = checkpoint_folder(whole, STEPS)
    sizes = Sizes.of(build_config(read_state(checkpoint).config), 2)
    planned, measured = written_by(sizes, 0), written(checkpoint)
    state = written(checkpoint, "optimizer.")
    assert measured[0] == pytest.approx(planned.total, rel=0.01)  # the optimizer's buffers are padded
    assert [state[0], state[1]] == pytest.approx([planned.optimizer] * 2, rel=0.01)
    assert measured[1] == state[1]
    assert measured.total() == checkpoint_bytes(sizes, planned.weights // sizes.w)


@pytest.mark.process
def test_export(whole, tmp_path):
    assert export_run(whole, tmp_path / "exported") == STEPS
    shut_down()


if __name__ == "__main__":
    torch.set_num_threads(1)
    loop.shut_down = lambda orderly=True: None  # the ranks meet once
    todo = json.loads(Path(sys.argv[1]).read_text())
    if todo["gather"]:
        optimizer_state.keep_own_parts = lambda optimizer: None
        optimizer_state.FORMAT["distrib_optim_fully_reshardable_mem_efficient"] = True
    else:
        dist.gather = None  # by which megatron-core gathers an optimizer's state
    run_jobs(todo["jobs"])
    shut_down()
