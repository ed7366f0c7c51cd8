"""Section 8: the chunked output layer with its loss against torch's, which computes all logits at once."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar_megatron.benchmark.timing import median_seconds
from tidar_megatron.gpu_check.setting import NOT_ON_A_CPU, Setting
from tidar_megatron.models.cross_entropy import linear_cross_entropy

LARGEST_ERROR = 2e-2  # of the gradients in bfloat16: norm of the difference over the norm of torch's


class _Alone:
    """The group of a single rank."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def check(setting: Setting) -> None:
    """Find time, peak memory and gradient error of both, at the sizes of an 8B model's output layer."""
    tokens, hidden_size, vocabulary = setting.size((8192, 4096, 151936), (256, 32, 512))
    generator = torch.Generator(setting.device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=setting.device, dtype=torch.bfloat16)

    hidden, weight = draw(tokens, hidden_size), draw(vocabulary, hidden_size) * 0.02
    labels = torch.randint(vocabulary, (tokens,), generator=generator, device=setting.device)
    weights = torch.rand(tokens, generator=generator, device=setting.device) / tokens

    def chunked(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, weights, _Alone(), vocabulary)[0]

    def whole(hidden: Tensor, weight: Tensor) -> Tensor:
        return (F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="none") * weights).sum()

    def both_ways(loss: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        inputs = [tensor.detach().requires_grad_() for tensor in (hidden, weight)]
        value = loss(*inputs)
        return [value.detach(), *torch.autograd.grad(value, inputs)]

    setting.found |= {"tokens": tokens, "hidden_size": hidden_size, "vocabulary": vocabulary, "dtype": "bfloat16"}
    setting.found |= {} if setting.on_gpu else {"note": f"{NOT_ON_A_CPU}: peak memory"}
    rows: dict[str, dict[str, Any]] = {}
    setting.found["rows"] = rows
    for name, loss in (("chunked", chunked), ("whole", whole)):
        run = partial(both_ways, loss)
        seconds = median_seconds(run, setting.device, setting.size(5, 1))
        flops = 3 * 2 * tokens * hidden_size * vocabulary
        rows[name] = {"milliseconds": 1e3 * seconds, "tflops": flops / seconds / 1e12}
        rows[name] |= {"peak_extra_bytes": setting.peak_extra_bytes(run)}
    (ours, *gradients), (theirs, *expected) = both_ways(chunked), both_ways(whole)
    errors = [float((a.float() - b).norm() / b.float().norm()) for a, b in zip(gradients, expected, strict=True)]
    off = abs(float(ours - theirs) / float(theirs))
    setting.found |= {"loss_error": off, "gradient_errors": errors}
    for name, error in zip(("hidden", "weight"), errors, strict=True):
        setting.require(error <= LARGEST_ERROR, f"the gradient of {name}: relative error {error:.2g}")
    setting.require(off <= 1e-3, f"the loss: relative error {off:.2g}")
    for name, row in rows.items():
        peak = row["peak_extra_bytes"]
        memory = NOT_ON_A_CPU if peak is None else f"{peak / 2**30:.2f} GiB"
        setting.summary.append(f"{name}: {row['milliseconds']:.1f} ms, {row['tflops']:.3g} TFLOP/s, peak {memory}")
