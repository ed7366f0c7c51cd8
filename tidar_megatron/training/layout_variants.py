"""The layouts that the layout check trains, and the tiny models that it trains in them."""

import dataclasses
from typing import Any

from tidar_megatron.config import ResolvedConfig, build_config, check_world_size
from tidar_megatron.errors import UserError

Tree = dict[str, dict[str, Any]]
MASK_TOKEN_ID = 96
MODEL: Tree = {
    "drafts": {},
    "tidar": {"block_size": 4, "ar_loss_weight": 0.8, "mask_token_id": MASK_TOKEN_ID, "attention_chunk_size": 12},
    "model": {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "vocab_size": MASK_TOKEN_ID + 1,
        "make_vocab_size_divisible_by": 16,
        "init_method_std": 0.1,  # so that every part of the model matters to the loss
    },
    "data": {"seq_length": 64},
    "training": {"global_batch_size": 8, "train_iters": 100},
    "optimizer": {"lr": 1e-3, "lr_decay_style": "constant", "clip_grad": 0.5},
    "parallel": {"context_parallel_kv_heads": 1},
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A layout-independent training setup, and the tolerances within which the layouts must agree."""

    changes: Tree = dataclasses.field(default_factory=dict)  # to MODEL
    longest_document: int = 200
    loss_tolerance: float = 1e-5  # relative
    grad_tolerance: float = 1e-4
    argmax: bool = True  # compare the greedy metrics too; rounding may break a tie differently, and changes them


VARIANTS = {
    "long": Variant(),
    "packed": Variant(longest_document=30),
    "untied": Variant(
        {"model": {"untie_embeddings_and_output_weights": True, "qk_layernorm": False, "add_qkv_bias": True}}
    ),
    "experts": Variant(
        {"model": {"num_experts": 4, "moe_ffn_hidden_size": 48, "moe_aux_loss_coeff": 0.1}}, longest_document=30
    ),
    # stratified sampling of half of the blocks, in strata of two, and of three quarters, in strata of one and two
    "half": Variant({"tidar": {"diffusion_block_fraction": 0.5}}, longest_document=30),
    "three quarters": Variant({"tidar": {"diffusion_block_fraction": 0.75}}),
    "half, experts": Variant(
        {
            "model": {"num_experts": 4, "moe_ffn_hidden_size": 48, "moe_aux_loss_coeff": 0.1},
            "tidar": {"diffusion_block_fraction": 0.5},
        },
        longest_document=30,
    ),
    "drafts": Variant({"drafts": {"train": "drafts", "draft_rank": 6}}, longest_document=30),
    "drafts, untied": Variant(
        {
            "drafts": {"train": "drafts", "draft_rank": 6},
            "model": {"untie_embeddings_and_output_weights": True, "qk_layernorm": False, "add_qkv_bias": True},
        }
    ),
    "drafts, experts": Variant(
        {
            "drafts": {"train": "drafts", "draft_rank": 6},
            "model": {"num_experts": 4, "moe_ffn_hidden_size": 48, "moe_aux_loss_coeff": 0.0},
        },
        longest_document=30,
    ),
    # bfloat16 has 8 significant bits, and the order of additions depends on the layout
    "bf16": Variant({"training": {"bf16": True}}, loss_tolerance=5e-3, grad_tolerance=5e-2, argmax=False),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A parallel layout; the data-parallel size follows from the number of ranks, or must be ``data_parallel_size``."""

    name: str
    parallel: dict[str, Any]
    variant: str = "long"
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    data_parallel_size: int | None = None

    def config(self, world_size: int) -> ResolvedConfig:
        """Return the full configuration for ``world_size`` ranks.

        Raises:
            UserError: The layout does not fit ``world_size`` ranks.
        """
        config = variant_config(self.variant, world_size, self.parallel, self.model)
        dp = check_world_size(config, world_size)
        if self.data_parallel_size not in (None, dp):
            raise UserError(f"layout {self.name}: {world_size} processes make {dp} data-parallel ranks")
        return config


def _layout(name: str, variant: str = "long", **settings: Any) -> Layout:
    short = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "vpp": "virtual_pipeline_model_parallel_size",
        "cp": "context_parallel_size",
        "ep": "expert_model_parallel_size",
        "etp": "expert_tensor_parallel_size",
        "sp": "sequence_parallel",
        "distributed": "use_distributed_optimizer",
        "recompute": "recompute_granularity",
        "modules": "recompute_modules",
    }
    dp = settings.pop("dp", None)
    model = {"moe_token_dispatcher_type": settings.pop("dispatcher")} if "dispatcher" in settings else {}
    return Layout(name, {short.get(key, key): value for key, value in settings.items()}, variant, model, dp)


OVERLAPS: dict[str, Any] = {"distributed": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
ALL_LAYOUTS = (
    _layout("one", dp=1),
    _layout("distributed optimizer, both overlaps", dp=1, **OVERLAPS),
    _layout("DP2", dp=2),
    _layout("DP2, distributed optimizer, both overlaps", dp=2, **OVERLAPS),
    _layout("DP2xTP2", tp=2, dp=2),
    _layout("DP4, overlap of the gradient reduction", dp=4, overlap_grad_reduce=True),
    _layout("DP4, distributed optimizer, both overlaps", dp=4, **OVERLAPS),
    _layout("full recompute", recompute="full"),
    _layout("selective recompute", recompute="selective", modules=["core_attn", "mlp"]),
    _layout("bf16", "bf16"),
    _layout("bf16, distributed optimizer, both overlaps", "bf16", **OVERLAPS),
    _layout("TP2", tp=2),
    _layout("TP2+SP", "untied", tp=2, sp=True),
    _layout("PP2", pp=2),
    _layout("PP2, untied", "untied", pp=2),
    _layout("PP2xVPP2", pp=2, vpp=2),
    _layout("CP2", cp=2),
    _layout("CP2, packed documents", "packed", cp=2),
    _layout("CP2, distributed optimizer, both overlaps, full recompute", cp=2, recompute="full", **OVERLAPS),
    _layout("CP2, selective recompute", "packed", cp=2, recompute="selective"),
    _layout("CP2, bf16", "bf16", cp=2),
    _layout("TP4", tp=4),
    _layout("TP4+SP", tp=4, sp=True),
    _layout("PP4", pp=4),
    _layout("CP4", cp=4),
    _layout("CP4, packed documents", "packed", cp=4),
    _layout("TP2xPP2+SP", tp=2, pp=2, sp=True),
    _layout("TP2xPP2+SP, untied", "untied", tp=2, pp=2, sp=True),
    _layout("PP2xTP2xVPP2+SP", pp=2, tp=2, vpp=2, sp=True),
    _layout("PP2xTP2xVPP2+SP, full recompute", pp=2, tp=2, vpp=2, sp=True, recompute="full"),
    _layout("CP2xTP2+SP", cp=2, tp=2, sp=True),
    _layout("CP2xTP2+SP, packed documents", "packed", cp=2, tp=2, sp=True),
    _layout("CP2xPP2, distributed optimizer", cp=2, pp=2, distributed=True),
    _layout("CP2xPP2xVPP2, distributed optimizer, overlaps", "packed", cp=2, pp=2, vpp=2, **OVERLAPS),
    _layout("TP2xPP2+SP, bf16, distributed optimizer", "bf16", tp=2, pp=2, sp=True, distributed=True),
    _layout("CP2xTP2xPP2xVPP2+SP, distributed optimizer", cp=2, tp=2, pp=2, vpp=2, sp=True, distributed=True),
    _layout("half of the blocks", "half", recompute="full"),
    _layout("half of the blocks, TP2+SP", "half", tp=2, sp=True),
    _layout("half of the blocks, PP2xVPP2", "half", pp=2, vpp=2),
    _layout("half of the blocks, CP2", "half", cp=2),
    _layout("half of the blocks, CP4", "half", cp=4),
    _layout("half of the blocks, CP2xTP2+SP", "half", cp=2, tp=2, sp=True),
    _layout("three quarters of the blocks", "three quarters"),
    _layout("three quarters of the blocks, CP2xPP2", "three quarters", cp=2, pp=2),
    _layout("half of the blocks, experts, EP2xCP2", "half, experts", ep=2, cp=2),
    _layout("drafts", "drafts", dp=1),
    _layout("drafts, DP2, distributed optimizer, both overlaps", "drafts", dp=2, **OVERLAPS),
    _layout("drafts, full recompute", "drafts", recompute="full"),
    _layout("drafts, selective recompute", "drafts", recompute="selective", modules=["core_attn", "mlp"]),
    _layout("drafts, TP2", "drafts", tp=2),
    _layout("drafts, TP2+SP", "drafts, untied", tp=2, sp=True),
    _layout("drafts, PP2", "drafts", pp=2),
    _layout("drafts, PP2xVPP2", "drafts, untied", pp=2, vpp=2),
    _layout("drafts, PP2xVPP2, full recompute", "drafts", pp=2, vpp=2, recompute="full"),
    _layout("drafts, CP2", "drafts", cp=2),
    _layout("drafts, CP2xTP2+SP", "drafts", cp=2, tp=2, sp=True),
    _layout("drafts, PP2xTP2xVPP2+SP", "drafts", pp=2, tp=2, vpp=2, sp=True),
    _layout("drafts, experts, EP2", "drafts, experts", ep=2),
    _layout("experts", "experts"),
    _layout("experts, EP2, all-gather", "experts", ep=2),
    _layout("experts, EP2, all-to-all", "experts", ep=2, dispatcher="alltoall"),
    _layout(
        "experts, EP4, all-to-all, distributed optimizer", "experts", ep=4, dispatcher="alltoall", distributed=True
    ),
    _layout("experts, EP2xPP2xVPP2", "experts", ep=2, pp=2, vpp=2),
    _layout("experts, TP2+SP", "experts", tp=2, sp=True),
    _layout("experts, TP4+SP, ETP2, all-to-all", "experts", tp=4, sp=True, etp=2, dispatcher="alltoall"),
    _layout("experts, ETP2, distributed optimizer", "experts", etp=2, distributed=True),
    _layout("experts, EP2xTP2+SP", "experts", ep=2, tp=2, sp=True),
    _layout("experts, EP2xTP2xPP2+SP", "experts", ep=2, tp=2, pp=2, sp=True),
    _layout("experts, EP2xCP2", "experts", ep=2, cp=2),
    _layout("experts, EP2xETP2xTP2+SP", "experts", ep=2, etp=2, tp=2, sp=True),
)


def layouts_for(world_size: int) -> list[Layout]:
    """Return the layouts that fit ``world_size`` ranks."""

    def fits(layout: Layout) -> bool:
        try:
            layout.config(world_size)
        except UserError:
            return False
        return True

    return [layout for layout in ALL_LAYOUTS if fits(layout)]


def variant_config(
    variant: str, world_size: int, parallel: dict[str, Any] | None = None, model: dict[str, Any] | None = None
) -> ResolvedConfig:
    """Return the tiny model's configuration, with at least two sequences per step for every rank of ``world_size``."""
    tree = {name: dict(section) for name, section in MODEL.items()}
    tree["training"]["global_batch_size"] = world_size * max(2, -(-8 // world_size))
    for name, section in {**VARIANTS[variant].changes, "parallel": parallel or {}}.items():
        tree[name].update(section)
    tree["model"].update(model or {})
    return ResolvedConfig.of(build_config(tree))
