"""Compile a part of decoding for this machine's CPU. No output changes, decoding becomes faster.

tidar compile
"""

import time

from tidar_megatron.program import OneLineParser, importing


def main() -> None:
    """Compile the library, and say where it is."""
    parser = OneLineParser(
        description="Compile the calls of a model's layers for this machine's CPU, once for each version of torch, "
        "Python and this package. Every program then decodes with them: the same tokens, bit for bit, in less time. "
        "Needs a C++ compiler and ninja."
    )
    parser.parse_args()
    with importing():
        from tidar_megatron.inference.native import compile_library
    start = time.perf_counter()
    path = compile_library()
    print(f"compiled in {time.perf_counter() - start:.0f} s: {path}")
