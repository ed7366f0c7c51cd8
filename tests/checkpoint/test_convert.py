"""Hugging Face -> a run -> Hugging Face changes no bit, in any layout; what does not fit leaves nothing behind."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT, torchrun
from tests.random_models import LLAMA3, write_random_model
from tidar_megatron.checkpoint.convert import TOLERANCE, export_run, import_run, verify
from tidar_megatron.config import ParallelConfig, build_config
from tidar_megatron.data.tokenizer import byte_tokenizer, free_id, reserved_ids
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.errors import UserError
from tidar_megatron.training.trainer import Trainer

MODELS = {
    "llama-tied": {"kind": "llama"},
    "llama-untied-llama3": {"kind": "llama", "tie": False, "rope_parameters": LLAMA3},
    "mistral-tied-bf16": {"kind": "mistral", "dtype": torch.bfloat16},
    "mistral-untied": {"kind": "mistral", "tie": False},
    "qwen2-tied": {"kind": "qwen2"},
    "qwen2-untied-bf16": {"kind": "qwen2", "tie": False, "dtype": torch.bfloat16},
    "qwen3-tied": {"kind": "qwen3"},
    "qwen3-untied": {"kind": "qwen3", "tie": False},
    "qwen3_moe-untied": {"kind": "qwen3_moe", "tie": False},
}
SAME = "model_type vocab_size rms_norm_eps rope_parameters tie_word_embeddings eos_token_id dtype architectures".split()


def same_folder(before, after):
    weights = [
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (before, after)
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert tensor.dtype == weights[1][name].dtype and torch.equal(tensor, weights[1][name]), name
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (before, after))
    for key in SAME:
        assert ours.get(key) == theirs.get(key), key


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")
    for name, settings in MODELS.items():
        write_random_model(folder / name / "hf", **settings)
        import_run(folder / name / "hf", folder / name / "run")
    return folder


@pytest.mark.parametrize("name", list(MODELS))
def test_there_and_back_changes_no_bit(imported, tmp_path, name):
    from transformers import AutoModelForCausalLM

    export_run(imported / name / "run", tmp_path / "hf")
    same_folder(imported / name / "hf", tmp_path / "hf")
    export_run(imported / name / "run", tmp_path / "small", shard_bytes=100_000)
    assert len(list((tmp_path / "small").glob("model-*.safetensors"))) > 2
    same_folder(imported / name / "hf", tmp_path / "small")
    ids = torch.arange(24)[None]
    one, two, three = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        for folder in (imported / name / "hf", tmp_path / "hf", tmp_path / "small")
    )
    assert torch.equal(one, two)
    assert torch.equal(one, three)


@pytest.mark.parametrize("name", list(MODELS))
def test_both_sides_have_the_same_logits_and_a_changed_weight_is_seen(imported, tmp_path, name):
    source, run = imported / name / "hf", imported / name / "run"
    found = verify(source, run)
    assert found["max_logit_difference"] <= TOLERANCE
    assert found["largest_logit"] > 0.5
    shutil.copytree(source, tmp_path / "hf")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.2.self_attn.k_proj.weight"][3] += 0.5
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    assert verify(tmp_path / "hf", run)["max_logit_difference"] > TOLERANCE


def test_through_tp2_pp2(imported, tmp_path, shards):
    """Four ranks start from what was imported, save without a step, and one process exports."""
    names = [name for name in MODELS if "moe" not in name]
    torchrun(4, "-m", "tests.checkpoint.start_and_save", imported, tmp_path, shards[0], *names)
    for name in names:
        export_run(tmp_path / name, tmp_path / f"{name}-hf")
        same_folder(imported / name / "hf", tmp_path / f"{name}-hf")


def starts_from(folder, shards, **tidar):
    tree = {
        "data": {"train_data": str(shards[0]), "seq_length": 32},
        "training": {"init_from": str(folder)},
        "tidar": {"block_size": 4, **tidar},
    }
    trainer = Trainer.build(build_config(tree))
    weights = {name: p.detach().clone() for name, p in trainer.model[0].named_parameters()}
    trainer.close()
    shut_down()
    return trainer.config, weights


@pytest.mark.parametrize("name", ["qwen3-tied", "llama-untied-llama3", "qwen3_moe-untied"])
def test_a_run_starts_alike_from_the_folder_and_from_what_was_imported(imported, shards, name):
    one, two = (starts_from(imported / name / kind, shards) for kind in ("hf", "run"))
    assert one[0].model == two[0].model
    assert one[1].keys() == two[1].keys()
    assert all(torch.equal(one[1][key], two[1][key]) for key in one[1])


def test_what_was_imported_is_no_run_to_go_on_with(imported, shards):
    tree = {"data": {"train_data": str(shards[0]), "seq_length": 32}}
    run = imported / "qwen3-tied" / "run"
    config = build_config({**tree, "checkpoint": {"load": str(run)}, "training": {"init_from": str(run)}})
    with pytest.raises(UserError, match=r"holds a model's weights, no run; start from them with --init-from"):
        Trainer.build(config)


@pytest.mark.parametrize("kind", ["mean", "normal", "keep"])
def test_the_mask_row(imported, shards, kind):
    """260 ids, the tokenizer's are 257: the mask token is row 257 of the folder."""
    source = load_file(imported / "llama-untied-llama3" / "hf" / "model.safetensors")
    config, weights = starts_from(imported / "llama-untied-llama3" / "hf", shards, init_mask_token=kind)
    assert config.tidar.mask_token_id == 257
    before, after = source["model.embed_tokens.weight"], weights["embedding.word_embeddings.weight"]
    others = torch.arange(260) != 257
    assert torch.equal(before[others], after[:260][others])
    assert not after[260:].any()
    assert torch.equal(weights["output_layer.weight"][:260], source["lm_head.weight"])
    if kind == "keep":
        assert torch.equal(before[257], after[257])
    elif kind == "mean":
        torch.testing.assert_close(after[257], before.mean(0))
    else:
        away = (after[257] - before.mean(0)) / before.std(0)
        assert 0.6 < away.std() < 1.6


def test_a_vocabulary_without_a_free_row_grows_and_is_trimmed(tmp_path):
    write_random_model(tmp_path / "hf", "llama", tie=False)
    config = import_run(tmp_path / "hf", tmp_path / "run", None, "mean", 260)
    assert (config.model.vocab_size, config.tidar.mask_token_id) == (261, 260)
    export_run(tmp_path / "run", tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "out"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert after[name].shape == (261, 64)
        assert torch.equal(after[name][:260], before[name])
        torch.testing.assert_close(after[name][260], before[name].mean(0))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tidar"]["mask_token_id"] == 260
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["suppress_tokens"] == [260]


def test_which_id_is_free():
    tokenizer = byte_tokenizer()
    assert free_id(tokenizer, 260) == 257  # a row of padding
    assert free_id(tokenizer, 257) == 257  # a new one
    tokenizer.add_tokens(["<|reserved_special_token_7|>", "<unused3>", "<extra>"], special_tokens=True)
    assert reserved_ids(tokenizer.get_vocab()) == [257, 258]
    assert free_id(tokenizer, 260) == 257
    assert free_id(tokenizer, 300) == 260


def test_a_tokenizer_comes_along(tmp_path):
    write_random_model(tmp_path / "hf", "qwen3")
    byte_tokenizer().save_pretrained(str(tmp_path / "hf"))
    config = import_run(tmp_path / "hf", tmp_path / "run", None, "mean")
    assert config.tidar.mask_token_id == 257
    export_run(tmp_path / "run", tmp_path / "out")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.encode("<|mask|>a", add_special_tokens=False) == [257, 97]


def tool(*arguments):
    command = [sys.executable, "tools/convert_checkpoint.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_tool(tmp_path):
    hf, run = write_random_model(tmp_path / "hf", "mistral"), tmp_path / "run"
    layout = ["--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2]
    done = tool("import", "--hf", hf, "--output", run, *layout)
    assert (done.returncode, done.stderr) == (0, "")
    assert "4 layers, hidden size 64, 260 ids, no mask token" in done.stdout
    done = tool("verify", "--hf", hf, "--checkpoint", run, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["max_logit_difference"] <= 1e-4
    done = tool("export", "--checkpoint", run, "--hf", tmp_path / "out")
    assert done.returncode == 0
    same_folder(hf, tmp_path / "out")
    weights = load_file(hf / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, hf / "model.safetensors", metadata={"format": "pt"})
    done = tool("verify", "--hf", hf, "--checkpoint", run)
    assert done.returncode == 2
    assert "is not the model in" in done.stderr


def test_what_cannot_be_imported_leaves_nothing(tmp_path):
    hf, run = write_random_model(tmp_path / "hf", "llama", tie=False), tmp_path / "run"
    weights, config = hf / "model.safetensors", json.loads((hf / "config.json").read_text())
    whole = load_file(weights)

    def refuse(said, parallel=None, mask=None, mask_token_id=None, target=run):
        with pytest.raises(UserError, match=said) as caught:
            import_run(hf, target, parallel, mask, mask_token_id)
        assert "\n" not in str(caught.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]

    refuse(r"tensor-model-parallel-size 3", ParallelConfig(tensor_model_parallel_size=3))
    refuse(r"no tokenizer to tell which ids are free; add --mask-token-id", mask="mean")
    refuse(r"--mask-token-id 261: the model has ids 0 to 259, and 260 would be a new one", None, "mean", 261)
    refuse("exists and is not empty", target=hf)
    save_file({**whole, "model.norm.weight": torch.ones(63)}, weights)
    refuse(r"model.norm.weight does not fit: \(63,\); is config.json of the same model")
    save_file({**whole, "model.layers.1.self_attn.k_proj.weight": torch.ones(16, 64)}, weights)
    refuse(r"model.layers.1.self_attn.q_proj.weight does not fit")
    save_file({**whole, "model.embed_tokens.weight": torch.ones(200, 64)}, weights)
    refuse(r"model.embed_tokens.weight does not fit")
    save_file({**whole, "model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, weights)
    refuse(r"q_proj.bias is no part of the model")
    save_file(whole, weights)
    (hf / "config.json").write_text(json.dumps(config | {"dtype": "float8_e4m3fn"}))
    refuse("dtype 'float8_e4m3fn' is not supported")
    (hf / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    refuse("model_type 'gpt2'")


def test_importing_holds_one_layer_at_a_time(tmp_path):
    """Peak memory beyond the mapped files: measured in a process of its own, by the kernel."""
    hf = write_random_model(
        tmp_path / "hf", "llama", tie=False, num_hidden_layers=24, hidden_size=512, intermediate_size=2048,
        num_attention_heads=8, num_key_value_heads=8, head_dim=64, vocab_size=16384,
    )  # fmt: skip
    size = (hf / "model.safetensors").stat().st_size
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.import_memory", hf, tmp_path / "run"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout)["anonymous_bytes"]
    assert size > 450e6
    assert grown < 0.35 * size, grown / size
