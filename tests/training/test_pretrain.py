"""A whole run through ``tools/pretrain.py``'s own entry: phases, logs, stop and continue, export."""

import json
from pathlib import Path

import pytest
import torch

from tidar_megatron.checkpoint.export import export_run
from tidar_megatron.config import build_config, load_config
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.errors import UserError
from tidar_megatron.training.loop import Trainer, pretrain

STEPS = 8


def small(shards, **changes):
    """A configuration of a run of seconds; ``changes`` are section -> fields."""
    tree = {
        "tidar": {"block_size": 4, "ar_warmup_fraction": 0.25},
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "make_vocab_size_divisible_by": 8,
            "max_position_embeddings": 512,
        },
        "data": {"train_data": str(shards[0]), "valid_data": str(shards[1]), "seq_length": 32},
        "training": {
            "train_iters": STEPS,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "eval_interval": 4,
            "eval_sequences": 5,
        },
        "optimizer": {"lr": 3e-3, "lr_warmup_iters": 2},
        "logging": {"log_interval": 1},
    }
    for section, fields in changes.items():
        tree[section] = {**tree.get(section, {}), **fields}
    return build_config(tree)


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    rows = [m for m in metrics(folder) if "loss" in m]
    return {m["iteration"]: (m["ar_loss"], m["diffusion_loss"] or 0.0, m["grad_norm"]) for m in rows}


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """The uninterrupted run."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    pretrain(small(shards, checkpoint={"save": str(folder)}))
    return folder


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
    config = load_config(whole / "config.yaml")
    assert config.tidar.mask_token_id == 257
    assert config.model.vocab_size == 258
    assert (whole / "tokenizer" / "tokenizer.json").exists()


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_stop_and_continue_gives_the_same_losses(whole, shards, tmp_path, stop):
    """Stopped in the AR warm-up, in the joint phase, and after an evaluation; to 6 digits."""
    run = {"save": str(tmp_path), "load": str(tmp_path)}
    pretrain(small(shards, checkpoint=run, training={"exit_interval": stop}))
    assert max(losses(tmp_path)) == stop
    pretrain(small(shards, checkpoint=run))
    again = losses(tmp_path)
    assert again.keys() == losses(whole).keys()
    for iteration, values in losses(whole).items():
        assert again[iteration] == pytest.approx(values, rel=1e-6), iteration


def test_a_resume_forgets_what_was_logged_after_its_checkpoint(whole, shards, tmp_path):
    run = {"save": str(tmp_path), "load": str(tmp_path)}
    pretrain(small(shards, checkpoint=run, training={"exit_interval": 3}))
    with (tmp_path / "metrics.jsonl").open("a") as file:  # as if it had run on to step 4 and died
        file.write(json.dumps({"iteration": 4, "loss": 99.0}) + "\n")
    pretrain(small(shards, checkpoint=run))
    iterations = [m["iteration"] for m in metrics(tmp_path) if "loss" in m]
    assert iterations == list(range(1, STEPS + 1))


def test_load_and_save_folders_that_do_not_fit(whole, shards, tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        Trainer.build(small(shards, checkpoint={"load": str(tmp_path)}))
    with pytest.raises(UserError, match="holds a run already"):
        Trainer.build(small(shards, checkpoint={"save": str(whole)}))


def test_exported_model_gives_the_training_models_logits(whole, shards, tmp_path):
    """AR logits through transformers to 1e-4, and the folder loads with no remote code."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer = Trainer.build(small(shards, checkpoint={"load": str(whole)}))
    (batch,) = trainer.train_data.step_batches(0, 4, 4, 0, 1)
    with torch.no_grad():
        ours = trainer.model(batch.tokens, batch.position_ids, batch.visibility)[:, :32, :258]
    shut_down()
    assert export_run(whole, tmp_path / "hf") == STEPS
    shut_down()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=False)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.config.max_position_embeddings == 512
    assert model.config.tidar["mask_token_id"] == 257
    assert model.config.tidar["block_size"] == 4
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.encode("<|mask|>", add_special_tokens=False) == [257]
    documents = batch.visibility[:, :32, 0]
    checked = 0
    for row in range(4):  # transformers knows no packed documents: one at a time, at its own positions
        for document in documents[row].unique():
            (place,) = (documents[row] == document).nonzero(as_tuple=True)
            tokens = batch.tokens[row, place][None]
            with torch.no_grad():
                theirs = model(tokens, position_ids=place[None]).logits[0]
            torch.testing.assert_close(ours[row, place], theirs, rtol=0, atol=1e-4)
            checked += len(place)
    assert checked == 4 * 32


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


def test_bf16_follows_float32(shards, tmp_path):
    """bfloat16 compute with float32 main weights: the same run within bfloat16's rounding."""
    for name, bf16 in (("fp32", False), ("bf16", True)):
        pretrain(small(shards, checkpoint={"save": str(tmp_path / name)}, training={"bf16": bf16}))
    fp32, bf16 = losses(tmp_path / "fp32"), losses(tmp_path / "bf16")
    for iteration, values in fp32.items():
        assert bf16[iteration][0] == pytest.approx(values[0], rel=0.02), iteration
    assert bf16 != fp32
