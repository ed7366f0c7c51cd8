"""One typed configuration: a dataclass tree, filled from a YAML file, then from command-line flags.

Flags carry Megatron-LM's own names where it has one (``--tensor-model-parallel-size``, ``--lr-decay-style``); the YAML
file has the same names with underscores, grouped by section. Both go through one validation, so an unknown key or a
wrong type fails in the same single line wherever it was written. The resolved tree is saved with the run.
"""

import argparse
import dataclasses
import difflib
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from tidar_megatron.errors import OneLineParser, UserError

CONFIG_FILE = "resolved_config.yaml"  # the whole tree, in the run's folder


class Section:
    """A part of the tree. An unknown key is an error."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


def described(text: str, default: Any) -> Any:
    """A dataclass field with its help text."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class TiDARConfig(Section):
    """What makes it TiDAR (arXiv 2511.08923, section 3)."""

    block_size: int = described("B: mask tokens of a block see each other; the draft length at inference", 8)
    ar_loss_weight: Rate = described("alpha, the weight of the next-token loss: (alpha*AR + diffusion)/(1+alpha)", 1.0)
    mask_token_id: NonNegative | None = described("default: the first id that the tokenizer does not use", None)
    ar_warmup_fraction: Fraction = described("fraction of train-iters of plain AR training before the joint loss", 0.0)
    attention_backend: Literal["chunked", "dense"] = described("dense is the reference: a 2S x 2S mask", "chunked")
    attention_chunk_size: Count = described("query tokens per chunk of the chunked backend", 128)


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
    init_method_std: Positive = described("standard deviation of the initial weights", 0.02)
    vocab_size: Count | None = described("ids in use, mask token included; default: from the tokenizer", None)
    make_vocab_size_divisible_by: Count = described(
        "pad the vocabulary to a multiple of this, itself a multiple of TP", 128
    )
    max_position_embeddings: Count | None = described("context limit written on export; default: seq-length", None)
    transformer_impl: Literal["local", "transformer_engine"] = described("megatron-core's layers to build on", "local")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Shards made by tools/prepare_data.py."""

    train_data: str | None = described("folder of training shards", None)
    valid_data: str | None = described("folder of held-out shards", None)
    seq_length: Count = described("S, clean tokens per packed sequence; the model sees 2S", 1024)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Section):
    """Batches, lengths of time, precision."""

    micro_batch_size: Count = described("packed sequences per forward and rank", 1)
    global_batch_size: Count = described("packed sequences per optimizer step, over all ranks", 8)
    train_iters: Count = described("optimizer steps", 1000)
    seed: NonNegative = described("seed of weights and of the order of the data", 1234)
    bf16: bool = described("bfloat16 compute with float32 main weights (slow on CPUs)", False)
    init_from: str | None = described("Hugging Face folder (Llama, Qwen2, Qwen3) that a new run starts from", None)
    eval_interval: Count = described("steps between evaluations on valid-data", 200)
    eval_sequences: Count = described("packed sequences of valid-data per evaluation", 64)
    exit_interval: Count | None = described("save and leave after an iteration divisible by this", None)


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
    adam_beta1: Rate = described("Adam's beta1", 0.9)
    adam_beta2: Rate = described("Adam's beta2", 0.95)
    adam_eps: Positive = described("Adam's epsilon", 1e-8)
    clip_grad: Rate = described("clip the global gradient norm to this; 0: off", 1.0)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section):
    """How the model is laid over ranks; data parallelism takes what is left."""

    tensor_model_parallel_size: Count = described("TP", 1)
    pipeline_model_parallel_size: Count = described("PP", 1)
    sequence_parallel: bool = described("shard norms and residuals over TP along the sequence", False)
    distributed_timeout_minutes: Count = described("time-out of collectives", 10)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """Where runs are kept."""

    save: str | None = described("folder of the run: checkpoints, resolved_config.yaml, metrics.jsonl", None)
    load: str | None = described("folder to continue from; equal to --save it may still be empty", None)
    save_interval: Count | None = described("steps between checkpoints; one is always saved at the end", None)


@dataclass(frozen=True, kw_only=True)
class LoggingConfig(Section):
    """What is told while training."""

    log_interval: Count = described("steps between lines", 10)
    wandb_project: str | None = described("W&B project; without a key the run is kept offline", None)
    wandb_exp_name: str | None = described("W&B run name; default: the name of the save folder", None)
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
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)

    def check(self) -> None:
        """Refuse what no later part could mend: relations between the fields.

        Raises:
            UserError: names the flag, its value and the nearest value that works.
        """
        B, S, tp = self.tidar.block_size, self.data.seq_length, self.parallel.tensor_model_parallel_size
        model, pp = self.model, self.parallel.pipeline_model_parallel_size
        if B < 1:
            raise UserError(f"--block-size {B}: must be at least 1")
        step = math.lcm(B, tp) if self.parallel.sequence_parallel else B
        if S % step:
            why = f"--block-size {B}" + (f" and --tensor-model-parallel-size {tp}" if step != B else "")
            raise UserError(f"--seq-length {S}: must be a multiple of {step} ({why}); nearest: {nearest(S, step)}")
        if self.training.init_from and model == ModelConfig():
            return  # the folder decides; checked again once it is read
        groups = model.num_query_groups or model.num_attention_heads
        if model.num_attention_heads % groups:
            raise UserError(
                f"--num-query-groups {groups}: must divide --num-attention-heads {model.num_attention_heads}"
            )
        if model.kv_channels is None and model.hidden_size % model.num_attention_heads:
            raise UserError(
                f"--hidden-size {model.hidden_size}: must be a multiple of --num-attention-heads "
                f"{model.num_attention_heads}, or give --kv-channels"
            )
        if model.kv_channels is not None and model.kv_channels % 2:
            raise UserError(f"--kv-channels {model.kv_channels}: must be even, rotary positions turn pairs of channels")
        for flag, value, size, layout in (
            ("--num-attention-heads", model.num_attention_heads, tp, "--tensor-model-parallel-size"),
            ("--num-query-groups", groups, tp, "--tensor-model-parallel-size"),
            ("--ffn-hidden-size", model.ffn_hidden_size, tp, "--tensor-model-parallel-size"),
            (
                "--make-vocab-size-divisible-by",
                model.make_vocab_size_divisible_by,
                tp,
                "--tensor-model-parallel-size",
            ),
            ("--num-layers", model.num_layers, pp, "--pipeline-model-parallel-size"),
        ):
            if value % size:
                raise UserError(
                    f"{flag} {value}: must be a multiple of {layout} {size}; nearest: {nearest(value, size)}"
                )

    @property
    def ar_warmup_iters(self) -> int:
        """Steps of plain AR training before the joint objective begins."""
        return round(self.tidar.ar_warmup_fraction * self.training.train_iters)

    def to_yaml(self) -> str:
        """The resolved tree as YAML, readable by :func:`load_config`."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def nearest(value: int, step: int) -> int:
    """The multiple of ``step`` nearest to ``value``, and at least ``step``."""
    return max(step, round(value / step) * step)


SECTIONS: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(Config)}
# flag name -> its section; flags are flat as Megatron's are, so a name may stand in one section only
FIELDS: dict[str, str] = {field.name: name for name, cls in SECTIONS.items() for field in dataclasses.fields(cls)}
assert len(FIELDS) == sum(len(dataclasses.fields(cls)) for cls in SECTIONS.values()), "a flag name stands twice"


def flag(name: str) -> str:
    """``seq_length`` -> ``--seq-length``."""
    return "--" + name.replace("_", "-")


def _is_switch(section: str, name: str) -> bool:
    return next(f.type for f in dataclasses.fields(SECTIONS[section]) if f.name == name) is bool


def build_config(tree: dict[str, Any], source: str = "config") -> Config:
    """Validate a nested dict of plain values.

    Raises:
        UserError: one line that names the unknown key or the value of a wrong type.
    """
    for name, values in tree.items():
        for key, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, bool) and FIELDS.get(key) == name and not _is_switch(name, key):
                raise UserError(f"{source}: {name}.{key} ({flag(key)}): must be a number, got {value!r}")
    try:
        config = TypeAdapter(Config).validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"]]
        where = f"{source}: {'.'.join(path)}"
        if first["type"] == "unexpected_keyword_argument":
            known = list(FIELDS) if len(path) > 1 else list(SECTIONS)
            hint = difflib.get_close_matches(path[-1], known, n=1)
            here = f" (did you mean {hint[0]!r}?)" if hint else ""
            raise UserError(f"{where}: unknown key{here}") from None
        if path[-1] in FIELDS:
            where += f" ({flag(path[-1])})"
        raise UserError(f"{where}: {first['msg']}, got {first['input']!r}") from None
    config.check()
    return config


def load_config(path: str | Path, overrides: dict[str, dict[str, Any]] | None = None) -> Config:
    """Read a YAML file; ``overrides`` (section -> name -> value) win over it."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"--config {path}: must hold sections such as 'model:', not {type(tree).__name__}")
    for name, values in (overrides or {}).items():
        if not isinstance(tree.setdefault(name, {}) or {}, dict):
            break  # the validation names it
        tree[name] = {**(tree[name] or {}), **values}
    return build_config({k: {} if v is None else v for k, v in tree.items()}, source=str(path))


def parse_config(argv: list[str] | None = None, description: str = "") -> Config:
    """The command line of a training program: ``--config FILE.yaml``, and one flag per field that wins over it."""
    parser = OneLineParser(description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file with the sections below; flags win over it")
    for name, cls in SECTIONS.items():
        group = parser.add_argument_group(name, (cls.__doc__ or "").split("\n")[0])
        for field in dataclasses.fields(cls):
            default = "" if field.default is None else f" [{field.default}]"
            kind: dict[str, Any] = {"help": field.metadata["help"].replace("%", "%%") + default}
            if field.type is bool:
                kind["action"] = argparse.BooleanOptionalAction
            else:
                choices = typing.get_args(field.type) if typing.get_origin(field.type) is Literal else ()
                kind["metavar"] = "|".join(choices) or field.name.upper()
            group.add_argument(flag(field.name), dest=field.name, default=argparse.SUPPRESS, **kind)
    given = vars(parser.parse_args(argv))
    path = given.pop("config", None)
    overrides: dict[str, dict[str, Any]] = {}
    for name, value in given.items():
        overrides.setdefault(FIELDS[name], {})[name] = value
    return load_config(path, overrides) if path else build_config(overrides, source="command line")
