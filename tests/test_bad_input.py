"""Bad input, through the programs themselves: one clear line on standard error, exit status 2, nothing lost."""

import json
import runpy
import shutil
import sys

import pytest
import torch

from tests.conftest import ROOT
from tidar_megatron.training import signals


def run(monkeypatch, capsys, tool, *arguments):
    """A program of tools/, in this process: its exit status and what it said on standard error."""
    monkeypatch.setattr(signals, "install", lambda: None)  # pytest keeps its own
    monkeypatch.setattr(sys, "argv", [f"tools/{tool}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(str(ROOT / "tools" / f"{tool}.py"), run_name="__main__")
    return leaving.value.code, capsys.readouterr().err


def refused(outcome, *said):
    status, error = outcome
    assert status == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    for part in said:
        assert part in error


@pytest.fixture
def train(monkeypatch, capsys, shards):
    """Call tools/pretrain.py with a small sound configuration and further flags."""
    base = (
        "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 48 --seq-length 32 --train-iters 2 "
    )
    base += f"--block-size 4 --train-data {shards[0]}"
    return lambda *flags: run(monkeypatch, capsys, "pretrain", *base.split(), *flags)


def test_unknown_key_and_wrong_type_in_the_file(train, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model:\n  num_leyers: 2\n")
    refused(train("--config", path), "model.num_leyers: unknown key", "num_layers")
    path.write_text("optimizer:\n  lr: fast\n")
    refused(train("--config", path), "optimizer.lr", "valid number", "'fast'")


def test_unknown_flag_and_wrong_type_on_the_command_line(train):
    refused(train("--num-leyers", "2"), "unknown flag --num-leyers", "--num-layers")
    refused(train("--lr", "fast"), "optimizer.lr", "'fast'")


def test_lengths(train):
    refused(train("--block-size", "0"), "--block-size 0: must be at least 1")
    refused(train("--block-size", "5"), "--seq-length 32", "multiple of 5", "nearest: 30")
    layout = "--sequence-parallel --tensor-model-parallel-size 4 --block-size 2 --seq-length 30 --num-query-groups 4"
    refused(train(*layout.split()), "--seq-length 30", "multiple of 4", "nearest: 32")
    refused(
        train("--global-batch-size", "3", "--micro-batch-size", "2"),
        "--global-batch-size 3",
        "multiple of --micro-batch-size 2",
        "nearest: 4",
    )


def test_too_few_processes_for_the_layout(train):
    refused(train("--pipeline-model-parallel-size", "2"), "needs a multiple of 2 processes", "there are 1")
    refused(train("--context-parallel-size", "2"), "needs a multiple of 2 processes", "--nproc-per-node 2")


def test_what_gloo_cannot_do(train, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    flags = "--num-experts 4 --tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2"
    flags += " --expert-tensor-parallel-size 2 --moe-token-dispatcher-type alltoall"
    refused(train(*flags.split()), "which gloo does not support", "use --moe-token-dispatcher-type allgather")


def test_mask_token_the_tokenizer_uses(train):
    refused(train("--mask-token-id", "100"), "--mask-token-id 100", "0 to 256", "take 257")


def test_flags_that_would_do_nothing(train, tmp_path):
    refused(train("--tokenizer", tmp_path), f"--tokenizer {tmp_path}", "shards carry their own")
    refused(train("--save-interval", "1"), "--save-interval: needs --save")
    refused(train("--async-save"), "--async-save: needs --save")


def test_no_data(train, tmp_path):
    refused(train("--train-data", tmp_path), "manifest.json", "tidar prepare-data")


def test_damaged_shards(train, shards, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(shards[0], copy)
    (shard,) = copy.glob("*.tar")
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    refused(train("--train-data", copy), shard.name, "SHA-256")
    shard.unlink()
    refused(train("--train-data", copy), shard.name, "missing")


def test_schedules_that_contradict_themselves(train):
    refused(train("--lr-warmup-iters", "2"), "--lr-warmup-iters 2: must be less than")
    refused(train("--lr-decay-style", "WSD"), "--lr-wsd-decay-iters")
    refused(train("--min-lr", "1"), "--min-lr 1.0: must not exceed")


def test_transformer_engine_that_is_not_there(train):
    try:
        import transformer_engine  # noqa: F401
    except ImportError:
        refused(train("--transformer-impl", "transformer_engine"), "not installed", "--transformer-impl local")
    else:
        pytest.skip("transformer-engine is installed here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny exported model with a context of 64, and the same without its tidar section."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from tidar_megatron.data.tokenizer import byte_tokenizer

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, eos_token_id=256, bos_token_id=None,
        tidar={"mask_token_id": 257, "block_size": 4},
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    Qwen3ForCausalLM(config).save_pretrained(path / "tidar")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|mask|>"], special_tokens=True)
    tokenizer.save_pretrained(path / "tidar")
    shutil.copytree(path / "tidar", path / "plain")
    plain = json.loads((path / "plain" / "config.json").read_text())
    del plain["tidar"]
    (path / "plain" / "config.json").write_text(json.dumps(plain))
    return path


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prompt", "x" * 64], ["64", "context"]),
        (["--prompt", ""], ["empty"]),
        (["--prompt", "a<|mask|>b"], ["mask token"]),
        (["--prompt", "a", "--draft-length", "0"], ["draft length 0"]),
        (["--prompt", "a", "--branches", "some"], ["branches"]),
        (["--prompt", "a", "--device", "cuda:99"], ["device"]),
    ],
)
def test_prompts(monkeypatch, capsys, folder, flags, said):
    refused(run(monkeypatch, capsys, "generate", "--model", folder / "tidar", *flags), *said)


def test_a_model_that_cannot_draft(monkeypatch, capsys, folder):
    outcome = run(monkeypatch, capsys, "generate", "--model", folder / "plain", "--prompt", "a", "--mode", "tidar")
    refused(outcome, "no tidar section", "--plan ar")


def test_export_of_what_is_no_run(monkeypatch, capsys, tmp_path):
    outcome = run(monkeypatch, capsys, "convert_checkpoint", "export", "--checkpoint", tmp_path, "--hf", tmp_path / "x")
    refused(outcome, "holds no resolved_config.yaml")
