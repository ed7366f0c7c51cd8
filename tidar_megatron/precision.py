"""Full float32 precision for comparisons, also where the environment lets matrix products round to TF32."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32(tell: bool = True) -> Iterator[None]:
    """Compute float32 matrix products in full precision in this block.

    NVIDIA's containers set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, which allows TF32 on a GPU. TF32 keeps 10 bits of each
    factor, an error of 5e-4, which is more than comparisons in float32 allow.

    Args:
        tell: Whether to say in one line on standard error that a lower precision was set.
    """
    before = torch.get_float32_matmul_precision()
    if tell and before != "highest":
        print(
            f"note: the float32 matmul precision is {before!r} (TF32; TORCH_ALLOW_TF32_CUBLAS_OVERRIDE sets it), "
            "but this comparison computes in full float32",
            file=sys.stderr,
        )
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
