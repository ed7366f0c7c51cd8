"""Write a model of transformers as a GGUF file, the format of llama.cpp: the same weights, and no tokenizer."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.mistral.modeling_mistral import MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from tidar_megatron.inference.dtype import dtype_name
from tidar_megatron.inference.lean import is_lean

ARCHITECTURES: dict[type[nn.Module], str] = {  # the names in gguf.MODEL_ARCH
    LlamaModel: "LLAMA",
    MistralModel: "LLAMA",
    Qwen2Model: "QWEN2",
    Qwen3Model: "QWEN3",
}
TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # the names in gguf's types


def why_not(causal_lm: PreTrainedModel) -> str | None:
    """Return why :func:`write_gguf` cannot write this model, or None if it can."""
    config = causal_lm.config
    name, architecture = type(causal_lm).__name__, ARCHITECTURES.get(type(causal_lm.base_model))
    if architecture is None or not is_lean(causal_lm):
        return f"{name} is not converted to GGUF, only Llama, Mistral, Qwen2 and Qwen3 are"
    if causal_lm.dtype not in TYPES:
        return f"it has no {dtype_name(causal_lm.dtype)}"
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1) != 1:
        return f"scaled or partial rotary positions ({rope}) are not converted to GGUF"
    if getattr(config, "sliding_window", None):
        return "a sliding window is not converted to GGUF"
    if config.hidden_act != "silu":
        return f"its {name} has the activation silu, not {config.hidden_act}"
    biased = {key.split(".")[-2] for key in causal_lm.state_dict() if key.endswith(".bias")}
    if biased - ({"q_proj", "k_proj", "v_proj"} if architecture == "QWEN2" else set()):
        return f"biases ({', '.join(sorted(biased))}) are not converted to GGUF"
    return None


def write_gguf(causal_lm: PreTrainedModel, path: Path) -> None:
    """Write a model for which :func:`why_not` has no reason; matrices keep the model's dtype.

    Norms and biases are float32, as llama.cpp has them. The file has no tokenizer: prompts are token ids.
    """
    import gguf

    config = causal_lm.config
    name = ARCHITECTURES[type(causal_lm.base_model)]
    architecture = gguf.MODEL_ARCH[name]
    matrix_type = gguf.GGMLQuantizationType[TYPES[causal_lm.dtype]]
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    all_or_most = "ALL" if matrix_type.name == "F32" else "MOSTLY"
    writer.add_file_type(gguf.LlamaFileType[f"{all_or_most}_{matrix_type.name}"])
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    weights = causal_lm.state_dict()
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    for key, weight in weights.items():
        if name == "LLAMA" and key.endswith(("q_proj.weight", "k_proj.weight")):
            weight = _pairs_together(weight, head_dim)
        stored = matrix_type if weight.ndim > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(weight.float().cpu().numpy(), stored)
        its_name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert its_name is not None, key
        writer.add_tensor(its_name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _pairs_together(weight: Tensor, head_dim: int) -> Tensor:
    """Return the weight of queries or keys with the channels of each head reordered as GGUF has them for Llama.

    Rotary positions turn pairs of channels, which are half a head apart in transformers and side by side in GGUF.
    """
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
