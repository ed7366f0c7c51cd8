"""The sections of the check in their order: where each is, and its share of the time."""

from collections.abc import Sequence
from typing import NamedTuple

BROKEN_DEVICE = 3  # a worker's exit status: its CUDA context is broken, and a new process must go on


class Section(NamedTuple):
    """A section: the module that holds it, whose ``check`` runs it, and its weight in the division of the time left."""

    name: str
    module: str
    weight: float
    about: str


_PACKAGE = "tidar_megatron.gpu_check"
SECTIONS = (
    Section("machine", f"{_PACKAGE}.machine", 15, "versions, and the ceilings of matrix products and copies"),
    Section("attention", f"{_PACKAGE}.attention", 90, "flex, chunked and fused attention against dense"),
    Section("runs", f"{_PACKAGE}.runs", 80, "tests/test_gpu.py, a run with --async-save, its resume"),
    Section("decode", f"{_PACKAGE}.decode", 40, "CUDA graphs against eager forwards"),
    Section("slots", f"{_PACKAGE}.slots", 110, "forward time for 1 to 272 tokens"),
    Section("speed", f"{_PACKAGE}.speed", 70, "tokens per second at batch 1, at scripted acceptance"),
    Section("step", f"{_PACKAGE}.step", 60, "a training step against AR's, at the shapes of an 8B model's layers"),
    Section("training", f"{_PACKAGE}.training", 40, "a step of a 1.5B model: tokens/s, MFU, peak memory"),
    Section("loss", f"{_PACKAGE}.loss", 15, "the output layer and its loss: peak memory and time"),
    Section("certificate", f"{_PACKAGE}.certificate", 40, "every plan's output against transformers'"),
)


def limit(remaining: Sequence[Section], seconds: float) -> float:
    """Return the seconds that the first of the remaining sections may take, of ``seconds`` that are left for all."""
    return max(0.0, seconds) * remaining[0].weight / sum(section.weight for section in remaining)
