"""Which Hugging Face architectures these models are: ``config.json`` -> our model's configuration, and back.

A TiDAR model is an ordinary Llama, Mistral, Qwen2, Qwen3 or Qwen3-MoE: the mask token is one more vocabulary id, so
whatever loads those loads it. What is TiDAR's own stands in the ``tidar`` section of ``config.json``.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from tidar_megatron.config import Config, ModelConfig
from tidar_megatron.errors import UserError


@dataclass(frozen=True)
class Family:
    """What tells one architecture from the others."""

    architecture: str
    qk_layernorm: bool = False
    qkv_bias: bool = False
    experts: bool = False


# of two that compute the same, a model that was trained here from scratch is the first
FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_layernorm=True),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", qk_layernorm=True, experts=True),
}
NEEDED = "num_hidden_layers hidden_size intermediate_size num_attention_heads rms_norm_eps vocab_size".split()
OPTIONAL = "num_key_value_heads head_dim max_position_embeddings rope_theta tie_word_embeddings".split()
ROPE_NUMBERS = {  # Hugging Face's -> ours, of the kinds of scaling that have them
    "factor": "rope_scaling_factor",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_max_position_embeddings",
}
ROPE_KINDS = {"none": (), "linear": ("factor",), "llama3": tuple(ROPE_NUMBERS)}


def read_json(path: Path) -> dict[str, Any]:
    """A folder's JSON file.

    Raises:
        UserError: it is missing or no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{path}: not found; give a Hugging Face model folder") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object")
    return content


def model_from_huggingface(folder: str | Path, ours: ModelConfig) -> ModelConfig:
    """``ours`` with everything that a Hugging Face ``config.json`` decides.

    Raises:
        UserError: a model we would not compute as Hugging Face does, named.
    """
    path = Path(folder) / "config.json"
    hf = read_json(path)
    hf.setdefault("num_experts", hf.get("num_local_experts"))  # as transformers 5 writes it
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"{path}: model_type {model_type!r} is not one of {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    _refuse_what_we_do_not_compute(path, hf, family)
    needed = [*NEEDED, "num_experts", "num_experts_per_tok", "moe_intermediate_size"] if family.experts else NEEDED
    for key in needed:
        if not hf.get(key):
            raise UserError(f"{path}: has no {key}; is it a whole model folder?")
    _check_kinds(f"{path}: ", hf, [*needed, *OPTIONAL])
    heads = hf["num_attention_heads"]
    experts = {}
    if family.experts:
        experts = {
            "num_experts": hf["num_experts"],
            "moe_router_topk": hf["num_experts_per_tok"],
            "moe_ffn_hidden_size": hf["moe_intermediate_size"],
        }
    return dataclasses.replace(
        ours,
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        ffn_hidden_size=hf["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=hf.get("num_key_value_heads") or heads,
        kv_channels=hf.get("head_dim") or hf["hidden_size"] // heads,
        qk_layernorm=family.qk_layernorm,
        add_qkv_bias=family.qkv_bias,
        untie_embeddings_and_output_weights=not hf.get("tie_word_embeddings", False),
        norm_epsilon=hf["rms_norm_eps"],
        max_position_embeddings=ours.max_position_embeddings or hf.get("max_position_embeddings"),
        vocab_size=hf["vocab_size"],
        **experts,
        **_rope_from_huggingface(path, hf),
    )


def tidar_section(folder: str | Path) -> dict[str, Any]:
    """What a model that has learned to draft says of it in its ``config.json``; empty of another.

    Raises:
        UserError: it is no section, or one of its values cannot be meant.
    """
    path = Path(folder) / "config.json"
    hf = read_json(path)
    section = hf.get("tidar")
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise UserError(f"{path}: tidar {section!r} is no section; correct it")
    _check_kinds(f"{path}: tidar.", section, ["block_size", "seq_length"])
    mask, size, alpha = section.get("mask_token_id"), hf.get("vocab_size"), section.get("ar_loss_weight", 1.0)
    if mask is not None and not (type(mask) is int and type(size) is int and 0 <= mask < size):
        raise UserError(f"{path}: tidar.mask_token_id {mask!r} is not an id below {size}; correct it")
    if not (_is_number(alpha) and 0 <= alpha < math.inf):
        raise UserError(f"{path}: tidar.ar_loss_weight {alpha!r} is not a number of 0 or more; correct it")
    return section


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_kinds(where: str, section: dict[str, Any], keys: list[str]) -> None:
    """Whether each is of the kind that it must be: sizes, but for two numbers and a switch."""
    for key in keys:
        value: Any = section.get(key)
        wanted = "a positive integer"
        right = type(value) is int and value > 0
        if key in ("rms_norm_eps", "rope_theta"):
            right, wanted = _is_number(value) and 0 < value < math.inf, "a number above 0"
        elif key == "tie_word_embeddings":
            right, wanted = type(value) is bool, "true or false"
        if value is not None and not right:
            raise UserError(f"{where}{key} {value!r} is not {wanted}; correct it")


def _refuse_what_we_do_not_compute(path: Path, hf: dict[str, Any], family: Family) -> None:
    windows = hf.get("use_sliding_window")
    if hf["model_type"] == "mistral":
        windows = hf.get("sliding_window", 4096)  # transformers' default, where the key is missing
    refused = {
        "attention_bias": hf.get("attention_bias"),
        "mlp_bias": hf.get("mlp_bias"),
        "sliding windows": windows,
        f"hidden_act {hf.get('hidden_act')!r}": hf.get("hidden_act", "silu") != "silu",
        "a layer without experts": family.experts
        and (hf.get("mlp_only_layers") or hf.get("decoder_sparse_step", 1) != 1),
        "norm_topk_prob false": family.experts and not hf.get("norm_topk_prob"),
    }
    for name, present in refused.items():
        if present:
            raise UserError(f"{path}: {name} is not supported; start from a model without it")


def _rope_from_huggingface(path: Path, hf: dict[str, Any]) -> dict[str, Any]:
    rope = hf.get("rope_parameters") or {}  # transformers 5; before it, rope_theta and rope_scaling
    scaling = hf.get("rope_scaling") or rope
    for name, value in (("rope_parameters", rope), ("rope_scaling", scaling)):
        if not isinstance(value, dict):
            raise UserError(f"{path}: {name} {value!r} is no section; is it a whole model folder?")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    kind = "none" if kind == "default" else kind
    if str(kind) not in ROPE_KINDS:
        known = ", ".join(k for k in ROPE_KINDS if k != "none")
        raise UserError(f"{path}: rope type {kind!r} is not supported; start from a model with {known} or without")
    for key in ROPE_KINDS[kind]:
        number = scaling.get(key)
        if not _is_number(number):
            raise UserError(f"{path}: rope type {kind!r} without {key}; is it a whole model folder?")
        if not (math.isfinite(number) and number > 0):
            raise UserError(f"{path}: rope type {kind!r} with {key} {number}: must be a number above 0")
        if hf.get(key) not in (None, number):
            raise UserError(f"{path}: {key} is {hf[key]} and, of the rope, {number}; leave the right one there alone")
    base = rope.get("rope_theta") or scaling.get("rope_theta") or hf.get("rope_theta") or 10000.0
    return {
        "rotary_base": float(base),
        "rope_scaling_type": kind,
        **{ROPE_NUMBERS[key]: scaling[key] for key in ROPE_KINDS[kind]},
    }


def huggingface_config(config: Config, eos_token_id: int | None, source: dict[str, Any] | None = None) -> dict:
    """The ``config.json`` of a trained or imported model, with its ``tidar`` section where it has a mask token.

    Args:
        config: resolved.
        eos_token_id: of its tokenizer, for where ``source`` does not say.
        source: the ``config.json`` that the model was once imported from: what we do not decide stays as it is there.

    Raises:
        UserError: no Hugging Face class computes this model. ``training/resolve.py`` asks before a run starts.
    """
    from transformers import CONFIG_MAPPING

    model = config.model
    kind = model_type(model, source)
    rope = {"rope_type": "default" if model.rope_scaling_type == "none" else model.rope_scaling_type}
    rope |= {key: getattr(model, ROPE_NUMBERS[key]) for key in ROPE_KINDS[model.rope_scaling_type]}
    decided: dict[str, Any] = {
        "model_type": kind,
        "architectures": [FAMILIES[kind].architecture],
        "dtype": "bfloat16" if config.training.bf16 else "float32",
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": {**rope, "rope_theta": model.rotary_base},
        "rope_theta": model.rotary_base,  # and rope_scaling: where transformers before 5 look
        "rope_scaling": rope if model.rope_scaling_type != "none" else None,
        "max_position_embeddings": model.max_position_embeddings or config.data.seq_length,
        "vocab_size": model.vocab_size,
    }
    if kind != "qwen2":
        decided["head_dim"] = model.head_channels
    if kind == "mistral":
        decided["sliding_window"] = None  # the class's default is a window of 4096
    if FAMILIES[kind].experts:
        decided |= {
            "num_experts": model.num_experts,
            "num_experts_per_tok": model.moe_router_topk,
            "moe_intermediate_size": model.moe_ffn_hidden_size or model.ffn_hidden_size,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    if config.tidar.mask_token_id is not None:
        decided["tidar"] = {
            "block_size": config.tidar.block_size,
            "mask_token_id": config.tidar.mask_token_id,
            "ar_loss_weight": config.tidar.ar_loss_weight,
            "seq_length": config.data.seq_length,
        }
    if source is not None:
        decided = source | decided
        decided.pop("torch_dtype", None)  # dtype's older name
        decided.setdefault("eos_token_id", eos_token_id)
    else:
        decided |= {"bos_token_id": None, "eos_token_id": eos_token_id, "initializer_range": model.init_method_std}
    try:
        complete = CONFIG_MAPPING[kind].from_dict(dict(decided))
    except Exception as error:  # each class has checks of its own
        named, why = FAMILIES[kind].architecture, " ".join(str(error).split())
        raise UserError(
            f"transformers' {named} refuses this model, so it cannot be exported: {why}; change what that names"
        ) from None
    if source is not None:
        return decided
    # the class also writes what it derives, and under its own names (num_local_experts)
    return json.loads(complete.to_json_string()) | decided


def model_type(model: ModelConfig, source: dict[str, Any] | None = None) -> str:
    """Return the ``model_type`` of the Hugging Face class that computes ``model``.

    Args:
        model: resolved.
        source: the ``config.json`` that it was once imported from, whose class is kept where it still fits.

    Raises:
        UserError: there is none; names the flags, and what to change.
    """
    experts, heads = model.num_experts is not None, model.num_attention_heads

    def fits(kind: str) -> bool:
        family = FAMILIES[kind]
        if kind == "llama" and model.hidden_size % heads:  # transformers refuses it, whatever head_dim says
            return False
        ours = (model.qk_layernorm, model.add_qkv_bias, experts)
        return ours == (family.qk_layernorm, family.qkv_bias, family.experts)

    named = (source or {}).get("model_type")
    kind = next((kind for kind in (named, *FAMILIES) if kind in FAMILIES and fits(kind)), None)
    if kind is None:
        remedy = "leave --add-qkv-bias out (Qwen3), or add --no-qk-layernorm (Qwen2)"
        if experts:
            needed = [] if model.qk_layernorm else ["add --qk-layernorm"]
            needed += ["leave --add-qkv-bias out"] if model.add_qkv_bias else []
            remedy = f"{' and '.join(needed)} (Qwen3-MoE)"
        has = ["--num-experts"] if experts else []
        has += ["--qk-layernorm" if model.qk_layernorm else "--no-qk-layernorm"]
        has += ["--add-qkv-bias"] if model.add_qkv_bias else []
        raise UserError(f"no Hugging Face class has {' with '.join(has)}, so the model cannot be exported; {remedy}")
    if kind == "qwen2" and model.head_channels * heads != model.hidden_size:
        raise UserError(
            f"--kv-channels {model.head_channels}: with --add-qkv-bias the model cannot be exported, because the heads "
            f"of Qwen2 are --hidden-size {model.hidden_size} / --num-attention-heads {heads} wide; leave --kv-channels "
            "or --add-qkv-bias out"
        )
    return kind
