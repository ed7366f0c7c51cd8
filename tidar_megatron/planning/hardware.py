"""The table of hardware, and the assumptions that turn peaks into predictions. ``tidar plan`` prints both.

Peaks and bandwidths are the vendor's figures. The efficiencies are **assumptions**: this project has not measured any
of them on such a machine. Replace them by measured figures once there are some.
"""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU in nodes of eight. Rates are per GPU; those of links are also per direction."""

    name: str
    bf16_flops: float  # FLOP/s, dense (without sparsity)
    fp32_flops: float  # FLOP/s without tensor cores
    memory_gib: float  # approximately what the driver leaves to programs
    memory_bandwidth: float  # bytes/s
    nvlink: float  # bytes/s
    infiniband: float  # bytes/s, with one network card per GPU
    gpus_per_node: int
    source: str


HARDWARE = {
    "h100": Hardware(
        "H100 SXM",
        989.4e12,
        66.9e12,
        79.0,
        3.35e12,
        450e9,
        50e9,
        8,
        "NVIDIA H100 and DGX H100 datasheets; NDR 400 Gb/s",
    ),
    "h200": Hardware(
        "H200 SXM",
        989.4e12,
        66.9e12,
        139.0,
        4.8e12,
        450e9,
        50e9,
        8,
        "NVIDIA H200 and DGX H200 datasheets; NDR 400 Gb/s",
    ),
    "b200": Hardware(
        "B200 (HGX, 1 kW)",
        2250e12,
        75e12,
        178.0,
        8.0e12,
        900e9,
        50e9,
        8,
        "NVIDIA DGX B200 datasheet, dense = half of sparse; ConnectX-7 400 Gb/s",
    ),
}


@dataclass(frozen=True)
class Assumption:
    """A figure that was chosen, not measured, with the reason."""

    value: float
    unit: str
    meaning: str
    reason: str


ASSUMPTIONS = {
    "matmul": Assumption(
        0.70,
        "of the peak",
        "projections, feed-forward, output layer",
        "FlashAttention-3 (arXiv 2407.08608) gives 0.80-0.90 for good GEMMs on H100; less for smaller shapes, clocks",
    ),
    "attention": Assumption(
        0.25,
        "of the peak",
        "chunked attention, on the tiles that it executes",
        "FlashAttention-2 reaches 0.35 on H100 (arXiv 2407.08608); kernels that take a mask are slower",
    ),
    "memory": Assumption(
        0.80,
        "of the peak",
        "norms, rotary, SwiGLU, loss, optimizer",
        "streaming kernels commonly reach 0.8 to 0.9 of the bandwidth",
    ),
    "nvlink": Assumption(
        0.80, "of the peak", "collectives within a node", "nccl-tests on 8 H100: about 360 of 450 GB/s bus bandwidth"
    ),
    "infiniband": Assumption(
        0.85, "of the peak", "collectives between nodes", "nccl-tests: about 43 of 50 GB/s a card; no congestion"
    ),
    "touches": Assumption(
        4.0,
        "passes",
        "memory traffic of a layer, in units of the activations it saves",
        "written and read in forward, read in backward beside a gradient of the same size",
    ),
    "loss_touches": Assumption(
        8.0,
        "passes",
        "memory traffic of the loss, in units of its float32 logits",
        "written, max, subtract, exp, sum, scale, read by two products; float32 read and written, bfloat16 half of it",
    ),
    "hidden": Assumption(
        0.90,
        "of the traffic",
        "data-parallel traffic that compute can hide: --overlap-grad-reduce, --overlap-param-gather",
        "all buckets but the last travel while other layers compute; TP, CP, PP and EP traffic hides behind nothing",
    ),
    "reserve": Assumption(
        3.0,
        "GiB",
        "CUDA context, NCCL buffers, fragmentation; part of memory_gib",
        "1 to 2 GiB of context and NCCL channels, and slack for the allocator",
    ),
}


def efficiency(name: str) -> float:
    """Return the assumed value of ``name``, a key of ``ASSUMPTIONS``."""
    return ASSUMPTIONS[name].value
