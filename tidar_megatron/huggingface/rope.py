"""RoPE settings of a Hugging Face configuration; settings that training does not compute are refused."""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_MAPPING, PretrainedConfig

from tidar_megatron.config import ModelConfig
from tidar_megatron.errors import UserError
from tidar_megatron.json_files import is_number
from tidar_megatron.models.layers import scaled_frequencies

ROPE_NUMBERS = {  # Hugging Face's key -> our field
    "factor": "rope_scaling_factor",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_max_position_embeddings",
}
ROPE_KINDS = {"none": (), "linear": ("factor",), "llama3": tuple(ROPE_NUMBERS)}


def rope_from_huggingface(path: Path, config: PretrainedConfig) -> dict[str, Any]:
    """Return the fields of our model configuration for the RoPE settings of ``config``.

    Args:
        path: The path of ``config.json``, for messages.
        config: The configuration as transformers read it.

    Raises:
        UserError: Training does not compute this RoPE type, or a number is invalid.
    """
    config.standardize_rope_params()  # the rotary modules also call this, after all keys have been read
    rope = config.rope_parameters
    kind = rope.get("rope_type")
    kind = "none" if kind == "default" else kind
    if not isinstance(kind, str) or kind not in ROPE_KINDS:
        known = ", ".join(k for k in ROPE_KINDS if k != "none")
        raise UserError(f"{path}: rope type {kind!r} is not supported; start from a model with {known} or no scaling")
    for key in ("rope_theta", *ROPE_KINDS[kind]):
        if not (is_number(rope.get(key)) and rope[key] > 0):
            has = repr(rope[key]) if key in rope else "missing"
            raise UserError(f"{path}: {key} of rope type {rope['rope_type']!r} is {has}, not a number above 0")
    numbers = {ROPE_NUMBERS[key]: rope[key] for key in ROPE_KINDS[kind]}
    if (length := numbers.get("rope_original_max_position_embeddings")) is not None:
        if length != int(length):
            raise UserError(f"{path}: original_max_position_embeddings {length!r} is not a positive integer")
        numbers["rope_original_max_position_embeddings"] = int(length)
    return {"rotary_base": float(rope["rope_theta"]), "rope_scaling_type": kind, **numbers}


def check_frequencies(path: Path, config: PretrainedConfig, model: ModelConfig) -> None:
    """Refuse RoPE settings for which transformers computes other frequencies than training does.

    Args:
        path: The path of ``config.json``, for messages.
        config: The configuration as transformers read it.
        model: Our model configuration.

    Raises:
        UserError: The frequencies differ; the message shows the settings.
    """
    base = MODEL_MAPPING[type(config)]
    name = base.__name__.removesuffix("Model") + "RotaryEmbedding"
    try:
        theirs = getattr(sys.modules[base.__module__], name)(config)
        channels = torch.arange(0, model.head_channels, 2, dtype=torch.float32) / model.head_channels
        ours = scaled_frequencies(1 / model.rotary_base**channels, model)
        same = theirs.attention_scaling == 1 and torch.allclose(ours, theirs.inv_freq, rtol=1e-5, atol=0)
    except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError):
        same = False
    if not same:
        raise UserError(
            f"{path}: the rope settings {config.rope_parameters} give frequencies that training does not compute; "
            "start from a model without them"
        )
