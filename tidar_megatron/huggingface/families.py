"""The supported Hugging Face architectures: conversion of ``config.json`` to our model configuration, and back.

A TiDAR model is an ordinary Llama, Mistral, Qwen2, Qwen3 or Qwen3-MoE whose vocabulary has one more id, the mask token,
so any program that loads these architectures can load it. TiDAR's own settings are in the ``tidar`` section of
``config.json``.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from tidar_megatron.config import Config, ModelConfig
from tidar_megatron.errors import UserError
from tidar_megatron.hf_folder import config as hf_folder
from tidar_megatron.huggingface.rope import (
    ROPE_KINDS,
    ROPE_NUMBERS,
    check_frequencies,
    rope_from_huggingface,
)
from tidar_megatron.json_files import is_count, is_number, read_object
from tidar_megatron.tidar_section import check_tidar


@dataclass(frozen=True)
class Family:
    """A Hugging Face architecture and the features that distinguish it from the others."""

    architecture: str
    qk_layernorm: bool = False
    qkv_bias: bool = False
    experts: bool = False


# a model that was trained from scratch is exported as the first family that computes it
FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_layernorm=True),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", qk_layernorm=True, experts=True),
}
# keys that must be positive integers, if the configuration's class has them
SIZES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings".split()
SIZES += "num_key_value_heads num_experts num_experts_per_tok moe_intermediate_size decoder_sparse_step".split()


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file of a Hugging Face folder.

    Raises:
        UserError: The file is missing, or is not a JSON object.
    """
    return read_object(path, "give a Hugging Face model folder")


def read_config(folder: str | Path) -> PretrainedConfig:
    """Return a folder's configuration as transformers reads it, with the defaults of its class.

    transformers decides what older and newer keys mean, and which of two takes precedence.

    Raises:
        UserError: ``config.json`` is missing, of an unsupported family, or rejected by transformers.
    """
    path = Path(folder) / "config.json"
    model_type = read_json(path).get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"{path}: model_type {model_type!r} is not one of {', '.join(FAMILIES)}")
    config = hf_folder.read_config(folder)
    if config.model_type != model_type:
        raise UserError(
            f"{path}: names another configuration file, of a {config.model_type}; remove its configuration_files"
        )
    return config


def model_from_huggingface(folder: str | Path, ours: ModelConfig) -> ModelConfig:
    """Return ``ours`` with every field that a Hugging Face ``config.json`` decides replaced by its value.

    Args:
        folder: The Hugging Face folder.
        ours: A configuration that gives all other fields.

    Raises:
        UserError: The model has a feature that we do not compute as transformers does; the message names it.
    """
    path = Path(folder) / "config.json"
    config = read_config(folder)
    family = FAMILIES[config.model_type]
    for name in SIZES:
        if hasattr(config, name) and not is_count(getattr(config, name)):
            raise UserError(f"{path}: {name} {getattr(config, name)!r} is not a positive integer; correct it")
    if not (is_number(config.rms_norm_eps) and config.rms_norm_eps > 0):
        raise UserError(f"{path}: rms_norm_eps {config.rms_norm_eps!r} is not a number above 0; correct it")
    # the attention of every family reads it in this way
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    if not is_count(head_dim):
        raise UserError(f"{path}: head_dim {head_dim!r} is not a positive integer; correct it")
    _refuse_what_we_do_not_compute(path, config, family)
    experts = {}
    if family.experts:
        experts = {
            "num_experts": config.num_experts,
            "moe_router_topk": config.num_experts_per_tok,
            "moe_ffn_hidden_size": config.moe_intermediate_size,
        }
    model = dataclasses.replace(
        ours,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=head_dim,
        qk_layernorm=family.qk_layernorm,
        add_qkv_bias=family.qkv_bias,
        untie_embeddings_and_output_weights=not config.tie_word_embeddings,
        norm_epsilon=config.rms_norm_eps,
        max_position_embeddings=ours.max_position_embeddings or config.max_position_embeddings,
        vocab_size=config.vocab_size,
        **experts,
        **rope_from_huggingface(path, config),
    )
    check_frequencies(path, config, model)
    return model


def tidar_section(folder: str | Path) -> dict[str, Any]:
    """Return the ``tidar`` section of a folder's ``config.json``; empty if the model has not learned to draft.

    Raises:
        UserError: The section is not a JSON object, or one of its values is invalid.
    """
    path = Path(folder) / "config.json"
    config = read_config(folder)
    section = getattr(config, "tidar", None)
    if section is None:
        return {}
    check_tidar(section, config.vocab_size, str(path))
    return {key: value for key, value in section.items() if value is not None}


def _refuse_what_we_do_not_compute(path: Path, config: PretrainedConfig, family: Family) -> None:
    declared = {field.name for field in dataclasses.fields(config)}

    def of_class(name: str) -> Any:
        """Return a setting if the class has it, otherwise None: Mistral's attention ignores ``attention_bias``."""
        return getattr(config, name) if name in declared else None

    slides = of_class("sliding_window") is not None
    if "layer_types" in declared:
        slides = any(kind != "full_attention" for kind in config.layer_types)
    dense = family.experts and any(
        layer in config.mlp_only_layers or (layer + 1) % config.decoder_sparse_step
        for layer in range(config.num_hidden_layers)
    )
    refused = {
        "attention_bias": of_class("attention_bias"),
        "mlp_bias": of_class("mlp_bias"),
        "sliding windows": slides,
        f"hidden_act {config.hidden_act!r}": config.hidden_act not in ("silu", "swish"),  # two names of one function
        "a layer without experts": dense,
        "norm_topk_prob false": family.experts and not config.norm_topk_prob,
        # settings that any class can have
        "is_causal false": not getattr(config, "is_causal", True),
        "a model within a model": config.get_text_config(decoder=True) is not config,
        "per_layer_config": config.is_heterogeneous,
        **{
            name: getattr(config, name, None)
            for name in ("quantization_config", "fusion_config", "transformers_weights")
        },
    }
    for name, present in refused.items():
        if present:
            raise UserError(f"{path}: {name} is not supported; start from a model without it")


def settled(model: ModelConfig) -> ModelConfig:
    """Return a configuration with all defaults filled in and without the fields that only an export reads."""
    return dataclasses.replace(
        model,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        kv_channels=model.head_channels,
        moe_ffn_hidden_size=model.moe_ffn_hidden_size or model.ffn_hidden_size,
        max_position_embeddings=None,
    )


def huggingface_config(config: Config, eos_token_id: int | None, source: dict[str, Any] | None = None) -> dict:
    """Return the ``config.json`` of a trained or imported model, with a ``tidar`` section if it has a mask token.

    Args:
        config: The resolved configuration.
        eos_token_id: The tokenizer's EOS, used if ``source`` has none.
        source: The ``config.json`` that the model was imported from; keys that we do not decide keep their value.

    Raises:
        UserError: No Hugging Face class computes this model. ``training/resolve.py`` checks this before a run starts.
    """
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
        "rope_theta": model.rotary_base,  # this and rope_scaling: transformers before 5 reads these
        "rope_scaling": rope if model.rope_scaling_type != "none" else None,
        "max_position_embeddings": model.max_position_embeddings or config.data.seq_length,
        "vocab_size": model.vocab_size,
    }
    if kind != "qwen2" or model.head_channels * model.num_attention_heads != model.hidden_size:
        decided["head_dim"] = model.head_channels  # Qwen2 reads it too, but few of its folders have it
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
    except Exception as error:  # each class has its own checks
        named, why = FAMILIES[kind].architecture, " ".join(str(error).split())
        raise UserError(
            f"transformers' {named} rejects this model, so it cannot be exported: {why}; change the setting it names"
        ) from None
    if source is not None:
        return decided
    # the class also writes derived values, and its own names of keys (num_local_experts)
    return json.loads(complete.to_json_string()) | decided


def model_type(model: ModelConfig, source: dict[str, Any] | None = None) -> str:
    """Return the ``model_type`` of the Hugging Face class that computes ``model``.

    Args:
        model: The resolved model configuration.
        source: The ``config.json`` that the model was imported from; its class is kept if it still fits.

    Raises:
        UserError: There is no such class; the message names the flags and what to change.
    """
    experts, heads = model.num_experts is not None, model.num_attention_heads

    def fits(kind: str) -> bool:
        family = FAMILIES[kind]
        if kind == "llama" and model.hidden_size % heads:  # transformers rejects it even if head_dim is given
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
    return kind
