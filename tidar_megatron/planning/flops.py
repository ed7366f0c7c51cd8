"""The FLOPs that a step executes, and those that count as useful.

A matrix product of [m, k] and [k, n] has 2mkn FLOPs, its backward twice that. Attention has two products over its
tiles, its backward five (fused kernels recompute the scores). Norms, rotary positions and softmax are not counted, as
in torch's FlopCounterMode.
"""

from dataclasses import dataclass

from tidar_megatron.adapter import CANDIDATES
from tidar_megatron.attention_mask import training_area
from tidar_megatron.planning.sizes import Sizes


@dataclass(frozen=True)
class Flops:
    """FLOPs that one rank executes."""

    matmul: float
    attention: float

    @property
    def total(self) -> float:
        """The sum of both."""
        return self.matmul + self.attention

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.matmul + other.matmul, self.attention + other.attention)

    def times(self, matmul: float, attention: float | None = None) -> "Flops":
        """Return these FLOPs multiplied by ``matmul`` and ``attention``, which is ``matmul`` by default."""
        return Flops(self.matmul * matmul, self.attention * (matmul if attention is None else attention))


def layer_forward(sizes: Sizes, clean_pass: bool = False) -> tuple[Flops, Flops]:
    """Return the FLOPs of one layer's forward over one micro-batch: attention with projections, and feed-forward.

    They are those of the tokens that have a backward; or, with ``--train drafts``, of the pass of the clean tokens.
    """
    t, area = sizes.graph_tokens, sizes.tiles.area
    if clean_pass:
        t, area = sizes.tokens - sizes.graph_tokens, sizes.clean_tiles.area
    h, d = sizes.h, sizes.d
    projections = 2 * t * h * d * (2 * sizes.heads + 2 * sizes.groups)
    tiles = 4 * sizes.b * area * sizes.heads * d
    if sizes.experts is None:
        feed_forward = 2 * t * 3 * h * sizes.f
    else:
        router = 2 * sizes.residual_tokens * h * sizes.experts
        feed_forward = router + 2 * sizes.expert_rows * 3 * h * sizes.f
    return Flops(projections, tiles), Flops(feed_forward, 0)


def chunk_flops(sizes: Sizes, last: bool) -> Flops:
    """Return the FLOPs of one micro-batch in one model chunk: forward, recomputation and backward.

    The ``last`` chunk has the output layer.
    """
    attention, feed_forward = layer_forward(sizes)
    parallel, n = sizes.config.parallel, sizes.chunk_layers
    layer, pairs = attention + feed_forward, Flops(pair_flops(sizes), 0)
    if sizes.trains_drafts:  # frozen weights have no gradient, and clean tokens no backward
        clean_attention, clean_feed_forward = layer_forward(sizes, clean_pass=True)
        total = layer.times(2 * n, 3.5 * n) + pairs.times(3 * n) + (clean_attention + clean_feed_forward).times(n)
    else:
        total = layer.times(3 * n, 3.5 * n)
    if parallel.recompute_granularity == "full":
        uniform = parallel.recompute_method == "uniform"
        layers = n if uniform else min(parallel.recompute_num_layers, n)
        total += (layer + pairs).times(layers)
    elif parallel.recompute_granularity == "selective":
        modules = parallel.recompute_modules
        if "core_attn" in modules:
            total += Flops(0, attention.attention * n)
        if sizes.feed_forward in modules:
            total += feed_forward.times(n) + Flops(pair_flops(sizes, "linear_fc1", "linear_fc2") * n, 0)
    if last and sizes.trains_drafts:
        total += Flops(draft_loss_flops(sizes), 0)
    elif last:
        total += Flops(3 * 2 * sizes.tokens * sizes.h * sizes.vocabulary, 0)
    return total


def pair_flops(sizes: Sizes, *modules: str) -> float:
    """Return the FLOPs of the forward of one layer's pairs over one micro-batch, of all or of some modules.

    Of a pair's two weights the one that is not sharded sees this rank's part of the sequence.
    """
    t, s = sizes.graph_tokens, sizes.residual_tokens
    chosen = [sizes.pairs[name] for name in modules or sizes.pairs if name in sizes.pairs]
    sums = [t * i + s * o if by_rows else s * i + t * o for i, o, by_rows in chosen]
    return 2.0 * sizes.config.drafts.draft_rank * sum(sums)


def draft_loss_flops(sizes: Sizes) -> float:
    """Return the FLOPs of a micro-batch's draft loss: logits of masks and of their teachers, and the selector.

    The selector is computed again in its backward; its products have no gradients of states and embeddings.
    """
    drafts, t, h = sizes.config.drafts, sizes.graph_tokens, sizes.h
    logits = 2 * t * h * sizes.vocabulary * (2 + (drafts.draft_loss != "ce"))
    projections = 2 * t * h * drafts.draft_selector * (2 + CANDIDATES)
    scores = 2 * t * CANDIDATES * drafts.draft_selector
    return logits + 3 * projections + 4 * scores


def stage_flops(sizes: Sizes, stage: int) -> Flops:
    """Return the FLOPs of one micro-batch in all chunks of a pipeline stage."""
    return chunk_flops(sizes, False).times(sizes.vpp - 1) + chunk_flops(sizes, stage == sizes.pp - 1)


def executed_flops(sizes: Sizes) -> float:
    """Return the FLOPs of one step over all ranks, including recomputation and masked keys in tiles."""
    each = sum(stage_flops(sizes, stage).total for stage in range(sizes.pp))
    return each * sizes.micro_batches * sizes.tp * sizes.cp * sizes.dp


def active_parameters(sizes: Sizes) -> int:
    """Return the number of weights in the matrix products of one token.

    Embedding and norms are not counted, and of the experts only the top-k that a token is routed to.
    """
    model, h, d = sizes.config.model, sizes.h, sizes.d
    groups = model.num_query_groups or model.num_attention_heads
    layer = h * d * (2 * model.num_attention_heads + 2 * groups)
    if model.num_experts is None:
        layer += 3 * h * model.ffn_hidden_size
    else:
        layer += h * model.num_experts
        layer += 3 * h * (model.moe_ffn_hidden_size or model.ffn_hidden_size) * model.moe_router_topk
    assert model.vocab_size is not None
    return model.num_layers * layer + h * model.vocab_size


def model_flops(sizes: Sizes) -> tuple[float, float]:
    """Return the useful FLOPs of a step over all ranks: forward and backward (factor 3) without recomputation.

    Returns:
        The FLOPs of the doubled sequence, 2S tokens (fewer if only some blocks have masks) with the visible pairs of
        its mask, or of both passes of ``--train drafts``; and those of plain AR training on the same S clean tokens
        with causal attention, the baseline.
    """
    model, S, B = sizes.config.model, sizes.config.data.seq_length, sizes.config.tidar.block_size
    doubled, causal = training_area(S, B)
    each = 6 * active_parameters(sizes)
    pair = 12 * model.num_layers * model.num_attention_heads * sizes.d
    sequences = sizes.config.training.global_batch_size
    share = sizes.config.chosen_blocks / sizes.config.blocks
    seen_by_masks = share * (doubled - causal)
    if sizes.anywhere:
        seen_by_masks = sizes.config.chosen_blocks * B * ((S - 1) / 2 + B)
    plain = each * 1.0 * S + pair * causal
    if not sizes.trains_drafts:
        return sequences * (each * (1.0 + share) * S + pair * (causal + seen_by_masks)), sequences * plain
    # forward alone for clean tokens, without their logits; no gradients of frozen weights for masks
    logits = sizes.h * (model.vocab_size or 0)
    rank = sizes.config.drafts.draft_rank
    pairs = sum(i * sizes.tp + o if by_rows else i + o * sizes.tp for i, o, by_rows in sizes.pairs.values())
    of_masks = (4 * active_parameters(sizes) + 6 * model.num_layers * rank * pairs) * share * S + pair * seen_by_masks
    return sequences * (plain / 3 - 2 * logits * S + of_masks), sequences * plain
