"""A TiDAR model: megatron-core's stock GPTModel with our core attention, rotary positions and RMSNorm in its spec."""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from tidar_megatron.config import Config
from tidar_megatron.distributed.groups import Ranks
from tidar_megatron.distributed.platform import has_gpu
from tidar_megatron.errors import UserError
from tidar_megatron.models.layers import HybridCoreAttention, PositionRotaryEmbedding, RMSNorm


def transformer_config(config: Config) -> TransformerConfig:
    """The part of the configuration that megatron-core's modules read."""
    model, parallel = config.model, config.parallel
    dtype = torch.bfloat16 if config.training.bf16 else torch.float32
    kv_channels = model.kv_channels or model.hidden_size // model.num_attention_heads
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        kv_channels=kv_channels,
        qk_layernorm=model.qk_layernorm,  # here as well as in the spec: its gradients are reduced over TP only then
        add_qkv_bias=model.add_qkv_bias,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        init_method_std=model.init_method_std,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        bf16=config.training.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        calculate_per_token_loss=True,  # (loss_sum, num_tokens): sums and counts, never means of means
        use_cpu_initialization=not has_gpu(),
        mrope_section=[kv_channels // 2],  # chooses the path of GPTModel that hands position_ids to the rotary module
        # fusions want CUDA (and torch.compile costs 18 s on a CPU's first step)
        bias_activation_fusion=has_gpu(),
        bias_dropout_fusion=has_gpu(),
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )


def layer_spec(config: Config, transformer: TransformerConfig) -> TransformerBlockSubmodules:
    """The stock layer spec with our modules in it."""
    qk_layernorm, impl = config.model.qk_layernorm, config.model.transformer_impl
    if impl == "transformer_engine":
        try:
            import transformer_engine  # noqa: F401
        except ImportError:
            raise UserError(
                "--transformer-impl transformer_engine: the package transformer-engine is not installed; "
                "pip install 'tidar-megatron[gpu]' on a CUDA machine, or use --transformer-impl local"
            ) from None
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm)
        from megatron.core.extensions.transformer_engine import TENorm

        norm: Any = TENorm
    else:
        layer = get_gpt_layer_local_spec(qk_layernorm=qk_layernorm, normalization="RMSNorm")
        norm = RMSNorm
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
        if qk_layernorm:
            layer.submodules.self_attention.submodules.q_layernorm = norm
            layer.submodules.self_attention.submodules.k_layernorm = norm
    layer.submodules.self_attention.submodules.core_attention = partial(
        HybridCoreAttention, backend=config.tidar.attention_backend, chunk_size=config.tidar.attention_chunk_size
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(transformer), layer_norm=norm)


def padded_vocab_size(vocab_size: int, config: Config) -> int:
    """The vocabulary as the model holds it: a multiple of ``make_vocab_size_divisible_by``.

    Unlike Megatron-LM's it does not depend on TP: the padding's logits take part in the softmax, so a padding that
    did would make the loss depend on the layout.
    """
    multiple = config.model.make_vocab_size_divisible_by
    return math.ceil(vocab_size / multiple) * multiple


def build_model(config: Config, vocab_size: int, ranks: Ranks) -> GPTModel:
    """This rank's part of the model, on its device, with random weights.

    Its forward takes ``input_ids``, ``position_ids`` int64 ``[b, t]`` and, as ``attention_mask``, the visibility
    metadata int32 ``[b, t, 4]``; with ``labels`` it returns per-token losses float32 ``[b, t]``, without them logits
    ``[b, t, padded vocabulary / TP]``.

    Args:
        config: the resolved configuration.
        vocab_size: ids in use, the mask token included.
        ranks: where this process stands.
    """
    transformer = transformer_config(config)
    model = GPTModel(
        transformer,
        layer_spec(config, transformer),
        vocab_size=padded_vocab_size(vocab_size, config),
        max_sequence_length=2 * config.data.seq_length,
        pre_process=ranks.is_first_stage,
        post_process=ranks.is_last_stage,
        share_embeddings_and_output_weights=not config.model.untie_embeddings_and_output_weights,
        position_embedding_type="mrope",
        rotary_base=config.model.rotary_base,
        pg_collection=ranks.groups,
    )
    model.rotary_pos_emb = PositionRotaryEmbedding(transformer, config.model.rotary_base)
    return model.to(ranks.device)
