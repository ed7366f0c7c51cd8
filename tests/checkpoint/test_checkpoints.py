"""What a checkpoint brings back beside weights, and the two ways of saving."""

import functools
import random
import shutil

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from tests.faults.checkpoint_jobs import tensors
from tests.training.small_runs import losses, small
from tidar_megatron.checkpoint.contents import read_state
from tidar_megatron.checkpoint.folder import checkpoint_folder, saved_iterations
from tidar_megatron.checkpoint.integrity import FILE_NAME, seal, write_manifest
from tidar_megatron.checkpoint.writer import staged
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.training.loop import pretrain
from tidar_megatron.training.trainer import Trainer


@pytest.fixture(autouse=True)
def _leave():
    yield
    shut_down()


def draws():
    """One number of every generator."""
    with get_cuda_rng_tracker().fork():
        stream = torch.rand(()).item()
    return random.random(), np.random.random(), torch.rand(()).item(), stream


@pytest.mark.slow
def test_an_asynchronous_run_is_the_same_run(shards, tmp_path):
    for name, asynchronous in (("sync", False), ("async", True)):
        checkpoint = {"save": str(tmp_path / name), "save_interval": 1, "keep_last": 2, "async_save": asynchronous}
        pretrain(small(shards, checkpoint=checkpoint))
        assert saved_iterations(tmp_path / name) == [7, 8]
        assert not list((tmp_path / name).glob(".iter_*"))
    assert losses(tmp_path / "sync") == losses(tmp_path / "async")
    for iteration in (7, 8):  # of the moment at which it was begun, though training went on
        one, other = (tensors(checkpoint_folder(tmp_path / name, iteration)) for name in ("sync", "async"))
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_random_generators(shards, tmp_path):
    """Restored in the layout they were saved in, and otherwise those of the seed."""
    trainer = Trainer.build(small(shards, checkpoint={"save": str(tmp_path)}))
    seeded = draws()
    draws()
    trainer.save()
    expected = draws()
    trainer.close()
    trainer = Trainer.build(small(shards, checkpoint={"load": str(tmp_path)}))
    assert draws() == expected
    trainer.close()
    checkpoint = checkpoint_folder(tmp_path, 0)
    state = read_state(checkpoint)
    another = state.model_copy(update={"layout": {**state.layout, "world_size": 2}})
    (checkpoint / "state.json").write_text(another.model_dump_json())
    (checkpoint / FILE_NAME).unlink()
    write_manifest(checkpoint, 0, {path.name: seal(path) for path in checkpoint.iterdir()})
    trainer = Trainer.build(small(shards, checkpoint={"load": str(tmp_path)}))
    assert draws() == seeded
    trainer.close()


class Window:
    """A part of the loop with a state."""

    def __init__(self, values):
        self.values = values

    def state_dict(self):
        return {"values": self.values}

    def load_state_dict(self, state):
        self.values = state["values"]


def test_states_of_parts(shards, tmp_path):
    trainer = Trainer.build(small(shards, checkpoint={"save": str(tmp_path)}))
    trainer.parts["window"] = Window([1.5, 0.1])
    trainer.save()
    trainer.close()
    trainer = Trainer.build(small(shards, checkpoint={"load": str(tmp_path)}))
    trainer.parts |= {"window": Window([]), "new": Window([7])}
    trainer.load()
    trainer.close()
    assert trainer.parts["window"].values == [1.5, 0.1]
    assert trainer.parts["new"].values == [7]  # the checkpoint knows none: as it began


def test_the_optimizers_settings_are_the_configurations(shards, tmp_path):
    run = {"save": str(tmp_path), "load": str(tmp_path)}
    pretrain(small(shards, checkpoint=run, training={"exit_interval": 3}))
    trainer = Trainer.build(small(shards, checkpoint=run, optimizer={"adam_beta2": 0.5, "adam_eps": 1e-5}))
    assert {(group["betas"], group["eps"]) for group in trainer.optimizer.param_groups} == {((0.9, 0.5), 1e-5)}
    steps = {float(state["step"]) for state in trainer.optimizer.chained_optimizers[0].optimizer.state.values()}
    assert steps == {3.0}
    trainer.close()


def test_a_start_clears_up(shards, tmp_path):
    run = tmp_path / "run"
    pretrain(small(shards, checkpoint={"save": str(run)}, training={"exit_interval": 3}))
    shutil.copytree(checkpoint_folder(run, 3), run / ".iter_0000006.partial-0123abcd")
    Trainer.build(small(shards, checkpoint={"save": str(run), "load": str(run)})).close()
    assert not list(run.glob(".iter_*"))


def test_a_start_prunes_what_a_killed_run_did_not(shards, tmp_path):
    run = {"save": str(tmp_path), "load": str(tmp_path), "save_interval": 1}
    pretrain(small(shards, checkpoint=run, training={"train_iters": 3}))
    Trainer.build(small(shards, checkpoint={**run, "keep_last": 2})).close()
    assert saved_iterations(tmp_path) == [2, 3]
    Trainer.build(
        small(shards, checkpoint={"load": str(tmp_path), "save": str(tmp_path / "other"), "keep_last": 1})
    ).close()
    assert saved_iterations(tmp_path) == [2, 3]


def test_tensors_are_staged_in_pageable_memory():
    """A process forked while this one holds page-locked memory may crash, and megatron-core's own copies are such."""
    asked = []

    class OnGpu:
        def to(self, device, non_blocking):
            asked.append((device, non_blocking))
            return torch.ones(2)

    buckets = [("file", "key", ([], [("item", OnGpu())]))]
    preload = functools.partial(FileSystemWriterAsync.preload_tensors, buckets, True)
    request = AsyncRequest(lambda: None, (0, None, "results"), [], preload_fn=preload)
    request = request._replace(async_fn_args=[0, None, "results"])
    rank, [(file, key, (_, [(item, tensor)]))], results = staged(request).async_fn_args
    assert (rank, file, key, item, results) == (0, "file", "key", "item", "results")
    assert torch.equal(tensor, torch.ones(2))
    assert asked == [("cpu", False)]
