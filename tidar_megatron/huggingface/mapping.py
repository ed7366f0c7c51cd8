"""The Hugging Face name of each parameter, for every family: one table, used in both directions."""

import itertools

import torch
from torch import Tensor

from tidar_megatron.config import ModelConfig
from tidar_megatron.models.parameters import KINDS, ParameterKind

NAMES = {  # a parameter's name -> the Hugging Face tensors that it is made of
    "embedding.word_embeddings.weight": ("model.embed_tokens.weight",),
    "decoder.layers.*.input_layernorm.weight": ("model.layers.*.input_layernorm.weight",),
    "decoder.layers.*.self_attention.linear_qkv.weight": tuple(
        f"model.layers.*.self_attn.{p}_proj.weight" for p in "qkv"
    ),
    "decoder.layers.*.self_attention.linear_qkv.bias": tuple(f"model.layers.*.self_attn.{p}_proj.bias" for p in "qkv"),
    "decoder.layers.*.self_attention.q_layernorm.weight": ("model.layers.*.self_attn.q_norm.weight",),
    "decoder.layers.*.self_attention.k_layernorm.weight": ("model.layers.*.self_attn.k_norm.weight",),
    "decoder.layers.*.self_attention.linear_proj.weight": ("model.layers.*.self_attn.o_proj.weight",),
    "decoder.layers.*.pre_mlp_layernorm.weight": ("model.layers.*.post_attention_layernorm.weight",),
    "decoder.layers.*.mlp.linear_fc1.weight": (
        "model.layers.*.mlp.gate_proj.weight",
        "model.layers.*.mlp.up_proj.weight",
    ),
    "decoder.layers.*.mlp.linear_fc2.weight": ("model.layers.*.mlp.down_proj.weight",),
    "decoder.layers.*.mlp.router.weight": ("model.layers.*.mlp.gate.weight",),
    "decoder.layers.*.mlp.experts.local_experts.*.linear_fc1.weight": (
        "model.layers.*.mlp.experts.*.gate_proj.weight",
        "model.layers.*.mlp.experts.*.up_proj.weight",
    ),
    "decoder.layers.*.mlp.experts.local_experts.*.linear_fc2.weight": (
        "model.layers.*.mlp.experts.*.down_proj.weight",
    ),
    "decoder.final_layernorm.weight": ("model.norm.weight",),
    "output_layer.weight": ("lm_head.weight",),
}


def huggingface_names(kind: ParameterKind, numbers: list[str]) -> list[str]:
    """Return the Hugging Face names of one parameter.

    Args:
        kind: The parameter's kind.
        numbers: The numbers of its layer and expert, as :func:`~tidar_megatron.models.parameters.kind_of` returns them.
    """
    return [name.replace("*", "{}").format(*numbers) for name in NAMES[kind.name]]


def expected_names(model: ModelConfig) -> set[str]:
    """Return the names of the tensors in this model's Hugging Face folder.

    With tied embeddings ``lm_head.weight`` is not among them, although a folder may have it.
    """
    experts = model.num_experts is not None
    absent = {"lm_head.weight"} if not model.untie_embeddings_and_output_weights else set()
    names = set()
    for kind in KINDS:
        if (
            (kind.name.endswith("_qkv.bias") and not model.add_qkv_bias)
            or (kind.name.endswith(("q_layernorm.weight", "k_layernorm.weight")) and not model.qk_layernorm)
            or (".mlp.linear_fc" in kind.name and experts)
            or ((".mlp.router" in kind.name or ".experts." in kind.name) and not experts)
        ):
            continue
        sizes = (model.num_layers, model.num_experts or 0)[: kind.name.count("*")]
        for numbers in itertools.product(*map(range, sizes)):
            names.update(huggingface_names(kind, list(map(str, numbers))))
    return names - absent


def join(kind: ParameterKind, tensors: list[Tensor], groups: int) -> Tensor:
    """Return the full (unsharded) megatron-core parameter, made from its Hugging Face tensors.

    Args:
        kind: The parameter's kind.
        tensors: The Hugging Face tensors, in the order of :func:`huggingface_names`.
        groups: The number of query groups of the model.
    """
    if kind.fused == "qkv":  # [group][query heads of the group, its key head, its value head]
        return torch.cat([t.reshape(groups, -1, *t.shape[1:]) for t in tensors], dim=1).flatten(0, 1)
    return torch.cat(tensors) if kind.fused == "glu" else tensors[0]


def split(kind: ParameterKind, full: Tensor, groups: int, heads: int) -> list[Tensor]:
    """Return the Hugging Face tensors of a full (unsharded) parameter: the inverse of :func:`join`.

    Args:
        kind: The parameter's kind.
        full: The full parameter.
        groups: The number of query groups of the model.
        heads: The number of query heads of the model.
    """
    if kind.fused == "qkv":
        per_head = full.shape[0] // (heads + 2 * groups)
        by_group = full.reshape(groups, -1, *full.shape[1:])
        parts = by_group.split([heads // groups * per_head, per_head, per_head], dim=1)
        return [part.flatten(0, 1).contiguous() for part in parts]
    return [part.contiguous() for part in full.chunk(2)] if kind.fused == "glu" else [full]
