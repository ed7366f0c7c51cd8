"""Damaged folders: one line that names the file and the key, and nothing large allocated."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.mutations import limits
from tidar_megatron.checkpoint.folder import TRACKER, restart_points
from tidar_megatron.checkpoint.summary import inspect
from tidar_megatron.data.sources import open_documents
from tidar_megatron.data.tokenizer import byte_tokenizer
from tidar_megatron.errors import UserError
from tidar_megatron.hf_folder.model import check_folder
from tidar_megatron.inference.engine import generate
from tidar_megatron.inference.loading import load_model
from tidar_megatron.inference.request import DecodeOptions, parse_plan
from tidar_megatron.training.metrics import JsonLines


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A tiny exported Llama."""
    folder = tmp_path_factory.mktemp("sound")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tidar={"mask_token_id": 257, "block_size": 4},
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    """A copy to damage."""
    return shutil.copytree(sound, tmp_path / "model")


def edit(folder, name="config.json", **values):
    tree = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(tree | values))


def refused(action, *said):
    with pytest.raises(UserError) as error, limits():
        action()
    message = str(error.value)
    assert "\n" not in message
    for part in said:
        assert part in message, message


@pytest.mark.parametrize(
    "values",
    [
        {"initializer_range": 1},
        {"rms_norm_eps": "1e-5"},
        {"max_position_embeddings": None},
        {"tie_word_embeddings": None},
        {"dtype": "auto"},
        {"dtype": "foo"},
        {"eos_token_id": "2"},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "1e4"}},
        {"rope_theta": -5, "rope_parameters": None},
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 2.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 1.0,
                "original_max_position_embeddings": 16,
            },
        },
        {"rope_parameters": {"full_attention": {"low_freq_factor": 4.0, "high_freq_factor": 1.0}}},
        {"hidden_act": "foo"},
        {"vocab_size": 10**12},
        {"hidden_size": 0},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 1},
        {"attention_bias": True},
    ],
    ids=str,
)
def test_one_line_names_the_key_of_config_json(folder, values):
    edit(folder, **values)
    refused(lambda: load_model(folder), str(folder), next(iter(values)))


def test_biases_that_config_json_does_not_know_are_not_dropped(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
    weights["value_head.weight"] = torch.ones(1)  # another head is nobody's business
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(lambda: load_model(folder), "model.layers.0.self_attn.q_proj.bias", "attention_bias false")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(folder, value):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(lambda: load_model(folder), "model.layers.1.mlp.up_proj.weight", "NaN or infinite")


def test_weights_of_integers(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"].to(torch.int8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(lambda: load_model(folder), "model.layers.1.mlp.up_proj.weight has dtype I8")


def test_a_block_size_beyond_the_context_or_beyond_any_forward(folder):
    tidar = {"mask_token_id": 257, "block_size": 100_000}
    edit(folder, tidar=tidar)
    refused(lambda: load_model(folder), "tidar.block_size 100000", "max_position_embeddings 64")
    edit(folder, max_position_embeddings=131_072)
    model = load_model(folder)
    refused(lambda: generate(model, [1, 2], DecodeOptions("tidar", max_new_tokens=4)), "draft length 100000")
    with limits():
        generate(model, [1, 2], parse_plan("linear:4"))


def test_what_is_computed_is_bounded_by_the_weights(tmp_path):
    """The table of positions of a GPT-J is in no safetensors."""
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=2, rotary_dim=8, n_positions=64)
    GPTJForCausalLM(config).save_pretrained(tmp_path)
    check_folder(tmp_path)
    edit(tmp_path, n_positions=10**8)
    refused(lambda: check_folder(tmp_path), "n_positions 100000000")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"])
@pytest.mark.parametrize("content", ["[]", "", "{", "\x00", '{"a": NaN}', "[" * 100_000, "1" * 5000])
def test_files_that_hold_something_else(folder, name, content):
    (folder / name).write_text(content)
    refused(lambda: load_model(folder), str(folder / name))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"])
def test_what_is_no_file(folder, name):
    path = folder / name
    path.unlink()
    path.mkdir()
    refused(lambda: load_model(folder), str(path), "is a folder, not a file")
    path.rmdir()
    path.symlink_to(path)
    refused(lambda: load_model(folder), str(path), "Too many levels of symbolic links")


def test_an_index_that_leads_elsewhere(folder):
    (folder / "model.safetensors").rename(folder / "x.safetensors")
    index = folder / "model.safetensors.index.json"
    for name in ("../x.safetensors", 3, None, "y.safetensors"):
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
        refused(lambda: load_model(folder), "y.safetensors" if name == "y.safetensors" else "weight_map.lm_head.weight")


def test_a_tracker_of_many_digits(tmp_path):
    (tmp_path / "iter_0000001").mkdir()
    (tmp_path / TRACKER).write_text("1" * 5000)
    refused(lambda: restart_points(tmp_path), TRACKER, "not an iteration")
    (tmp_path / TRACKER).unlink()
    (tmp_path / TRACKER).mkdir()
    refused(lambda: restart_points(tmp_path), TRACKER, "Is a directory")
    assert inspect(tmp_path, verify=False)["tracker"] is None


def test_metrics_that_are_no_file_or_no_lines_of_ours(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.mkdir()
    refused(lambda: JsonLines(path, 3), str(path), "is a folder")
    path.rmdir()
    path.write_bytes(b'{"iteration": 1}\n[]\n{}\n{"iteration": null}\n\xff\n{"iteration": 2}\n{"iteration": 9}\n')
    JsonLines(path, 3).close()
    assert path.read_text() == '{"iteration": 1}\n{"iteration": 2}\n'


def test_a_bin_that_is_a_folder(tmp_path, sound):
    (tmp_path / "x.bin").mkdir()
    (tmp_path / "x.idx").write_bytes(b"MMIDIDX")
    refused(lambda: open_documents(str(tmp_path / "x"), str(sound)), "x.bin", "is not a file")
