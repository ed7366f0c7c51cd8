"""The dtype that a model runs in: one that is named, or ``auto``, which is chosen for the device.

On a GPU ``auto`` is bfloat16. On a CPU it is bfloat16 if the processor has instructions for it and if a timed matrix
product is faster in it, else float32. The dtype of the stored weights does not matter.
"""

import hashlib
import json
import math
import time
from functools import cache

import torch
import torch.nn.functional as F

from tidar_megatron.errors import UserError
from tidar_megatron.files import cache_folder, replace_text
from tidar_megatron.inference.costs import processor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # keys of torch.cpu.get_capabilities; the last one is Arm's
WEIGHT = (12288, 2048)  # the shape of the timed weight: 96 MiB in float32, more than most caches hold
ROWS, ROUNDS = (1, 16), 3  # tokens of the timed products, as in AR and with drafts, and how often each is timed
SMALL_MODEL = 32 * 2**20  # bytes
LEAST_SPEEDUP = 1.1  # bfloat16 rounds more, so it must gain more than noise


def choose_dtype(name: str | torch.dtype | None, device: torch.device, weight_bytes: float = math.inf) -> torch.dtype:
    """Return the dtype of that name; for ``auto`` or None, the one chosen for the device and the size of the model.

    Args:
        name: The name, a dtype, ``auto``, or None for ``auto``.
        device: The device of the model.
        weight_bytes: The bytes of the stored weights. On a CPU small ones stay in a cache and run in float32.

    Raises:
        UserError: the name is not one of a supported dtype.
    """
    if name is None or name == "auto":
        return torch.float32 if device.type == "cpu" and weight_bytes < SMALL_MODEL else _automatic(device)[0]
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, name, None)
    if dtype not in DTYPES:
        raise UserError(f"dtype {name!r}: use float32, bfloat16, float16, float64 or auto")
    return dtype


def dtype_note(name: str | None, device: torch.device, chosen: torch.dtype | None = None) -> str | None:
    """Return a line that tells what ``auto`` chose, and why; None if a dtype is named.

    Args:
        name: The name that was given.
        device: The model's device.
        chosen: The model's dtype; None for that of a model that is not small.
    """
    if name not in (None, "auto"):
        return None
    dtype, reason = _automatic(device)
    if chosen not in (None, dtype):
        dtype, reason = torch.float32, "weights this small stay in the processor's cache, where bfloat16 gains nothing"
    return f"dtype: {dtype_name(dtype)} (auto: {reason})"


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name that users give: ``float32``, not ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def _automatic(device: torch.device) -> tuple[torch.dtype, str]:
    """Return the dtype for the device, and the reason for it."""
    if device.type != "cpu":
        return torch.bfloat16, "the choice for a GPU"
    if not has_bfloat16():
        return torch.float32, "this processor has no instructions for bfloat16"
    speedup = _speedup(torch.get_num_threads())
    if speedup < LEAST_SPEEDUP:
        return torch.float32, f"matrix products in bfloat16 are only {speedup:.2f} x as fast here"
    return torch.bfloat16, f"matrix products are {speedup:.1f} x as fast as in float32 here"


def has_bfloat16() -> bool:
    """Return whether the processor has instructions that multiply bfloat16."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in INSTRUCTIONS)


@cache
def _speedup(threads: int) -> float:
    """Return :func:`measure_speedup`, cached on disk per processor, version of torch and number of threads."""
    what = json.dumps([processor(), torch.__version__, threads, WEIGHT, ROWS])
    path = cache_folder() / f"dtype-{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"
    try:
        speedup = json.loads(path.read_text(encoding="utf-8"))["bfloat16_speedup"]
        if isinstance(speedup, float) and 0 < speedup < math.inf:
            return speedup
    except (OSError, ValueError, TypeError, KeyError):
        pass
    speedup = measure_speedup()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps({"bfloat16_speedup": speedup}))
    except OSError:
        pass  # an unwritable cache: measure again next time
    return speedup


@torch.inference_mode()
def measure_speedup() -> float:
    """Return the CPU's time for a decode step's matrix products in float32, divided by that in bfloat16."""
    seconds = {(dtype, rows): math.inf for dtype in (torch.float32, torch.bfloat16) for rows in ROWS}
    weights = {dtype: torch.ones(WEIGHT, dtype=dtype, device="cpu") for dtype, _ in seconds}
    for _ in range(ROUNDS):  # interleaved; the minimum is kept, since noise only adds time
        for dtype, rows in seconds:
            tokens = torch.ones(rows, WEIGHT[1], dtype=dtype, device="cpu")
            start = time.perf_counter()
            F.linear(tokens, weights[dtype])
            seconds[dtype, rows] = min(seconds[dtype, rows], time.perf_counter() - start)
    slow, fast = (sum(seconds[dtype, rows] for rows in ROWS) for dtype in weights)
    return slow / fast
