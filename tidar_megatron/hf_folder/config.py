"""Reading of ``config.json`` and ``generation_config.json``; an error is one line that names the key.

transformers validates some fields and trusts the others: it finds a wrong size when it allocates memory, and a NaN when
all logits are NaN. Values that no model can have are refused here. If transformers itself rejects a file, the error
says which key is at fault.
"""

import json
import math
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tidar_megatron.errors import UserError
from tidar_megatron.hf_folder.blame import Tree, key_to_blame
from tidar_megatron.json_files import cut, is_count, is_number, one_line, read_object, shown
from tidar_megatron.tidar_section import check_tidar

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
# keys of any class whose values are used as factors, divisors or bases of powers
POSITIVE = (
    "rope_theta",
    "rotary_emb_base",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)
NOT_NEGATIVE = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_eps", "norm_epsilon")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # names in different classes
# counts that classes loop over while they read a configuration
COUNTED = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_labels", *EXPERTS)
LARGEST_COUNT = 100_000
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "forced_bos_token_id", "forced_eos_token_id")


def read_config(folder: str | Path) -> PretrainedConfig:
    """Return transformers' configuration of a local folder; no code of the folder is run.

    Raises:
        UserError: ``config.json`` is missing, transformers rejects it, or it has a value that no model can have; the
            message names the key.
    """
    path = Path(folder) / CONFIG
    raw = read_object(path, "give a Hugging Face model folder")
    check_raw(raw, path)
    try:
        config = _accepted(folder)
    except Exception as error:  # transformers' own, of nearly any type
        raise refusal(path, raw, build_config, error) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = shown(raw["model_type"])
        raise UserError(f"{path}: transformers cannot load model_type {kind} as a causal LM; use another model")
    chosen = getattr(config, "num_experts_per_tok", None)
    experts = [number for name in EXPERTS if is_count(number := getattr(config, name, None))]
    if isinstance(chosen, int) and experts and not 1 <= chosen <= experts[0]:
        raise UserError(f"{path}: num_experts_per_tok {chosen} is not from 1 to {experts[0]}; correct it")
    return config


def build_config(raw: Tree) -> PretrainedConfig:
    """Return transformers' configuration for the content of a ``config.json``; errors of transformers propagate."""
    with TemporaryDirectory() as folder:
        (Path(folder) / CONFIG).write_text(json.dumps(raw), encoding="utf-8")
        return _accepted(folder)


def _accepted(folder: str | Path) -> PretrainedConfig:
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    config.to_dict()  # some values are used only there
    return config


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def refusal(path: Path, raw: Tree, attempt: Any, error: BaseException) -> UserError:
    """Return the error which says that transformers rejects ``raw``, with the key if it can be found.

    Args:
        path: The file.
        raw: The content of the file.
        attempt: The function that failed for ``raw``.
        error: The exception that it raised.
    """
    key = key_to_blame(raw, attempt, error)
    if key is None:
        return UserError(f"{path}: transformers cannot load it ({one_line(error)}); export it or copy it again")
    value: Any = raw
    for part in key.split("."):
        value = value[part]
    # remove what this message already says
    reason = re.sub(r"^(Class v|V)alidation error for .*?: \w+: |,? ?Errors: .*", "", one_line(error, 1000))
    return UserError(f"{path}: {key} {shown(value)} is not accepted by transformers ({cut(reason)}); correct it")


def check_raw(raw: Tree, path: Path) -> None:
    """Refuse the content of a ``config.json`` if it has values that no model can have, or unsupported ones.

    Raises:
        UserError: The message names the key.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise UserError(f"{path}: transformers cannot load model_type {shown(kind)} as a causal LM; use another model")
    if (quantized := raw.get("quantization_config")) is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise UserError(
            f"{path}: quantization_config ({shown(method)}) is not supported; use the model before it was quantized"
        )
    if raw.get("transformers_weights") is not None:
        raise UserError(f"{path}: transformers_weights is not supported; name the file model.safetensors")
    for name in ("dtype", "torch_dtype"):
        _check_dtype(raw.get(name), name, path)
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(name), dict | None):
            raise UserError(f"{path}: {name} {shown(raw[name])} is not a section; correct it or leave it out")
    for name in COUNTED:
        if type(raw.get(name)) is int and raw[name] > LARGEST_COUNT:
            raise UserError(f"{path}: {name} {raw[name]} is too large, the limit is {LARGEST_COUNT}; correct it")
    _check_numbers(raw, path, "")
    for name in ("rope_scaling", "rope_parameters"):
        rope = raw.get(name) or {}
        nested = {f"{name}.{key}": value for key, value in rope.items() if isinstance(value, dict)}  # as in Gemma 3
        for where, section in {name: rope, **nested}.items():
            low, high = section.get("low_freq_factor"), section.get("high_freq_factor")
            if low is not None and high is not None and low >= high:
                raise UserError(
                    f"{path}: {where}.low_freq_factor {low} is not below high_freq_factor {high}; correct it"
                )
    tidar = raw.get("tidar")
    if tidar is not None:
        check_tidar(tidar, raw.get("vocab_size"), str(path))


def _check_dtype(value: Any, name: str, path: Path) -> None:
    if value is None:
        return
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else None
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UserError(
            f"{path}: {name} {shown(value)} is not a floating-point dtype such as float32 or bfloat16; correct it"
        )


def _check_numbers(section: Tree, path: Path, above: str) -> None:
    for key, value in section.items():
        where = f"{path}: {above}{key} {shown(value)}"
        if isinstance(value, dict) and key not in POSITIVE + NOT_NEGATIVE:
            if not above.count("."):  # rope settings of a layer type are nested once more
                _check_numbers(value, path, f"{above}{key}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where} is not a finite number; correct it")
        elif key in POSITIVE and value is not None and not (is_number(value) and value > 0):
            raise UserError(f"{where} is not a number above 0; correct it")
        elif key in NOT_NEGATIVE and value is not None and not (is_number(value) and value >= 0):
            raise UserError(f"{where} is not a number of 0 or more; correct it")


def read_generation_config(folder: str | Path) -> Tree:
    """Return the content of the folder's ``generation_config.json``; empty if there is none.

    transformers silently ignores a broken file and generates with its own defaults.

    Raises:
        UserError: transformers rejects it, or a token id in it is invalid; the message names the key.
    """
    path = Path(folder) / GENERATION_CONFIG
    if not path.exists() and not path.is_symlink():
        return {}
    raw = read_object(path)
    for key in TOKEN_IDS:
        value = raw.get(key)
        ids = value if isinstance(value, list) and key.endswith("eos_token_id") else [value]
        if value is not None and not all(type(token) is int for token in ids):
            raise UserError(f"{path}: {key} {shown(value)} is not a token id; correct it")
    for key in ("suppress_tokens", "begin_suppress_tokens"):
        value = raw.get(key)
        if value is not None and not (isinstance(value, list) and all(type(token) is int for token in value)):
            raise UserError(f"{path}: {key} {shown(value)} is not a list of token ids; correct it")
    try:
        GenerationConfig.from_dict(_copy(raw))
    except Exception as error:  # transformers' own
        raise refusal(path, raw, lambda tree: GenerationConfig.from_dict(_copy(tree)), error) from error
    return raw
