"""Tiny random models of any causal LM class of transformers, with windows and chunks that take effect early."""

from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 48
CONTEXT = 128
MOST_PARAMETERS = 4_000_000

# Settings that make a model small. A configuration class gets those that it has.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
    "hidden_size": 32,
    "d_model": 32,
    "word_embed_proj_dim": 32,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "intermediate_size": 48,
    "ffn_hidden_size": 48,
    "ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_groups": 1,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "sliding_window": 16,
    "attention_chunk_size": 16,
    "original_max_position_embeddings": 16,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "mask_token_id": None,
}

# Settings that only some classes need.
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
DECODER = {"is_decoder": True}
TEXT = IDS | DECODER
ROTARY = {"rotary_dim": 4}
MLA = {"num_key_value_heads": 4}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys("camembert data2vec-text roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl".split(), TEXT),
    **dict.fromkeys("bert big_bird electra ernie megatron-bert rembert roformer".split(), DECODER),
    **dict.fromkeys("axk1 axk2 deepseek_v2 deepseek_v3 glm4_moe_lite glm_moe_dsa minicpm3 youtu".split(), MLA),
    **dict.fromkeys("bamba granitemoehybrid".split(), MAMBA),
    **dict.fromkeys("codegen gptj".split(), ROTARY),
    **dict.fromkeys("cwm modernbert-decoder".split(), IDS),
    "deepseek_v32": {**MLA, "index_topk": 16},
    "doge": {"keep_window_size": 16},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma4_text": {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"floor_scale": 16, "attn_scale": 0.5},
    "longcat_flash": {**MLA, "num_layers": 1, "expert_ffn_hidden_size": 16, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "state_size": 8},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "roc_bert": {"is_decoder": True, "shape_vocab_size": 8, "pronunciation_vocab_size": 8},
    "zaya": {"num_experts_per_tok": 1},
}

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 16,
    },
}


class NotBuiltError(Exception):
    """Raised if a class cannot be built small from its configuration class alone; the message says why."""


def model_types() -> list[str]:
    """Return every model type in transformers' table of causal LMs."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def class_name(model_type: str) -> str:
    """Return the name of the class in transformers' table for ``model_type``."""
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]


def settings_of(model_type: str) -> dict[str, Any]:
    """Return the settings that make ``model_type`` small.

    Raises:
        NotBuiltError: its configuration class has no usable defaults.
    """
    try:
        defaults = CONFIG_MAPPING[model_type]()
    except Exception as error:
        raise NotBuiltError(_line(error)) from error
    own, known = OWN.get(model_type, {}), {*defaults.to_dict(), *defaults.attribute_map}
    return {name: value for name, value in (SMALL | own).items() if name in own or name in known}


def takes_rope(model_type: str) -> bool:
    """Return whether the configuration class has one set of rotary settings for all layers."""
    rope = getattr(CONFIG_MAPPING[model_type](), "rope_parameters", None)
    return isinstance(rope, dict) and "rope_type" in rope


def build(model_type: str, **changes: Any) -> PreTrainedModel:
    """Build a random float32 model of ``model_type`` in evaluation mode.

    Args:
        model_type: a model type from :func:`model_types`.
        changes: settings of the configuration to override.

    Raises:
        NotBuiltError: the settings contradict each other, or give more than :data:`MOST_PARAMETERS`.
    """
    settings = settings_of(model_type) | changes
    try:
        config = CONFIG_MAPPING[model_type](**settings)
        model_class = getattr(transformers, class_name(model_type))
        with torch.device("meta"):
            shell = model_class(config)
        size = sum(tensor.numel() for tensor in [*shell.parameters(), *shell.buffers()])
        if size > MOST_PARAMETERS:
            raise NotBuiltError(f"{size / 1e6:.0f}M parameters: the sizes of its parts are not settings of the class")
        torch.manual_seed(0)
        model = model_class(config).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() > 1 or "norm" not in name:
                    weight.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
            model(input_ids=torch.arange(4, 24)[None], use_cache=False)
    except NotBuiltError:
        raise
    except Exception as error:
        raise NotBuiltError(_line(error)) from error
    return model


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:120]}"
