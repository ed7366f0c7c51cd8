"""One call for attention. Which backend serves it is nobody else's business.

A *schedule* is what a backend derives, once per batch, from the visibility metadata and the one predicate of
:mod:`tidar_megatron.attention_mask`; no backend knows the layout of the doubled sequence. All layers share it.

======================  ===============================================================================================
``dense``               the reference: the whole mask
``chunked``             portable: unmasked and masked tiles, no mask beyond a chunk's (``tiles.py``, ``chunked.py``)
``flex``                FlexAttention with a BlockMask (``flex.py``): CUDA; on a CPU it has no backward
``transformer_engine``  its fused causal kernel for the clean half, flex for the masks (``fused_clean.py``): CUDA
``auto``                the best that this machine has
======================  ===============================================================================================

Shapes: b batch, h query heads, g K/V heads (GQA: never expanded), G = h / g, t queries, k keys, d channels of a head.
"""

from importlib.util import find_spec
from typing import Protocol

from torch import Tensor

from tidar_megatron.models.attention.chunked import ChunkedSchedule
from tidar_megatron.models.attention.dense import DenseSchedule


class AttentionSchedule(Protocol):
    """What a backend has prepared for a batch."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See :func:`hybrid_attention`."""


def choose_backend(backend: str, device_type: str, channels: int, bf16: bool) -> str:
    """What ``auto`` stands for on a device for heads of so many channels; any other name is its own.

    FlexAttention's kernel has no heads of fewer than 16 channels, transformer-engine's fused ones are not for float32.
    """
    if backend != "auto":
        return backend
    if device_type != "cuda" or channels < 16:
        return "chunked"
    return "transformer_engine" if bf16 and find_spec("transformer_engine") else "flex"


def make_schedule(
    visibility: Tensor, queries: tuple[slice, ...] | None = None, *, backend: str, chunk_size: int, device: str = "cpu"
) -> AttentionSchedule:
    """Prepare attention for all layers of a batch, on the host; but for ``dense`` nothing is read from the device.

    Args:
        visibility: metadata of the keys on the host, int32 ``[b, k, 4]``.
        queries: which of the keys are the queries (context parallelism); default: all of them.
        backend: see above; what ``auto`` is must be known (:func:`choose_backend`).
        chunk_size: tokens of a chunk (``chunked``).
        device: where attention is computed.
    """
    queries = queries or (slice(0, visibility.shape[1]),)
    assert backend != "auto"
    if backend == "dense":
        return DenseSchedule(visibility, queries, device)
    if backend == "chunked":
        return ChunkedSchedule(visibility, queries, chunk_size, device)
    from tidar_megatron.models.attention.flex import FlexSchedule

    if backend == "transformer_engine":
        from tidar_megatron.models.attention.fused_clean import FusedCleanSchedule, fits

        if fits(visibility, queries):
            return FusedCleanSchedule(visibility, device)
    return FlexSchedule(visibility, queries, device)


def hybrid_attention(query: Tensor, key: Tensor, value: Tensor, schedule: AttentionSchedule, scale: float) -> Tensor:
    """Softmax attention under the rule.

    Args:
        query: ``[b, h, t, d]``.
        key, value: ``[b, g, k, d]``; h is a multiple of g.
        schedule: made by :func:`make_schedule` for these tokens.
        scale: factor on the scores.

    Returns:
        ``[b, h, t, d]``.
    """
    return schedule.attend(query, key, value, scale)
