"""Compare outputs for the same prompts: are they identical, and if not, do they part where two tokens tie?"""

from collections.abc import Sequence
from typing import Literal, TypedDict

import torch
from torch import Tensor

from tidar_megatron.evaluation.certificate import tie_gap
from tidar_megatron.inference.cache import KVPool
from tidar_megatron.inference.forward import ForwardLayout, PackedForward, Part
from tidar_megatron.inference.model import DecodeModel

CHUNK = 512  # tokens per forward


class Agreement(TypedDict):
    """The result of comparing the greedy outputs for several prompts with those of AR.

    ``ties`` counts the outputs that part from AR's where two tokens have the same logit up to rounding, ``different``
    those that part elsewhere.
    """

    identical_to_ar: bool
    ties: int
    different: int


def agreement_with_ar(
    model: DecodeModel, prompts: Sequence[Sequence[int]], ours: Sequence[Sequence[int]], ar: Sequence[Sequence[int]]
) -> Agreement:
    """Compare the greedy outputs for some prompts with those of AR; see :func:`agreement`."""
    found = [agreement(model, *row) for row in zip(prompts, ours, ar, strict=True)]
    ties, different = found.count("tie"), found.count("different")
    return {"identical_to_ar": not ties + different, "ties": ties, "different": different}


def agreement(
    model: DecodeModel, prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int]
) -> Literal["identical", "tie", "different"]:
    """Compare two greedy outputs of a model.

    The model runs only if the outputs part.

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
