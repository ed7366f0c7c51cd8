"""A fair comparison of decoding plans in one process: their throughput, and whether their outputs agree.

Every prompt is decoded by every plan in turn, in an order that rotates, and speeds are medians over the prompts: a
plan's figure must not depend on the minute in which it ran. Times exclude the prefill, and EOS is ignored. The fraction
of distinct 4-grams is reported too, because looping output flatters drafting, and prompt lookup most of all.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from numpy.typing import NDArray

from tidar_megatron.evaluation.agreement import agreement_with_ar
from tidar_megatron.evaluation.stock import load_stock
from tidar_megatron.inference.engine import generate
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.request import DecodeOptions, distinct_4grams
from tidar_megatron.precision import full_float32


@dataclass(frozen=True)
class PlanFigures:
    """The results of one plan over all prompts.

    Attributes:
        tokens_per_forward: Tokens over forwards, both summed over the prompts.
        tokens_per_second: The median over the prompts.
        speedup_over_ar: The median over the prompts of AR's seconds divided by the plan's, for the same prompt.
        identical_to_ar: Whether every output equals AR's.
        ties: How many outputs part from AR's where two tokens have the same logit up to rounding.
        different: How many outputs part from AR's elsewhere.
        distinct_4grams: The fraction of distinct 4-grams in an output, averaged over the prompts.
    """

    tokens_per_forward: float
    tokens_per_second: float
    speedup_over_ar: float
    identical_to_ar: bool
    ties: int
    different: int
    distinct_4grams: float

    def as_dict(self) -> dict[str, Any]:
        """Return the results as a JSON-serializable dict."""
        return asdict(self)


@full_float32()
def compare_plans(
    model: DecodeModel,
    prompts: Sequence[Sequence[int]],
    plans: Mapping[str, DecodeOptions],
    max_new_tokens: int,
    transformers_folder: str | None = None,
) -> dict[str, PlanFigures]:
    """Decode every prompt greedily by AR, by every plan and by transformers' ``generate``, interleaved.

    Args:
        model: The model that decodes.
        prompts: Token ids of each prompt.
        plans: Options by plan name; their ``max_new_tokens`` and ``ignore_eos`` are overridden.
        max_new_tokens: The number of tokens per prompt, at least 2.
        transformers_folder: The model's folder, to compare with transformers' own ``generate``; None to skip it.

    Returns:
        Results by plan name; ``"ar"`` is added and comes first, ``"transformers generate"`` last.
    """
    modes = {"ar": DecodeOptions(mode="ar"), **plans}
    modes = {name: replace(o, max_new_tokens=max_new_tokens, ignore_eos=True) for name, o in modes.items()}
    decoders: dict[str, Callable[[Sequence[int]], Decoded]] = {
        name: lambda prompt, options=options: ours(model, prompt, options)  # type: ignore[misc]
        for name, options in modes.items()
    }
    if transformers_folder is not None:
        decoders["transformers generate"] = TransformersGenerate(model, transformers_folder, max_new_tokens)
    for decode in decoders.values():  # warm-up: allocate masks and memory before timing
        decode(prompts[0])
    runs: dict[str, list[Decoded]] = {name: [] for name in decoders}
    names = list(decoders)
    for number, prompt in enumerate(prompts):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            runs[name].append(decoders[name](prompt))
    ar = runs["ar"]
    its_tokens = [run.token_ids for run in ar]
    # every run decodes the same number of tokens after the prefill, whatever its last forward accepted beyond them
    tokens = max_new_tokens - 1
    return {
        name: PlanFigures(
            tokens_per_forward=len(prompts) * tokens / sum(run.forwards for run in done),
            tokens_per_second=median(tokens / run.seconds for run in done),
            speedup_over_ar=median(its.seconds / run.seconds for run, its in zip(done, ar, strict=True)),
            distinct_4grams=sum(distinct_4grams(run.token_ids) for run in done) / len(done),
            **agreement_with_ar(model, prompts, [run.token_ids for run in done], its_tokens),
        )
        for name, done in runs.items()
    }


def spread_pieces(documents: Sequence[NDArray], count: int, length: int) -> list[list[int]]:
    """Return up to ``count`` disjoint pieces of ``length`` tokens, evenly spaced over the documents."""
    places = [(n, at) for n, one in enumerate(documents) for at in range(0, len(one) - length + 1, 4 * length)]
    chosen = [places[k * len(places) // count] for k in range(count)] if len(places) > count else places
    return [documents[n][at : at + length].tolist() for n, at in chosen]


@dataclass(frozen=True)
class Decoded:
    """The output for one prompt; forwards and seconds exclude the prefill."""

    token_ids: list[int]
    forwards: int
    seconds: float


def ours(model: DecodeModel, prompt: Sequence[int], options: DecodeOptions) -> Decoded:
    """Decode with our engine."""
    generation = generate(model, prompt, options)
    return Decoded(generation.token_ids, generation.forwards, generation.decode_seconds)


class TransformersGenerate:
    """A decoder by transformers' greedy ``generate``; the time of generating one token stands for the prefill."""

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
