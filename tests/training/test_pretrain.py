"""A whole run through ``tools/pretrain.py``'s own entry: phases, schedule, logs, evaluation."""

import math

import pytest
import torch

from tests.training.small_runs import STEPS, losses, metrics, small
from tidar_megatron.config import load_config
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.models.gpt import run_model
from tidar_megatron.models.loss import joint_loss
from tidar_megatron.training.loop import pretrain
from tidar_megatron.training.trainer import Trainer


def test_two_phases_and_what_is_logged(whole):
    steps = [m for m in metrics(whole) if "loss" in m]
    assert [m["iteration"] for m in steps] == list(range(1, STEPS + 1))
    assert [m["phase"] for m in steps] == ["AR"] * 2 + ["joint"] * (STEPS - 2)
    assert [m["diffusion_loss"] is None for m in steps] == [True] * 2 + [False] * (STEPS - 2)
    for m in steps:
        assert m["learning_rate"] >= 0
        assert min(m["grad_norm"], m["clean_tokens_per_second"], m["step_seconds"]) > 0
    assert steps[-1]["ar_loss"] < steps[0]["ar_loss"]
    evaluations = [m["eval"] for m in metrics(whole) if "eval" in m]
    assert len(evaluations) == 2
    for values in evaluations:
        assert len(values["acceptance_by_offset"]) == len(values["agreement_by_offset"]) == 3
        assert 1 <= values["tokens_per_forward"] <= 4


def test_the_resolved_configuration_is_kept(whole, shards):
    config = load_config(whole / "resolved_config.yaml")
    assert config.tidar.mask_token_id == 257
    assert config.model.vocab_size == 258
    assert (whole / "tokenizer" / "tokenizer.json").exists()


def test_the_schedule_is_followed(whole):
    """Warm-up from 0 over 2 steps, then a cosine to 0 over the 6 that are left."""
    rates = [m["learning_rate"] for m in metrics(whole) if "loss" in m]
    cosine = [3e-3 * 0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
    assert rates == pytest.approx([0.0, 1.5e-3, *cosine], abs=1e-9)


def test_weights_decay_and_norms_do_not(shards):
    trainer = Trainer.build(small(shards, optimizer={"weight_decay": 0.3, "adam_beta2": 0.9}))
    decays = {}
    for group in trainer.optimizer.param_groups:
        assert group["betas"] == (0.9, 0.9)
        decays |= {parameter.dim(): group["weight_decay"] * group["wd_mult"] for parameter in group["params"]}
    shut_down()
    assert decays == {1: 0.0, 2: pytest.approx(0.3)}


def test_the_logged_loss_is_the_formula(shards, tmp_path):
    pretrain(small(shards, checkpoint={"save": str(tmp_path)}, tidar={"ar_loss_weight": 0.5}))
    for m in metrics(tmp_path):
        if "loss" in m:
            joint = m["phase"] == "joint"
            formula = (0.5 * m["ar_loss"] + m["diffusion_loss"]) / 1.5 if joint else m["ar_loss"]
            assert m["loss"] == pytest.approx(formula)
            assert m["clean_tokens_per_second"] * m["step_seconds"] == pytest.approx(4 * 32)


@pytest.mark.slow
def test_evaluation_is_of_the_held_out_data(whole, shards):
    """All of it, and it is not the training data's."""
    means = []
    for data in (shards, shards[::-1]):
        changes = {"data": {"valid_data": str(data[1])}, "training": {"eval_sequences": 1000}}
        trainer = Trainer.build(small(shards, checkpoint={"load": str(whole)}, **changes))
        graphs = []
        hook = trainer.model[0].register_forward_hook(lambda *call, seen=graphs: seen.append(call[-1].requires_grad))
        means.append(trainer.evaluate())
        hook.remove()
        assert graphs == [False] * len(graphs) != []  # an evaluation that recorded the graph would hold all activations
        (batch,) = trainer.valid_data.evaluation_batches(1000, 1000, 0, 1)
        with torch.no_grad():
            _, _, (ar, _) = joint_loss(trainer.model[0], batch, run_model(trainer.model[0], batch))
        assert means[-1]["ar_loss"] == pytest.approx(ar.item() / batch.ar_tokens, rel=1e-5)
        shut_down()
    assert means[0]["ar_loss"] != pytest.approx(means[1]["ar_loss"], rel=1e-3)


@pytest.mark.slow
def test_bf16_follows_float32_and_resumes(shards, tmp_path):
    """bfloat16 compute with float32 main weights: the same run within bfloat16's rounding, also when interrupted."""
    for name, bf16 in (("fp32", False), ("bf16", True)):
        pretrain(small(shards, checkpoint={"save": str(tmp_path / name)}, training={"bf16": bf16}))
    fp32, bf16 = losses(tmp_path / "fp32"), losses(tmp_path / "bf16")
    for iteration, values in fp32.items():
        assert bf16[iteration][0] == pytest.approx(values[0], rel=0.02), iteration
    assert bf16 != fp32
    run = {"save": str(tmp_path / "again"), "load": str(tmp_path / "again")}
    pretrain(small(shards, checkpoint=run, training={"bf16": True, "exit_interval": 4}))
    pretrain(small(shards, checkpoint=run, training={"bf16": True}))
    again = losses(tmp_path / "again")
    for iteration, values in bf16.items():
        assert again[iteration] == pytest.approx(values, rel=1e-6), iteration
