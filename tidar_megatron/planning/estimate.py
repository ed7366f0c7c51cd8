"""The predicted memory, step time and MFU of a layout.

One micro-batch on one pipeline stage takes::

    matmul FLOPs / (peak x matmul) + attention FLOPs / (peak x attention)
        + memory traffic of norms, activations and loss / (bandwidth x memory) + TP, CP, EP and PP traffic / links

A step of m micro-batches takes m times that on the slowest stage, plus each other stage once, divided by VPP (the
bubble, Megatron-LM, arXiv 2104.04473), plus the data-parallel traffic that no compute hides, plus the optimizer.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property

from tidar_megatron.models.cross_entropy import chunk_tokens
from tidar_megatron.planning.flops import model_flops, stage_flops
from tidar_megatron.planning.hardware import GIB, Hardware, efficiency
from tidar_megatron.planning.memory import Memory, layer_bytes, memory_of, parameters_of
from tidar_megatron.planning.saves import Written, written_by
from tidar_megatron.planning.sizes import Sizes
from tidar_megatron.planning.traffic import Traffic, passes, traffic_of


@dataclass(frozen=True)
class Seconds:
    """The parts of a step's time on the slowest stage, in seconds."""

    matmul: float
    attention: float
    memory: float
    communication: float  # TP, CP, EP, PP
    bubble: float  # waiting for other stages
    data: float  # data-parallel traffic that no compute hides
    optimizer: float

    @property
    def step(self) -> float:
        """The time of a step, which is the sum of the parts."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Estimate:
    """The prediction for one layout on one kind of hardware."""

    sizes: Sizes
    hardware: Hardware

    @cached_property
    def memory(self) -> Memory:
        """The memory of the rank that uses the most."""
        return max((memory_of(self.sizes, stage) for stage in self.stages), key=lambda m: m.gib)

    @property
    def stages(self) -> list[int]:
        """The stages to compute, one of each kind."""
        return stages_that_differ(self.sizes.pp)

    def traffic(self, stage: int) -> list[Traffic]:
        """Return the traffic per step of a rank of ``stage``, one entry per group."""
        return traffic_of(self.sizes, stage, self.hardware)

    @property
    def written(self) -> Written:
        """The bytes of a checkpoint that the busiest rank writes."""
        return max((written_by(self.sizes, stage) for stage in self.stages), key=lambda written: written.total)

    @cached_property
    def seconds(self) -> Seconds:
        """The time of a step, part by part."""
        sizes = self.sizes
        work = {stage: self._micro_batch(stage) for stage in self.stages}
        slowest = max(work, key=lambda stage: sum(work[stage]))
        matmul, attention, memory, communication = (sizes.micro_batches * part for part in work[slowest])
        middle = work.get(1, work[0])
        others = [sum(work.get(stage, middle)) for stage in range(sizes.pp) if stage != slowest]
        bubble, data = sum(others) / sizes.vpp, self._exposed_data(slowest, sum(work[slowest]))
        return Seconds(matmul, attention, memory, communication, bubble, data, self._optimizer(slowest))

    def _exposed_data(self, stage: int, micro_batch: float) -> float:
        """Return the seconds of data-parallel traffic that no compute hides.

        Reducing gradients can be hidden behind the last micro-batch's backward, two thirds of its work. Gathering the
        distributed optimizer's weights can be hidden behind the first micro-batch's forward, one third of its work.
        """
        parallel, w = self.sizes.config.parallel, self.sizes.w
        total = sum(t.seconds for t in self.traffic(stage) if t.group == "DP")
        gather = total * w / (4 + w) if parallel.use_distributed_optimizer else 0.0
        exposed = 0.0
        for seconds, overlapped, compute in (
            (total - gather, parallel.overlap_grad_reduce, 2 / 3 * micro_batch),
            (gather, parallel.overlap_param_gather, 1 / 3 * micro_batch),
        ):
            least = seconds * (1 - efficiency("hidden"))
            exposed += max(least, seconds - compute) if overlapped else seconds
        return exposed

    def _micro_batch(self, stage: int) -> tuple[float, float, float, float]:
        """Return the seconds of one micro-batch: matmul, attention, memory traffic, communication."""
        sizes, hardware = self.sizes, self.hardware
        peak = hardware.bf16_flops if sizes.w == 2 else hardware.fp32_flops
        flops = stage_flops(sizes, stage)
        touched = layer_bytes(sizes, "gpu") * sizes.layers * efficiency("touches") * (1 + passes(sizes)) / 2
        if sizes.trains_drafts:  # the clean pass, a forward alone
            touched *= 1 + (sizes.tokens - sizes.graph_tokens) / sizes.graph_tokens / 3
        if stage == sizes.pp - 1:
            chunks = math.ceil(sizes.tokens / chunk_tokens(sizes.h))  # each chunk adds to the weight's gradient
            adding = 0 if sizes.trains_drafts else 4 * sizes.vocabulary * sizes.h * chunks * (3 if sizes.w == 2 else 2)
            touched += 4 * sizes.graph_tokens * sizes.vocabulary * efficiency("loss_touches") + adding
        links = sum(t.seconds for t in self.traffic(stage) if t.group != "DP") / sizes.micro_batches
        return (
            flops.matmul / (peak * efficiency("matmul")),
            flops.attention / (peak * efficiency("attention")),
            touched / self._memory_rate,
            links,
        )

    def _optimizer(self, stage: int) -> float:
        """Return the seconds of Adam, which reads and writes its state, reads gradients twice and writes weights.

        Gradients are read a second time for their norm.
        """
        sizes = self.sizes
        parameters = parameters_of(sizes, stage)
        owned = float(parameters.trained)
        if sizes.config.parallel.use_distributed_optimizer:
            owned = parameters.dense / (sizes.dp * sizes.cp) + parameters.expert / sizes.edp
        state = 12 if sizes.w == 2 else 8
        return owned * (2 * state + 8 + sizes.w) / self._memory_rate + 4 * parameters.trained / self._memory_rate

    @property
    def _memory_rate(self) -> float:
        return self.hardware.memory_bandwidth * efficiency("memory")

    @cached_property
    def mfu(self) -> tuple[float, float]:
        """The model FLOPs utilization, for the FLOPs of the doubled sequence and for those of the S clean tokens."""
        sizes = self.sizes
        peak = self.hardware.bf16_flops if sizes.w == 2 else self.hardware.fp32_flops
        available = self.seconds.step * peak * sizes.world_size
        doubled, clean = model_flops(sizes)
        return doubled / available, clean / available

    @property
    def tokens_per_second(self) -> float:
        """The throughput in clean tokens per second per GPU."""
        config = self.sizes.config
        step = config.training.global_batch_size * config.data.seq_length
        return step / self.seconds.step / self.sizes.world_size

    def fits(self, memory_gib: float) -> bool:
        """Return whether the rank that uses the most memory stays within ``memory_gib``."""
        return self.memory.gib <= memory_gib

    def as_dict(self) -> dict[str, object]:
        """Return the layout's entry in the output of ``--json``."""
        sizes, memory, seconds = self.sizes, self.memory, self.seconds
        parallel = sizes.config.parallel
        parts = ("weights", "gradients", "optimizer", "activations", "loss", "working", "reserve")
        return {
            "tp": sizes.tp,
            "pp": sizes.pp,
            "vpp": sizes.vpp,
            "cp": sizes.cp,
            "dp": sizes.dp,
            "ep": sizes.ep,
            "micro_batch_size": sizes.b,
            "recompute": recompute_name(sizes),
            "sequence_parallel": parallel.sequence_parallel,
            "distributed_optimizer": parallel.use_distributed_optimizer,
            "memory_gib": round(memory.gib, 3),
            "memory_parts_gib": {name: round(getattr(memory, name) / GIB, 3) for name in parts},
            "parameters_per_rank": memory.parameters,
            "step_seconds": round(seconds.step, 4),
            "seconds": {name: round(value, 4) for name, value in vars(seconds).items()},
            "mfu": round(self.mfu[0], 4),
            "mfu_s": round(self.mfu[1], 4),
            "tokens_per_second_per_gpu": round(self.tokens_per_second, 1),
            "bytes_per_step": {t.group: round(t.bytes) for t in self.traffic(sizes.pp - 1)},
            "bytes_per_save": dataclasses.asdict(self.written),
        }


def stages_that_differ(pp: int) -> list[int]:
    """Return the first pipeline stage, one from the middle, and the last."""
    return sorted({0, min(1, pp - 1), pp - 1})


def recompute_name(sizes: Sizes) -> str:
    """Return ``none``, ``full``, or the names of the recomputed modules joined by "+"."""
    parallel = sizes.config.parallel
    if parallel.recompute_granularity is None:
        return "none"
    return "full" if parallel.recompute_granularity == "full" else "+".join(parallel.recompute_modules)
