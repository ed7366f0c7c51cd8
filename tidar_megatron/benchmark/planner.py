"""The planner against every fixed plan: a sweep, then interleaved passes of its winner, ``auto`` and plain AR."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tidar_megatron.benchmark.bodies import in_body
from tidar_megatron.benchmark.measuring import Spread, rounded
from tidar_megatron.inference.engine import stream
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.planner import planner_of
from tidar_megatron.inference.request import DecodeOptions, parse_plan

LENGTHS = (2, 3, 4, 6, 8, 12, 16)
KINDS = ("linear", "1", "2", "3", "all")
PASS_SECONDS = 2.0  # the approximate time of a pass with plain AR


@dataclass
class Pass:
    """Totals over all prompts, without the prefill's token and time."""

    tokens: int = 0
    forwards: int = 0
    seconds: float = 0.0


def planner(
    model: DecodeModel,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[tuple[str, int]],
    max_new_tokens: int,
    repeats: int,
    quantize: str | None = None,
) -> dict[str, Any]:
    """Measure the planner and every fixed plan in greedy decoding, one request at a time, ignoring EOS.

    Args:
        model: the model to decode with.
        prompts: token ids of the prompts; a measurement decodes up to 8 of them, more for a faster model.
        settings: pairs of a body (``own``, ``useless``, or one of :data:`~tidar_megatron.benchmark.bodies.BODIES`) and
            a number of threads.
        max_new_tokens: tokens to generate for each prompt, at least 2.
        quantize: how the weights of bodies are quantized: ``int8``, ``int4`` or None.
        repeats: rounds in which the sweep's winner, ``auto`` and AR are measured again.

    Returns:
        ``compared``, a row for each setting with ratios paired by round; ``sweep``, every fixed plan, fastest first.
    """
    compared, swept = [], []
    for body, threads in settings:
        torch.set_num_threads(threads)
        row, rows = _setting(in_body(model, body, quantize), prompts, max_new_tokens, repeats)
        compared.append({"body": body, "threads": threads, **row})
        swept += [{"body": body, "threads": threads, **plan} for plan in rows]
    return {"compared": compared, "sweep": swept}


def _setting(
    model: DecodeModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, repeats: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    fixed = [f"{kind}:{length}" for kind in KINDS for length in LENGTHS if not kind.isdigit() or int(kind) < length]
    names = ["ar", *fixed, "auto"]
    plans = {name: replace(parse_plan(name), max_new_tokens=max_new_tokens, ignore_eos=True) for name in names}
    start = time.perf_counter()
    learned = planner_of(model)
    load_seconds = time.perf_counter() - start
    prompts = prompts[: max(2, min(8, round(PASS_SECONDS / _pass(model, prompts[:1], plans["ar"]).seconds)))]
    swept = _rounds(model, prompts, {name: plans[name] for name in ["ar", *fixed]}, 2)
    fastest = sorted(swept, key=lambda name: min(run.seconds for run in swept[name]))
    best = fastest[0]
    print(f"best of the sweep: {best}", file=sys.stderr)
    again = _rounds(model, prompts, {"ar": plans["ar"], best: plans[best], "auto": plans["auto"]}, repeats)

    def ratio(name: str, other: str) -> dict[str, float]:
        pairs = zip(again[name], again[other], strict=True)
        return rounded(Spread.of([theirs.seconds / ours.seconds for ours, theirs in pairs]))

    row = {
        "best": best,
        "auto_chose": learned.choice.name,
        "auto_over_best": ratio("auto", best),
        "auto_over_ar": ratio("auto", "ar"),
        "best_over_ar": ratio(best, "ar"),
        "prompts": len(prompts),
        "load_seconds": round(load_seconds, 2),
    }
    rows = []
    for name in fastest:
        run = min(swept[name], key=lambda run: run.seconds)
        rate, per_forward = run.tokens / run.seconds, run.tokens / run.forwards
        rows.append({"plan": name, "tokens_per_second": round(rate, 1), "tokens_per_forward": round(per_forward, 3)})
    return row, rows


def _rounds(
    model: DecodeModel, prompts: Sequence[Sequence[int]], plans: Mapping[str, DecodeOptions], count: int
) -> dict[str, list[Pass]]:
    """Run ``count`` rounds with one pass of each plan, in alternating order, after one prompt each to warm up."""
    done: dict[str, list[Pass]] = {name: [] for name in plans}
    for options in plans.values():
        _pass(model, prompts[:1], options)
    for number in range(count):
        for name in list(plans)[:: -1 if number % 2 else 1]:
            done[name].append(_pass(model, prompts, plans[name]))
    return done


def _pass(model: DecodeModel, prompts: Sequence[Sequence[int]], options: DecodeOptions) -> Pass:
    done = Pass()
    for prompt in prompts:
        start = 0.0
        for step in stream(model, prompt, options):
            if step.is_prefill:
                start = time.perf_counter()
            else:
                done.tokens += len(step.tokens)
                done.forwards += 1
        done.seconds += time.perf_counter() - start
    return done
