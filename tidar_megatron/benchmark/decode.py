"""The speed of decoding: every mode of the engine, transformers' own ``generate`` and llama.cpp on the same prompts."""

import gc
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from tidar_megatron.benchmark.energy import Rapl, Sizes
from tidar_megatron.benchmark.llama import QUANTIZED, LlamaCpp, missing
from tidar_megatron.benchmark.measuring import Spread, peak_bytes, rounded
from tidar_megatron.benchmark.timing import seconds_of
from tidar_megatron.benchmark.ways import Run, Texts, Transformers, Way, ours
from tidar_megatron.distributed.platform import device
from tidar_megatron.evaluation.agreement import agreement_with_ar
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.request import distinct_4grams, parse_plan
from tidar_megatron.precision import full_float32

LOOKUP = 8  # tokens drafted by prompt lookup, in the engine, in transformers and in llama.cpp
REST = 0.02  # seconds before a request, in which the threads of the library before it fall asleep
COMPUTED = "computed: bytes of weights and K/V read, and FLOPs (this machine has no energy counters that can be read)"


@dataclass
class Request:
    """A measured request: one text, or a batch, decoded in one way."""

    seconds: float
    joules: float | None
    run: Run


@full_float32()
def decode(
    model: DecodeModel,
    folder: str | Path,
    prompts: Texts,
    contexts: Sequence[int],
    batches: Sequence[int],
    max_new_tokens: int,
    repeats: int,
    assistant: Any = None,
) -> dict[str, Any]:
    """Measure each way of decoding for each batch size and context length, on the same texts.

    Requests of all ways are interleaved (:func:`measure`). EOS is ignored, so that all ways generate equally many
    tokens. transformers' model has the engine's dtype. llama.cpp, if it is installed, has the same weights in a file of
    this dtype, and files that it has quantized itself.

    Args:
        model: a model with its tokenizer.
        folder: the model's folder; if it has a ``custom_generate``, that is measured too.
        prompts: token ids of texts, which are concatenated to contexts of any length.
        contexts: the lengths of the longest prompt, in tokens.
        batches: the batch sizes; there are as many texts as the largest.
        max_new_tokens: tokens to generate for each text.
        repeats: rounds of measurements, each with all texts.
        assistant: a smaller transformers model that drafts for transformers' ``generate``.

    Returns:
        ``rows``; ``skipped``, the contexts that do not fit; ``left_out``, what could not be measured and why.

        Figures are medians over requests, and their spreads the quartiles; ``spread`` is that of ``over_ar``. They
        include the prefill, but for ``decode_tokens_per_second``. ``ties`` counts the outputs that part from AR's where
        two tokens are equally likely up to rounding, ``different`` those that part elsewhere, and ``same_tokens`` is
        the share of tokens before that; there are none for quantized weights. Energy is in joules per new token where
        the machine has counters, else there are bytes and FLOPs, computed from the sizes of the model
        (:class:`~tidar_megatron.benchmark.energy.Work`).
    """
    fitting = [context for context in contexts if context + max_new_tokens <= model.context_limit]
    block = model.block_size or LOOKUP
    stock = Transformers(model, folder)
    meter = Rapl.find()
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "block_size": block}
    settings["energy"] = f"measured: {', '.join(meter.names)}" if meter else COMPUTED
    engine = _engine(model, block, max_new_tokens)
    rows, left_out = [], []
    with ExitStack() as stack:
        llama = None
        if 1 in batches:
            if (reason := missing(stock.causal_lm)) is None:
                llama = stack.enter_context(LlamaCpp(stock.causal_lm, Sizes.of(model)))
                settings["bits_per_weight"] = llama.bits_per_weight
            left_out = llama.failed if llama else [str(reason)]
        for line in left_out:
            print(f"note: left out: {line}", file=sys.stderr)
        for context in fitting:
            lengths = [context - context * (number % 8) // 16 for number in range(max(batches))]
            texts = [text_of(prompts, length, number) for number, length in enumerate(lengths)]
            for batch in batches:
                groups: list[Texts] = [texts[start : start + batch] for start in range(0, len(texts), batch)]
                ways = engine | _transformers(stock, folder, batch, max_new_tokens, assistant)
                # a run of each, which also warms up
                peaks = {name: peak_bytes(partial(way, groups[0])) for name, way in ways.items()}
                if llama is not None and batch == 1:  # llama-cpp-python decodes one sequence at a time
                    ways |= llama.ways(context + max_new_tokens, max_new_tokens, LOOKUP)
                done = measure(ways, groups, repeats, meter)
                of_ar = done["ar ar"]
                for name, requests in done.items():
                    mode, _, plan = name.partition(" ")
                    row = {"mode": mode, "plan": plan, "batch": batch, "context": context, **figures(requests, of_ar)}
                    outputs, ar = _outputs(requests[-len(groups) :]), _outputs(of_ar[-len(groups) :])
                    row |= _compared(model, texts, outputs, None if plan.startswith(tuple(QUANTIZED)) else ar)
                    rows.append(row | {"peak_bytes": peaks.get(name)})
    skipped = [context for context in contexts if context not in fitting]
    return {"settings": settings, "rows": rows, "skipped": skipped, "left_out": left_out}


def text_of(prompts: Texts, length: int, first: int) -> list[int]:
    """Return ``length`` tokens that end with prompt ``first``; the following prompts are put before it, one by one."""
    text: list[int] = []
    number = first
    while len(text) < length:
        text = [*prompts[number % len(prompts)], *text]
        number += 1
    return text[-length:]


def _engine(model: DecodeModel, block: int, max_new_tokens: int) -> dict[str, Way]:
    names = ["ar", "lookup", *(["auto", "all", "1", "2", "linear"] if model.mask_token_id is not None else [])]
    plans = {name: parse_plan(name if name in ("ar", "auto") else f"{name}:{block}") for name in names}
    return {
        f"{options.mode} {name}": partial(ours, model, replace(options, max_new_tokens=max_new_tokens))
        for name, options in plans.items()
    }


def _transformers(
    stock: Transformers, folder: str | Path, batch: int, max_new_tokens: int, assistant: Any
) -> dict[str, Way]:
    generate = partial(stock.run, max_new_tokens=max_new_tokens)
    ways: dict[str, Way] = {"transformers generate": generate}
    if batch > 1:  # transformers drafts for one sequence only
        return ways
    if (Path(folder) / "custom_generate").is_dir():
        remote = {"custom_generate": str(folder), "trust_remote_code": True}
        ways["transformers custom_generate"] = partial(generate, **remote)
    ways["transformers prompt-lookup"] = partial(generate, prompt_lookup_num_tokens=LOOKUP)
    if assistant is not None:
        ways["transformers assistant"] = partial(generate, assistant_model=assistant)
    return ways


def measure(ways: Mapping[str, Way], groups: list[Texts], repeats: int, meter: Rapl | None) -> dict[str, list[Request]]:
    """Decode each group in every way, one request after the other, in an order that rotates.

    A way's figure must depend neither on the minute in which it ran nor on the way before it.

    Args:
        ways: The ways of decoding, by name.
        groups: The texts of each request.
        repeats: Rounds, each with all groups, after a request of each way to warm up.
        meter: The energy counters, if there are any.

    Returns:
        The requests of each way, in the same order.
    """
    where, names = device(), list(ways)
    done: dict[str, list[Request]] = {name: [] for name in names}
    for way in ways.values():
        way(groups[0])
    for number, group in enumerate(groups * repeats):
        begin, first = time.perf_counter(), number % len(names)
        for name in names[first:] + names[:first]:
            gc.collect()
            time.sleep(REST)
            made: list[Run] = []
            before = meter.read() if meter else []
            seconds = seconds_of(partial(_keep, made, ways[name], group), where)
            done[name].append(Request(seconds, meter.joules_since(before) if meter else None, made[0]))
        if number == 0:
            count, took = len(groups) * repeats, time.perf_counter() - begin
            print(f"{', '.join(names)}: {count} requests each, about {took:.2g} s for one of each", file=sys.stderr)
    return done


def _keep(made: list[Run], way: Way, group: Texts) -> None:
    made.append(way(group))


def figures(requests: Sequence[Request], of_ar: Sequence[Request]) -> dict[str, Any]:
    """Return the figures of a way's requests; ``of_ar`` are AR's, of the same texts in the same order."""
    runs = [request.run for request in requests]
    counts = [sum(map(len, run.tokens)) for run in runs]
    forwards = [run.forwards for run in runs if run.forwards is not None]
    rate = Spread.of([count / request.seconds for count, request in zip(counts, requests, strict=True)])
    over_ar = Spread.of([ar.seconds / request.seconds for ar, request in zip(of_ar, requests, strict=True)])
    return {
        "tokens_per_forward": round(sum(counts) / sum(forwards), 3) if forwards else None,
        "tokens_per_second": round(rate.median, 1),
        "tokens_per_second_spread": rounded(rate),
        "decode_tokens_per_second": round(median(map(_decode_rate, requests)), 1),
        "over_ar": round(over_ar.median, 3),
        "spread": rounded(over_ar),
        "first_token_seconds": round(median(run.first_token_seconds for run in runs), 5),
        **_energy(requests, counts),
    }


def _decode_rate(request: Request) -> float:
    """Return the tokens per second after the first token of each text, which the prefill gives."""
    tokens = sum(len(text) - 1 for text in request.run.tokens)
    return tokens / max(request.seconds - request.run.first_token_seconds, 1e-9)


def _energy(requests: Sequence[Request], counts: Sequence[int]) -> dict[str, float | None]:
    """Return the energy per new token; the computed one is None if a way's forwards are unknown."""
    joules = [request.joules for request in requests if request.joules is not None]
    if joules:
        return {"joules_per_token": round(median(j / n for j, n in zip(joules, counts, strict=True)), 4)}
    work = [request.run.work for request in requests if request.run.work is not None]
    read, flops = (sum(getattr(one, name) for one in work) / sum(counts) for name in ("bytes_read", "flops"))
    return {
        "computed_megabytes_per_token": round(read / 1e6, 3) if work else None,
        "computed_gigaflops_per_token": round(flops / 1e9, 4) if work else None,
    }


def _compared(model: DecodeModel, texts: Texts, outputs: list[list[int]], ar: Texts | None) -> dict[str, Any]:
    """Return how varied the outputs are, and how far they are AR's; ``ar`` is None where other weights made them."""
    found: dict[str, Any] = {"distinct_4grams": round(sum(map(distinct_4grams, outputs)) / len(texts), 3)}
    if ar is None:
        return found | dict.fromkeys(("identical_to_ar", "ties", "different", "same_tokens"))
    return found | {**agreement_with_ar(model, texts, outputs, ar), "same_tokens": round(same_tokens(outputs, ar), 3)}


def _outputs(requests: Sequence[Request]) -> list[list[int]]:
    return [tokens for request in requests for tokens in request.run.tokens]


def same_tokens(outputs: Texts, others: Texts) -> float:
    """Return the share of the outputs' tokens that come before the first which differs from the other output's."""
    same = sum(
        next((n for n, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))
        for one, other in zip(outputs, others, strict=True)
    )
    return same / sum(map(len, outputs))
