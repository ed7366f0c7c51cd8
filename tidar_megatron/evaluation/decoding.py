"""How fast each way of decoding is, and whether it says the same: a fair comparison in one process.

Every prompt is decoded by every plan in turn, so a machine whose speed drifts treats all alike. The prefill is left out
of the times, EOS is ignored, and beside the speed stand the distinct 4-grams of the output: a looping output makes
drafting look better than it is, and prompt-lookup best of all.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from numpy.typing import NDArray

from tidar_megatron.evaluation.stock import load_stock
from tidar_megatron.inference.engine import generate
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.request import DecodeOptions, distinct_4grams


@dataclass(frozen=True)
class PlanFigures:
    """One plan over all prompts."""

    tokens_per_forward: float
    tokens_per_second: float
    speedup_over_ar: float
    identical_to_ar: bool
    distinct_4grams: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compare_plans(
    model: DecodeModel,
    prompts: Sequence[Sequence[int]],
    plans: Mapping[str, DecodeOptions],
    max_new_tokens: int,
    transformers_folder: str | None = None,
) -> dict[str, PlanFigures]:
    """Greedy decoding of every prompt by AR, by every plan and by transformers' ``generate``, in turn.

    Args:
        model: the model that decodes all of them.
        prompts: token ids.
        plans: name -> options; their ``max_new_tokens`` and ``ignore_eos`` are overridden.
        max_new_tokens: tokens per prompt, at least 2.
        transformers_folder: the model's folder, to compare with transformers' own ``generate``.

    Returns:
        name -> figures; ``"ar"`` is added and comes first, ``"transformers generate"`` last.
    """
    modes = {"ar": DecodeOptions(mode="ar"), **plans}
    modes = {name: replace(o, max_new_tokens=max_new_tokens, ignore_eos=True) for name, o in modes.items()}
    decoders: dict[str, Callable[[Sequence[int]], Decoded]] = {
        name: lambda prompt, options=options: ours(model, prompt, options)  # type: ignore[misc]
        for name, options in modes.items()
    }
    if transformers_folder is not None:
        decoders["transformers generate"] = TransformersGenerate(model, transformers_folder, max_new_tokens)
    for decode in decoders.values():  # masks and memory of every plan exist before the clock runs
        decode(prompts[0])
    runs: dict[str, list[Decoded]] = {name: [] for name in decoders}
    for prompt in prompts:
        for name, decode in decoders.items():
            runs[name].append(decode(prompt))
    ar = runs["ar"]
    ar_seconds = sum(run.seconds for run in ar)
    # every run decodes as many tokens after the prefill's, whatever a last forward accepted beyond them
    tokens = len(prompts) * (max_new_tokens - 1)
    return {
        name: PlanFigures(
            tokens_per_forward=tokens / sum(run.forwards for run in done),
            tokens_per_second=tokens / (seconds := sum(run.seconds for run in done)),
            speedup_over_ar=ar_seconds / seconds,
            identical_to_ar=all(run.token_ids == its.token_ids for run, its in zip(done, ar, strict=True)),
            distinct_4grams=sum(distinct_4grams(run.token_ids) for run in done) / len(done),
        )
        for name, done in runs.items()
    }


def spread_pieces(documents: Sequence[NDArray], count: int, length: int) -> list[list[int]]:
    """Up to ``count`` pieces of ``length`` tokens, evenly spaced over documents, no two of which share a token."""
    places = [(n, at) for n, one in enumerate(documents) for at in range(0, len(one) - length + 1, 4 * length)]
    chosen = [places[k * len(places) // count] for k in range(count)] if len(places) > count else places
    return [documents[n][at : at + length].tolist() for n, at in chosen]


@dataclass(frozen=True)
class Decoded:
    """One prompt, decoded; the prefill is neither in the forwards nor in the seconds."""

    token_ids: list[int]
    forwards: int
    seconds: float


def ours(model: DecodeModel, prompt: Sequence[int], options: DecodeOptions) -> Decoded:
    """Decode with our engine."""
    generation = generate(model, prompt, options)
    return Decoded(generation.token_ids, generation.forwards, generation.decode_seconds)


class TransformersGenerate:
    """Greedy ``generate`` of transformers; it does not time its prefill, so the time of one token is taken off."""

    def __init__(self, model: DecodeModel, folder: str, max_new_tokens: int) -> None:
        self._causal_lm = load_stock(folder, model, never_masks=False)
        self._max_new_tokens = max_new_tokens

    @torch.inference_mode()
    def __call__(self, prompt: Sequence[int]) -> Decoded:
        ids = torch.tensor([list(prompt)], device=self._causal_lm.device)
        seconds, output = [], ids
        for tokens in (1, self._max_new_tokens):
            start = time.perf_counter()
            output = self._causal_lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens)
            seconds.append(time.perf_counter() - start)
        tokens = output[0, len(prompt) :].tolist()
        return Decoded(tokens, self._max_new_tokens - 1, seconds[1] - seconds[0])
