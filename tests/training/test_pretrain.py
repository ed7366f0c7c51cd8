"""A whole run through ``tools/pretrain.py``'s own entry: phases, schedule, logs, evaluation."""

import json
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


def test_wandb_is_kept_offline_and_never_stops_a_run(shards, tmp_path, monkeypatch, capsys):
    import wandb

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    short = {"train_iters": 2, "eval_interval": 2}
    board = {"wandb_project": "test", "tensorboard_dir": str(tmp_path / "board"), "log_interval": 1}
    run = tmp_path / "run"
    pretrain(
        small(shards, checkpoint={"save": str(run)}, training=short, optimizer={"lr_warmup_iters": 0}, logging=board)
    )
    assert "kept offline" in capsys.readouterr().out
    assert list(run.glob("wandb/offline-run-*"))
    assert list((tmp_path / "board").glob("events*"))

    def broken(**unused):
        raise RuntimeError("no such\nserver")

    monkeypatch.setattr(wandb, "init", broken)
    run = tmp_path / "broken"
    pretrain(
        small(shards, checkpoint={"save": str(run)}, training=short, optimizer={"lr_warmup_iters": 0}, logging=board)
    )
    said = capsys.readouterr().out
    assert "W&B is left out: RuntimeError: no such server" in said
    assert max(losses(run)) == 2
    monkeypatch.undo()
    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "finish", lambda *args, **kwargs: broken())
    run = tmp_path / "broken at the end"
    pretrain(
        small(shards, checkpoint={"save": str(run)}, training=short, optimizer={"lr_warmup_iters": 0}, logging=board)
    )
    assert "WandB is left out from here on" in capsys.readouterr().out


def test_wandb_goes_on_as_the_same_run_and_shows_what_was_asked_for(shards, tmp_path):
    """Read back from the offline run's own record: the chart by offset, the samples' table, a checkpoint's artifact."""
    run = tmp_path / "run"
    board = {
        "wandb_project": "test",
        "wandb_log_checkpoints": True,
        "log_samples": 2,
        "tensorboard_dir": str(tmp_path / "board"),
    }
    again = {"save": str(run), "load": str(run)}
    pretrain(small(shards, checkpoint=again, training={"exit_interval": 4}, logging=board))
    identity = (run / "wandb_run_id").read_text()
    pretrain(small(shards, checkpoint=again, logging=board))
    assert (run / "wandb_run_id").read_text() == identity
    folders = list(run.glob("wandb/offline-run-*"))
    assert len(folders) == 2
    assert all(folder.name.endswith(identity) for folder in folders)
    record = b"".join(file.read_bytes() for folder in folders for file in folder.rglob("*.wandb"))
    for said in (b"eval/acceptance", b"draft acceptance by offset", b"run-checkpoint", b"memory_gib", b"samples"):
        assert said in record, said
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in samples] == [4, 4, 8, 8]
    assert all(row["tokens_per_forward"] >= 1 and row["prompt"] for row in samples)
    assert all(row["memory_gib"] > 0.05 for row in metrics(run) if "loss" in row)


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
