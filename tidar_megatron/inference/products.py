"""Matrix products of a decode forward with weights in the layout that the processor's kernels prefer.

A forward of few tokens is bound by reading the weights, and oneDNN, which torch uses on CPUs, reads a weight faster if
it was laid out for oneDNN once. A row then has the same bits however many rows a product has, from :data:`ROWS` on.
What was measured is in docs/decisions/bits.md.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rounds_once(device: torch.device) -> bool:
    """Return whether kernels of this device round once where transformers' modules round twice: those of a GPU."""
    return device.type == "cuda"


class Kernel(NamedTuple):
    """A product as ``lean.cpp`` computes it: the name of the kernel, its tensors, the bias, and some sizes."""

    name: str
    tensors: list[Tensor]
    bias: Tensor | None
    sizes: tuple[int, ...] = ()


class Product(NamedTuple):
    """A product with fixed weights.

    Attributes:
        of: Returns the product of rows, ``[tokens, in]`` -> ``[tokens, out]``.
        added: Returns a residual ``[tokens, out]`` plus the product of rows.
        kernel: The same product for C++; None if it only runs from Python.
    """

    of: Callable[[Tensor], Tensor]
    added: Callable[[Tensor, Tensor], Tensor]
    kernel: Kernel | None = None

    @staticmethod
    def apart(of: Callable[[Tensor], Tensor], kernel: Kernel | None = None) -> "Product":
        """Return a product whose addition is a call of its own, and rounds as transformers' modules do."""
        return Product(of, lambda residual, rows: residual + of(rows), kernel)


ProductOf = Callable[[Tensor, Tensor | None], Product]  # of a weight, ``[out, in]``, and a bias
SMALL = 2**20  # bytes of a weight that stays in a cache: oneDNN's calls cost more there than they save
ROWS = 4  # the fewest rows of a packed product: a single row is added up in another order, and is no faster
_EXPECTED_ROWS = 16  # tells oneDNN which layout to choose


def can_pack(weight: Tensor) -> bool:
    """Return whether oneDNN multiplies weights of this dtype on this device from a layout of its own."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def packed(weight: Tensor, bias: Tensor | None) -> Product:
    """Return the product with a copy of ``weight``, ``[out, in]``, in oneDNN's layout; see :func:`can_pack`."""
    blocks = _in_blocks(weight)
    return Product(
        of=lambda rows: _linear(rows, blocks, bias, "none", [], ""),
        added=lambda residual, rows: _linear_with(rows, residual, blocks, bias, "add"),
        kernel=Kernel("packed", [blocks], bias),
    )


def least_rows(product: Product) -> int:
    """Return the fewest rows of a product whose rows have the same bits however many there are."""
    return ROWS if product.kernel is not None and product.kernel.name == "packed" else 1


_linear = torch.ops.mkldnn._linear_pointwise.default
_linear_with = torch.ops.mkldnn._linear_pointwise.binary


def _in_blocks(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _EXPECTED_ROWS)


def plain(weight: Tensor, bias: Tensor | None) -> Product:
    """Return the product with ``weight``, ``[out, in]``, as it is; a GPU adds to the residual in the same kernel."""
    product = Product.apart(lambda rows: F.linear(rows, weight, bias), Kernel("plain", [weight], bias))
    if not rounds_once(weight.device) or bias is not None:
        return product
    transposed = weight.t()
    return product._replace(added=lambda residual, rows: torch.addmm(residual, rows, transposed))


def laid_out(weight: Tensor, bias: Tensor | None) -> Product:
    """Return :func:`packed` where it can be, else :func:`plain`."""
    return (packed if can_pack(weight) else plain)(weight, bias)


LONGEST = 4096  # inputs of a product of lean.cpp: the part of a weight that it multiplies at once stays in a cache


def of_library(library: ModuleType) -> ProductOf:
    """Return the products of a CPU where ``lean.cpp`` is compiled: its own, if the processor has AVX-512.

    A row of these has the same bits however many rows there are, and no row of padding is needed. Other weights are
    :func:`laid_out`.
    """

    def product_of(weight: Tensor, bias: Tensor | None) -> Product:
        outputs, inputs = weight.shape
        fits = outputs % 16 == 0 and inputs % 2 == 0 and inputs <= LONGEST
        if not fits or not library.has_own_kernels(weight.dtype):
            return laid_out(weight, bias)
        kernel = Kernel("own", [library.laid_out(weight)], bias)
        product = library.Product(*kernel)
        return Product(product.of, product.added, kernel)

    return product_of


def side_by_side(modules: Sequence[nn.Linear]) -> Product:
    """Return the product with the current weights of several modules, their outputs side by side."""
    if len(modules) == 1:
        return Product.apart(modules[0])
    return Product.apart(lambda rows: torch.cat([F.linear(rows, m.weight, m.bias) for m in modules], -1))


@torch.no_grad()
def take_weights(modules: Sequence[nn.Linear], product_of: ProductOf = laid_out) -> Product:
    """Return one product with the weights of several modules, which lose them.

    The modules keep weights without memory (:func:`leave_no_weights`).
    """
    weight = torch.cat([module.weight for module in modules]) if len(modules) > 1 else modules[0].weight.detach()
    biases = [module.bias for module in modules]
    bias = torch.cat(biases) if len(modules) > 1 and biases[0] is not None else biases[0]
    product = product_of(weight, bias)
    leave_no_weights(modules)
    return product


def leave_no_weights(modules: Sequence[nn.Module]) -> None:
    """Replace the weights of modules by weights without memory, on the meta device."""
    for module in modules:
        module.weight = nn.Parameter(module.weight.to("meta"), requires_grad=False)
