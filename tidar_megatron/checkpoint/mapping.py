"""The name-mapping table between megatron-core and Hugging Face: read in both directions, for every family.

Each row names a megatron-core parameter, the Hugging Face tensors it is made of, how they are joined, and how tensor
parallelism cuts the result. "*" is a number: the layer, then the expert. Where a row has two megatron-core names, the
second is transformer-engine's, which fuses a norm into the projection behind it.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from tidar_megatron.config import ModelConfig

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")  # a row for each id


@dataclass(frozen=True)
class Entry:
    """One row of the table."""

    megatron: tuple[str, ...]
    huggingface: tuple[str, ...]
    join: str = "same"  # same | qkv (interleaved by query group) | glu (gate above up)
    shard: str = "replicated"  # replicated | rows | columns


TABLE = (
    Entry(("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), shard="rows"),
    Entry(
        ("decoder.layers.*.input_layernorm.weight", "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight"),
        ("model.layers.*.input_layernorm.weight",),
    ),
    Entry(
        ("decoder.layers.*.self_attention.linear_qkv.weight",),
        tuple(f"model.layers.*.self_attn.{p}_proj.weight" for p in "qkv"),
        join="qkv",
        shard="rows",
    ),
    Entry(
        ("decoder.layers.*.self_attention.linear_qkv.bias",),
        tuple(f"model.layers.*.self_attn.{p}_proj.bias" for p in "qkv"),
        join="qkv",
        shard="rows",
    ),
    Entry(("decoder.layers.*.self_attention.q_layernorm.weight",), ("model.layers.*.self_attn.q_norm.weight",)),
    Entry(("decoder.layers.*.self_attention.k_layernorm.weight",), ("model.layers.*.self_attn.k_norm.weight",)),
    Entry(
        ("decoder.layers.*.self_attention.linear_proj.weight",),
        ("model.layers.*.self_attn.o_proj.weight",),
        shard="columns",
    ),
    Entry(
        ("decoder.layers.*.pre_mlp_layernorm.weight", "decoder.layers.*.mlp.linear_fc1.layer_norm_weight"),
        ("model.layers.*.post_attention_layernorm.weight",),
    ),
    Entry(
        ("decoder.layers.*.mlp.linear_fc1.weight",),
        ("model.layers.*.mlp.gate_proj.weight", "model.layers.*.mlp.up_proj.weight"),
        join="glu",
        shard="rows",
    ),
    Entry(("decoder.layers.*.mlp.linear_fc2.weight",), ("model.layers.*.mlp.down_proj.weight",), shard="columns"),
    Entry(("decoder.layers.*.mlp.router.weight",), ("model.layers.*.mlp.gate.weight",)),
    Entry(
        ("decoder.layers.*.mlp.experts.local_experts.*.linear_fc1.weight",),
        ("model.layers.*.mlp.experts.*.gate_proj.weight", "model.layers.*.mlp.experts.*.up_proj.weight"),
        join="glu",
        shard="rows",
    ),
    Entry(
        ("decoder.layers.*.mlp.experts.local_experts.*.linear_fc2.weight",),
        ("model.layers.*.mlp.experts.*.down_proj.weight",),
        shard="columns",
    ),
    Entry(("decoder.final_layernorm.weight",), ("model.norm.weight",)),
    Entry(("output_layer.weight",), ("lm_head.weight",), shard="rows"),
)


def entry_of(parameter: str) -> tuple[Entry, list[str]]:
    """The table's row for a megatron-core parameter, and its numbers: none, the layer, or the layer and the expert."""
    parts = parameter.split(".")
    pattern = ".".join("*" if part.isdigit() else part for part in parts)
    for entry in TABLE:
        if pattern in entry.megatron:
            return entry, [part for part in parts if part.isdigit()]
    raise KeyError(f"no Hugging Face name is known for {parameter}")


def huggingface_names(entry: Entry, numbers: list[str]) -> list[str]:
    """The row's Hugging Face names with the numbers in their places."""
    return [name.replace("*", "{}").format(*numbers) for name in entry.huggingface]


def expected_names(model: ModelConfig) -> set[str]:
    """The tensors that a Hugging Face folder of this model has (one that ties its embeddings may have lm_head too)."""
    experts = model.num_experts is not None
    absent = {"lm_head.weight"} if not model.untie_embeddings_and_output_weights else set()
    names = set()
    for entry in TABLE:
        megatron = entry.megatron[0]
        if (
            (megatron.endswith("_qkv.bias") and not model.add_qkv_bias)
            or (megatron.endswith(("q_layernorm.weight", "k_layernorm.weight")) and not model.qk_layernorm)
            or (".mlp.linear_fc" in megatron and experts)
            or ((".mlp.router" in megatron or ".experts." in megatron) and not experts)
        ):
            continue
        sizes = (model.num_layers, model.num_experts or 0)[: megatron.count("*")]
        for numbers in itertools.product(*map(range, sizes)):
            names.update(huggingface_names(entry, list(map(str, numbers))))
    return names - absent


def join(entry: Entry, tensors: list[Tensor], groups: int) -> Tensor:
    """Hugging Face tensors -> the whole megatron-core parameter (before tensor parallelism cuts it)."""
    if entry.join == "qkv":  # [group][query heads of the group, its key head, its value head]
        return torch.cat([t.reshape(groups, -1, *t.shape[1:]) for t in tensors], dim=1).flatten(0, 1)
    return torch.cat(tensors) if entry.join == "glu" else tensors[0]


def split(entry: Entry, whole: Tensor, groups: int, heads: int) -> list[Tensor]:
    """The inverse of :func:`join`."""
    if entry.join == "qkv":
        per_head = whole.shape[0] // (heads + 2 * groups)
        by_group = whole.reshape(groups, -1, *whole.shape[1:])
        parts = by_group.split([heads // groups * per_head, per_head, per_head], dim=1)
        return [part.flatten(0, 1).contiguous() for part in parts]
    return [part.contiguous() for part in whole.chunk(2)] if entry.join == "glu" else [whole]


def cut(entry: Entry, whole: Tensor, tp_rank: int, tp_size: int) -> Tensor:
    """The part of a whole parameter that one tensor-parallel rank holds."""
    if entry.shard == "replicated":
        return whole
    if entry.join == "glu":  # every rank has its part of gate above its part of up
        return torch.cat([half.chunk(tp_size)[tp_rank] for half in whole.chunk(2)])
    return whole.chunk(tp_size, dim=0 if entry.shard == "rows" else 1)[tp_rank]


def shard_group(model: GPTModel, name: str) -> dist.ProcessGroup:
    """The ranks among which the parameter ``name`` is cut."""
    return model.pg_collection.expt_tp if ".experts." in name else model.pg_collection.tp


def own_parameters(chunks: Iterable[GPTModel]) -> Iterator[tuple[str, torch.nn.Parameter, GPTModel]]:
    """This rank's parameters under the names of the whole model, and the chunk each is in.

    Layers are counted over all pipeline stages and chunks, experts over all expert-parallel ranks. The last stage's
    copy of a tied embedding goes by the embedding's name.
    """
    for model in chunks:
        layers = model.decoder.layers
        first_layer = layers[0].layer_number - 1 if len(layers) else 0
        for name, parameter in model.named_parameters():
            # transformer-engine's grouped experts are linear_fc1.weight0, .weight1, ..
            name = re.sub(r"experts\.(linear_fc\d)\.weight(\d+)$", r"experts.local_experts.\2.\1.weight", name)
            parts = name.split(".")
            if name.startswith("decoder.layers."):
                parts[2] = str(int(parts[2]) + first_layer)
            if "local_experts" in parts:
                group, at = model.pg_collection.ep, parts.index("local_experts") + 1
                parts[at] = str(int(parts[at]) + group.rank() * (model.config.num_moe_experts // group.size()))
            if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
                parts = ["embedding", "word_embeddings", "weight"]
            yield ".".join(parts), parameter, model
