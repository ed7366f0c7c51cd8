"""What a Hugging Face folder must be: what we would compute otherwise, or is not whole, is refused in one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.random_models import LLAMA3, write_random_model
from tidar_megatron.config import ModelConfig
from tidar_megatron.errors import UserError
from tidar_megatron.huggingface.families import model_from_huggingface
from tidar_megatron.huggingface.folders import Safetensors
from tidar_megatron.huggingface.mapping import NAMES, expected_names
from tidar_megatron.models.layers import scaled_frequencies
from tidar_megatron.models.parameters import KINDS


def test_tensor_parallel_parts_make_the_whole():
    whole = torch.arange(8 * 6.0).reshape(8, 6)
    assert {kind.name for kind in KINDS} == set(NAMES)
    for kind in KINDS:
        parts = [kind.part(whole, rank, 2) for rank in (0, 1)]
        if kind.shard == "replicated":
            assert all(torch.equal(part, whole) for part in parts)
        else:
            assert sum(part.numel() for part in parts) == whole.numel()
            assert set(torch.cat([part.flatten() for part in parts]).tolist()) == set(whole.flatten().tolist())


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe"])
def test_the_table_names_every_tensor_of_a_family_and_no_other(tmp_path, kind, tie):
    write_random_model(tmp_path, kind, tie)
    there = load_file(tmp_path / "model.safetensors").keys()
    assert expected_names(model_from_huggingface(tmp_path, ModelConfig())) == there


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("qwen3", {"model_type": "mamba"}, "model_type 'mamba'"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'yarn'"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ("llama", {"rope_scaling": {"type": "linear"}}, r"Missing required keys .*: \{'factor'\}"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": float("nan")}},
            "factor is NaN, which is not a value",
        ),
        ("llama", {"rope_scaling": {"type": "linear", "factor": True}}, "factor true is not a number above 0"),
        ("llama", {"rope_scaling": "linear"}, 'rope_scaling "linear" is not a section'),
        *[
            (
                "llama",
                {"rope_parameters": {"rope_type": "default", "rope_theta": base}},
                f"rope_theta {said} is not a.* number",
            )
            for base, said in ((0, 0), (-5, -5), (float("inf"), "Infinity"), ("1e4", '"1e4"'))
        ],
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": ["linear"]}}, "refuses it|rope type .* is not"),
        (
            "llama",
            {"rope_scaling": {**LLAMA3, "partial_rotary_factor": 0.5}},
            "give frequencies that training does not",
        ),
        (
            "llama",
            {"rope_scaling": LLAMA3, "original_max_position_embeddings": 7.5},
            "embeddings 7.5 is not a positive",
        ),
        ("llama", {"is_causal": False}, "is_causal false"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, r"quantization_config .* is not supported"),
        ("qwen2", {"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 is too large"),
        ("qwen3", {"num_hidden_layers": "2"}, "Field 'num_hidden_layers' expected int, got str"),
        ("qwen3", {"vocab_size": 64.0}, "Field 'vocab_size' expected int, got float"),
        ("qwen3", {"head_dim": "8"}, "Field 'head_dim' expected int, got str"),
        ("llama", {"hidden_size": -32}, "hidden_size -32 is not"),
        ("llama", {"max_position_embeddings": 0}, "max_position_embeddings 0 is not"),
        ("llama", {"rms_norm_eps": "1e-6"}, 'rms_norm_eps "1e-6" is not a number of 0 or more'),
        ("llama", {"tie_word_embeddings": "false"}, "Field 'tie_word_embeddings' expected bool, got str"),
        ("llama", {"model_type": ["llama"]}, r"model_type \['llama'\] is not one of"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 4, "layer_types": None, "max_window_layers": 1},
            "sliding windows",
        ),
        ("mistral", {"sliding_window": 4096}, "sliding windows"),
        ("mistral", {"sliding_window": ...}, "sliding windows"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "a layer without experts"),
        ("qwen3_moe", {"num_local_experts": None}, "num_experts None is not a positive integer"),
        ("llama", {"hidden_size": None}, "Field 'hidden_size' expected int, got NoneType"),
    ],
)
def test_what_we_would_compute_otherwise_is_refused_by_name(tmp_path, kind, change, said):
    write_random_model(tmp_path, kind)
    config = json.loads((tmp_path / "config.json").read_text())
    config = {key: value for key, value in (config | change).items() if value is not ...}  # left out
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        model_from_huggingface(tmp_path, ModelConfig())


def test_folders_that_are_not_whole(tmp_path):
    with pytest.raises(UserError, match=r"not found; give a Hugging Face model folder"):
        model_from_huggingface(tmp_path, ModelConfig())
    write_random_model(tmp_path)
    model, weights = model_from_huggingface(tmp_path, ModelConfig()), tmp_path / "model.safetensors"
    whole = load_file(weights)

    def refuse(said):
        with pytest.raises(UserError, match=said):
            Safetensors(tmp_path).check(model)

    weights.unlink()
    refuse(r"holds no \*\.safetensors; save")
    torch.save(whole, tmp_path / "pytorch_model.bin")
    refuse(r"pytorch_model.bin is a pickle, which is not opened")
    weights.write_bytes(b"\x08\0\0\0\0\0\0\0no json ")
    refuse("is not a complete safetensors file")
    save_file({name: tensor for name, tensor in whole.items() if name != "model.norm.weight"}, weights)
    refuse("model.norm.weight is missing")
    save_file({**whole, "model.layers.9.mlp.up_proj.weight": torch.zeros(1)}, weights)
    refuse("model.layers.9.mlp.up_proj.weight is not part of the model")
    embeddings = whole["model.embed_tokens.weight"]
    for head in (torch.zeros(1), embeddings.double(), embeddings + torch.eye(*embeddings.shape) * 1e-6):
        save_file({**whole, "lm_head.weight": head}, weights)  # transformers 5 computes with it, though they are tied
        refuse("lm_head.weight differs from embed_tokens.weight")
    save_file({**whole, "lm_head.weight": embeddings.clone()}, weights)
    Safetensors(tmp_path).check(model)


@pytest.mark.parametrize(
    "rope",
    [{"rope_type": "default", "rope_theta": 1e4}, {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}, LLAMA3],
)
def test_rotary_frequencies_are_those_of_transformers(tmp_path, rope):
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    write_random_model(tmp_path, "llama", rope_parameters=rope)
    model = model_from_huggingface(tmp_path, ModelConfig())
    theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    plain = model.rotary_base ** (-torch.arange(0, 16, 2) / 16)
    assert theirs.attention_scaling == 1.0
    torch.testing.assert_close(scaled_frequencies(plain, model), theirs.inv_freq, rtol=1e-6, atol=0)
    # as it was written before transformers 5, the base beside the scaling or in it
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    config.pop("rope_theta", None)
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_scaling": rope}))
    assert model_from_huggingface(tmp_path, ModelConfig()) == model
