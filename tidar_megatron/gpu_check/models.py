"""Models with random weights, made on the device: nothing is downloaded, and speed does not depend on the weights."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tidar_megatron.gpu_check.setting import Setting
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.wrapping import wrap_model

BLOCK_SIZE = 8
KINDS: dict[str, dict[str, Any]] = {  # the keys of config.json
    "1.5B": {
        "model_type": "qwen2",
        "num_hidden_layers": 28,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "8B": {
        "model_type": "qwen3",
        "num_hidden_layers": 36,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "small": {
        "model_type": "qwen3",
        "num_hidden_layers": 8,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 4096,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "model_type": "qwen3",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 128,
        "tie_word_embeddings": True,
    },
}


def random_causal_lm(kind: str, setting: Setting, dtype: torch.dtype, spread: float = 0.02) -> PreTrainedModel:
    """Return one of :data:`KINDS` with random weights and a ``tidar`` section, made on the setting's device.

    Args:
        kind: The name of the sizes; ``tiny`` is taken instead if the setting is tiny.
        setting: The conditions of the section.
        dtype: The dtype of the weights.
        spread: The standard deviation of the weights.
    """
    keys = dict(KINDS["tiny" if setting.tiny else kind])
    config = AutoConfig.for_model(
        keys.pop("model_type"),
        **keys,
        initializer_range=spread,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=None,
        tidar={"mask_token_id": keys["vocab_size"] - 1, "block_size": BLOCK_SIZE},
    )
    torch.manual_seed(0)
    with torch.device(setting.device):
        causal_lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return causal_lm.to(setting.device).requires_grad_(False)


def random_model(kind: str, setting: Setting, dtype: torch.dtype, spread: float = 0.02) -> DecodeModel:
    """Return :func:`random_causal_lm`, wrapped for decoding."""
    return wrap_model(random_causal_lm(kind, setting, dtype, spread))


def random_prompt(model: DecodeModel, length: int, seed: int = 0) -> list[int]:
    """Return random token ids without the mask token, which is the last id."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.vocab_size - 1, (length,), generator=generator).tolist()
