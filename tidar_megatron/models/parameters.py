"""The table of the model's parameters: their names, and how tensor parallelism shards each.

Names are those in the full model: layers are numbered over all pipeline stages, experts over all expert-parallel ranks.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")  # one row per token id


@dataclass(frozen=True)
class ParameterKind:
    """One kind of parameter, the same in all layers.

    Attributes:
        names: megatron-core's name, where "*" stands for the number of the layer, then of the expert. A second name
            is transformer-engine's, which fuses a norm into the projection after it.
        fused: the projections fused into the parameter: none ("no"); query, key and value heads, interleaved by query
            group ("qkv"); or the gate of a gated linear unit above its up projection ("glu").
        shard: the dimension that tensor parallelism shards.
    """

    names: tuple[str, ...]
    fused: Literal["no", "qkv", "glu"] = "no"
    shard: Literal["replicated", "rows", "columns"] = "replicated"

    @property
    def name(self) -> str:
        """Return megatron-core's name."""
        return self.names[0]

    def full_shape(self, part: torch.Size, tp_size: int) -> list[int]:
        """Return the shape of the full parameter, given the shape of one rank's part."""
        shape = list(part)
        if self.shard != "replicated":
            shape[0 if self.shard == "rows" else 1] *= tp_size
        return shape

    def part(self, full: Tensor, tp_rank: int, tp_size: int) -> Tensor:
        """Return the part of a full parameter that one tensor-parallel rank holds."""
        if self.shard == "replicated":
            return full
        if self.fused == "glu":  # each rank holds its part of the gate above its part of the up projection
            return torch.cat([half.chunk(tp_size)[tp_rank] for half in full.chunk(2)])
        return full.chunk(tp_size, dim=0 if self.shard == "rows" else 1)[tp_rank]


KINDS = (
    ParameterKind(VOCABULARY[:1], shard="rows"),
    ParameterKind(
        ("decoder.layers.*.input_layernorm.weight", "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight")
    ),
    ParameterKind(("decoder.layers.*.self_attention.linear_qkv.weight",), fused="qkv", shard="rows"),
    ParameterKind(("decoder.layers.*.self_attention.linear_qkv.bias",), fused="qkv", shard="rows"),
    ParameterKind(("decoder.layers.*.self_attention.q_layernorm.weight",)),
    ParameterKind(("decoder.layers.*.self_attention.k_layernorm.weight",)),
    ParameterKind(("decoder.layers.*.self_attention.linear_proj.weight",), shard="columns"),
    ParameterKind(("decoder.layers.*.pre_mlp_layernorm.weight", "decoder.layers.*.mlp.linear_fc1.layer_norm_weight")),
    ParameterKind(("decoder.layers.*.mlp.linear_fc1.weight",), fused="glu", shard="rows"),
    ParameterKind(("decoder.layers.*.mlp.linear_fc2.weight",), shard="columns"),
    ParameterKind(("decoder.layers.*.mlp.router.weight",)),
    ParameterKind(("decoder.layers.*.mlp.experts.local_experts.*.linear_fc1.weight",), fused="glu", shard="rows"),
    ParameterKind(("decoder.layers.*.mlp.experts.local_experts.*.linear_fc2.weight",), shard="columns"),
    ParameterKind(("decoder.final_layernorm.weight",)),
    ParameterKind(VOCABULARY[1:], shard="rows"),
)
DRAFT_KINDS = (  # of the draft weights (draft_layers.py), which a base model does not have
    ParameterKind(("mask_embedding.weight",)),
    *(ParameterKind((f"selector.{name}",)) for name in ("previous", "candidate", "gate", "gate_bias")),
    ParameterKind(("decoder.layers.*.self_attention.linear_qkv.draft.a",)),
    ParameterKind(("decoder.layers.*.self_attention.linear_qkv.draft.b",), fused="qkv", shard="rows"),
    ParameterKind(("decoder.layers.*.self_attention.linear_proj.draft.a",), shard="columns"),
    ParameterKind(("decoder.layers.*.self_attention.linear_proj.draft.b",)),
    ParameterKind(("decoder.layers.*.mlp.linear_fc1.draft.a",)),
    ParameterKind(("decoder.layers.*.mlp.linear_fc1.draft.b",), fused="glu", shard="rows"),
    ParameterKind(("decoder.layers.*.mlp.linear_fc2.draft.a",), shard="columns"),
    ParameterKind(("decoder.layers.*.mlp.linear_fc2.draft.b",)),
)
_KIND_OF = {name: kind for kind in (*KINDS, *DRAFT_KINDS) for name in kind.names}


def kind_of(parameter: str) -> tuple[ParameterKind, list[str]]:
    """Return a parameter's kind, and the numbers in its name: none, the layer's, or the layer's and the expert's.

    Raises:
        KeyError: the table has no such parameter.
    """
    parts = parameter.split(".")
    pattern = ".".join("*" if part.isdigit() else part for part in parts)
    return _KIND_OF[pattern], [part for part in parts if part.isdigit()]


def shard_group(model: GPTModel, name: str) -> dist.ProcessGroup:
    """Return the ranks among which the parameter ``name`` is sharded."""
    return model.pg_collection.expt_tp if ".experts." in name else model.pg_collection.tp


def is_draft_weight(name: str) -> bool:
    """Return whether a parameter belongs to the draft weights, by its name in the model."""
    return ".draft." in name or name.startswith(("mask_embedding.", "selector."))


def own_parameters(
    chunks: Iterable[GPTModel], drafts: bool = False
) -> Iterator[tuple[str, torch.nn.Parameter, GPTModel]]:
    """Yield each of this rank's parameters as (its name in the full model, the parameter, the chunk that holds it).

    The last stage's copy of a tied embedding is yielded under the embedding's name.

    Args:
        chunks: This rank's part of the model.
        drafts: Whether to yield the draft weights; otherwise those of the base model are.
    """
    for model in chunks:
        layers = model.decoder.layers
        first_layer = layers[0].layer_number - 1 if len(layers) else 0
        for name, parameter in model.named_parameters():
            if is_draft_weight(name) != drafts:
                continue
            # transformer-engine names its grouped experts linear_fc1.weight0, .weight1, ..
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
