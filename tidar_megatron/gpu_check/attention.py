"""Section 1: every attention backend against the dense one in float64, forward and backward, then their speed."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tidar_megatron.attention_mask import training_layout
from tidar_megatron.benchmark.timing import median_seconds
from tidar_megatron.gpu_check.setting import NOT_ON_A_CPU, Setting
from tidar_megatron.models.attention import hybrid_attention, make_schedule

BLOCK, CHUNK = 16, 256
LARGEST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # norm of the error over the norm of the reference
NO_FLEX = f"{NOT_ON_A_CPU}: flex's backward"
NAMES = ("out", "d_query", "d_key", "d_value")


def check(setting: Setting) -> None:
    """Find the errors of each backend, dtype and layout, and the times of each backend and length."""
    with setting.part(0.5):
        errors = setting.rows("errors")
        _errors(setting, errors)
    worst = {row["backend"]: 0.0 for row in errors if "errors" in row}
    for row in errors:
        if "errors" in row and row["dtype"] == "bfloat16":
            worst[row["backend"]] = max(worst[row["backend"]], *row["errors"].values())
    setting.summary.append("largest relative error in bf16: " + ", ".join(f"{n} {v:.2g}" for n, v in worst.items()))
    times = setting.rows("times")
    _times(setting, times)
    for row in times:
        if "milliseconds" in row:
            setting.summary.append(
                f"S = {row['seq_length']}, {row['fraction']:.0%} of the blocks, {row['backend']}: "
                f"{row['milliseconds']:.2f} ms, {row['over_causal']:.2f} of causal attention's"
            )


def backends(setting: Setting) -> list[str]:
    """Return the backends to compare with the dense one."""
    fused = ["transformer_engine"] if setting.on_gpu and find_spec("transformer_engine") else []
    return ["chunked", "flex", *fused]


def layout(length: int, documents: int, fraction: float) -> Tensor:
    """Return the metadata of a row of equal documents, of which only a fraction of the blocks have masks.

    Returns:
        int32 ``[1, L, 4]`` on the host.
    """
    each = length // documents
    place = torch.arange(length)[None]
    visibility = training_layout(place // each, place % each, BLOCK)
    blocks = length // BLOCK
    chosen = torch.randperm(blocks, generator=torch.Generator().manual_seed(0))[: max(1, round(fraction * blocks))]
    masks = (chosen.sort().values[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
    return visibility[:, torch.cat([torch.arange(length), length + masks])]


def _tensors(setting: Setting, tokens: int, heads: int, kv_heads: int, channels: int, dtype: torch.dtype) -> Any:
    generator = torch.Generator(setting.device).manual_seed(0)
    shapes = [(1, count, tokens, channels) for count in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator, device=setting.device).to(dtype) for shape in shapes]


def _both_ways(attend: Callable[..., Tensor], tensors: list[Tensor], backward: bool = True) -> list[Tensor]:
    *given, upstream = tensors
    inputs = [tensor.detach().requires_grad_(backward) for tensor in given]
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)] if backward else [out]


def _errors(setting: Setting, rows: list[dict[str, Any]]) -> None:
    length, heads, kv_heads, channels = setting.size((1024, 8, 2, 128), (64, 4, 2, 16))
    if setting.on_gpu and not find_spec("transformer_engine"):
        rows.append({"backend": "transformer_engine", "note": "is not installed"})
    if not setting.on_gpu:
        rows.append({"backend": "transformer_engine", "note": NOT_ON_A_CPU})
    for documents, fraction in ((1, 1.0), (4, 1.0), (4, 0.25)):
        visibility = layout(length, documents, fraction)
        for dtype in (torch.float32, torch.bfloat16):
            tensors = _tensors(setting, visibility.shape[1], heads, kv_heads, channels, dtype)
            exact = _attending(setting, visibility, "dense", channels)
            expected = _both_ways(exact, [tensor.double() for tensor in tensors])
            for backend in backends(setting):
                if not setting.in_time():
                    return
                if backend == "transformer_engine" and dtype == torch.float32:
                    continue  # its fused kernels do not have it
                kind = str(dtype).removeprefix("torch.")
                where = f"{backend}, {kind}, {documents} documents, {fraction:g} of the blocks"
                row: dict[str, Any] = {"backend": backend, "dtype": kind, "seq_length": length}
                row |= {"documents": documents, "fraction": fraction}
                backward = setting.on_gpu or backend != "flex"
                with setting.guard(where):
                    ours = _both_ways(_attending(setting, visibility, backend, channels), tensors, backward)
                    errors = {
                        name: float((mine.double() - theirs).norm() / theirs.norm())
                        for name, mine, theirs in zip(NAMES, ours, expected, strict=False)
                    }
                    rows.append(row | {"errors": errors} | ({} if backward else {"note": NO_FLEX}))
                    for name, error in errors.items():
                        holds = error <= LARGEST_ERROR[dtype]
                        setting.require(holds, f"{where}, {name}: relative error {error:.2g}")


def _attending(setting: Setting, visibility: Tensor, backend: str, channels: int) -> Callable[..., Tensor]:
    schedule = make_schedule(visibility, backend=backend, chunk_size=CHUNK, device=str(setting.device))
    return lambda query, key, value: hybrid_attention(query, key, value, schedule, channels**-0.5)


def _times(setting: Setting, rows: list[dict[str, Any]]) -> None:
    """Time forward and backward in bfloat16 at the heads of an 8B model."""
    heads, kv_heads, channels = setting.size((32, 8, 128), (2, 1, 16))
    samples = setting.size(5, 1)
    for length in setting.size((4096, 16384), (64,)):
        S = slice(length)
        clean = [t[:, :, S].contiguous() for t in _tensors(setting, length, heads, kv_heads, channels, torch.bfloat16)]
        causal = median_seconds(partial(_both_ways, _causal, clean), setting.device, samples)
        for fraction in (1.0, 0.25):
            visibility = layout(length, 1, fraction)
            tensors = _tensors(setting, visibility.shape[1], heads, kv_heads, channels, torch.bfloat16)
            for backend in backends(setting):
                if not setting.in_time():
                    return
                row: dict[str, Any] = {"seq_length": length, "fraction": fraction, "backend": backend}
                if backend == "flex" and not setting.on_gpu:
                    rows.append(row | {"note": NO_FLEX})
                    continue
                with setting.guard(f"{backend}, S = {length}, {fraction:g} of the blocks"):
                    run = partial(_both_ways, _attending(setting, visibility, backend, channels), tensors)
                    seconds = median_seconds(run, setting.device, samples)
                    row |= {"milliseconds": 1e3 * seconds, "over_causal": seconds / causal}
                    row |= {"causal_milliseconds": 1e3 * causal}
                    row |= {"peak_extra_bytes": setting.peak_extra_bytes(run)}
                    rows.append(row)


def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
