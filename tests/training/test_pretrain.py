"""A whole run through ``tools/pretrain.py``'s own entry: phases, logs, stop and continue, export."""

import json
import math
import threading
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file

from tidar_megatron.checkpoint.distributed import latest_iteration, saved_iterations
from tidar_megatron.checkpoint.export import export_run
from tidar_megatron.config import build_config, load_config
from tidar_megatron.data.loader import TrainingData
from tidar_megatron.data.prefetch import Prefetcher
from tidar_megatron.data.prepare import prepare
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.errors import UserError
from tidar_megatron.models.gpt import run_model
from tidar_megatron.models.loss import joint_loss
from tidar_megatron.models.output_layer import output_weight
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
    config = load_config(whole / "resolved_config.yaml")
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
    monkeypatch.setattr(Prefetcher, "get", lambda self, *request: trainer._build_batches(*request))
    monkeypatch.setattr(Prefetcher, "start", lambda self, *request: None)
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


def test_a_resume_forgets_what_was_logged_after_its_checkpoint(whole, shards, tmp_path):
    run = {"save": str(tmp_path), "load": str(tmp_path)}
    pretrain(small(shards, checkpoint=run, training={"exit_interval": 3}))
    with (tmp_path / "metrics.jsonl").open("a") as file:  # as if killed after step 4, in the midst of a line
        file.write(json.dumps({"iteration": 4, "loss": 99.0}) + "\n" + '{"iteration": 5, "lo')
    pretrain(small(shards, checkpoint=run))
    iterations = [m["iteration"] for m in metrics(tmp_path) if "loss" in m]
    assert iterations == list(range(1, STEPS + 1))


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
    with pytest.raises(UserError, match=r"its tokenizer is not the data's|fewer than"):
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


def test_a_save_that_fails_publishes_nothing(shards, tmp_path, monkeypatch):
    run = {"save": str(tmp_path), "load": str(tmp_path), "save_interval": 3}
    real, calls = dist_checkpointing.save, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise OSError("disk full")
        return real(*args, **kwargs)

    monkeypatch.setattr(dist_checkpointing, "save", failing)
    with pytest.raises(OSError, match="disk full"):
        pretrain(small(shards, checkpoint=run))
    assert latest_iteration(tmp_path) == 3
    assert saved_iterations(tmp_path) == [3]
    pretrain(small(shards, checkpoint=run))
    assert latest_iteration(tmp_path) == STEPS


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
    with pytest.raises(UserError, match="holds a run already"):
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
