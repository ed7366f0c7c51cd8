"""The one entry point for attention, which hides the backend that serves it.

A *schedule* is what a backend derives, once per batch, from the visibility metadata and the predicate of
:mod:`tidar_megatron.attention_mask`. All layers share it. No backend knows the layout of the doubled sequence. The
FlexAttention backends derive it from a *plan*, which is made on the host before the step (``data/prefetch.py``).

======================  ===============================================================================================
``dense``               the reference: the full mask
``chunked``             portable: unmasked and masked tiles, no mask larger than a chunk (``tiles.py``, ``chunked.py``)
``flex``                FlexAttention with a BlockMask (``flex.py``): CUDA; on a CPU it has no backward
``transformer_engine``  a fused causal kernel for clean tokens, flex for mask tokens (``fused_clean.py``): CUDA
``auto``                the best backend that this machine has
======================  ===============================================================================================

Shapes: b batch, h query heads, g K/V heads (GQA: never expanded), G = h / g, t queries, k keys, d channels of a head.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Protocol

from torch import Tensor

from tidar_megatron.models.attention.chunked import ChunkedSchedule
from tidar_megatron.models.attention.dense import DenseSchedule


class AttentionSchedule(Protocol):
    """The tables that a backend has prepared for one batch."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Compute :func:`hybrid_attention` for the batch of this schedule."""


class AttentionPlan(Protocol):
    """The part of a schedule that is made on the host, ahead of the step."""

    def map(self, function: Callable[[Tensor], Tensor], /) -> "AttentionPlan":
        """Return the plan with ``function`` of each tensor: page-locked, or on a device."""

    def schedule(self) -> AttentionSchedule:
        """Return the schedule on the device of the tensors, without a wait for it."""


def choose_backend(backend: str, device_type: str, channels: int, bf16: bool) -> str:
    """Return the backend that ``auto`` selects on a device; any other name is returned as it is.

    FlexAttention's kernel needs at least 16 channels, and transformer-engine's fused kernels do not support float32.

    Args:
        backend: the name of a backend, or ``auto``.
        device_type: the type of the device that computes attention, ``cuda`` or ``cpu``.
        channels: the channels of one head.
        bf16: whether the model computes in bfloat16.
    """
    if backend != "auto":
        return backend
    if device_type != "cuda" or channels < 16:
        return "chunked"
    return "transformer_engine" if bf16 and find_spec("transformer_engine") else "flex"


def make_plan(visibility: Tensor, queries: tuple[slice, ...] | None = None, *, backend: str) -> AttentionPlan | None:
    """Return the plan of a batch, on the host; None for backends without plans (``dense``, ``chunked``).

    Args:
        visibility, queries, backend: as for :func:`make_schedule`.
    """
    if backend in ("dense", "chunked"):
        return None
    queries = queries or (slice(0, visibility.shape[1]),)
    from tidar_megatron.models.attention.flex import FlexPlan

    if backend == "transformer_engine":
        from tidar_megatron.models.attention.fused_clean import FusedCleanPlan, fits

        if fits(visibility, queries):
            return FusedCleanPlan.of(visibility)
    return FlexPlan.of(visibility, queries)


def make_schedule(
    visibility: Tensor, queries: tuple[slice, ...] | None = None, *, backend: str, chunk_size: int, device: str = "cpu"
) -> AttentionSchedule:
    """Prepare attention for all layers of a batch, on the host. No backend except ``dense`` waits for the device.

    Args:
        visibility: metadata of the keys on the host, int32 ``[b, k, 4]``.
        queries: which of the keys are the queries (context parallelism); by default all of them.
        backend: one of the names above except ``auto``, which :func:`choose_backend` resolves.
        chunk_size: tokens per chunk (``chunked``).
        device: the device that computes attention.
    """
    queries = queries or (slice(0, visibility.shape[1]),)
    assert backend != "auto"
    if backend == "dense":
        return DenseSchedule(visibility, queries, device)
    if backend == "chunked":
        return ChunkedSchedule(visibility, queries, chunk_size, device)
    plan = make_plan(visibility, queries, backend=backend)
    assert plan is not None
    return plan.map(lambda tensor: tensor.to(device, non_blocking=True)).schedule()


def hybrid_attention(query: Tensor, key: Tensor, value: Tensor, schedule: AttentionSchedule, scale: float) -> Tensor:
    """Compute softmax attention under the visibility rule.

    Args:
        query: ``[b, h, t, d]``.
        key, value: ``[b, g, k, d]``; h is a multiple of g.
        schedule: the schedule that :func:`make_schedule` made for these tokens.
        scale: the factor on the scores.

    Returns:
        ``[b, h, t, d]``.
    """
    return schedule.attend(query, key, value, scale)
