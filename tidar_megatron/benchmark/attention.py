"""The time of attention, forward and backward, against plain causal attention on the same S clean tokens."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tidar_megatron.attention_mask import training_layout
from tidar_megatron.benchmark.measuring import Timings, peak_bytes, rounded
from tidar_megatron.distributed.platform import device, has_gpu
from tidar_megatron.models.attention import choose_backend, hybrid_attention, make_schedule

HEADS, CHANNELS, BLOCK = 8, 64, 16
DOCUMENTS = 16


def attention(
    seq_lengths: list[int],
    repeats: int,
    chunk_size: int = 256,
    dense_up_to: int = 4096,
    heads: int | None = None,
    channels: int | None = None,
) -> dict[str, Any]:
    """Compare each backend with causal attention, and measure the effect of grouped K/V heads and of packing.

    Args:
        seq_lengths: clean tokens per sequence, S.
        repeats: rounds of measurements.
        chunk_size: the chunk size of the chunked backend, in tokens.
        dense_up_to: the longest sequence to measure the dense backend on.
        heads: query heads; by default :data:`HEADS`.
        channels: channels of a head; by default :data:`CHANNELS`.

    Returns:
        ``rows``, one for each length and backend; ``grouped`` and ``packed``, one row for each length.
        ``peak_extra_bytes`` is the peak of forward and backward, including the schedule, beyond the output and the
        gradients that every backend returns.
    """
    heads, channels = heads or HEADS, channels or CHANNELS
    backends = ["chunked", "flex"] if has_gpu() else ["chunked"]
    backends += [best] if (best := choose_backend("auto", device().type, channels, has_gpu())) not in backends else []
    rows, grouped, packed = [], [], []
    for S in seq_lengths:
        one = _documents(S, 1)
        shown = [*backends, "dense"] if dense_up_to >= S else backends
        tensors = _tensors(2 * S, heads, heads, channels)
        runs: dict[str, Callable[[], object]] = {"causal": _causal([t[:, :, :S].contiguous() for t in tensors])}
        for backend in shown:
            runs[backend] = _hybrid(tensors, one, backend, chunk_size)
        if has_gpu():
            runs["causal, cuDNN"] = _causal([t[:, :, :S].contiguous() for t in tensors], SDPBackend.CUDNN_ATTENTION)
        times = Timings(runs, repeats)
        for name in [name for name in runs if name != "causal"]:
            spread = times.ratio(name, "causal")
            row = {"seq_length": S, "backend": name, "over_causal": round(spread.median, 3), "spread": rounded(spread)}
            row |= {"seconds": rounded(times.of(name))}
            if name in shown:
                row |= {"peak_extra_bytes": _extra(tensors, one, name, chunk_size)}
            rows.append(row)
        best = backends[-1]
        few = _tensors(2 * S, heads, 1, channels)
        alike = Timings(
            {"grouped": _hybrid(few, one, best, chunk_size), "each its own": _hybrid(tensors, one, best, chunk_size)},
            repeats,
        )
        ratio = alike.ratio("grouped", "each its own")
        grouped.append(
            {"seq_length": S, "backend": best, "query_heads": heads, "kv_heads": 1}
            | {"over_own_kv_heads": round(ratio.median, 3), "spread": rounded(ratio)}
            | {"peak_bytes": peak_bytes(_hybrid(few, one, best, chunk_size))}
            | {"peak_bytes_expanded": peak_bytes(_hybrid(few, one, best, chunk_size, expanded=True))}
        )
        many = _documents(S, DOCUMENTS)
        together = Timings(
            {"packed": _hybrid(tensors, many, best, chunk_size), "one": _hybrid(tensors, one, best, chunk_size)},
            repeats,
        )
        ratio = together.ratio("packed", "one")
        packed.append(
            {"seq_length": S, "backend": best, "documents": DOCUMENTS}
            | {"over_one_document": round(ratio.median, 3), "spread": rounded(ratio)}
        )
    settings = {"heads": heads, "channels": channels, "block_size": BLOCK, "chunk_size": chunk_size}
    return {"settings": settings, "rows": rows, "grouped": grouped, "packed": packed}


def _documents(length: int, count: int) -> Tensor:
    """Return the metadata of the doubled sequence of ``count`` documents of equal length."""
    place = torch.arange(length)[None]
    each = length // count
    return training_layout(place // each, place % each, BLOCK)


def _tensors(tokens: int, heads: int, kv_heads: int, channels: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if has_gpu() else torch.float32
    shapes = [(1, count, tokens, channels) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator).to(device(), dtype) for shape in shapes]


def _hybrid(
    tensors: list[Tensor],
    visibility: Tensor,
    backend: str,
    chunk_size: int,
    expanded: bool = False,
    grad: Tensor | None = None,
) -> Callable[[], list[Tensor]]:
    """Return a function that runs hybrid attention both ways; ``expanded`` repeats K/V heads for each query head."""
    schedule = make_schedule(visibility, backend=backend, chunk_size=chunk_size, device=str(device()))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if expanded:
            key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in (key, value))
        return hybrid_attention(query, key, value, schedule, query.shape[-1] ** -0.5)

    return _both_ways(tensors, attend, grad)


def _causal(tensors: list[Tensor], kernel: SDPBackend = SDPBackend.FLASH_ATTENTION) -> Callable[[], object]:
    def attend(*inputs: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(*inputs, is_causal=True)

    return _both_ways(tensors, attend)


def _both_ways(
    tensors: list[Tensor], attend: Callable[..., Tensor], grad: Tensor | None = None
) -> Callable[[], list[Tensor]]:
    grad = torch.ones_like(tensors[0]) if grad is None else grad

    def run() -> list[Tensor]:
        inputs = [tensor.detach().requires_grad_() for tensor in tensors]
        out = attend(*inputs)
        return [out, *torch.autograd.grad(out, inputs, grad)]

    return run


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _extra(tensors: list[Tensor], visibility: Tensor, backend: str, chunk_size: int) -> int:
    grad, results = torch.ones_like(tensors[0]), []
    peak = peak_bytes(lambda: results.extend(_hybrid(tensors, visibility, backend, chunk_size, grad=grad)()))
    return max(0, peak - sum(_bytes(tensor) for tensor in results))
