"""Tiny Hugging Face folders with random weights, of every family that can be imported."""

import torch

SHAPE = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def write_random_model(folder, kind="qwen3", tie=True, dtype=torch.float32, **settings):
    """A folder whose norms and biases are not all alike; ``settings`` go into its config.json. GQA, 260 ids."""
    from transformers import AutoConfig, AutoModelForCausalLM

    known = {
        **SHAPE,
        **(EXPERTS if kind == "qwen3_moe" else {}),
        **({"sliding_window": None} if kind == "mistral" else {}),
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 260,
        "tie_word_embeddings": tie,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": 256,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(known | settings)))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + noise * 0.3 if parameter.dim() == 1 else noise * 0.2)
    model.to(dtype).save_pretrained(folder)
    return folder


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
