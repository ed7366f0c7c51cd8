"""The search over all layouts of a model on a number of GPUs, which returns those that fit, fastest first.

It varies TP (within a node), PP, VPP, CP, EP, the micro-batch size and the recomputed modules. Model, lengths, block
size and global batch size are those of the YAML. TP > 1 implies sequence parallelism. The distributed optimizer is
tried on, and also off if the YAML turns it off.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from tidar_megatron.config import Config
from tidar_megatron.errors import UserError
from tidar_megatron.planning.built_ranks import build_shard
from tidar_megatron.planning.estimate import Estimate, recompute_name, stages_that_differ
from tidar_megatron.planning.hardware import GIB, Hardware
from tidar_megatron.planning.memory import memory_of
from tidar_megatron.planning.sizes import Sizes

MICRO_BATCH_SIZES = (1, 2, 4, 8)
LARGEST_CP, LARGEST_VPP = 16, 8


def divisors(number: int, largest: int) -> list[int]:
    """Return the divisors of ``number`` up to ``largest``, in ascending order."""
    return [n for n in range(1, min(number, largest) + 1) if number % n == 0]


def candidates(config: Config, gpus: int, hardware: Hardware) -> Iterator[Sizes]:
    """Yield the layouts that pass the configuration's own checks."""
    model, parallel = config.model, config.parallel
    recomputes: list[dict[str, object]] = [
        {"recompute_granularity": None},
        {"recompute_granularity": "selective", "recompute_modules": ("core_attn",)},
        {
            "recompute_granularity": "selective",
            "recompute_modules": ("core_attn", "moe" if model.num_experts else "mlp"),
        },
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ]
    experts = divisors(model.num_experts, 64) if model.num_experts else [1]
    sizes = itertools.product(
        divisors(gpus, hardware.gpus_per_node), divisors(model.num_layers, gpus), divisors(gpus, LARGEST_CP), experts
    )
    for tp, pp, cp, ep in sizes:
        if gpus % (tp * pp * cp):
            continue
        vpps = divisors(model.num_layers // pp, LARGEST_VPP) if pp > 1 else [1]
        for vpp, distributed in itertools.product(vpps, sorted({True, parallel.use_distributed_optimizer})):
            layout = dataclasses.replace(
                parallel,
                tensor_model_parallel_size=tp,
                pipeline_model_parallel_size=pp,
                virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
                context_parallel_size=cp,
                expert_model_parallel_size=ep,
                sequence_parallel=tp > 1,
                use_distributed_optimizer=distributed,
                overlap_param_gather=parallel.overlap_param_gather and distributed,
            )
            for b in MICRO_BATCH_SIZES:
                training = dataclasses.replace(config.training, micro_batch_size=b)
                try:
                    sized = Sizes.of(dataclasses.replace(config, parallel=layout, training=training), gpus)
                except UserError:
                    break  # a layout that refuses a micro-batch size refuses all larger ones
                for recompute in recomputes:
                    again = dataclasses.replace(layout, **recompute)  # type: ignore[arg-type]
                    yield Sizes(dataclasses.replace(sized.config, parallel=again), gpus)


def search(config: Config, gpus: int, hardware: Hardware, memory_gib: float) -> list[Estimate]:
    """Return the layouts that fit, fastest first.

    For each (TP, PP, VPP, CP, EP) only the fastest micro-batch size and recomputation are kept.

    Args:
        config: the configuration, complete with its vocabulary size.
        gpus: the number of GPUs to use, all of them.
        hardware: the kind of GPU.
        memory_gib: the memory that a rank may use, in GiB.

    Raises:
        UserError: no layout fits, or none can use all GPUs; the message says what is short and what would help.
    """
    best: dict[tuple[int, ...], Estimate] = {}
    smallest: Estimate | None = None
    for sizes in candidates(config, gpus, hardware):
        estimate = Estimate(sizes, hardware)
        if smallest is None or estimate.memory.gib < smallest.memory.gib:
            smallest = estimate
        if not estimate.fits(memory_gib):
            continue
        key = (sizes.tp, sizes.pp, sizes.vpp, sizes.cp, sizes.ep)
        if key not in best or estimate.seconds.step < best[key].seconds.step:
            best[key] = estimate
    if smallest is None:
        raise UserError(no_layout(config, gpus))
    if not best:
        raise UserError(too_large(smallest, memory_gib, enough_gpus(config, gpus, hardware, memory_gib)))
    return sorted(best.values(), key=lambda e: (e.seconds.step, e.memory.gib))


def enough_gpus(config: Config, gpus: int, hardware: Hardware, memory_gib: float) -> int | None:
    """Return the least power of two times ``gpus``, up to 64 times, on which some layout fits; else None."""
    for more in (gpus * 2**n for n in range(1, 7)):
        if any(Estimate(sizes, hardware).fits(memory_gib) for sizes in candidates(config, more, hardware)):
            return more
    return None


def no_layout(config: Config, gpus: int) -> str:
    """Return the error message for when no layout can use all GPUs: why data parallelism alone cannot."""
    plain = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "sequence_parallel": False,
    }
    training = dataclasses.replace(config.training, micro_batch_size=1)
    parallel = dataclasses.replace(config.parallel, **plain)  # type: ignore[arg-type]
    try:
        Sizes.of(dataclasses.replace(config, parallel=parallel, training=training), gpus)
    except UserError as error:
        return f"--gpus {gpus}: no layout can use them all; data parallelism alone fails: {error}"
    raise AssertionError("data parallelism alone is one of the candidates")


def too_large(smallest: Estimate, memory_gib: float, enough: int | None) -> str:
    """Return the error message for when no layout fits: what is short, and what would help."""
    memory, sizes = smallest.memory, smallest.sizes
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "the optimizer's state": memory.optimizer,
        "activations": memory.activations + memory.working,
        "the loss's gradients and logits": memory.loss,
    }
    name, most = max(parts.items(), key=lambda item: item[1])
    helps = f"--gpus {enough}" if enough else "a smaller --seq-length or model"
    layout = f"TP {sizes.tp}, PP {sizes.pp}, CP {sizes.cp}" + (f", EP {sizes.ep}" if sizes.experts else "")
    return (
        f"no layout of {sizes.world_size} GPUs fits {memory_gib:g} GiB: the smallest ({layout}, recompute "
        f"{recompute_name(sizes)}) needs {memory.gib:.1f} GiB; {most / GIB:.1f} GiB are {name}; "
        f"{helps} would fit, or --gpu-memory-gib {math.ceil(memory.gib)}"
    )


def verify(sizes: Sizes) -> None:
    """Build the shards of the stages that differ and compare the arithmetic with them.

    Raises:
        AssertionError: the arithmetic and a shard disagree, which is a bug in the planner.
    """
    for stage in stages_that_differ(sizes.pp):
        built, planned = build_shard(sizes, stage), memory_of(sizes, stage)
        assert built.parameters == planned.parameters, (sizes, stage, built, planned)
        assert built.weight_bytes == planned.weights, (sizes, stage, built, planned)
        # the distributed optimizer pads each tensor in its buffers to a multiple of 64 elements, much for a tiny model
        padding = 64 * built.tensors if sizes.config.parallel.use_distributed_optimizer else 0
        for exact, said, each in (
            (built.gradient_bytes, planned.gradients, 4),
            (built.optimizer_bytes, planned.optimizer, 12),
        ):
            assert abs(exact - said) <= max(0.01 * exact, padding * each), (sizes, stage, built, planned)


def verify_all(estimates: list[Estimate]) -> None:
    """Call :func:`verify` once for all layouts with equal shards; VPP and the split of DP and CP do not change them."""
    seen = set()
    for estimate in estimates:
        sizes = estimate.sizes
        key = (sizes.tp, sizes.pp, sizes.ep, sizes.config.parallel.use_distributed_optimizer)
        if key not in seen:
            seen.add(key)
            verify(sizes)
