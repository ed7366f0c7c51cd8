"""The memory of one rank in bytes: weights, gradients, optimizer, activations, loss.

Weights, gradients and the optimizer's state are computed here; :mod:`tidar_megatron.planning.built_ranks` builds the
same shards, and the tool compares the two. They are equal up to the padding of the distributed optimizer's buffers.

Activations are what autograd saves for the backward, as counted by saved-tensor hooks: each storage once, without
parameters. They depend on the kernels; the hooks test the first set:

``cpu``  torch's RMSNorm saves its input in float32 and its normalized output; SwiGLU saves its product's factors.
``gpu``  torch's fused RMSNorm saves its input and a number per row; megatron-core's fused SwiGLU saves its input.

In both, attention saves q, k, v, the output and its log-sum-exp, as the chunked backend does on a kernel that does not
save scores. The other backends are counted the same way.

With ``--train drafts`` only masks have a backward. Their layers save the same, but for what frozen weights need: a
frozen linear layer without a pair saves nothing, a frozen norm not its output. Attention saves the keys and values of
clean tokens too.
"""

from dataclasses import dataclass
from typing import Literal

from tidar_megatron.models.cross_entropy import chunk_tokens
from tidar_megatron.planning.hardware import GIB, efficiency
from tidar_megatron.planning.sizes import Sizes

Kernels = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Parameters:
    """The number of parameters that one rank holds; only frozen ones have no gradient."""

    dense: int  # replicated over DP and CP
    expert: int  # replicated over the ranks that hold the same experts
    frozen: int = 0

    @property
    def total(self) -> int:
        """The number of all parameters."""
        return self.trained + self.frozen

    @property
    def trained(self) -> int:
        """The number of parameters that are not frozen."""
        return self.dense + self.expert


@dataclass(frozen=True)
class Memory:
    """The peak memory of a rank of one pipeline stage: the number of its parameters, and bytes by purpose."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    working: int
    reserve: int

    @property
    def gib(self) -> float:
        """The sum of all parts in GiB."""
        parts = self.weights + self.gradients + self.optimizer + self.activations + self.loss
        return (parts + self.working + self.reserve) / GIB


def parameters_of(sizes: Sizes, stage: int) -> Parameters:
    """Return the parameters of a rank of pipeline stage ``stage``; all ranks of a stage hold equally many."""
    model, h, d = sizes.config.model, sizes.h, sizes.d
    qkv, queries = (sizes.heads + 2 * sizes.groups) * d, sizes.heads * d
    layer = 2 * h + h * qkv + queries * h
    layer += qkv if model.add_qkv_bias else 0
    layer += 2 * d if model.qk_layernorm else 0
    expert = 0
    if sizes.experts is None:
        layer += 3 * h * sizes.f
    else:
        layer += h * sizes.experts
        expert = 3 * h * sizes.f * (sizes.experts // sizes.ep)
    first, last = stage == 0, stage == sizes.pp - 1
    ends = h if last else 0
    ends += sizes.vocabulary * h if first else 0
    ends += sizes.vocabulary * h if last and not (sizes.tied and first) else 0
    if not sizes.trains_drafts:
        return Parameters(sizes.layers * layer + ends, sizes.layers * expert)
    drafts = sizes.config.drafts
    trained = sizes.layers * drafts.draft_rank * sum(inputs + outputs for inputs, outputs, _ in sizes.pairs.values())
    trained += h if first else 0  # the masks' input
    trained += (3 * h + 1) * drafts.draft_selector if last else 0
    return Parameters(trained, 0, sizes.layers * layer + ends)


def optimizer_bytes(sizes: Sizes, parameters: Parameters) -> int:
    """Return the bytes of Adam's two float32 moments, and of the float32 main weights under bfloat16.

    The distributed optimizer shards them. It also pads its buffers, so a shard may have some hundred elements more.
    """
    each = 12 if sizes.w == 2 else 8
    if not sizes.config.parallel.use_distributed_optimizer:
        return each * parameters.trained
    return each * (-(-parameters.dense // (sizes.dp * sizes.cp)) - (-parameters.expert // sizes.edp))


def norm_bytes(sizes: Sizes, rows: int, width: int, kernels: Kernels) -> int:
    """Return the bytes that an RMSNorm saves over ``rows`` of ``width`` channels."""
    kept = rows * width * (sizes.w if kernels == "gpu" else 4 if sizes.trains_drafts else 8)
    return kept + 4 * rows


def core_attention_bytes(sizes: Sizes) -> int:
    """Return the bytes that recomputing ``core_attn`` frees: those of a layer's attention without its inputs."""
    w, d = sizes.w, sizes.d
    log_sum_exp = 4 * sizes.graph_tokens * sizes.heads
    copies = joins_keys(sizes)
    # folded heads are unfolded into a copy; otherwise the output projection saves the same tensor
    outputs = sizes.graph_tokens * sizes.heads * d * w if sizes.heads != sizes.groups or copies else 0
    joined = 2 * sizes.b * sizes.tiles.keys * sizes.groups * d * w if copies else 0
    return outputs + log_sum_exp + joined


def joins_keys(sizes: Sizes) -> bool:
    """Return whether attention copies keys and values: behind those of other ranks, or of the clean pass."""
    return sizes.cp > 1 or sizes.trains_drafts


def feed_forward_bytes(sizes: Sizes, kernels: Kernels) -> int:
    """Return the bytes that recomputing ``mlp`` (``moe``) frees: those of a layer's feed-forward without its input."""
    w, t = sizes.w, sizes.graph_tokens
    if sizes.experts is None:
        saves_product = not sizes.trains_drafts or "linear_fc2" in sizes.pairs
        own = t * sizes.f * w * ((2 if kernels == "gpu" else 4) + saves_product)
        return own + pair_bytes(sizes, "linear_fc1", "linear_fc2")
    rows, s, topk = sizes.expert_rows, sizes.residual_tokens, sizes.config.model.moe_router_topk
    experts = rows * w * (sizes.h + sizes.f * (3 if kernels == "gpu" else 6))
    seen = s * sizes.ep * sizes.etp  # tokens of the expert-parallel group
    routing = s * (5 * sizes.experts + 16 * topk) + 5 * seen * sizes.experts // sizes.ep + 8 * rows
    return experts + routing


def pair_bytes(sizes: Sizes, *modules: str) -> int:
    """Return the bytes that the pairs of linear layers save between their two products."""
    rows = [sizes.residual_tokens if sizes.pairs[m][2] else sizes.graph_tokens for m in modules if m in sizes.pairs]
    return sum(rows) * sizes.config.drafts.draft_rank * sizes.w


def layer_bytes(sizes: Sizes, kernels: Kernels, recompute: tuple[str, ...] = ()) -> int:
    """Return the bytes of activations that one layer saves per micro-batch if the modules ``recompute`` save none."""
    t, s, h, d, w = sizes.graph_tokens, sizes.residual_tokens, sizes.h, sizes.d, sizes.w
    heads, groups, model = sizes.heads, sizes.groups, sizes.config.model
    norms = 2 * norm_bytes(sizes, s, h, kernels)
    # inputs of the projection to q, k, v and of the feed-forward
    inputs = s * h * w * (len({"linear_qkv", "linear_fc1"} & {*sizes.pairs}) if sizes.trains_drafts else 2)
    within = pair_bytes(sizes, "linear_qkv", "linear_proj")
    rotary = 4 * sizes.angle_rows * d * w
    attention_recomputed = "core_attn" in recompute
    fused_qkv, qk_norm = t * (heads + 2 * groups) * d * w, 0
    keeps_qkv = not joins_keys(sizes) or attention_recomputed  # v is a view of the fused q, k, v; a joined v is not
    if model.qk_layernorm:
        qk_norm = norm_bytes(sizes, t * heads, d, kernels) + 4 * t * groups
        if kernels == "gpu" or w == 4:  # k's norm saves its input, also a view of the fused q, k, v
            keeps_qkv = True
        else:
            qk_norm += 4 * t * groups * d
        qk_norm += 4 * t * groups * d if kernels == "cpu" and not sizes.trains_drafts else 0
    turned = t * heads * d * w
    if not joins_keys(sizes) or attention_recomputed:
        turned += t * groups * d * w
    # the input of the output projection
    attention = t * heads * d * w if not sizes.trains_drafts or "linear_proj" in sizes.pairs else 0
    attention += 0 if attention_recomputed else core_attention_bytes(sizes)
    feed_forward = 0 if sizes.feed_forward in recompute else feed_forward_bytes(sizes, kernels)
    fused_qkv = fused_qkv if keeps_qkv else 0
    return norms + inputs + within + rotary + fused_qkv + qk_norm + turned + attention + feed_forward


@dataclass(frozen=True)
class Activations:
    """The bytes of activations of one micro-batch in one model chunk."""

    layers: int
    shared: int  # shared by all layers: metadata, rotary angles
    ends: int  # embedding and output layer, if the chunk has them
    loss: int  # the gradients that the loss computes in its forward
    working: int  # not saved but alive for a moment in backward: recomputed activations, and the widest gradient

    @property
    def saved(self) -> int:
        """The number of bytes that saved-tensor hooks count."""
        return self.layers + self.shared + self.ends + self.loss


def activations_of(sizes: Sizes, first: bool, last: bool, kernels: Kernels) -> Activations:
    """Return the activations of a chunk that is the ``first`` or the ``last`` of the model, both, or neither."""
    parallel, t, s, h, w = sizes.config.parallel, sizes.graph_tokens, sizes.residual_tokens, sizes.h, sizes.w
    n, every = sizes.chunk_layers, layer_bytes(sizes, kernels)
    metadata, angles = 16 * sizes.b * sizes.tiles.keys, 4 * sizes.angle_rows * sizes.d
    # gradients of the feed-forward's first projection and of the residuals; tokens dispatched to experts
    rows, dispatched = (t, 0) if sizes.experts is None else (sizes.expert_rows, s * sizes.ep * sizes.etp)
    working = rows * 2 * sizes.f * w + 2 * s * h * w + dispatched * h * w
    working += sizes.tiles.masks * (1 + w * (sizes.heads // sizes.groups))  # bool masks, and their biases
    if parallel.recompute_granularity == "full":
        group = min(parallel.recompute_num_layers, n)
        if parallel.recompute_method == "uniform":
            layers = -(-n // group) * s * h * w
            working += group * every
        else:  # "block": the first layers of the chunk, each on its own
            layers = group * s * h * w + (n - group) * every
            working += every
        shared = metadata + angles
    else:
        modules = parallel.recompute_modules if parallel.recompute_granularity == "selective" else ()
        one = layer_bytes(sizes, kernels, tuple(modules))
        layers, working = n * one, working + every - one
        shared = metadata if "core_attn" in modules else 0
    ends = t * (8 + (1 if sizes.tp > 1 else 0)) if first and not sizes.trains_drafts else 0
    if first and sizes.trains_drafts and (w == 4 or kernels == "gpu" or parallel.recompute_granularity == "full"):
        layers -= s * h * w  # the first layer's input is a view of one row
    loss = 0
    if last:
        ends += norm_bytes(sizes, s, h, kernels)
        loss = w * h * (t + (0 if sizes.trains_drafts else sizes.vocabulary))
    return Activations(layers, shared, ends, loss, working)


def loss_bytes(sizes: Sizes) -> int:
    """Return the peak bytes of the loss in its forward (``models/cross_entropy.py``).

    These are the hidden states and their gradient, the weight's gradient in float32, and a chunk of logits; under
    bfloat16 also the larger of the logits' float32 softmax and the chunk's part of the weight's gradient.
    """
    t, h, v, w = sizes.graph_tokens, sizes.h, sizes.vocabulary, sizes.w
    chunk = min(chunk_tokens(h), t)
    if sizes.trains_drafts:  # no gradient of the weight; log-probabilities, probabilities and slopes of distributions
        kind = sizes.config.drafts.draft_loss
        each = {"ce": w + 4, "argmax": 2 * w + 4}.get(kind, 2 * w + 20)
        return 2 * t * h * w + each * (chunk if kind == "ce" else chunk // 2) * v
    logits = 4 * chunk * v if w == 4 else 2 * chunk * v + max(4 * chunk * v, 2 * v * h)
    return 2 * t * h * w + 4 * v * h + logits


def in_flight(sizes: Sizes, stage: int) -> int:
    """Return how many forwards of a chunk over a micro-batch a stage holds activations of, in (interleaved) 1F1B.

    A stage runs ahead by as many forwards as stages follow it (Megatron-LM, arXiv 2104.04473, section 2.2).
    """
    if sizes.vpp == 1:
        return min(sizes.pp - stage, sizes.micro_batches)
    ahead = 2 * (sizes.pp - stage - 1) + (sizes.vpp - 1) * sizes.pp
    return min(ahead + 1, sizes.micro_batches * sizes.vpp)


def memory_of(sizes: Sizes, stage: int, kernels: Kernels = "gpu") -> Memory:
    """Return the peak memory of a rank of pipeline stage ``stage``."""
    parameters = parameters_of(sizes, stage)
    first, last = stage == 0, stage == sizes.pp - 1
    one = activations_of(sizes, first and sizes.vpp == 1, last and sizes.vpp == 1, kernels)
    ends = activations_of(sizes, first, last, kernels)
    # with interleaving only one of a stage's VPP chunks can have the embedding or the output layer
    at_ends = -(-in_flight(sizes, stage) // sizes.vpp)
    return Memory(
        parameters=parameters.total,
        weights=sizes.w * parameters.total,
        gradients=4 * parameters.trained,
        optimizer=optimizer_bytes(sizes, parameters),
        activations=in_flight(sizes, stage) * (one.layers + one.shared) + at_ends * ends.ends,
        loss=loss_bytes(sizes) if last else 0,
        working=ends.working,
        reserve=round(efficiency("reserve") * GIB),
    )
