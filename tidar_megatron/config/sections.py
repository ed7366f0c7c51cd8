"""The configuration: a tree of frozen dataclasses, one section per concern, every field with its help text."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field


class Section:
    """The base class of all sections; an unknown key is an error."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=2**31)]  # numpy takes 32 bits; the upper half leaves room for per-rank offsets
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
# one path, or weights and paths; YAML may hold a single string, and weights as numbers
Sources = Annotated[tuple[str, ...], BeforeValidator(lambda given: _words(given))]
Rate = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


def _words(given: Any) -> Any:
    if given is None:
        return ()
    if isinstance(given, str):
        return (given,)
    return tuple(map(str, given)) if isinstance(given, list | tuple) else given


def described(text: str, default: Any) -> Any:
    """Return a dataclass field with its default and help text."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class TiDARConfig(Section):
    """The TiDAR objective and its attention (arXiv 2511.08923, section 3)."""

    block_size: int = described(
        "B, tokens per block: the mask tokens of a block attend to each other, and a draft has at most B tokens", 8
    )
    ar_loss_weight: Rate = described(
        "alpha, weight of the next-token (AR) loss; the joint loss is (alpha * AR + diffusion) / (1 + alpha)", 1.0
    )
    mask_token_id: NonNegative | None = described(
        "id of the mask token; default: the first id that the tokenizer does not use; with --init-from, preferably an "
        "existing row of the model that no text uses",
        None,
    )
    init_mask_token: Literal["mean", "normal", "keep"] | None = described(
        "with --init-from, initial embedding of the mask token: normal (random, distributed as the other rows), mean "
        "(of the other rows) or keep (as loaded); default: keep for a TiDAR model, otherwise normal",
        None,
    )
    masking: Literal["total", "random"] = described(
        "what a training step masks in the diffusion half: total masks every token, random a random share of each "
        "block (the paper's ablation)",
        "total",
    )
    ar_warmup_fraction: Fraction = described(
        "fraction of train-iters that trains on the next-token loss alone, before the joint loss begins", 0.0
    )
    diffusion_block_fraction: Share = described(
        "fraction of each sequence's blocks that have mask tokens in a training step, drawn at random for each "
        "sequence; evaluation masks all blocks",
        1.0,
    )
    block_starts: Literal["aligned", "anywhere"] = described(
        "where the blocks of a training step start: aligned at multiples of block-size in each document, or anywhere, "
        "as in decoding; evaluation has aligned blocks",
        "aligned",
    )
    blocks_per_sequence: Count | None = described(
        "blocks of each sequence that have mask tokens in a training step; default: all aligned ones, or as "
        "many blocks that start anywhere, of which there may be more",
        None,
    )
    attention_backend: Literal["auto", "chunked", "flex", "transformer_engine", "dense"] = described(
        "attention kernel of training; auto: transformer_engine or flex on a GPU, chunked on a CPU; dense is the "
        "reference with a full 2S x 2S mask",
        "auto",
    )
    attention_chunk_size: Count = described("tokens per chunk of the chunked attention backend", 256)


@dataclass(frozen=True, kw_only=True)
class DraftConfig(Section):
    """Draft weights on a frozen AR model: low-rank pairs that act on mask tokens alone (arXiv 2507.11851)."""

    train: Literal["all", "drafts"] = described(
        "all trains every weight; drafts freezes the model of --init-from and trains weights that act on mask tokens "
        "alone, so its AR output never changes",
        "all",
    )
    draft_rank: Count = described("rank of the pair beside each linear layer", 64)
    draft_alpha: Positive = described("the product of a pair is multiplied by draft-alpha / draft-rank", 128.0)
    draft_modules: tuple[Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"], ...] = described(
        "linear layers that have a pair", ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    )
    draft_loss: Literal["ce", "argmax", "kl", "tv", "hybrid"] = described(
        "what a draft learns: ce the data's token, argmax the model's likeliest token; kl, tv, hybrid its distribution",
        "ce",
    )
    draft_loss_weighting: Literal["none", "reach", "decay"] = described(
        "how the offsets in a block are weighted: reach by how far a draft gets, decay by exp(-offset / 4)", "reach"
    )
    draft_selector: NonNegative = described(
        "rank of the selector, a head that walks a block and chooses among the likeliest tokens; 0: none", 128
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The transformer: RMSNorm, SwiGLU, rotary embeddings, grouped-query attention (as in Qwen3 and Llama)."""

    num_layers: Count = described("transformer layers", 12)
    hidden_size: Count = described("width of the residual stream", 768)
    ffn_hidden_size: Count = described("width of the SwiGLU feed-forward layer", 2048)
    num_attention_heads: Count = described("query heads", 12)
    num_query_groups: Count | None = described("K/V heads; default: as many as query heads", None)
    kv_channels: Count | None = described("channels per head; default: hidden-size / num-attention-heads", None)
    qk_layernorm: bool = described("RMSNorm on queries and keys, per head (Qwen3)", True)
    add_qkv_bias: bool = described("bias on the q, k and v projections (Qwen2)", False)
    untie_embeddings_and_output_weights: bool = described("give the output layer weights of its own", False)
    norm_epsilon: Positive = described("RMSNorm's epsilon", 1e-6)
    rotary_base: Positive = described("base of the rotary frequencies", 10000.0)
    rope_scaling_type: Literal["none", "linear", "llama3"] = described("RoPE scaling for long contexts", "none")
    rope_scaling_factor: Positive = described("linear, llama3: factor by which frequencies are divided", 8.0)
    rope_low_freq_factor: Positive = described(
        "llama3: wavelengths above rope-original-max-position-embeddings / this are scaled in full", 1.0
    )
    rope_high_freq_factor: Positive = described(
        "llama3: wavelengths below rope-original-max-position-embeddings / this are not scaled", 4.0
    )
    rope_original_max_position_embeddings: Count = described("llama3: context length before scaling", 8192)
    init_method_std: Positive = described("standard deviation of the initial weights", 0.02)
    vocab_size: Count | None = described(
        "token ids in use, including the mask token; default: from the tokenizer", None
    )
    make_vocab_size_divisible_by: Count = described("pad the vocabulary to a multiple of this and of TP", 128)
    max_position_embeddings: Count | None = described("context limit that an export states; default: seq-length", None)
    transformer_impl: Literal["local", "transformer_engine"] = described(
        "megatron-core's layer implementation", "local"
    )
    num_experts: Count | None = described("experts per layer (Qwen3-MoE); default: a dense feed-forward", None)
    moe_router_topk: Count = described("experts that each token is routed to", 2)
    moe_ffn_hidden_size: Count | None = described("width of each expert; default: ffn-hidden-size", None)
    moe_aux_loss_coeff: Rate = described("weight of the load-balancing loss, per layer", 0.0)
    moe_token_dispatcher_type: Literal["allgather", "alltoall"] = described(
        "collective that sends tokens to their experts", "allgather"
    )
    moe_grouped_gemm: bool = described(
        "compute all experts of a rank in one grouped GEMM; needs transformer_engine", False
    )

    @property
    def head_channels(self) -> int:
        """The number of channels per attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Training and held-out data: shards from tidar prepare-data, Megatron .bin/.idx pairs, or blends of them."""

    train_data: Sources = described(
        "training data: a folder of shards, the prefix of a .bin/.idx pair, or a blend: WEIGHT PATH WEIGHT PATH ...", ()
    )
    valid_data: Sources = described("held-out data for evaluation, in the same form as train-data", ())
    tokenizer: str | None = described(
        "Hugging Face tokenizer folder of .bin/.idx pairs (shards bring their own tokenizer)", None
    )
    verify_data: bool = described(
        "read and hash all data at startup, including data that was verified before and has not changed", False
    )
    seq_length: Count = described(
        "S, clean tokens per packed sequence; with a mask token for each, the model sees 2S tokens", 1024
    )
    reset_positions: bool = described("restart rotary positions at 0 with each document", True)
    cross_document_attention: bool = described("let tokens attend to earlier documents of their packed sequence", False)
    num_workers: NonNegative = described(
        "threads that build the batches of the next steps in the background; 0: build them when needed", 1
    )
    data_timeout_minutes: Positive = described("end the run if a step waits longer than this for its batches", 5.0)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Section):
    """Batch sizes, training length, precision, initial weights and evaluation."""

    micro_batch_size: Count = described("packed sequences per forward on each data-parallel rank", 1)
    global_batch_size: Count = described("packed sequences per optimizer step, over all ranks", 8)
    train_iters: Count = described("optimizer steps in total", 1000)
    seed: Seed = described("seed of the initial weights and of the data order", 1234)
    bf16: bool = described(
        "bfloat16 compute with float32 main weights (slow on CPUs without bfloat16 instructions)", False
    )
    init_from: str | None = described(
        "initial weights of a new run: a Hugging Face folder (Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE), or the folder "
        "of another run",
        None,
    )
    eval_interval: Count = described("steps between evaluations on valid-data", 200)
    eval_sequences: Count = described("packed sequences of valid-data per evaluation", 64)
    exit_interval: Count | None = described("save and exit after an iteration divisible by this", None)
    exit_duration_in_mins: Positive | None = described("save and exit once the program has run for this long", None)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """megatron-core's Adam optimizer and its learning-rate schedule."""

    lr: Rate = described("peak learning rate", 1e-5)
    min_lr: Rate = described("learning rate at the end of the decay", 0.0)
    lr_decay_style: Literal["constant", "linear", "cosine", "WSD"] = described("shape of the decay", "cosine")
    lr_decay_iters: Count | None = described("steps of the schedule, warm-up included; default: train-iters", None)
    lr_warmup_iters: NonNegative | None = described("steps of linear warm-up", None)
    lr_warmup_fraction: Fraction | None = described("warm-up as a fraction of lr-decay-iters", None)
    lr_wsd_decay_iters: Count | None = described("steps of WSD's final decay", None)
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine"] = described("shape of WSD's final decay", "linear")
    weight_decay: Rate = described("decoupled weight decay", 0.1)
    adam_beta1: Beta = described("Adam's beta1", 0.9)
    adam_beta2: Beta = described("Adam's beta2", 0.95)
    adam_eps: Positive = described("Adam's epsilon", 1e-8)
    clip_grad: Rate = described("maximum global gradient norm; 0: no clipping", 1.0)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section):
    """Layout of the model over the ranks; the data-parallel size follows from the number of processes."""

    tensor_model_parallel_size: Count = described("TP: ranks that share each layer", 1)
    pipeline_model_parallel_size: Count = described("PP: pipeline stages", 1)
    virtual_pipeline_model_parallel_size: Count | None = described(
        "VPP: model chunks per pipeline stage, for the interleaved schedule", None
    )
    context_parallel_size: Count = described("CP: ranks that share each sequence", 1)
    context_parallel_kv_heads: Count = described("K/V heads per all-gather of CP; fewer heads need less memory", 4)
    expert_model_parallel_size: Count = described("EP: ranks that share the experts of each layer", 1)
    expert_tensor_parallel_size: Count = described(
        "expert TP: ranks that share each expert (in Megatron-LM the default is TP)", 1
    )
    sequence_parallel: bool = described(
        "shard norms and residuals along the sequence over the tensor-parallel ranks", False
    )
    use_distributed_optimizer: bool = described("shard the optimizer state over the data-parallel ranks", False)
    overlap_grad_reduce: bool = described("overlap gradient reduction with the backward pass", False)
    overlap_param_gather: bool = described(
        "overlap the distributed optimizer's weight all-gather with the forward pass", False
    )
    recompute_granularity: Literal["full", "selective"] | None = described(
        "activation recomputation: full recomputes layers, selective the recompute-modules; default: none", None
    )
    recompute_method: Literal["uniform", "block"] = described(
        "with full: uniform recomputes all layers in groups, block the first layers of each stage", "uniform"
    )
    recompute_num_layers: Count = described("with full: layers per group (uniform), or per stage (block)", 1)
    recompute_modules: tuple[Literal["core_attn", "mlp", "moe", "layernorm"], ...] = described(
        "with selective: modules to recompute; layernorm needs transformer_engine", ("core_attn",)
    )
    distributed_timeout_minutes: Positive = described("timeout of collectives", 10.0)


@dataclass(frozen=True, kw_only=True)
class HealthConfig(Section):
    """Detection of bad steps, and the response to them."""

    max_skipped_iterations_in_a_row: Count = described(
        "end the run after this many consecutive steps without an update", 10
    )
    loss_spike_action: Literal["flag", "skip"] = described(
        "on a loss spike: flag reports it, skip also skips the update", "flag"
    )
    loss_spike_factor: Annotated[float, Field(gt=1.0)] = described(
        "a loss above this multiple of the median of recent losses is a spike", 3.0
    )
    loss_spike_window: Count = described("number of recent losses; detection starts when half of them are known", 100)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """Saving and loading of checkpoints."""

    save: str | None = described("folder of the run: checkpoints, resolved_config.yaml, metrics.jsonl", None)
    load: str | None = described("run folder to resume from; if it is the same as --save, it may be empty", None)
    save_interval: Count | None = described("steps between checkpoints; one is always saved at the end", None)
    async_save: bool = described("write checkpoints in the background while training continues", False)
    keep_last: Count | None = described("complete checkpoints to keep; older ones are deleted; default: all", None)
    verify_checkpoint: bool = described("verify a checkpoint's hashes before loading it (sizes: always)", True)
    override_fingerprint: tuple[str, ...] = described(
        "settings (data, tokenizer, seed, rotary_base, ...) that may differ from those of the loaded checkpoint", ()
    )


@dataclass(frozen=True, kw_only=True)
class LoggingConfig(Section):
    """Logs, metrics and generated samples."""

    log_interval: Count = described("steps between records in metrics.jsonl and the dashboards", 10)
    console_interval: Count | None = described("steps between lines on the console; default: --log-interval", None)
    log_sample_ids: bool = described(
        "log which packed sequences each step trains on, in sample_ids/ of the run's folder", False
    )
    wandb_project: str | None = described("W&B project; without an API key the run is logged offline", None)
    wandb_exp_name: str | None = described("W&B run name; default: the name of the save folder", None)
    wandb_log_checkpoints: bool = described("log each checkpoint as a W&B artifact", False)
    log_samples: NonNegative = described(
        "held-out prompts that a background process completes with each new checkpoint; 0: none", 0
    )
    tensorboard_dir: str | None = described("folder for TensorBoard events", None)
