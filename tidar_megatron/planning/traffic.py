"""The traffic of a GPU per step, by process group and link. Ring collectives send (n - 1) / n of a buffer per pass.

Groups follow megatron-core's rank order: TP is innermost, then CP, DP, and PP outermost; for experts TP, EP, DP, PP.
A group within one node uses NVLink. A group across nodes uses one network card for each of its ranks in a node, up to
NVLink's bandwidth.
"""

from dataclasses import dataclass

from tidar_megatron.adapter import CANDIDATES
from tidar_megatron.planning.hardware import Hardware, efficiency
from tidar_megatron.planning.memory import parameters_of
from tidar_megatron.planning.sizes import Sizes


@dataclass(frozen=True)
class Traffic:
    """The bytes that a GPU of one pipeline stage sends within one group per step."""

    group: str
    size: int
    link: str
    bytes: float
    seconds: float


def link_of(hardware: Hardware, stride: int, size: int) -> tuple[str, float]:
    """Return the link of a group of ``size`` ranks ``stride`` apart, and its assumed bytes/s per rank."""
    nvlink = hardware.nvlink * efficiency("nvlink")
    if stride * size <= hardware.gpus_per_node:
        return "NVLink", nvlink
    together = max(1, hardware.gpus_per_node // stride)
    return "InfiniBand", min(nvlink, together * hardware.infiniband * efficiency("infiniband"))


def traffic_of(sizes: Sizes, stage: int, hardware: Hardware) -> list[Traffic]:
    """Return the traffic of each group for a rank of pipeline stage ``stage``, without groups that send nothing."""
    groups = {
        "TP": (sizes.tp, 1, tensor_bytes(sizes, stage)),
        "CP": (sizes.cp, sizes.tp, context_bytes(sizes)),
        "EP": (sizes.ep * sizes.etp, 1, expert_bytes(sizes)),
        "PP": (sizes.pp, sizes.tp * sizes.cp * sizes.dp, pipeline_bytes(sizes, stage)),
        "DP": (sizes.dp * sizes.cp, sizes.tp, data_bytes(sizes, stage)),
    }
    if sizes.experts is not None and sizes.dp * sizes.cp == 1:  # experts may have replicas even then
        groups["DP"] = (sizes.edp, sizes.etp * sizes.ep, data_bytes(sizes, stage))
    result = []
    for name, (size, stride, sent) in groups.items():
        if size > 1 and sent:
            link, rate = link_of(hardware, stride, 2 if name == "PP" else size)
            result.append(Traffic(name, size, link, sent, sent / rate))
    return result


def passes(sizes: Sizes) -> float:
    """Return the forward passes of a layer per micro-batch, averaged over layers: one, or two if it is recomputed."""
    parallel, n = sizes.config.parallel, sizes.chunk_layers
    if parallel.recompute_granularity != "full":
        return 1.0
    return 2.0 if parallel.recompute_method == "uniform" else 1.0 + min(parallel.recompute_num_layers, n) / n


def tensor_bytes(sizes: Sizes, stage: int) -> float:
    """Return the bytes that a rank sends to its tensor-parallel group per step.

    A layer with a dense feed-forward gathers and reduces its residual stream twice in forward and twice in backward.
    Without sequence parallelism these are all-reduces; with it, all-gathers and reduce-scatters of the same total, and
    two more gathers in backward for the weights' gradients. Experts gather over TP x EP instead.
    """
    if sizes.tp == 1:
        return 0.0
    share = sizes.w * (sizes.tp - 1) / sizes.tp
    one = sizes.graph_tokens * sizes.h * share  # one all-gather, or one reduce-scatter
    blocks = 2 if sizes.experts is None else 1  # attention and feed-forward
    per_layer = blocks * (2 * passes(sizes) + 2)
    again = 1 if sizes.config.parallel.sequence_parallel and not sizes.trains_drafts else 0
    per_layer += blocks * again
    parallel = sizes.config.parallel
    if sizes.experts is None and parallel.recompute_granularity == "selective" and "mlp" in parallel.recompute_modules:
        per_layer += 2  # the feed-forward's forward is run again
    total = per_layer * one * sizes.layers
    total += 2 * one if stage == 0 else 0  # the embedding
    total += 2 * one if stage == sizes.pp - 1 else 0  # the output layer, whose gradients are computed in forward
    if sizes.trains_drafts:
        total += draft_bytes(sizes, stage, one, share)
    return total * sizes.micro_batches


def draft_bytes(sizes: Sizes, stage: int, one: float, share: float) -> float:
    """Return the bytes that a micro-batch sends besides what its masks send in joint training.

    Clean tokens have a forward alone. Pairs send what is between their two products, and the selector needs the
    embeddings of all candidates.
    """
    drafts, clean = sizes.config.drafts, (sizes.tokens - sizes.graph_tokens) * sizes.h * share
    within = sizes.graph_tokens * drafts.draft_rank * share
    total = 2 * 2 * clean * sizes.layers + len(sizes.pairs) * (passes(sizes) + 1) * within * sizes.layers
    if stage == 0:
        total += 2 * clean - 2 * one
    if stage == sizes.pp - 1 and drafts.draft_loss != "ce":
        total += clean
    if stage == sizes.pp - 1 and drafts.draft_selector:  # all-reduced embeddings, again in its backward
        total += 2 * 2 * (1 + CANDIDATES) * one
    return total


def context_bytes(sizes: Sizes) -> float:
    """Return the bytes that a rank sends to its context-parallel group per step.

    Clean keys and values are all-gathered in forward, and their gradients reduce-scattered in backward.
    """
    if sizes.cp == 1:
        return 0.0
    clean = sizes.b * sizes.config.data.seq_length * 2 * sizes.groups * sizes.d * sizes.w
    parallel = sizes.config.parallel
    forwards = passes(sizes)
    if parallel.recompute_granularity == "selective" and "core_attn" in parallel.recompute_modules:
        forwards += 1
    # with --train drafts both passes gather them, and nothing is reduced
    return (forwards + 1) * clean * (sizes.cp - 1) / sizes.cp * sizes.layers * sizes.micro_batches


def expert_bytes(sizes: Sizes) -> float:
    """Return the bytes that a rank sends to its expert-parallel group per step, if tokens are routed evenly.

    Tokens travel to their experts and back, in forward and in backward. The all-gather dispatcher sends every token of
    the group to every rank, and back in float32, the router's dtype. The all-to-all dispatcher sends top-k copies of
    each token, and (n - 1) / n of the copies leave the rank. Routing probabilities are not counted.
    """
    size = sizes.ep * sizes.etp
    if sizes.experts is None or size == 1:
        return 0.0
    model = sizes.config.model
    if model.moe_token_dispatcher_type == "allgather":
        there_and_back = size * (sizes.w + 4)
    else:
        there_and_back = model.moe_router_topk * sizes.etp * 2 * sizes.w
    once = sizes.residual_tokens * sizes.h * there_and_back * (size - 1) / size
    forwards = passes(sizes)
    parallel = sizes.config.parallel
    if parallel.recompute_granularity == "selective" and "moe" in parallel.recompute_modules:
        forwards += 1
    return once * (forwards + 1) * sizes.layers * sizes.micro_batches


def pipeline_bytes(sizes: Sizes, stage: int) -> float:
    """Return the bytes that a rank sends to other pipeline stages per step.

    For each chunk, residual streams go to the next stage and gradients to the previous one. If the embeddings are tied,
    the first and last stage also sum their float32 gradients once per step.
    """
    if sizes.pp == 1:
        return 0.0
    forward = sizes.vpp - (1 if stage == sizes.pp - 1 else 0)
    backward = sizes.vpp - (1 if stage == 0 else 0)
    sums_rows = sizes.tied and stage in (0, sizes.pp - 1) and not sizes.trains_drafts
    shared = 4 * sizes.vocabulary * sizes.h if sums_rows else 0
    residuals = sizes.residual_tokens * sizes.rows // sizes.graph_rows  # clean tokens have gradients too: zeros
    return float(residuals * sizes.h * sizes.w * (forward + backward) * sizes.micro_batches + shared)


def data_bytes(sizes: Sizes, stage: int) -> float:
    """Return the bytes that a rank sends to its data-parallel group per step.

    Float32 gradients are all-reduced once per step; with the distributed optimizer they are reduce-scattered, and the
    new weights all-gathered.
    """
    parameters = parameters_of(sizes, stage)
    each = 4 + sizes.w if sizes.config.parallel.use_distributed_optimizer else 8
    dense, expert = sizes.dp * sizes.cp, sizes.edp
    return each * (parameters.dense * (dense - 1) / dense + parameters.expert * (expert - 1) / expert)
