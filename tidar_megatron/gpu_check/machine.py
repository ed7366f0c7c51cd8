"""Section 0: the versions of everything, and what this machine can reach: matrix products, copies, launches."""

import os
import platform
import subprocess
import sys
from functools import partial
from importlib import metadata
from typing import Any

import torch

from tidar_megatron.benchmark.timing import median_seconds
from tidar_megatron.gpu_check.setting import NOT_ON_A_CPU, Setting

PACKAGES = (
    "tidar-megatron",
    "torch",
    "triton",
    "transformers",
    "megatron-core",
    "transformer-engine",
    "apex",
    "flash-attn",
    "numpy",
)
VARIABLES = (
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "NVIDIA_TF32_OVERRIDE",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)
LAUNCHES = 200


def check(setting: Setting) -> None:
    """Find the machine's description, its versions and its ceilings."""
    setting.found |= {"machine": _machine(setting), "versions": _versions(), "environment": _environment()}
    machine, versions = setting.found["machine"], setting.found["versions"]
    setting.found["ceilings"] = ceilings = _ceilings(setting)
    setting.summary += [
        f"{machine.get('gpu') or machine['processor']}, driver {machine.get('driver')}, torch {torch.__version__}, "
        f"megatron-core {versions['megatron-core']}, transformers {versions['transformers']}",
        ", ".join(f"{name.replace('_', ' ')} {value:,.4g}" for name, value in ceilings.items() if value is not None),
    ]


def bf16_flops(setting: Setting) -> float:
    """Return the FLOP/s of a large bfloat16 matrix product of random numbers, measured now."""
    n = setting.size(8192, 256)
    a, b = (torch.randn(n, n, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / median_seconds(lambda: a @ b, setting.device, samples=setting.size(9, 2), warm_up=3)


def _machine(setting: Setting) -> dict[str, Any]:
    shown: dict[str, Any] = {"processor": _processor(), "cores": os.cpu_count(), "platform": platform.platform()}
    shown |= {"python": sys.version.split()[0], "threads": torch.get_num_threads(), "host": platform.node()}
    if not setting.on_gpu:
        return shown | {"gpu": None, "driver": None, "note": f"{NOT_ON_A_CPU}: driver, GPU, pinned copies, graphs"}
    properties = torch.cuda.get_device_properties(setting.device)
    return shown | {
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "capability": list(torch.cuda.get_device_capability(setting.device)),
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 2),
        "free_gib": round(torch.cuda.mem_get_info(setting.device)[0] / 2**30, 2),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": list(torch.cuda.nccl.version()) if torch.distributed.is_nccl_available() else None,
        "architectures": torch.cuda.get_arch_list(),
    }


def _processor() -> str:
    try:
        from tidar_megatron.inference.costs import processor  # needs transformers, which may be missing
    except ImportError:
        return platform.machine()
    return processor()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip()


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__
    return found


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def _ceilings(setting: Setting) -> dict[str, float | None]:
    where, samples = setting.device, setting.size(9, 2)
    flops = bf16_flops(setting)
    n = setting.size(4096, 128)
    square = torch.randn(n, n, device=where)
    fp32_seconds = median_seconds(lambda: square @ square, where, samples)
    source = torch.empty(setting.size(2**31, 2**20), dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    copy_seconds = median_seconds(lambda: target.copy_(source), where, samples)
    small = torch.zeros(1, device=where)
    launch_seconds = median_seconds(lambda: small.add_(1), where, samples)
    found = {
        "bf16_tflops": flops / 1e12,
        "fp32_tflops": 2 * n**3 / fp32_seconds / 1e12,
        "copy_gb_per_second": 2 * source.numel() / copy_seconds / 1e9,  # read and written
        "launch_microseconds": 1e6 * launch_seconds,
        "host_to_device_gb_per_second": None,
        "pinned_to_device_gb_per_second": None,
        "launch_in_graph_microseconds": None,
        "wait_microseconds": None,
    }
    if not setting.on_gpu:
        return found
    part = source[: setting.size(2**28, 2**20)]
    for name, pinned in (("host", False), ("pinned", True)):
        on_host = torch.zeros(part.numel(), dtype=torch.uint8, pin_memory=pinned)
        seconds = median_seconds(partial(part.copy_, on_host, non_blocking=True), where, samples)
        found[f"{name}_to_device_gb_per_second"] = part.numel() / seconds / 1e9
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(where), torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            small.add_(1)
    found["launch_in_graph_microseconds"] = 1e6 * median_seconds(graph.replay, where, samples) / LAUNCHES
    found["wait_microseconds"] = 1e6 * median_seconds(small.item, where, samples)
    return found
