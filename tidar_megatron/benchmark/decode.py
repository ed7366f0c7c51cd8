"""The speed of decoding: every mode of the engine and transformers' own ``generate`` on the same prompts."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from tidar_megatron.benchmark.measuring import Timings, peak_bytes, rounded
from tidar_megatron.evaluation.agreement import agreement_with_ar
from tidar_megatron.evaluation.stock import load_stock
from tidar_megatron.inference.engine import Engine
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.request import DecodeOptions, distinct_4grams, parse_plan
from tidar_megatron.inference.sequence import Sequence as Decoding
from tidar_megatron.precision import full_float32

LOOKUP = 8  # tokens drafted by prompt lookup, in the engine and in transformers


@dataclass
class Run:
    """The result of one way of decoding the texts."""

    tokens: list[list[int]]
    forwards: int | None  # forwards that emitted tokens; None if unknown
    first_token_seconds: float


@full_float32()
def decode(
    model: DecodeModel,
    folder: str | Path,
    prompts: Sequence[Sequence[int]],
    contexts: Sequence[int],
    batches: Sequence[int],
    max_new_tokens: int,
    repeats: int,
    assistant: Any = None,
) -> dict[str, Any]:
    """Measure each way of decoding for each batch size and context length, on the same texts.

    EOS is ignored, so that all ways generate equally many tokens.

    Args:
        model: a model with its tokenizer.
        folder: the model's folder; if it has a ``custom_generate``, that is measured too.
        prompts: token ids of texts, which are concatenated to contexts of any length.
        contexts: the lengths of the longest prompt, in tokens.
        batches: the batch sizes; there are as many texts as the largest.
        max_new_tokens: tokens to generate for each text.
        repeats: rounds of measurements.
        assistant: a smaller transformers model that drafts for transformers' ``generate``.

    Returns:
        ``rows``, and ``skipped``, the contexts that do not fit. ``over_ar`` compares complete requests, including
        prefill. ``ties`` counts the outputs that part from AR's where two tokens are equally likely up to rounding,
        ``different`` those that part elsewhere.
    """
    rows = []
    fitting = [context for context in contexts if context + max_new_tokens <= model.context_limit]
    names = ["ar", "lookup", *(["auto", "all", "1", "2", "linear"] if model.mask_token_id is not None else [])]
    block = model.block_size or LOOKUP
    plans = {name: parse_plan(name if name in ("ar", "auto") else f"{name}:{block}") for name in names}
    stock = _Transformers(model, folder)
    carries = (Path(folder) / "custom_generate").is_dir()
    for context in fitting:
        lengths = [context - context * (number % 8) // 16 for number in range(max(batches))]
        texts = [text_of(prompts, length, number) for number, length in enumerate(lengths)]
        for batch in batches:
            groups = [texts[start : start + batch] for start in range(0, len(texts), batch)]
            ours = {
                f"{options.mode} {name}": partial(_ours, model, replace(options, max_new_tokens=max_new_tokens))
                for name, options in plans.items()
            }
            theirs = {"transformers generate": partial(stock.run, max_new_tokens=max_new_tokens)}
            if batch == 1 and carries:
                remote = {"custom_generate": str(folder), "trust_remote_code": True}
                theirs["transformers custom_generate"] = partial(stock.run, max_new_tokens=max_new_tokens, **remote)
            if batch == 1:  # transformers drafts for one sequence only
                lookup = partial(stock.run, max_new_tokens=max_new_tokens, prompt_lookup_num_tokens=LOOKUP)
                theirs["transformers prompt-lookup"] = lookup
                if assistant is not None:
                    helped = partial(stock.run, max_new_tokens=max_new_tokens, assistant_model=assistant)
                    theirs["transformers assistant"] = helped
            both = {**ours, **theirs}
            ways = {name: _all(way, groups) for name, way in both.items()}
            last: dict[str, Run] = {}
            times = Timings({name: _keep(last, name, way) for name, way in ways.items()}, repeats)
            for name in ways:
                spread, run = times.ratio("ar ar", name), last[name]
                mode, _, plan = name.partition(" ")
                count = sum(map(len, run.tokens))
                rows.append(
                    {"mode": mode, "plan": plan, "batch": batch, "context": context}
                    | {"tokens_per_forward": None if run.forwards is None else round(count / run.forwards, 3)}
                    | {"tokens_per_second": round(count / times.of(name).median, 1)}
                    | {"over_ar": round(spread.median, 3), "spread": rounded(spread)}
                    | {"first_token_seconds": round(run.first_token_seconds, 5)}
                    | {"distinct_4grams": round(sum(map(distinct_4grams, run.tokens)) / len(texts), 3)}
                    | agreement_with_ar(model, texts, run.tokens, last["ar ar"].tokens)
                    | {"peak_bytes": peak_bytes(partial(both[name], groups[0]))}
                )
    settings = {"max_new_tokens": max_new_tokens, "block_size": block}
    return {"settings": settings, "rows": rows, "skipped": [c for c in contexts if c not in fitting]}


def text_of(prompts: Sequence[Sequence[int]], length: int, first: int) -> list[int]:
    """Return ``length`` tokens that end with prompt ``first``; the following prompts are put before it, one by one."""
    text: list[int] = []
    number = first
    while len(text) < length:
        text = [*prompts[number % len(prompts)], *text]
        number += 1
    return text[-length:]


def _keep(last: dict[str, Run], name: str, way: Callable[[], Run]) -> Callable[[], None]:
    def run() -> None:
        last[name] = way()

    return run


def _all(way: Callable[[Sequence[Sequence[int]]], Run], groups: Sequence[Sequence[Sequence[int]]]) -> Callable[[], Run]:
    """Return a function that decodes one group after the other and merges their results."""

    def run() -> Run:
        runs = [way(group) for group in groups]
        forwards = [run.forwards for run in runs if run.forwards is not None]
        first = sum(run.first_token_seconds for run in runs) / len(runs)
        return Run([tokens for run in runs for tokens in run.tokens], sum(forwards) if forwards else None, first)

    return run


def _ours(model: DecodeModel, options: DecodeOptions, texts: Sequence[Sequence[int]]) -> Run:
    options = replace(options, ignore_eos=True)
    start = time.perf_counter()
    room = max(Decoding(model, text, options).room for text in texts)
    engine = Engine(model, len(texts), room)
    sequences = [engine.submit(text, options) for text in texts]
    forwards, first = 0, 0.0
    while not engine.is_idle:
        forwards += sum(bool(step.tokens) for _, step in engine.step())
        first = first or (time.perf_counter() - start if all(one.tokens for one in sequences) else 0.0)
    return Run([sequence.tokens for sequence in sequences], forwards, first)


class _FirstToken(BaseStreamer):
    """A streamer that records the time of the first token: transformers passes the prompt, then token by token."""

    def __init__(self, start: float) -> None:
        self._start, self._puts, self.seconds = start, 0, 0.0

    def put(self, value: torch.Tensor) -> None:
        """Count calls, and record the time of the second, which has the first token."""
        self._puts += 1
        if self._puts == 2:
            self.seconds = time.perf_counter() - self._start

    def end(self) -> None:
        """Do nothing at the end of the stream."""


class _Transformers:
    """transformers' own model of the same weights, with greedy ``generate`` and transformers' own attention."""

    def __init__(self, model: DecodeModel, folder: str | Path) -> None:
        self._causal_lm = load_stock(folder, model, never_masks=False)

    @torch.inference_mode()
    def run(self, texts: Sequence[Sequence[int]], max_new_tokens: int, **more: Any) -> Run:
        """Decode the texts as one batch; shorter texts are padded on the left."""
        width = max(map(len, texts))
        padded = [[0] * (width - len(text)) + list(text) for text in texts]
        seen = [[0] * (width - len(text)) + [1] * len(text) for text in texts]
        ids, mask = (torch.tensor(rows, device=self._causal_lm.device) for rows in (padded, seen))
        first = _FirstToken(time.perf_counter())
        out = self._causal_lm.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, streamer=first, **more)
        plain = len(texts) * max_new_tokens if not more else None
        return Run(out[:, width:].tolist(), plain, first.seconds)
