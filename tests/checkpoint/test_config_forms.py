"""One setting has several spellings in ``config.json``: the imported model computes what transformers computes."""

import gc
import json
import math

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from tidar_megatron.config import ModelConfig
from tidar_megatron.errors import UserError
from tidar_megatron.huggingface.convert import TOLERANCE, export_run, import_run, verify
from tidar_megatron.huggingface.families import model_from_huggingface

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "num_key_value_heads": 2,
    "eos_token_id": 39,
    "rms_norm_eps": 1e-5,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True, "num_experts": 4}
LINEAR, LLAMA3 = {"rope_type": "linear", "factor": 2.0}, {"rope_type": "llama3", "factor": 4.0}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect():
    """Ending process groups collects garbage: what the imports made is left out, which is most of the time."""
    gc.freeze()
    yield
    gc.unfreeze()


def write(folder, config, dtype=torch.float32):
    """A folder of random weights whose ``config.json`` is ``config``, word for word.

    Raises:
        Exception: transformers makes no model of it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + noise * 0.3 if parameter.dim() == 1 else noise * 0.2)
    assert model(torch.arange(40)[None]).logits.isfinite().all()
    model.to(dtype).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("kind", "keys", "means"),
    [
        # the newer section is the older one's to overrule, and the base is taken from within, then from beside
        (
            "llama",
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                "rope_scaling": LINEAR | {"rope_theta": 777},
            },
            {"rope_scaling_type": "linear", "rope_scaling_factor": 2.0, "rotary_base": 777.0},
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": LINEAR},
            {"rope_scaling_type": "linear", "rotary_base": 10000.0},
        ),
        ("llama", {"rope_parameters": {"rope_theta": 777.0}, "rope_theta": 55.0}, {"rotary_base": 777.0}),
        ("qwen3", {"rope_scaling": LINEAR, "rope_theta": 55}, {"rotary_base": 55.0}),
        ("llama", {"rope_scaling": LLAMA3}, {"rope_original_max_position_embeddings": 64}),
        (
            "llama",
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}, "original_max_position_embeddings": 8},
            {"rope_original_max_position_embeddings": 8},
        ),
        # defaults of the class
        ("qwen3", {"num_attention_heads": 2, "num_key_value_heads": 1}, {"kv_channels": 128}),
        ("mistral", {"num_attention_heads": 16, "num_key_value_heads": ...}, {"num_query_groups": 8, "kv_channels": 2}),
        ("llama", {"num_key_value_heads": None, "head_dim": None}, {"num_query_groups": 4, "kv_channels": 8}),
        ("qwen2", {"head_dim": 16}, {"kv_channels": 16}),
        # what the class does not read, or what slides in no layer
        ("mistral", {"attention_bias": True}, {"add_qkv_bias": False}),
        ("llama", {"sliding_window": 4, "use_sliding_window": True}, {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}, {}),
        ("qwen3_moe", {"num_experts": 8, "num_local_experts": 4, "mlp_only_layers": [7]}, {"num_experts": 4}),
        ("qwen3", {"hidden_act": "swish"}, {}),
    ],
)
def test_a_setting_means_what_it_means_to_transformers(tmp_path, kind, keys, means):
    base = {"mistral": {"sliding_window": None}, "qwen3_moe": EXPERTS}.get(kind, {})
    config = {"model_type": kind, **SHAPE, **base, **keys}
    hf = write(tmp_path / "hf", {key: value for key, value in config.items() if value is not ...})
    model = model_from_huggingface(hf, ModelConfig())
    assert {name: getattr(model, name) for name in means} == means
    import_run(hf, tmp_path / "run")
    assert verify(hf, tmp_path / "run")["max_logit_difference"] <= TOLERANCE
    export_run(tmp_path / "run", tmp_path / "out")
    out = model_from_huggingface(tmp_path / "out", ModelConfig())
    assert out == model
    assert verify(tmp_path / "out", tmp_path / "run")["max_logit_difference"] <= TOLERANCE


@pytest.mark.parametrize("beside", [{}, {"torch_dtype": "float32"}])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_dtype_goes_before_its_older_name(tmp_path, key, beside):
    config = {"model_type": "llama", **SHAPE, **beside, **({key: "bfloat16"} if key else {})}
    hf = write(tmp_path / "hf", config, torch.bfloat16)
    assert import_run(hf, tmp_path / "run").training.bf16 == (key is not None or not beside)


ROPES = [{}, LINEAR, LLAMA3, {"type": "linear", "factor": 2.0}, {**LLAMA3, "original_max_position_embeddings": 16}]
ROPES += [rope | {"rope_theta": 777.0} for rope in ROPES]
ODD_ROPES = [None, [], "linear", {"rope_type": "yarn", "factor": 2.0}, {**LINEAR, "factor": "2"}]
ODD_ROPES += [{"full_attention": LINEAR}, {**LINEAR, "partial_rotary_factor": 0.5}, {"rope_theta": 0}]


def mostly(*usual, odd):
    """Values that mean something, and now and then one that may not."""
    return st.one_of(*[st.sampled_from(usual)] * 7, st.sampled_from(odd))


FORMS = {
    "rope_theta": mostly(500.0, 20000, odd=[0, -5, math.nan, math.inf, "1e4", None, 10**400]),
    "rope_scaling": mostly(*ROPES, None, odd=ODD_ROPES),
    "rope_parameters": mostly(*ROPES, None, odd=ODD_ROPES),
    "original_max_position_embeddings": mostly(8, 16, odd=[0, 8.0, 8.5, "8"]),
    "partial_rotary_factor": mostly(1.0, odd=[0.5, None]),
    "dtype": mostly("float32", "bfloat16", None, odd=["auto", "float16", "foo"]),
    "torch_dtype": mostly("float32", "bfloat16", odd=[None, "float64"]),
    "head_dim": mostly(8, 16, odd=[None, 7, 0, "8"]),
    "num_key_value_heads": mostly(2, 4, odd=[None, 3, 0]),
    "tie_word_embeddings": mostly(True, False, odd=[None, 0]),
    "hidden_act": mostly("silu", "swish", odd=["gelu", None]),
    "use_sliding_window": mostly(True, False, odd=[None]),
    "sliding_window": mostly(None, 4, odd=[0]),
    "max_window_layers": mostly(2, 28, odd=[1, 0]),
    "layer_types": mostly(["full_attention"] * 2, odd=[["full_attention", "sliding_attention"], []]),
    "attention_bias": mostly(False, odd=[True, None]),
    "is_causal": mostly(True, odd=[False]),
    "quantization_config": mostly(None, odd=[{"quant_method": "gptq", "bits": 4}]),
    "num_local_experts": mostly(4, odd=[None, 0, 10**9]),
    "num_experts": mostly(4, 2, odd=[None]),
    "decoder_sparse_step": mostly(1, odd=[2, 0]),
    "mlp_only_layers": mostly([], [7], None, odd=[[0]]),
}
KINDS = ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe"]


def refused(hf, run):
    """Import; returns why not."""
    try:
        import_run(hf, run)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.slow
@settings(max_examples=max(1, settings.default.max_examples // 3))
@given(
    kind=st.sampled_from(KINDS),
    forms=st.fixed_dictionaries({}, optional=FORMS),
    left_out=st.sets(st.sampled_from(["num_key_value_heads", "max_position_embeddings", "rms_norm_eps"])),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_mixture_is_the_model_of_transformers_or_refused(tmp_path_factory, kind, forms, left_out, dtype):
    folder = tmp_path_factory.mktemp("mixture")
    config = {key: value for key, value in SHAPE.items() if key not in left_out}
    config = {"model_type": kind, **config, **({"sliding_window": None} if kind == "mistral" else {})}
    config |= (EXPERTS if kind == "qwen3_moe" else {}) | forms
    try:
        write(folder / "hf", config, dtype)
        computed = True
    except Exception:
        computed = False
    if (refusal := refused(folder / "hf", folder / "run")) is not None:
        assert "\n" not in refusal
        return
    event("imported")
    assert computed
    assert verify(folder / "hf", folder / "run")["max_logit_difference"] <= TOLERANCE
