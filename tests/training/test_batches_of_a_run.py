"""What a run feeds its steps: masks of a fraction of the blocks, batches built ahead in a thread."""

import threading

import pytest
import torch

from tests.training.small_runs import STEPS, losses, metrics, small
from tidar_megatron.data.loader import TrainingData
from tidar_megatron.data.prefetch import Prefetcher
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.errors import UserError
from tidar_megatron.models.attention.flex import FlexPlan
from tidar_megatron.models.gpt import run_model
from tidar_megatron.training.loop import pretrain
from tidar_megatron.training.trainer import Trainer


@pytest.fixture(scope="module")
def half(shards, tmp_path_factory):
    """The uninterrupted run with masks of half of the blocks."""
    folder = tmp_path_factory.mktemp("half")
    pretrain(small(shards, checkpoint={"save": str(folder)}, tidar={"diffusion_block_fraction": 0.5}))
    return folder


def test_half_of_the_blocks(half, whole):
    """The AR phase is the same; then the same losses estimated; evaluation, of every block, stays comparable."""
    ours, theirs = losses(half), losses(whole)
    assert [ours[n] == theirs[n] for n in ours] == [True] * 2 + [False] * (STEPS - 2)
    for iteration, (ar, diffusion, _) in ours.items():
        assert ar == pytest.approx(theirs[iteration][0], rel=0.02), iteration
        assert diffusion == pytest.approx(theirs[iteration][1], rel=0.1), iteration
    ours, theirs = ([m["eval"]["diffusion_loss"] for m in metrics(run) if "eval" in m] for run in (half, whole))
    assert ours == pytest.approx(theirs, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("change", [{}, {"micro_batch_size": 1}])
def test_a_resume_chooses_the_same_blocks(half, shards, tmp_path, change):
    """Also in other micro-batches."""
    run, tidar = {"save": str(tmp_path), "load": str(tmp_path)}, {"diffusion_block_fraction": 0.5}
    pretrain(small(shards, checkpoint=run, training={"exit_interval": 5}, tidar=tidar))
    pretrain(small(shards, checkpoint=run, training=change, tidar=tidar))
    again = losses(tmp_path)
    assert again.keys() == losses(half).keys()
    for iteration, values in losses(half).items():
        assert again[iteration] == pytest.approx(values, rel=1e-6), iteration


def prefetching():
    return {thread for thread in threading.enumerate() if thread.name.startswith("prefetch")}


@pytest.mark.slow
def test_batches_are_built_ahead_and_nothing_is_left_running(whole, shards, tmp_path, monkeypatch):
    """Each step's once, in order and in one thread, over the change of phase; as a run without a thread trains."""
    built, before = [], prefetching()
    real = TrainingData.step_batches

    def noted(self, consumed, *arguments):
        built.append((consumed, arguments[-1], threading.current_thread().name))
        return real(self, consumed, *arguments)

    monkeypatch.setattr(TrainingData, "step_batches", noted)
    pretrain(small(shards, checkpoint={"save": str(tmp_path)}))
    assert built == [(4 * n, n >= 2, "prefetch_0") for n in range(STEPS)]
    assert not prefetching() - before  # other tests build a Trainer and never close it
    trainer = Trainer.build(small(shards))
    trainer.prefetcher = Prefetcher(trainer._build_batches, trainer.ranks.device, workers=0)
    steps = [trainer.step() for _ in range(STEPS)]
    shut_down()
    assert [s["grad_norm"] for s in steps] == [values[2] for values in losses(tmp_path).values()]


def test_data_that_fails_in_the_thread_ends_the_run_as_it_is(shards, tmp_path, monkeypatch):
    real, before = TrainingData.step_batches, prefetching()

    def failing(self, consumed, *arguments):
        if consumed == 12:
            raise UserError("shard 7: is damaged")
        return real(self, consumed, *arguments)

    monkeypatch.setattr(TrainingData, "step_batches", failing)
    with pytest.raises(UserError, match=r"^shard 7: is damaged$"):
        pretrain(small(shards, checkpoint={"save": str(tmp_path)}))
    assert max(losses(tmp_path)) == 3  # the steps before it were taken
    assert not prefetching() - before  # other tests build a Trainer and never close it


def test_plans_of_attention_are_made_in_the_thread(shards, monkeypatch):
    """And used: the forward makes none, and its hidden states are those of the other backend."""
    made = []
    real = FlexPlan.of
    monkeypatch.setattr(
        FlexPlan, "of", staticmethod(lambda *part: made.append(threading.current_thread().name) or real(*part))
    )
    trainer = Trainer.build(small(shards, tidar={"ar_warmup_fraction": 0.0}))
    (chunk,) = trainer.model
    (reference, *_) = trainer.step_batches()
    assert reference.attention_plan is None and not made  # chunked has none
    monkeypatch.setattr(chunk.attention_schedules, "_backend", "flex")
    trainer.prefetcher.expect([(0, True)])
    batch, *others = trainer.step_batches()
    assert made and set(made) == {"prefetch_0"}
    count = len(made)
    with torch.no_grad():
        found = run_model(chunk, batch.to("cpu"))
        assert len(made) == count == 1 + len(others)
        monkeypatch.undo()
        wanted = run_model(chunk, reference)
    trainer.close()
    shut_down()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recompute", [None, "full"])
def test_one_micro_batch_is_alive_at_a_time(shards, recompute):
    """In a step and in an evaluation: the masks of its attention plan are gone when the next one's forward begins."""
    one = {"training": {"micro_batch_size": 1}, "parallel": {"recompute_granularity": recompute}}
    trainer = Trainer.build(small(shards, tidar={"ar_warmup_fraction": 0.0}, **one))
    (chunk,), alive = trainer.model, []
    chunk.register_forward_pre_hook(lambda *call: alive.append(len(chunk.attention_schedules._schedules)))
    trainer.step()
    trainer.evaluate()
    trainer.close()
    shut_down()
    assert alive == [1] * (4 + 5)
