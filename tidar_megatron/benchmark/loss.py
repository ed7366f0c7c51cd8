"""The chunked output layer and cross-entropy against megatron-core's, which computes all logits, then their loss."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from tidar_megatron.benchmark.measuring import Timings, peak_bytes, rounded
from tidar_megatron.config import ParallelConfig
from tidar_megatron.distributed.groups import initialize, shut_down
from tidar_megatron.distributed.platform import has_gpu
from tidar_megatron.models.cross_entropy import linear_cross_entropy

HIDDEN, VOCABULARY, TOKENS = 256, 49152, 4096


def loss(
    repeats: int, hidden_size: int | None = None, vocabulary: int | None = None, tokens: int | None = None
) -> dict[str, Any]:
    """Measure the ratios of peak memory and time of forward and backward, and the largest relative gradient error.

    Args:
        repeats: rounds of measurements.
        hidden_size: the width of the hidden states; by default :data:`HIDDEN`.
        vocabulary: the number of ids; by default :data:`VOCABULARY`.
        tokens: the number of tokens; by default :data:`TOKENS`.
    """
    hidden_size, vocabulary, tokens = hidden_size or HIDDEN, vocabulary or VOCABULARY, tokens or TOKENS
    ranks = initialize(ParallelConfig(), seed=0)
    try:
        dtype = torch.bfloat16 if has_gpu() else torch.float32
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(tokens, hidden_size, generator=generator).to(ranks.device, dtype)
        weight = (torch.randn(vocabulary, hidden_size, generator=generator) * 0.05).to(ranks.device, dtype)
        labels = torch.randint(vocabulary, (tokens,), generator=generator).to(ranks.device)
        weights = torch.rand(tokens, generator=generator).to(ranks.device)

        def fused(hidden: Tensor, weight: Tensor) -> Tensor:
            return linear_cross_entropy(hidden, weight, labels, weights, ranks.groups.tp, vocabulary)[0]

        def unfused(hidden: Tensor, weight: Tensor) -> Tensor:
            logits = (hidden @ weight.t()).float().unsqueeze(1)
            return (vocab_parallel_cross_entropy(logits, labels.unsqueeze(1)).squeeze(1) * weights).sum()

        runs = {"chunked": _both_ways(fused, hidden, weight), "unfused": _both_ways(unfused, hidden, weight)}
        peaks = {name: peak_bytes(run) for name, run in runs.items()}
        grads = {name: run() for name, run in runs.items()}
        errors = [
            float((ours - theirs).norm() / theirs.norm())
            for ours, theirs in zip(grads["chunked"], grads["unfused"], strict=True)
        ]
        times = Timings(runs, repeats)
    finally:
        shut_down()
    ratio = times.ratio("chunked", "unfused")
    return {
        "settings": {"hidden_size": hidden_size, "vocabulary": vocabulary, "tokens": tokens, "dtype": str(dtype)},
        "peak_ratio": round(peaks["chunked"] / peaks["unfused"], 4),
        "time_ratio": round(ratio.median, 3),
        "spread": rounded(ratio),
        "peak_bytes": peaks,
        "seconds": {name: rounded(times.of(name)) for name in runs},
        "largest_gradient_error": max(errors),
    }


def _both_ways(loss: Callable[..., Tensor], *tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    def run() -> tuple[Tensor, ...]:
        inputs = [tensor.detach().requires_grad_() for tensor in tensors]
        return torch.autograd.grad(loss(*inputs), inputs)

    return run
