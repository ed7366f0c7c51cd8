"""The configuration: a tree of frozen dataclasses, one section per concern, every field with its help text."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field

from tidar_megatron.errors import UserError


class Section:
    """A part of the tree. An unknown key is an error."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=2**31)]  # of numpy's 32 bits, with room for what a rank adds
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
# one path or several words; the YAML may hold a single string, and weights as numbers
Sources = Annotated[tuple[str, ...], BeforeValidator(lambda given: _words(given))]
Rate = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


def _words(given: Any) -> Any:
    if given is None:
        return ()
    if isinstance(given, str):
        return (given,)
    return tuple(map(str, given)) if isinstance(given, list | tuple) else given


def described(text: str, default: Any) -> Any:
    """A dataclass field with its help text."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class TiDARConfig(Section):
    """What makes it TiDAR (arXiv 2511.08923, section 3)."""

    block_size: int = described("B: mask tokens of a block see each other; the draft length at inference", 8)
    ar_loss_weight: Rate = described("alpha, the weight of the next-token loss: (alpha*AR + diffusion)/(1+alpha)", 1.0)
    mask_token_id: NonNegative | None = described(
        "default: the first id that the tokenizer does not use; with --init-from a row of the model if one is free",
        None,
    )
    init_mask_token: Literal["mean", "normal", "keep"] | None = described(
        "with --init-from: its embedding is normal like the others, or their mean, or what is there; default: normal, "
        "of a TiDAR model keep",
        None,
    )
    masking: Literal["total", "random"] = described(
        "the diffusion half of a training step: all masks, or a random share of each block (the paper's ablation)",
        "total",
    )
    ar_warmup_fraction: Fraction = described("fraction of train-iters of plain AR training before the joint loss", 0.0)
    diffusion_block_fraction: Share = described(
        "fraction of each sequence's blocks, drawn anew, that a step trains drafts for; evaluation takes all", 1.0
    )
    attention_backend: Literal["auto", "chunked", "flex", "transformer_engine", "dense"] = described(
        "auto: transformer_engine or flex on a GPU, chunked on a CPU; dense is the reference, a 2S x 2S mask", "auto"
    )
    attention_chunk_size: Count = described("tokens of a chunk of the chunked backend", 256)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The transformer: RMSNorm, SwiGLU, rotary positions, grouped-query attention (Qwen3- and Llama-like)."""

    num_layers: Count = described("transformer layers", 12)
    hidden_size: Count = described("width of the residual stream", 768)
    ffn_hidden_size: Count = described("width of the SwiGLU feed-forward", 2048)
    num_attention_heads: Count = described("query heads", 12)
    num_query_groups: Count | None = described("K/V heads; default: as many as query heads", None)
    kv_channels: Count | None = described("channels of one head; default: hidden-size / num-attention-heads", None)
    qk_layernorm: bool = described("RMSNorm on queries and keys, per head (Qwen3)", True)
    add_qkv_bias: bool = described("bias on the q, k and v projections (Qwen2)", False)
    untie_embeddings_and_output_weights: bool = described("an output layer of its own", False)
    norm_epsilon: Positive = described("RMSNorm's epsilon", 1e-6)
    rotary_base: Positive = described("base of the rotary frequencies", 10000.0)
    rope_scaling_type: Literal["none", "linear", "llama3"] = described("how they are stretched for long texts", "none")
    rope_scaling_factor: Positive = described("linear, llama3: by how much", 8.0)
    rope_low_freq_factor: Positive = described("llama3: longer waves than the original length / this are scaled", 1.0)
    rope_high_freq_factor: Positive = described("llama3: shorter waves than the original length / this are not", 4.0)
    rope_original_max_position_embeddings: Count = described("llama3: the length before scaling", 8192)
    init_method_std: Positive = described("standard deviation of the initial weights", 0.02)
    vocab_size: Count | None = described("ids in use, mask token included; default: from the tokenizer", None)
    make_vocab_size_divisible_by: Count = described("pad the vocabulary to a multiple of this and of TP", 128)
    max_position_embeddings: Count | None = described("context limit written on export; default: seq-length", None)
    transformer_impl: Literal["local", "transformer_engine"] = described("megatron-core's layers to build on", "local")
    num_experts: Count | None = described("experts of each layer (Qwen3-MoE); default: a dense feed-forward", None)
    moe_router_topk: Count = described("experts that a token is sent to", 2)
    moe_ffn_hidden_size: Count | None = described("width of one expert; default: ffn-hidden-size", None)
    moe_aux_loss_coeff: Rate = described("weight of the load-balancing loss, per layer", 0.0)
    moe_token_dispatcher_type: Literal["allgather", "alltoall"] = described("how tokens travel to experts", "allgather")
    moe_grouped_gemm: bool = described("one kernel for all experts of a rank; needs transformer_engine", False)

    @property
    def head_channels(self) -> int:
        """Channels of one head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Shards made by tools/prepare_data.py, Megatron's .bin/.idx pairs, or blends of them."""

    train_data: Sources = described("folder of shards, prefix of a .bin/.idx pair, or WEIGHT PATH WEIGHT PATH ...", ())
    valid_data: Sources = described("held-out data, named as train-data are", ())
    tokenizer: str | None = described("Hugging Face tokenizer folder, for .bin/.idx pairs (shards have theirs)", None)
    verify_data: bool = described("read and hash all of the data again at the start, not only new or changed", False)
    seq_length: Count = described("S, clean tokens per packed sequence; with all masks the model sees 2S", 1024)
    reset_positions: bool = described("rotary positions begin anew with each document", True)
    cross_document_attention: bool = described("let a packed sequence's documents attend to earlier ones", False)
    num_workers: NonNegative = described("threads that build the next steps' batches; 0: built when needed", 1)
    data_timeout_minutes: Positive = described("end the run if a step's batches are not there by then", 5.0)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Section):
    """Batches, lengths of time, precision."""

    micro_batch_size: Count = described("packed sequences per forward and rank", 1)
    global_batch_size: Count = described("packed sequences per optimizer step, over all ranks", 8)
    train_iters: Count = described("optimizer steps", 1000)
    seed: Seed = described("seed of weights and of the order of the data", 1234)
    bf16: bool = described(
        "bfloat16 compute with float32 main weights (slow on CPUs without bfloat16 instructions)", False
    )
    init_from: str | None = described(
        "a new run's weights: a Hugging Face folder (Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE), or another run's", None
    )
    eval_interval: Count = described("steps between evaluations on valid-data", 200)
    eval_sequences: Count = described("packed sequences of valid-data per evaluation", 64)
    exit_interval: Count | None = described("save and leave after an iteration divisible by this", None)
    exit_duration_in_mins: Positive | None = described("save and leave once the program has run for so long", None)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """Adam, as megatron-core builds it, and its learning-rate schedule."""

    lr: Rate = described("peak learning rate", 1e-5)
    min_lr: Rate = described("learning rate at the end of the decay", 0.0)
    lr_decay_style: Literal["constant", "linear", "cosine", "WSD"] = described("shape of the decay", "cosine")
    lr_decay_iters: Count | None = described("steps over which the rate decays; default: train-iters", None)
    lr_warmup_iters: NonNegative | None = described("steps of linear warm-up", None)
    lr_warmup_fraction: Fraction | None = described("warm-up as a fraction of lr-decay-iters", None)
    lr_wsd_decay_iters: Count | None = described("length of WSD's final decay", None)
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine"] = described("shape of WSD's final decay", "linear")
    weight_decay: Rate = described("decoupled weight decay", 0.1)
    adam_beta1: Beta = described("Adam's beta1", 0.9)
    adam_beta2: Beta = described("Adam's beta2", 0.95)
    adam_eps: Positive = described("Adam's epsilon", 1e-8)
    clip_grad: Rate = described("clip the global gradient norm to this; 0: off", 1.0)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section):
    """How the model is laid over ranks; data parallelism takes what is left."""

    tensor_model_parallel_size: Count = described("TP", 1)
    pipeline_model_parallel_size: Count = described("PP", 1)
    virtual_pipeline_model_parallel_size: Count | None = described("VPP: interleaved model chunks per stage", None)
    context_parallel_size: Count = described("CP: each sequence is shared by this many ranks", 1)
    context_parallel_kv_heads: Count = described("K/V heads that one all-gather of CP carries; fewer: less memory", 4)
    expert_model_parallel_size: Count = described("EP: the experts of a layer are spread over this many ranks", 1)
    expert_tensor_parallel_size: Count = described("ranks that share one expert (Megatron-LM's default is TP)", 1)
    sequence_parallel: bool = described("shard norms and residuals over TP along the sequence", False)
    use_distributed_optimizer: bool = described("shard the optimizer's state over data-parallel ranks", False)
    overlap_grad_reduce: bool = described("reduce gradients while the backward runs", False)
    overlap_param_gather: bool = described("gather the sharded optimizer's weights while the forward runs", False)
    recompute_granularity: Literal["full", "selective"] | None = described("activation recomputation", None)
    recompute_method: Literal["uniform", "block"] = described(
        "full: which layers; uniform groups or the first", "uniform"
    )
    recompute_num_layers: Count = described("full: layers per group (uniform) or recomputed per stage (block)", 1)
    recompute_modules: tuple[Literal["core_attn", "mlp", "moe", "layernorm"], ...] = described(
        "selective: what is recomputed; layernorm needs transformer_engine", ("core_attn",)
    )
    distributed_timeout_minutes: Positive = described("time-out of collectives", 10.0)


@dataclass(frozen=True, kw_only=True)
class HealthConfig(Section):
    """When a step is not to be trusted, and what is done then."""

    max_skipped_iterations_in_a_row: Count = described("end the run after so many steps without an update", 10)
    loss_spike_action: Literal["flag", "skip"] = described("tell of a loss spike, or make no update of it", "flag")
    loss_spike_factor: Annotated[float, Field(gt=1.0)] = described(
        "a loss above so many times the median of the last ones is a spike", 3.0
    )
    loss_spike_window: Count = described("last losses that are compared with, from when half of them are there", 100)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """Where runs are kept."""

    save: str | None = described("folder of the run: checkpoints, resolved_config.yaml, metrics.jsonl", None)
    load: str | None = described("folder to continue from; equal to --save it may still be empty", None)
    save_interval: Count | None = described("steps between checkpoints; one is always saved at the end", None)
    async_save: bool = described("write checkpoints while training goes on", False)
    keep_last: Count | None = described("whole checkpoints to keep; older ones are removed; default: all", None)
    verify_checkpoint: bool = described("compare the hashes of a checkpoint before it is loaded (sizes: always)", True)
    override_fingerprint: tuple[str, ...] = described(
        "parts of the run (data, tokenizer, seed, rotary_base, ..) that may differ from its checkpoint's", ()
    )


@dataclass(frozen=True, kw_only=True)
class LoggingConfig(Section):
    """What is told while training."""

    log_interval: Count = described("steps between lines", 10)
    log_sample_ids: bool = described("write what each step trains on to sample_ids/ in the run's folder", False)
    wandb_project: str | None = described("W&B project; without a key the run is kept offline", None)
    wandb_exp_name: str | None = described("W&B run name; default: the name of the save folder", None)
    wandb_log_checkpoints: bool = described("make each checkpoint a W&B artifact", False)
    log_samples: NonNegative = described(
        "held-out prompts that a process beside training continues from every checkpoint", 0
    )
    tensorboard_dir: str | None = described("folder for TensorBoard events", None)


@dataclass(frozen=True, kw_only=True)
class Config(Section):
    """The whole tree."""

    tidar: TiDARConfig = dataclasses.field(default_factory=TiDARConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    health: HealthConfig = dataclasses.field(default_factory=HealthConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)

    @property
    def blocks(self) -> int:
        """Blocks of a packed sequence."""
        return self.data.seq_length // self.tidar.block_size

    @property
    def chosen_blocks(self) -> int:
        """Those of them that have masks in a training step."""
        return max(1, round(self.tidar.diffusion_block_fraction * self.blocks))

    @property
    def ar_warmup_iters(self) -> int:
        """Steps of plain AR training before the joint objective begins."""
        return round(self.tidar.ar_warmup_fraction * self.training.train_iters)

    @property
    def lr_decay_steps(self) -> int:
        """Steps from the first to the end of the learning rate's decay."""
        return self.optimizer.lr_decay_iters or self.training.train_iters

    @property
    def lr_warmup_steps(self) -> int:
        """Steps of linear warm-up, part of the decay's."""
        given = self.optimizer.lr_warmup_iters
        return given if given is not None else round((self.optimizer.lr_warmup_fraction or 0.0) * self.lr_decay_steps)

    def to_yaml(self) -> str:
        """Return the tree as YAML, readable by :func:`tidar_megatron.config.load_config`."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


@dataclass(frozen=True)
class ResolvedConfig(Config):
    """A configuration that is complete: nothing in it is left for the tokenizer or ``--init-from`` to decide."""

    @classmethod
    def of(cls, config: Config, missing: str = "model.vocab_size is missing") -> "ResolvedConfig":
        """Return ``config`` as a resolved one.

        Raises:
            UserError: it has no vocabulary; the message is ``missing``.
        """
        if config.model.vocab_size is None:
            raise UserError(missing)
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Config)})

    @property
    def vocab_size(self) -> int:
        """Ids in use, the mask token included; without padding."""
        assert self.model.vocab_size is not None
        return self.model.vocab_size

    @property
    def mask_token_id(self) -> int:
        """The mask token of a run that trains; an imported model may have none yet."""
        assert self.tidar.mask_token_id is not None
        return self.tidar.mask_token_id
