"""Compare two outputs for one prompt: are they identical, and if not, do they part where two tokens tie?"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from tidar_megatron.evaluation.certificate import tie_gap
from tidar_megatron.inference.cache import KVPool
from tidar_megatron.inference.forward import ForwardLayout, PackedForward, Part
from tidar_megatron.inference.model import DecodeModel

CHUNK = 512  # tokens per forward


def agreement(
    model: DecodeModel, prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int]
) -> Literal["identical", "tie", "different"]:
    """Compare two greedy outputs of a model.

    Returns:
        ``tie`` if the two tokens where they part have the same logit up to rounding.
    """
    place = next((n for n, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    if place is None:
        return "identical" if len(ours) == len(theirs) else "different"
    logits = _last_logits(model, [*prompt, *ours[:place]])
    apart = abs(float(logits[ours[place]] - logits[theirs[place]]))
    return "tie" if apart <= tie_gap(model.dtype, logits[theirs[place]]) else "different"


@torch.inference_mode()
def _last_logits(model: DecodeModel, text: Sequence[int]) -> Tensor:
    """Return the logits ``[V]`` of the token after a text."""
    pool = KVPool(1, len(text))
    for start in range(0, len(text), CHUNK):
        piece = list(text[start : start + CHUNK])
        hidden = model.forward(PackedForward(pool, [Part(0, start, piece, ForwardLayout(len(piece)))]))
    return model.logits(hidden[-1:])[0].float()
