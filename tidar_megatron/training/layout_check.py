"""Check every layout against one rank: train a tiny model in each, and compare its losses and gradients.

The batches are packed documents with fill, so the supervised counts differ between micro-batches and between data- and
context-parallel ranks. The second of the three steps trains plain AR (the warm-up). The reference is a separate process
of one rank, independent of the layouts.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch.distributed as dist
from torch import Tensor

from tidar_megatron.config import Config, ResolvedConfig
from tidar_megatron.data.blocks import choose_blocks
from tidar_megatron.data.doubled import Batch, make_batch
from tidar_megatron.data.packing import LengthsInMemory, PackedSequences, pack
from tidar_megatron.distributed.groups import Ranks, initialize
from tidar_megatron.models.gpt import build_model
from tidar_megatron.models.initialize import initialize_drafts, initialize_weights
from tidar_megatron.models.parameters import kind_of, own_parameters, shard_group
from tidar_megatron.training.layout_variants import MASK_TOKEN_ID, VARIANTS, Layout, Variant
from tidar_megatron.training.optimizer import build_optimizer, wrap_model
from tidar_megatron.training.step import Model, evaluate, forward_backward, train_step

STEPS = (True, False, True)  # per step: doubled sequences, or only the clean half


class Documents:
    """Random documents in memory, packed in the same way as the documents of shards.

    Args:
        config: The resolved configuration.
        longest: The most tokens in a document.
    """

    def __init__(self, config: Config, longest: int) -> None:
        draw = np.random.Generator(np.random.Philox(7))
        self.tokens = [draw.integers(0, MASK_TOKEN_ID, draw.integers(1, longest + 1)) for _ in range(400)]
        lengths = np.array([len(document) for document in self.tokens])
        self.block_size = config.tidar.block_size
        self.packed = PackedSequences(LengthsInMemory(lengths), config.data.seq_length, self.block_size, seed=1)

    def batches(self, step: int, config: Config, ranks: Ranks, doubled: bool, every_block: bool = False) -> list[Batch]:
        """Return this rank's micro-batches of a step, distributed as in ``data/loader.py``.

        Args:
            step: The number of the step, from 0.
            config: The resolved configuration.
            ranks: The process groups of this rank.
            doubled: Whether the sequences are doubled, or only their clean half is used.
            every_block: Whether every block has masks, whatever ``diffusion_block_fraction`` says.
        """
        dp, cp = ranks.groups.dp, ranks.groups.cp
        first = step * config.training.global_batch_size
        own = range(first + dp.rank(), first + config.training.global_batch_size, dp.size())
        batches = []
        for n in own:
            sequence = pack(self.packed.pieces(*self.packed.locate(n)), self.tokens, 0)
            some = doubled and not every_block and config.chosen_blocks < config.blocks
            chosen = choose_blocks(config.blocks, config.chosen_blocks, 1, n)[None] if some else None
            batches.append(make_batch([sequence], self.block_size, MASK_TOKEN_ID, doubled, chosen))
        return [batch.shard(cp.rank(), cp.size()) for batch in batches]


@dataclasses.dataclass
class Measured:
    """The measurements of one rank."""

    losses: list[list[float]]  # per step: AR, diffusion (0 in an AR step), gradient norm, balancing loss if any
    evaluation: list[float]
    grads: dict[str, tuple[int, int, Tensor]]  # of the first step: shard rank, number of shards, this rank's shard
    supervised: list[tuple[int, int]]  # per micro-batch of the first step: supervised AR and diffusion tokens


def measure(config: ResolvedConfig, variant: Variant) -> Measured:
    """Train the tiny model in a layout, and return what this rank measures. Collective."""
    ranks = initialize(config.parallel, config.training.seed)
    chunks = build_model(config, config.vocab_size, ranks)
    initialize_weights(chunks, config.training.seed)
    if config.trains_drafts:
        initialize_drafts(chunks, config.training.seed, output_std=0.02)
    model = wrap_model(chunks, config)
    optimizer, scheduler = build_optimizer(model, config)
    documents, alpha = Documents(config, variant.longest_document), config.ar_loss_weight

    optimizer.zero_grad()
    first = documents.batches(0, config, ranks, doubled=True)
    supervised = [(batch.ar_tokens, batch.diffusion_tokens) for batch in first]
    forward_backward(model, first, alpha, ranks)
    gather_gradients(model)
    grads = {}
    for name, parameter, chunk in own_parameters(chunks, config.trains_drafts):
        group = shard_group(chunk, name)
        grads[name] = (group.rank(), group.size(), parameter.main_grad.detach().float().cpu().clone())
    losses = []
    for step, doubled in enumerate(STEPS):
        doubled |= config.trains_drafts
        batches = documents.batches(step, config, ranks, doubled)
        result = train_step(model, optimizer, scheduler, batches, alpha, ranks)
        balancing = [] if result.balancing_loss is None else [result.balancing_loss]
        losses.append([result.ar_loss or 0.0, result.diffusion_loss or 0.0, result.grad_norm, *balancing])
    held_out = documents.batches(len(STEPS), config, ranks, doubled=True, every_block=True)
    evaluation = evaluate(model, held_out, config.tidar.block_size, ranks)
    names = [name for name in sorted(evaluation) if variant.argmax or not name.startswith(("agreement", "greedy"))]
    flat = np.hstack([np.asarray(evaluation[name], dtype=np.float64) for name in names]).tolist()
    return Measured(losses, flat, grads, supervised)


def gather_gradients(model: Model) -> None:
    """All-gather the reduced gradients, because under the distributed optimizer each rank has only its shard."""
    for chunk in model:
        if chunk.ddp_config.use_distributed_optimizer:
            for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
                group = buffer.data_parallel_group
                for bucket in buffer.buckets:
                    shards = list(bucket.grad_data.chunk(group.size()))
                    dist.all_gather(shards, shards[group.rank()].clone(), group=group)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The comparison of one layout with one rank: largest relative errors, and whether they are within tolerance."""

    name: str
    loss_rel_err: float
    grad_rel_err: float
    ok: bool


def compare(layout: Layout, ranks: Sequence[Measured], one: Measured) -> Comparison:
    """Return the largest relative errors over all ranks: of the losses, norms and metrics, and of the gradients.

    A gradient's error is ``||g - g1|| / ||g1||`` over the full parameter; where several ranks hold the same shard, the
    largest error counts.
    """
    allowed = VARIANTS[layout.variant]
    assert len({count for rank in ranks for count in rank.supervised}) > 1, "all micro-batches have equal token counts"
    reference = np.hstack([np.hstack(one.losses), one.evaluation])
    seen = np.array([np.hstack([np.hstack(rank.losses), rank.evaluation]) for rank in ranks])
    loss_error = float((np.abs(seen - reference) / np.maximum(np.abs(reference), 1e-3)).max())
    grad_error = float(np.max([_gradient_error(name, full, ranks) for name, (_, _, full) in one.grads.items()]))
    ok = bool(loss_error <= allowed.loss_tolerance and grad_error <= allowed.grad_tolerance)
    return Comparison(layout.name, loss_error, grad_error, ok)


def _gradient_error(name: str, full: Tensor, ranks: Sequence[Measured]) -> float:
    kind, _ = kind_of(name)
    worst: dict[int, float] = {}
    shards = 1
    for rank in ranks:
        if name in rank.grads:
            number, shards, part = rank.grads[name]
            reference = kind.part(full, number, shards)
            error = (part.double() - reference.double()).square().sum().item()
            worst[number] = float(np.maximum(worst.get(number, 0.0), error))  # np.maximum propagates NaN
    if kind.shard == "replicated":
        worst, shards = {0: float(np.max(list(worst.values())))} if worst else {}, 1
    if len(worst) < shards:
        return float("inf")  # no rank has one of the shards
    return sum(worst.values()) ** 0.5 / max(full.double().norm().item(), 1e-12)
