"""A layout's prediction: does it fit, how long is a step, what share of the peak is that.

Of one micro-batch on one pipeline stage::

    matmul FLOPs / (peak x matmul) + attention FLOPs / (peak x attention)
        + memory traffic of norms, activations and loss / (bandwidth x memory) + TP, CP, EP and PP traffic / links

and of a step, with m micro-batches: every stage once, divided by VPP for all but the slowest, (m - 1) times the slowest
(Megatron-LM, arXiv 2104.04473: the bubble), then the data-parallel traffic that no compute hides, and the optimizer.
"""

import math
from dataclasses import dataclass
from functools import cached_property

from tidar_megatron.models.cross_entropy import chunk_tokens
from tidar_megatron.planning.flops import model_flops, stage_flops
from tidar_megatron.planning.hardware import GIB, Hardware, efficiency
from tidar_megatron.planning.memory import Memory, layer_bytes, memory_of, parameters_of
from tidar_megatron.planning.sizes import Sizes
from tidar_megatron.planning.traffic import Traffic, passes, traffic_of


@dataclass(frozen=True)
class Seconds:
    """Where a step's time goes, on the slowest stage; the sum is the step."""

    matmul: float
    attention: float
    memory: float
    communication: float  # TP, CP, EP, PP
    bubble: float  # waiting for other stages
    data: float  # what of the data-parallel traffic nothing hides
    optimizer: float

    @property
    def step(self) -> float:
        """The sum."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Estimate:
    """A layout on some hardware."""

    sizes: Sizes
    hardware: Hardware

    @cached_property
    def memory(self) -> Memory:
        """Of the rank that holds the most."""
        return max((memory_of(self.sizes, stage) for stage in self.stages), key=lambda m: m.gib)

    @property
    def stages(self) -> list[int]:
        """One of each kind."""
        return stages_that_differ(self.sizes.pp)

    def traffic(self, stage: int) -> list[Traffic]:
        """Per step, of a rank of ``stage``."""
        return traffic_of(self.sizes, stage, self.hardware)

    @cached_property
    def seconds(self) -> Seconds:
        """Of a step."""
        sizes = self.sizes
        work = {stage: self._micro_batch(stage) for stage in self.stages}
        slowest = max(work, key=lambda stage: sum(work[stage]))
        matmul, attention, memory, communication = (sizes.micro_batches * part for part in work[slowest])
        middle = work.get(1, work[0])
        others = [sum(work.get(stage, middle)) for stage in range(sizes.pp) if stage != slowest]
        bubble, data = sum(others) / sizes.vpp, self._exposed_data(slowest, sum(work[slowest]))
        return Seconds(matmul, attention, memory, communication, bubble, data, self._optimizer(slowest))

    def _exposed_data(self, stage: int, micro_batch: float) -> float:
        """Gradients reduced, and weights gathered by the distributed optimizer, less what is hidden.

        The one behind the last micro-batch's backward, the other behind the first one's forward: two thirds and one
        third of the work.
        """
        parallel, w = self.sizes.config.parallel, self.sizes.w
        whole = sum(t.seconds for t in self.traffic(stage) if t.group == "DP")
        gather = whole * w / (4 + w) if parallel.use_distributed_optimizer else 0.0
        exposed = 0.0
        for seconds, overlapped, compute in (
            (whole - gather, parallel.overlap_grad_reduce, 2 / 3 * micro_batch),
            (gather, parallel.overlap_param_gather, 1 / 3 * micro_batch),
        ):
            least = seconds * (1 - efficiency("hidden"))
            exposed += max(least, seconds - compute) if overlapped else seconds
        return exposed

    def _micro_batch(self, stage: int) -> tuple[float, float, float, float]:
        sizes, hardware = self.sizes, self.hardware
        peak = hardware.bf16_flops if sizes.w == 2 else hardware.fp32_flops
        flops = stage_flops(sizes, stage)
        touched = layer_bytes(sizes, "gpu") * sizes.layers * efficiency("touches") * (1 + passes(sizes)) / 2
        if stage == sizes.pp - 1:
            chunks = math.ceil(sizes.tokens / chunk_tokens(sizes.h))  # each adds to the weight's gradient
            adding = 4 * sizes.vocabulary * sizes.h * chunks * (3 if sizes.w == 2 else 2)
            touched += 4 * sizes.tokens * sizes.vocabulary * efficiency("loss_touches") + adding
        links = sum(t.seconds for t in self.traffic(stage) if t.group != "DP") / sizes.micro_batches
        return (
            flops.matmul / (peak * efficiency("matmul")),
            flops.attention / (peak * efficiency("attention")),
            touched / self._memory_rate,
            links,
        )

    def _optimizer(self, stage: int) -> float:
        """Adam reads and writes its state, reads gradients (twice: their norm) and writes weights."""
        sizes = self.sizes
        parameters = parameters_of(sizes, stage)
        owned = float(parameters.total)
        if sizes.config.parallel.use_distributed_optimizer:
            owned = parameters.dense / (sizes.dp * sizes.cp) + parameters.expert / sizes.edp
        state = 12 if sizes.w == 2 else 8
        return owned * (2 * state + 8 + sizes.w) / self._memory_rate + 4 * parameters.total / self._memory_rate

    @property
    def _memory_rate(self) -> float:
        return self.hardware.memory_bandwidth * efficiency("memory")

    @cached_property
    def mfu(self) -> tuple[float, float]:
        """Model FLOPs over the peak: of the doubled sequence, and of the S clean tokens alone."""
        sizes = self.sizes
        peak = self.hardware.bf16_flops if sizes.w == 2 else self.hardware.fp32_flops
        available = self.seconds.step * peak * sizes.world_size
        doubled, clean = model_flops(sizes)
        return doubled / available, clean / available

    @property
    def tokens_per_second(self) -> float:
        """Clean tokens, per GPU."""
        config = self.sizes.config
        step = config.training.global_batch_size * config.data.seq_length
        return step / self.seconds.step / self.sizes.world_size

    def fits(self, memory_gib: float) -> bool:
        """Whether its fullest rank stays within ``memory_gib``."""
        return self.memory.gib <= memory_gib

    def as_dict(self) -> dict[str, object]:
        """One entry of ``--json``."""
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
        }


def stages_that_differ(pp: int) -> list[int]:
    """The first pipeline stage, one from the middle, the last."""
    return sorted({0, min(1, pp - 1), pp - 1})


def recompute_name(sizes: Sizes) -> str:
    """``none``, ``full``, or the modules."""
    parallel = sizes.config.parallel
    if parallel.recompute_granularity is None:
        return "none"
    return "full" if parallel.recompute_granularity == "full" else "+".join(parallel.recompute_modules)
