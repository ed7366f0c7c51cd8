"""Matrix products with weights of 8 or 4 bits.

``int8`` has one scale per output and quantizes each row of activations to 8 bits too. Its sums are integers, so a row
has the same bits however many rows a product has. Inputs are balanced first, as in SmoothQuant (arXiv 2211.10438): a
few of them are far larger than the others and would decide the steps of all. ``int4`` has a scale and a zero per output
and 32 inputs; its activations stay as they are. It reads the fewest bytes, but its kernel is slow for many rows.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar_megatron.errors import UserError
from tidar_megatron.inference.products import Kernel, Product

GROUP = 32  # inputs that share a scale and a zero in int4
_OUTPUTS = 64  # torch's int4 kernel lays out as many outputs together
_LEAST = 1e-30  # of a largest value, which divides


def to_int8(weight: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight as values int8 ``[out, in]`` of -127 .. 127, with two scales.

    Args:
        weight: The weight, ``[out, in]``.
        inputs: The largest magnitude of each input, float32 ``[in]``.

    Returns:
        The values; scales, float32 ``[out]``; and factors of the inputs, float32 ``[in]``, which make their magnitudes
        more equal: value * scale * factor is the weight.
    """
    wide = weight.float()
    factors = (_positive(wide.abs().amax(0)) / _positive(inputs)).sqrt_()
    wide = wide / factors
    scales = wide.abs().amax(1).div_(127).clamp_(min=_LEAST)
    return (wide / scales[:, None]).round_().to(torch.int8), scales, factors


def _positive(magnitudes: Tensor) -> Tensor:
    """Return magnitudes of at least a hundredth of their mean, so that what was never large has a moderate factor."""
    return magnitudes.clamp(min=max(_LEAST, magnitudes.mean().item() / 100))


def int8_product(values: Tensor, scales: Tensor, factors: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Product:
    """Return the product of rows of ``dtype`` with :func:`to_int8`'s tensors.

    Processors that do not add up bytes exactly run torch's kernel for 8-bit weights, which leaves the rows as they are.
    """
    if not _adds_integers():
        scales = scales.to(dtype)
        return _product(
            lambda rows: torch.ops.aten._weight_int8pack_mm((rows * factors).to(dtype), values, scales), bias
        )
    blocks = _in_blocks(values)
    zeros = torch.zeros(len(scales), dtype=torch.int32)
    scales = scales / 127  # rows are divided by their largest value, not by a 127th of it

    def of(rows: Tensor) -> Tensor:
        wide = rows * factors
        largest = wide.abs().amax(-1, keepdim=True).clamp_(min=_LEAST)
        # bytes with a zero of 128, which is what oneDNN is fast for; torch converts to int8 faster than to uint8
        bytes_ = wide.mul(127 / largest).round_().to(torch.int8).view(torch.uint8).bitwise_xor_(128)
        product = _integer_linear(bytes_, blocks, scales, zeros)
        return product.mul_(largest).to(dtype)

    return _product(of, bias, Kernel("int8", [blocks, scales, zeros, factors], bias))


def _integer_linear(rows: Tensor, blocks: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Return ``(rows - 128) @ values.T * scales``, float32, of bytes and of int8 values in oneDNN's layout."""
    product = torch.ops.onednn.qlinear_pointwise.default
    return product(rows, 1.0, 128, blocks, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")


def _in_blocks(values: Tensor) -> Tensor:
    return torch.ops.onednn.qlinear_prepack(values, [16, values.shape[1]])


@cache
def _adds_integers() -> bool:
    """Return whether oneDNN multiplies bytes exactly here; processors without VNNI saturate sums at 16 bits."""
    values = torch.full((64, 256), 127, dtype=torch.int8)
    for count in (1, 16):
        rows = torch.full((count, 256), 255, dtype=torch.uint8)
        try:
            out = _integer_linear(rows, _in_blocks(values), torch.ones(64), torch.zeros(64, dtype=torch.int32))
        except (AttributeError, RuntimeError):  # torch without oneDNN's integer products
            return False
        if not (out == 127 * 127 * 256).all():
            return False
    return True


def to_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return values uint8 ``[out, in / 2]``, two to a byte, and scales and zeros ``[in / GROUP, out, 2]``.

    A weight is (value - 8) * scale + zero, of values 0 .. 15.

    Raises:
        UserError: the number of inputs is not a multiple of :data:`GROUP`.
    """
    rows, width = weight.shape
    if width % GROUP:
        raise UserError(f"quantize int4: a weight has {width} inputs, which {GROUP} does not divide; use int8")
    groups = weight.float().view(rows, width // GROUP, GROUP)
    lowest, highest = groups.aminmax(dim=-1)
    scales = ((highest - lowest) / 15).clamp_(min=1e-9).to(weight.dtype)
    zeros = (lowest + scales.float() * 8).to(weight.dtype)
    steps = (groups - zeros.float()[..., None]) / scales.float()[..., None] + 8
    values = steps.round_().clamp_(0, 15).to(torch.uint8).view(rows, width)
    return values[:, ::2] << 4 | values[:, 1::2], torch.stack([scales, zeros], -1).transpose(0, 1).contiguous()


def int4_product(values: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Product:
    """Return the product of rows of ``dtype`` with :func:`to_int4`'s tensors."""
    outputs = len(values)
    fill = -outputs % _OUTPUTS
    each = torch.stack([values >> 4, values & 15], -1).flatten(1).int()
    blocks = torch.ops.aten._convert_weight_to_int4pack_for_cpu(F.pad(each, (0, 0, 0, fill)), 1)
    scales = F.pad(scales, (0, 0, 0, fill)).to(dtype)

    def of(rows: Tensor) -> Tensor:
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(rows.contiguous(), blocks, GROUP, scales)
        return product[:, :outputs] if fill else product

    return _product(of, bias, Kernel("int4", [blocks, scales], bias, (outputs, GROUP)))


def _product(of: Callable[[Tensor], Tensor], bias: Tensor | None, kernel: Kernel | None = None) -> Product:
    return Product.apart(of if bias is None else lambda rows: of(rows) + bias, kernel)
