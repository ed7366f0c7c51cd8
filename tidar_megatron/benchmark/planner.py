"""The planner against every fixed plan: a sweep, then interleaved passes of its winner, ``auto`` and plain AR."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tidar_megatron.benchmark.bodies import in_body
from tidar_megatron.benchmark.decode import text_of
from tidar_megatron.benchmark.measuring import Spread, rounded
from tidar_megatron.benchmark.ways import Texts, ours
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.planner import planner_of
from tidar_megatron.inference.request import DecodeOptions, parse_plan

LENGTHS = (2, 3, 4, 6, 8, 12, 16)
KINDS = ("linear", "1", "2", "3", "all")
PASS_SECONDS = 2.0  # the approximate time of a pass with plain AR, its prompts included
REQUESTS = 8  # the most requests of a pass


@dataclass
class Pass:
    """Totals over all texts, without the first token of each and its time."""

    tokens: int = 0
    forwards: int = 0
    seconds: float = 0.0


def planner(
    model: DecodeModel,
    prompts: Texts,
    settings: Sequence[tuple[str, int]],
    contexts: Sequence[int],
    batches: Sequence[int],
    max_new_tokens: int,
    repeats: int,
    quantize: str | None = None,
) -> dict[str, Any]:
    """Measure the planner and every fixed plan in greedy decoding, one request at a time, ignoring EOS.

    Args:
        model: the model to decode with.
        prompts: token ids of the prompts.
        settings: pairs of a body (``own``, ``useless``, or one of :data:`~tidar_megatron.benchmark.bodies.BODIES`) and
            a number of threads.
        contexts: the lengths of the longest prompt of a batch, in tokens; none for the prompts as they are.
        batches: the batch sizes; a measurement has 2 to 8 requests of as many texts, more for a faster model.
        max_new_tokens: tokens to generate for each text, at least 2.
        repeats: rounds in which the sweep's winner, ``auto`` and AR are measured again.
        quantize: how the weights of bodies are quantized: ``int8``, ``int4`` or None.

    Returns:
        ``compared``, a row for each setting, context and batch with ratios paired by round; ``sweep``, every fixed plan
        there, fastest first; ``skipped``, the contexts that do not fit.
    """
    fitting: list[int | None] = [c for c in contexts if c + max_new_tokens <= model.context_limit]
    compared, swept = [], []
    for body, threads in settings:
        torch.set_num_threads(threads)
        measured = in_body(model, body, quantize)
        for context in fitting or [None]:
            for batch in batches:
                where = {"body": body, "threads": threads, "context": context, "batch": batch}
                texts = _texts(prompts, context, batch * REQUESTS)
                groups = [texts[start : start + batch] for start in range(0, len(texts), batch)]
                row, rows = _setting(measured, groups, max_new_tokens, repeats)
                compared.append(where | row)
                swept += [where | plan for plan in rows]
    return {"compared": compared, "sweep": swept, "skipped": [c for c in contexts if c not in fitting]}


def _texts(prompts: Texts, context: int | None, count: int) -> Texts:
    if context is None:
        return [prompts[number % len(prompts)] for number in range(count)]
    return [text_of(prompts, context - context * (number % 8) // 16, number) for number in range(count)]


def _setting(
    model: DecodeModel, groups: Sequence[Texts], max_new_tokens: int, repeats: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    fixed = [f"{kind}:{length}" for kind in KINDS for length in LENGTHS if not kind.isdigit() or int(kind) < length]
    names = ["ar", *fixed, "auto"]
    plans = {name: replace(parse_plan(name), max_new_tokens=max_new_tokens) for name in names}
    start = time.perf_counter()
    learned = planner_of(model, len(groups[0]))
    load_seconds = time.perf_counter() - start
    start = time.perf_counter()
    _pass(model, groups[:1], plans["ar"])
    groups = groups[: max(2, round(PASS_SECONDS / (time.perf_counter() - start)))]  # prompts take time too
    few = groups[: max(1, len(groups) // 4)]
    swept = _rounds(model, few, {name: plans[name] for name in ["ar", *fixed]}, 2)
    fastest = sorted(swept, key=lambda name: min(run.seconds for run in swept[name]))
    best = fastest[0]
    print(f"best of the sweep: {best}", file=sys.stderr)
    again = _rounds(model, groups, {"ar": plans["ar"], best: plans[best], "auto": plans["auto"]}, repeats)

    def ratio(name: str, other: str) -> dict[str, float]:
        pairs = zip(again[name], again[other], strict=True)
        return rounded(Spread.of([theirs.seconds / ours.seconds for ours, theirs in pairs]))

    row = {
        "best": best,
        "auto_chose": learned.usual,
        "auto_over_best": ratio("auto", best),
        "auto_over_ar": ratio("auto", "ar"),
        "best_over_ar": ratio(best, "ar"),
        "requests": len(groups),
        "load_seconds": round(load_seconds, 2),
    }
    rows = []
    for name in fastest:
        run = min(swept[name], key=lambda run: run.seconds)
        rate, per_forward = run.tokens / run.seconds, run.tokens / run.forwards
        rows.append({"plan": name, "tokens_per_second": round(rate, 1), "tokens_per_forward": round(per_forward, 3)})
    return row, rows


def _rounds(
    model: DecodeModel, groups: Sequence[Texts], plans: Mapping[str, DecodeOptions], count: int
) -> dict[str, list[Pass]]:
    """Run ``count`` rounds with one pass of each plan, in alternating order, after one request each to warm up."""
    done: dict[str, list[Pass]] = {name: [] for name in plans}
    for options in plans.values():
        _pass(model, groups[:1], options)
    for number in range(count):
        for name in list(plans)[:: -1 if number % 2 else 1]:
            done[name].append(_pass(model, groups, plans[name]))
    return done


def _pass(model: DecodeModel, groups: Sequence[Texts], options: DecodeOptions) -> Pass:
    done = Pass()
    for texts in groups:
        start = time.perf_counter()
        run = ours(model, options, texts)
        done.seconds += time.perf_counter() - start - run.first_token_seconds
        done.tokens += sum(len(tokens) - 1 for tokens in run.tokens)
        done.forwards += (run.forwards or 0) - len(texts)
    return done
