"""The TiDAR model: megatron-core's stock GPTModel with our core attention, rotary positions and RMSNorm in its spec."""

import math
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from tidar_megatron.config import Config
from tidar_megatron.data.doubled import Batch
from tidar_megatron.distributed.groups import Ranks
from tidar_megatron.distributed.platform import has_gpu
from tidar_megatron.models.attention import choose_backend
from tidar_megatron.models.attention.schedules import AttentionSchedules
from tidar_megatron.models.draft_layers import (
    DraftPasses,
    MaskEmbedding,
    PairedColumnParallelLinear,
    PairedRowParallelLinear,
    freeze_base,
)
from tidar_megatron.models.experts import keep_experts_apart, use_balanced_router
from tidar_megatron.models.layers import HybridCoreAttention, PositionRotaryEmbedding, RMSNorm
from tidar_megatron.models.output_layer import OutputLayer
from tidar_megatron.models.selector import Selector


def transformer_config(config: Config) -> TransformerConfig:
    """Return the part of the configuration that megatron-core's modules read."""
    model, parallel, gpu = config.model, config.parallel, has_gpu()
    vpp = parallel.virtual_pipeline_model_parallel_size or 1
    full = parallel.recompute_granularity == "full"
    dtype = torch.bfloat16 if config.training.bf16 else torch.float32
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        kv_channels=model.head_channels,
        qk_layernorm=model.qk_layernorm,  # set here too: without it, TP does not reduce the norms' gradients
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
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        # over gloo, interleaving with the default (batched) sends silently gives wrong gradients
        overlap_p2p_comm=vpp > 1,
        batch_p2p_comm=vpp == 1,
        recompute_granularity=parallel.recompute_granularity,
        recompute_method=parallel.recompute_method if full else None,
        recompute_num_layers=parallel.recompute_num_layers if full else None,
        recompute_modules=list(parallel.recompute_modules),
        bf16=config.training.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        calculate_per_token_loss=True,  # the loss function returns (loss_sum, num_tokens), not a mean
        use_cpu_initialization=not gpu,
        mrope_section=[
            model.head_channels // 2
        ],  # selects the path of GPTModel that passes position_ids to the rotary module
        # fusions need CUDA (and on a CPU torch.compile adds 18 s to the first step)
        bias_activation_fusion=gpu,
        bias_dropout_fusion=gpu,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=gpu and has_gradient_accumulation_kernel(),
        persist_layer_norm=False,
        **(_expert_settings(config) if model.num_experts is not None else {}),
    )


def _expert_settings(config: Config) -> dict[str, Any]:
    """Return the settings of a dropless mixture of experts, routed like Qwen3-MoE: softmax over the chosen experts."""
    model, parallel = config.model, config.parallel
    return {
        "num_moe_experts": model.num_experts,
        "moe_router_topk": model.moe_router_topk,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size or model.ffn_hidden_size,
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_token_dispatcher_type": model.moe_token_dispatcher_type,
        "moe_grouped_gemm": model.moe_grouped_gemm,
        "moe_router_dtype": "fp32",
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
    }


def has_gradient_accumulation_kernel() -> bool:
    """Return whether apex's kernel is installed, which fuses a weight gradient's matmul with adding it to its buffer.

    transformer-engine's layers have their own kernel, but the output layer remains megatron-core's, which refuses the
    setting without apex.
    """
    return find_spec("fused_weight_gradient_mlp_cuda") is not None


def layer_spec(
    config: Config,
    transformer: TransformerConfig,
    schedules: AttentionSchedules,
    vp_stage: int | None,
    passes: DraftPasses | None = None,
) -> TransformerBlockSubmodules:
    """Return megatron-core's stock layer spec with our modules in it, for the layers of this stage.

    Args:
        config: the resolved configuration.
        transformer: the configuration from :func:`transformer_config`.
        schedules: the attention schedules that all layers share.
        vp_stage: the virtual pipeline stage; None without interleaving.
        passes: which pass runs, if only draft weights are trained.
    """
    qk_layernorm, impl = config.model.qk_layernorm, config.model.transformer_impl
    experts = {"num_experts": config.model.num_experts, "moe_grouped_gemm": config.model.moe_grouped_gemm}
    if impl == "transformer_engine":
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm, **experts)
        from megatron.core.extensions.transformer_engine import TENorm

        norm: Any = TENorm
    else:
        layer = get_gpt_layer_local_spec(qk_layernorm=qk_layernorm, normalization="RMSNorm", **experts)
        norm = RMSNorm
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
        if qk_layernorm:
            layer.submodules.self_attention.submodules.q_layernorm = norm
            layer.submodules.self_attention.submodules.k_layernorm = norm
    layer.submodules.self_attention.submodules.core_attention = partial(
        HybridCoreAttention,
        schedules=schedules,
        heads_per_gather=config.parallel.context_parallel_kv_heads,
        passes=passes,
    )
    if passes is not None:
        _add_pairs(layer, config, passes)
    if config.model.num_experts is not None:
        use_balanced_router(layer)
    layers = get_num_layers_to_build(transformer, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)


def _add_pairs(layer: ModuleSpec, config: Config, passes: DraftPasses) -> None:
    """Put linear layers with a low-rank pair into a layer's spec; a mixture of experts has them in attention alone."""
    drafts = config.drafts

    def pair(module: ModuleSpec, name: str, paired: type, **more: Any) -> None:
        if name in drafts.draft_modules:
            params = {"drafts": drafts, "passes": passes, **more}
            setattr(module.submodules, name, ModuleSpec(module=paired, params=params))

    attention, mlp = layer.submodules.self_attention, layer.submodules.mlp
    pair(attention, "linear_qkv", PairedColumnParallelLinear)
    pair(attention, "linear_proj", PairedRowParallelLinear)
    if config.model.num_experts is None:
        pair(mlp, "linear_fc1", PairedColumnParallelLinear, is_gated=True)
        pair(mlp, "linear_fc2", PairedRowParallelLinear)


def padded_vocab_size(vocab_size: int, config: Config) -> int:
    """Return the padded size of the vocabulary: a multiple of ``make_vocab_size_divisible_by`` and of TP.

    The rows from ``vocab_size`` on are padding. Exactly the rows that an export writes take part in every softmax. So
    a row of a Hugging Face folder without a token in its tokenizer belongs to the model, while padding is masked out
    of the losses and the draft metrics (``models/cross_entropy.py``). Padding rows start as zeros and get zero
    gradients; no result depends on them.

    The padding may differ between a checkpoint and a run with another TP that loads it: megatron-core truncates the
    rows or fills them with zeros, and ``huggingface/streaming.py`` reads only the rows of ids.
    """
    multiple = math.lcm(config.model.make_vocab_size_divisible_by, config.parallel.tensor_model_parallel_size)
    return math.ceil(vocab_size / multiple) * multiple


def build_model(config: Config, vocab_size: int, ranks: Ranks) -> list[GPTModel]:
    """Build this rank's part of the model on its device, with random weights.

    :func:`run_model` calls a chunk with a batch.

    Args:
        config: the resolved configuration.
        vocab_size: the number of ids in use, including the mask token; each chunk has it as ``unpadded_vocab_size``.
        ranks: the ranks and process groups of this process.

    Returns:
        One chunk; with interleaved pipeline stages, one chunk for each virtual stage.
    """
    transformer = transformer_config(config)
    vpp = config.parallel.virtual_pipeline_model_parallel_size or 1
    wanted, chunk_size = config.tidar.attention_backend, config.tidar.attention_chunk_size
    backend = choose_backend(wanted, ranks.device.type, config.model.head_channels, config.training.bf16)
    schedules = AttentionSchedules(backend, chunk_size, ranks.groups.cp)
    passes = DraftPasses() if config.trains_drafts else None
    chunks = []
    for stage in range(vpp):
        vp_stage = stage if vpp > 1 else None
        model = GPTModel(
            transformer,
            layer_spec(config, transformer, schedules, vp_stage, passes),
            vocab_size=padded_vocab_size(vocab_size, config),
            max_sequence_length=2 * config.data.seq_length,
            pre_process=ranks.holds_embedding(stage),
            post_process=ranks.holds_output(stage, vpp),
            share_embeddings_and_output_weights=not config.model.untie_embeddings_and_output_weights,
            position_embedding_type="mrope",
            rotary_base=config.model.rotary_base,
            pg_collection=ranks.groups,
            vp_stage=vp_stage,
        )
        model.attention_schedules = schedules
        model.unpadded_vocab_size = vocab_size  # GPTModel's own vocab_size is the padded one
        positions = config.data.seq_length + config.tidar.block_size  # a block that starts anywhere may end beyond S
        model.rotary_pos_emb = PositionRotaryEmbedding(transformer, config.model, ranks.device, positions)
        if model.post_process:
            model.output_layer = OutputLayer(model.output_layer)
        keep_experts_apart(model)
        model.draft_passes = passes
        if passes is not None:
            model.draft_config, model.block_size = config.drafts, config.tidar.block_size
            model.mask_embedding = MaskEmbedding(transformer) if model.pre_process else None
            has_selector = model.post_process and config.drafts.draft_selector > 0
            sizes = config.model.hidden_size, config.drafts.draft_selector, transformer.params_dtype
            model.selector = Selector(*sizes) if has_selector else None
            freeze_base(model)
        chunks.append(model.to(ranks.device))
    return chunks


def run_model(model: Any, batch: Batch) -> Tensor:
    """Run the forward of one chunk over a micro-batch.

    Args:
        model: a chunk of :func:`build_model`, or a wrapper around one.
        batch: this context-parallel rank's part of the micro-batch, t tokens per row.

    Returns:
        The hidden states ``[t, b, hidden]`` in the model's dtype, after the final norm for the last chunk; under
        sequence parallelism this rank's part, ``[t / TP, b, hidden]``. A chunk computes no logits: ``models/loss.py``
        and ``models/draft_metrics.py`` do.
    """
    chunk = unwrap(model)
    schedules, on_host, num_queries = chunk.attention_schedules, batch.visibility_on_host, batch.tokens.shape[1]
    if chunk.draft_passes is not None:
        return _run_passes(model, chunk, batch)
    schedules.prepare(batch.visibility, on_host, num_queries, batch.attention_plan)
    more = _more(model, chunk, batch.padding)
    return model(batch.tokens, batch.position_ids, batch.visibility, **more)


def _run_passes(model: Any, chunk: GPTModel, batch: Batch) -> Tensor:
    """Run :func:`run_model` in two passes: the clean tokens without a graph, then the masks, which see their K/V."""
    S, M, passes, schedules = batch.seq_length, batch.mask_length, chunk.draft_passes, chunk.attention_schedules
    received = chunk.decoder.input_tensor  # both passes' hidden states of the stage before, clean tokens first
    clean_keys = batch.visibility.shape[1] - M
    clean_visibility = batch.visibility[:, :clean_keys]
    inputs = (None, None) if received is None else received.tensor_split([len(received) * S // (S + M)])
    schedules.prepare(clean_visibility, batch.visibility_on_host[:, :clean_keys], S)
    with passes.clean(batch.visibility):
        chunk.set_input_tensor(inputs[0])
        more = _more(model, chunk, batch.padding[:, :S])
        clean = model(batch.tokens[:, :S], batch.position_ids[:, :S], clean_visibility, **more)
    if M == 0:
        return clean
    schedules.prepare(batch.visibility, batch.visibility_on_host, M, batch.attention_plan, masks_alone=True)
    chunk.set_input_tensor(inputs[1])
    masks = batch.tokens[:, S:]
    more = _more(model, chunk, batch.padding[:, S:])
    if chunk.pre_process:
        more["decoder_input"] = chunk.mask_embedding(masks)
    return torch.cat([clean, model(masks, batch.position_ids[:, S:], batch.visibility, **more)])


def _more(model: Any, chunk: GPTModel, padding: Tensor) -> dict[str, Any]:
    """Return the further arguments of a forward over tokens of which ``padding [b, t]`` are fill."""
    # training's wrapper around a bfloat16 chunk would convert the last chunk's hidden states to float32
    more: dict[str, Any] = {"fp32_output": False} if chunk.config.bf16 and model is not chunk else {}
    if chunk.config.num_moe_experts is None:
        return {**more, "padding_mask": None}
    group = chunk.pg_collection.tp
    if chunk.config.sequence_parallel and not chunk.pre_process:  # megatron-core splits it on the first stage only
        padding = padding.chunk(group.size(), dim=1)[group.rank()]
    return {**more, "padding_mask": padding}


def unwrap(model: Any) -> GPTModel:
    """Return the GPTModel inside data-parallel and precision wrappers."""
    while not isinstance(model, GPTModel):
        model = model.module
    return model
