"""How fast each way of decoding is, and whether it says the same: a fair comparison in one process.

Every prompt is decoded by every plan in turn, so a machine whose speed drifts treats all alike. The prefill is left out
of the times, EOS is ignored, and beside the speed stand the distinct 4-grams of the output: a looping output makes
drafting look better than it is, and prompt-lookup best of all.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from tidar_megatron.inference.decoding import generate
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.request import DecodeOptions, Generation


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
    model: DecodeModel, prompts: Sequence[Sequence[int]], plans: Mapping[str, DecodeOptions], max_new_tokens: int
) -> dict[str, PlanFigures]:
    """Greedy decoding of every prompt by AR and by every plan, interleaved.

    Args:
        model: the model that decodes all of them.
        prompts: token ids.
        plans: name -> options; their ``max_new_tokens`` and ``ignore_eos`` are overridden.
        max_new_tokens: tokens per prompt.

    Returns:
        name -> figures; ``"ar"`` is added and comes first.
    """
    modes = {"ar": DecodeOptions(mode="ar"), **plans}
    modes = {name: replace(o, max_new_tokens=max_new_tokens, ignore_eos=True) for name, o in modes.items()}
    for options in modes.values():  # masks and memory of every plan exist before the clock runs
        generate(model, prompts[0], options)
    runs: dict[str, list[Generation]] = {name: [] for name in modes}
    for prompt in prompts:
        for name, options in modes.items():
            runs[name].append(generate(model, prompt, options))
    ar_speed = _tokens_per_second(runs["ar"])
    return {
        name: PlanFigures(
            tokens_per_forward=_emitted(done) / sum(g.forwards for g in done),
            tokens_per_second=_tokens_per_second(done),
            speedup_over_ar=_tokens_per_second(done) / ar_speed,
            identical_to_ar=all(g.token_ids == ar.token_ids for g, ar in zip(done, runs["ar"], strict=True)),
            distinct_4grams=sum(g.distinct_4grams for g in done) / len(done),
        )
        for name, done in runs.items()
    }


def _emitted(runs: Sequence[Generation]) -> int:
    """Tokens that decode forwards gave, the prefill's first token left out."""
    return sum(sum(g.emitted) for g in runs)


def _tokens_per_second(runs: Sequence[Generation]) -> float:
    return _emitted(runs) / sum(g.decode_seconds for g in runs)


@dataclass(frozen=True)
class TransformersFigures:
    """Our AR mode beside transformers' own greedy ``generate``."""

    tokens_per_second: float  # theirs
    ar_over_transformers: float  # our AR mode's tokens per second over theirs
    identical: bool


@torch.inference_mode()
def compare_with_transformers(
    model: DecodeModel, folder: str, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> TransformersFigures:
    """Greedy AR in our engine and in transformers' ``generate``, in turn, prompt by prompt; EOS ignored.

    Prefill is excluded: ``generate`` does not time it, so the time of a call for one token is taken off.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, trust_remote_code=False)
    theirs = theirs.to(model.device).eval()
    theirs.generation_config = GenerationConfig(do_sample=False)

    def timed(prompt: Sequence[int], tokens: int) -> tuple[list[int], float]:
        ids = torch.tensor([list(prompt)], device=model.device)
        start = time.perf_counter()
        output = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens)
        return output[0, len(prompt) :].tolist(), time.perf_counter() - start

    options = DecodeOptions(mode="ar", max_new_tokens=max_new_tokens, ignore_eos=True)
    timed(prompts[0], max_new_tokens)
    generate(model, prompts[0], options)
    ours, spent, identical = [], 0.0, True
    for prompt in prompts:
        ours.append(generate(model, prompt, options))
        tokens, seconds = timed(prompt, max_new_tokens)
        spent += seconds - timed(prompt, 1)[1]
        identical = identical and tokens == ours[-1].token_ids
    speed = len(prompts) * (max_new_tokens - 1) / spent
    return TransformersFigures(speed, _tokens_per_second(ours) / speed, identical)
