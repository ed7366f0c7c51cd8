"""The shards of ranks, built on the meta device by the code that trains, in one process that plays each rank."""

import dataclasses
from dataclasses import dataclass

from tidar_megatron.config import ResolvedConfig
from tidar_megatron.distributed.fake import play_rank
from tidar_megatron.models.gpt import build_model
from tidar_megatron.models.parameters import VOCABULARY, kind_of, own_parameters, shard_group
from tidar_megatron.planning.sizes import Sizes
from tidar_megatron.training.optimizer import build_optimizer, wrap_model


@dataclass(frozen=True)
class Shard:
    """The sizes of one rank's shard, from building it."""

    parameters: int
    tensors: int  # tensors that hold these parameters
    weight_bytes: int
    gradient_bytes: int  # float32 buffers, with the distributed optimizer's padding
    optimizer_bytes: int  # moments and float32 main weights; without the step counters


def buildable(config: ResolvedConfig) -> ResolvedConfig:
    """Return the configuration with layers that need no GPU packages; model, layout and parameters stay the same."""
    model = dataclasses.replace(config.model, transformer_impl="local", moe_grouped_gemm=False)
    parallel = dataclasses.replace(config.parallel, recompute_granularity=None)
    # the learning-rate schedule does not matter here, and may be one that the trainer refuses
    optimizer = dataclasses.replace(
        config.optimizer, lr_decay_style="constant", lr_warmup_iters=0, lr_warmup_fraction=None
    )
    return dataclasses.replace(config, model=model, parallel=parallel, optimizer=optimizer)


def build_shard(sizes: Sizes, stage: int) -> Shard:
    """Build the model, gradient buffers and optimizer of the first rank of a pipeline stage, and measure them."""
    config = buildable(sizes.config)
    with play_rank(config.parallel, stage * (sizes.world_size // sizes.pp), sizes.world_size) as ranks:
        chunks = build_model(config, config.vocab_size, ranks)
        parameters = [p for chunk in chunks for p in chunk.parameters()]
        wrapped = wrap_model(chunks, config)
        buffers = [buffer for chunk in wrapped for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]]
        optimizer, _ = build_optimizer(wrapped, config)
        trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    return Shard(
        parameters=sum(p.numel() for p in parameters),
        tensors=len(parameters),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        gradient_bytes=sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers),
        optimizer_bytes=trained * (12 if config.training.bf16 else 8),
    )


def count_distinct_parameters(sizes: Sizes) -> int:
    """Count the parameters of the model, as its Hugging Face export has them, by building each distinct shard.

    Replicas on several ranks are counted once, and the vocabulary without its padding.
    """
    config = buildable(sizes.config)
    vocabulary = config.vocab_size
    per_stage = sizes.world_size // sizes.pp
    distinct: dict[tuple[str, int], int] = {}
    for stage in range(sizes.pp):
        # the first ranks of a stage differ in their tensor- or expert-parallel rank; the others are replicas
        for rank in range(max(sizes.tp, sizes.ep * sizes.etp)):
            with play_rank(config.parallel, stage * per_stage + rank, sizes.world_size) as ranks:
                for name, parameter, chunk in own_parameters(build_model(config, vocabulary, ranks)):
                    number = 0 if kind_of(name)[0].shard == "replicated" else shard_group(chunk, name).rank()
                    rows = parameter.shape[0]
                    if name in VOCABULARY:
                        rows = min(max(vocabulary - number * rows, 0), rows)
                    distinct[name, number] = rows * parameter[0].numel()
    return sum(distinct.values())
