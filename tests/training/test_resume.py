"""A run's checkpoints: continued, refused, exported."""

import json

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file

from tests.training.small_runs import STEPS, losses, metrics, small
from tidar_megatron.checkpoint.folder import latest_iteration, saved_iterations
from tidar_megatron.config import build_config
from tidar_megatron.data.prepare import prepare
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.errors import UserError
from tidar_megatron.huggingface.convert import export_run
from tidar_megatron.models.gpt import run_model
from tidar_megatron.models.output_layer import output_weight
from tidar_megatron.training.loop import pretrain
from tidar_megatron.training.trainer import Trainer


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_stop_and_continue_gives_the_same_losses(whole, shards, tmp_path, stop):
    """Stopped in the AR warm-up, in the joint phase, and after an evaluation; bit for bit."""
    run = {"save": str(tmp_path), "load": str(tmp_path)}
    pretrain(small(shards, checkpoint=run, training={"exit_interval": stop}))
    assert max(losses(tmp_path)) == stop
    pretrain(small(shards, checkpoint=run))
    assert losses(tmp_path) == losses(whole)


@pytest.mark.slow
def test_a_resume_forgets_what_was_logged_after_its_checkpoint(whole, shards, tmp_path):
    run = {"save": str(tmp_path), "load": str(tmp_path)}
    pretrain(small(shards, checkpoint=run, training={"exit_interval": 3}))
    with (tmp_path / "metrics.jsonl").open("a") as file:  # as if killed after step 4, in the midst of a line
        file.write(json.dumps({"iteration": 4, "loss": 99.0}) + "\n" + '{"iteration": 5, "lo')
    pretrain(small(shards, checkpoint=run))
    iterations = [m["iteration"] for m in metrics(tmp_path) if "loss" in m]
    assert iterations == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_longer_run_goes_on_with_the_new_schedule(shards, tmp_path):
    """More --train-iters and another --lr at a resume are followed, not ignored."""
    run = {"save": str(tmp_path), "load": str(tmp_path)}
    pretrain(small(shards, checkpoint=run))
    longer = {"train_iters": 12}
    pretrain(small(shards, checkpoint=run, training=longer, optimizer={"lr": 1e-3, "lr_decay_style": "constant"}))
    rates = {m["iteration"]: m["learning_rate"] for m in metrics(tmp_path) if "loss" in m}
    assert [rates[i] for i in range(10, 13)] == pytest.approx([1e-3] * 3)


@pytest.mark.parametrize(
    ("section", "change", "said"),
    [
        ("model", {"hidden_size": 64}, "--hidden-size 64: the run in .* has 32"),
        ("model", {"num_layers": 1}, "--num-layers 1"),
        ("model", {"rotary_base": 5000.0}, "--rotary-base"),
        ("tidar", {"block_size": 8}, "--block-size 8"),
        ("tidar", {"mask_token_id": 258}, "--mask-token-id 258: lies beyond"),
        ("data", {"seq_length": 64}, "--seq-length 64"),
        ("training", {"seed": 7}, "--seed 7"),
    ],
)
def test_another_run_is_not_continued(whole, shards, section, change, said):
    with pytest.raises(UserError, match=said):
        Trainer.build(small(shards, checkpoint={"load": str(whole)}, **{section: change}))


def test_data_of_another_tokenizer_is_refused(whole, shards, tmp_path):
    prepare([shards[0].parent / "texts.jsonl"], tmp_path / "bpe", "bpe:260")
    data = {"train_data": str(tmp_path / "bpe"), "valid_data": None}
    with pytest.raises(UserError, match=r"another tokenizer|vocab"):
        Trainer.build(small(shards, checkpoint={"load": str(whole)}, data=data, model={"vocab_size": 261}))
    export_run(whole, tmp_path / "hf")
    shut_down()
    with pytest.raises(UserError, match=r"its tokenizer differs from the data's|fewer than"):
        Trainer.build(
            build_config({"data": {**data, "seq_length": 32}, "training": {"init_from": str(tmp_path / "hf")}})
        )


def test_init_from_an_export_keeps_its_mask_token_and_refuses_other_shapes(whole, shards, tmp_path):
    export_run(whole, tmp_path / "hf")
    shut_down()
    tree = {"data": {"train_data": str(shards[0]), "seq_length": 32}, "training": {"init_from": str(tmp_path / "hf")}}
    trainer = Trainer.build(build_config(tree))
    assert trainer.config.tidar.mask_token_id == 257
    assert trainer.config.model.num_layers == 2
    shut_down()
    with pytest.raises(UserError, match=r"--num-layers 3: --init-from .* has 2"):
        Trainer.build(build_config({**tree, "model": {"num_layers": 3, "num_query_groups": 2}}))


@pytest.mark.slow
def test_a_save_that_fails_publishes_nothing(shards, tmp_path, monkeypatch):
    run = {"save": str(tmp_path), "load": str(tmp_path), "save_interval": 3}
    real, calls = dist_checkpointing.save, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise OSError("disk full")
        return real(*args, **kwargs)

    monkeypatch.setattr(dist_checkpointing, "save", failing)
    with pytest.raises(UserError, match=r"iteration 6 is not saved: OSError: disk full; iteration 3 is intact"):
        pretrain(small(shards, checkpoint=run))
    assert not list(tmp_path.glob(".iter_*"))
    assert latest_iteration(tmp_path) == 3
    assert saved_iterations(tmp_path) == [3]
    pretrain(small(shards, checkpoint=run))
    assert latest_iteration(tmp_path) == STEPS


@pytest.mark.slow
def test_export_of_an_older_iteration(shards, tmp_path):
    pretrain(small(shards, checkpoint={"save": str(tmp_path / "run"), "save_interval": 4}))
    with pytest.raises(UserError, match=r"--iteration 5: is not in .*; there are: 4, 8"):
        export_run(tmp_path / "run", tmp_path / "five", 5)
    assert export_run(tmp_path / "run", tmp_path / "four", 4) == 4
    shut_down()
    export_run(tmp_path / "run", tmp_path / "eight")
    shut_down()
    four, eight = (load_file(tmp_path / name / "model.safetensors") for name in ("four", "eight"))
    assert not torch.equal(four["model.norm.weight"], eight["model.norm.weight"])


def test_load_and_save_folders_that_do_not_fit(whole, shards, tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        Trainer.build(small(shards, checkpoint={"load": str(tmp_path)}))
    with pytest.raises(UserError, match="already holds a run"):
        Trainer.build(small(shards, checkpoint={"save": str(whole)}))


def test_exported_model_gives_the_training_models_logits(whole, shards, tmp_path):
    """AR logits through transformers to 1e-4, and the folder loads with no remote code."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer = Trainer.build(small(shards, checkpoint={"load": str(whole)}))
    (batch,) = trainer.train_data.step_batches(0, 4, 4, 0, 1)
    with torch.no_grad():
        ours = (run_model(trainer.model[0], batch) @ output_weight(trainer.model[0]).t()).transpose(0, 1)[:, :32, :258]
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
