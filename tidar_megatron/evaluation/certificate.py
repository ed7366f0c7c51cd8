"""Certify that the output equals that of transformers' ``generate``, for one checkpoint, dtype and machine.

Greedy decoding is compared token by token for every mode and plan, alone and in a batch. Matrix products of different
shapes round differently, so if two tokens are equally likely up to rounding, either may be chosen. Such a *tie* is
counted apart from a difference. Sampled decoding is tested by the frequencies of continuations against their
probabilities under the model (Pearson's chi-square test).
"""

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tidar_megatron.errors import UserError
from tidar_megatron.evaluation.statistics import chi_square
from tidar_megatron.evaluation.stock import load_stock
from tidar_megatron.inference.engine import Engine
from tidar_megatron.inference.logits import Best
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.request import DecodeOptions, parse_plan
from tidar_megatron.inference.sampling import SamplingOptions
from tidar_megatron.inference.sequence import Sequence as Decoding
from tidar_megatron.precision import full_float32

TIE = 1e-4  # largest difference of two float32 logits that tie; narrower dtypes allow more, see tie_gap
MOST_TIES = 0.01  # largest fraction of prompts with a tie
LEAST_P_VALUE = 1e-4
BATCHES = (1, 8)
TOP_K, DRAWN = 4, 3  # sampled continuations have 3 tokens, each one of the 4 likeliest
FEWEST = 50  # smallest number of samples


def plans(lengths: Sequence[int] = (2, 4, 8, 16), drafts: bool = True) -> dict[str, DecodeOptions]:
    """Return plans by name: all modes, with each K of ``lengths``, and 1, 2 or all branches.

    Args:
        lengths: The draft lengths K.
        drafts: Whether the model can draft; else only ``ar`` and ``lookup`` are included.
    """
    names = ["ar", *(f"lookup:{K}" for K in lengths)]
    if drafts:
        names += ["auto", *(f"{kind}:{K}" for K in lengths for kind in ("linear", "all", "1", "2"))]
    return {name: parse_plan(name) for name in names}


@dataclass
class Run:
    """The results of one plan and batch size over all prompts."""

    plan: str
    batch: int
    identical: int = 0
    ties: list[dict[str, Any]] = field(default_factory=list)
    differences: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Certificate:
    """The result of :func:`certify`.

    ``identical`` counts the prompts whose output is the same in all runs; ``ties`` counts those that tie in some run
    and differ in none.
    """

    prompts: int
    identical: int
    ties: int
    runs: list[Run]
    sampled: list[dict[str, Any]]

    @property
    def holds(self) -> bool:
        """Return whether no output differs, ties are rare and every sampled distribution passes its test."""
        same = self.identical + self.ties == self.prompts and self.ties <= MOST_TIES * self.prompts
        return same and all(test["p_value"] > LEAST_P_VALUE for test in self.sampled)

    def as_dict(self) -> dict[str, Any]:
        """Return the certificate as a JSON-serializable dict."""
        return {**asdict(self), "holds": self.holds}


def read_prompts(path: str | Path) -> list[str]:
    """Read prompts from a file of JSON lines, each a string or an object with a ``prompt``.

    Raises:
        UserError: the file cannot be read, holds no prompts, or a line is neither.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    prompts = []
    for number, line in enumerate(lines if lines != [""] else [], 1):
        try:
            value = json.loads(line)
            prompts.append(value["prompt"] if isinstance(value, dict) else value)
        except (ValueError, KeyError, RecursionError):
            prompts.append(None)
        if not isinstance(prompts[-1], str):
            raise UserError(f'{path}, line {number}: must be a JSON string or an object with a "prompt"')
    if not prompts:
        raise UserError(f"{path}: holds no prompts; write one JSON string per line")
    return prompts


class Stock:
    """A model with the same weights under transformers' own greedy ``generate``, with its logits."""

    def __init__(self, model: DecodeModel, folder: str | Path) -> None:
        self.causal_lm = load_stock(folder, model)
        self.mask_token_id = model.mask_token_id if model.drafts is None else None  # those of an adapter have no id

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], count: int) -> tuple[list[int], Tensor]:
        """Generate ``count`` tokens; return them and the logits ``[V]`` that the last one was chosen from."""
        ids = torch.tensor([list(prompt)], device=self.causal_lm.device)
        out = self.causal_lm.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return out.sequences[0, len(prompt) :].tolist(), out.logits[-1][0]

    @torch.inference_mode()
    def probabilities(self, prompt: Sequence[int], top_k: int, count: int) -> dict[tuple[int, ...], float]:
        """Return the probability of every continuation of ``count`` tokens, under top-k sampling at temperature 1."""
        found: dict[tuple[int, ...], float] = {(): 1.0}
        for _ in range(count):
            texts = list(found)
            ids = torch.tensor([[*prompt, *text] for text in texts], device=self.causal_lm.device)
            logits = self.causal_lm(ids).logits[:, -1].float()
            if self.mask_token_id is not None:
                logits[:, self.mask_token_id] = -torch.inf
            best = logits.topk(top_k)
            p = best.values.softmax(-1).tolist()
            found = {
                (*text, token): found[text] * share
                for text, tokens, shares in zip(texts, best.indices.tolist(), p, strict=True)
                for token, share in zip(tokens, shares, strict=True)
            }
        return found


@full_float32()
def certify(
    model: DecodeModel,
    folder: str | Path,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    runs: Mapping[str, DecodeOptions],
    samples: int,
    say: Callable[[str], None] = lambda text: None,
) -> Certificate:
    """Compare every plan with transformers' greedy ``generate``, alone and eight at a time, and test sampled output.

    Args:
        model: The model to certify.
        folder: The model's Hugging Face folder, for transformers to load.
        prompts: Token ids of each prompt.
        max_new_tokens: The number of tokens to generate per prompt.
        runs: Options by plan name; their ``max_new_tokens`` and ``ignore_eos`` are overridden.
        samples: The number of continuations to draw with each plan for the test of its distribution; 0 for no test.
        say: A function that is called with a line of text after each run.

    Raises:
        UserError: a prompt leaves no room for the new tokens, or none leaves room for a sample; samples are requested
            of a model in half precision, or too few to test.
    """
    room = model.context_limit - max_new_tokens
    if long := [number for number, prompt in enumerate(prompts, 1) if len(prompt) > room]:
        raise UserError(
            f"prompt {long[0]}: {len(prompts[long[0] - 1])} tokens and {max_new_tokens} new ones are more than the "
            f"model's context of {model.context_limit}; ask for fewer new tokens or leave the prompt out"
        )
    if samples and model.dtype not in (torch.float32, torch.float64):
        raise UserError(
            f"dtype {model.dtype}: its logits tie, so the likeliest tokens to draw from are not well defined; "
            "use --dtype float32, or --samples 0"
        )
    if 0 < samples < FEWEST:
        raise UserError(f"{samples} samples are too few: draw at least {FEWEST}, better 2000, or 0 for none")
    sampling = [prompt for prompt in prompts if len(prompt) + 2 * DRAWN <= model.context_limit][:32]
    if samples and not sampling:
        raise UserError(
            f"samples: no prompt leaves {2 * DRAWN} tokens of the model's context of {model.context_limit}; "
            "add a shorter one, or ask for 0 samples"
        )
    stock = Stock(model, folder)
    expected = [stock.generate(prompt, max_new_tokens)[0] for prompt in prompts]
    done = []
    for number, (name, options) in enumerate(runs.items(), 1):
        done += [_run(model, stock, Run(name, batch), options, prompts, expected) for batch in BATCHES]
        say(f"plan {number} of {len(runs)}: {name}")
    tied = {found["prompt"] for run in done for found in run.ties}
    different = {found["prompt"] for run in done for found in run.differences}
    sampled = []
    if samples:
        unsure = max(sampling, key=lambda prompt: _entropy(stock.probabilities(prompt, TOP_K, 1)))
        for number, name in enumerate(runs, 1):
            sampled.append(_sample(model, stock, unsure, name, runs[name], samples))
            say(f"plan {number} of {len(runs)}: {name}, sampled")
    identical = len(prompts) - len(tied | different)
    return Certificate(len(prompts), identical, len(tied - different), done, sampled)


def _run(
    model: DecodeModel,
    stock: Stock,
    run: Run,
    options: DecodeOptions,
    prompts: Sequence[Sequence[int]],
    expected: Sequence[list[int]],
) -> Run:
    options = replace(options, max_new_tokens=len(expected[0]), ignore_eos=True)
    room = max(Decoding(model, prompt, options).room for prompt in prompts)
    engine = Engine(model, run.batch, room, queue_size=len(prompts))
    pairs = list(zip(prompts, expected, strict=True))
    watched = [_Watched(engine.submit(prompt, options), theirs) for prompt, theirs in pairs]
    while not engine.is_idle:
        engine.step()
    for number, (watch, (prompt, theirs)) in enumerate(zip(watched, pairs, strict=True)):
        if watch.sequence.error is not None:
            raise watch.sequence.error
        ours = watch.sequence.tokens
        place = next((n for n, pair in enumerate(itertools.zip_longest(ours, theirs)) if len(set(pair)) > 1), None)
        if place is None:
            run.identical += 1
            continue
        token, other = ours[place], theirs[place]
        rows = {"ours": watch.row, "transformers": stock.generate(prompt, place + 1)[1]}
        apart = {of: None if row is None else abs(float(row[token] - row[other])) for of, row in rows.items()}
        found = {"prompt": number, "position": place, "tokens": [token, other], "logits_apart": apart}
        tie = all(
            gap is not None and gap <= tie_gap(model.dtype, rows["transformers"][other]) for gap in apart.values()
        )
        (run.ties if tie else run.differences).append(found)
    return run


def tie_gap(dtype: torch.dtype, logit: Tensor) -> float:
    """Return the largest difference of two logits that are equal up to rounding."""
    return TIE if dtype == torch.float32 else max(TIE, 4 * torch.finfo(dtype).eps * abs(float(logit)))


class _Watched:
    """A recorder of the logits from which a sequence chose its first unexpected token."""

    def __init__(self, sequence: Decoding, expected: Sequence[int]) -> None:
        self.sequence, self._expected = sequence, expected
        self.row: Tensor | None = None
        self._accept = sequence.accept
        sequence.accept = self._watch  # type: ignore[method-assign]

    def _watch(self, logits: Tensor, best: Best | None = None) -> list[int]:
        before = len(self.sequence.tokens)
        tokens = self._accept(logits, best)
        wrong = [n for n, token in enumerate(tokens) if token != self._expected[before + n]]
        if wrong and self.row is None:
            self.row = logits[wrong[0]].clone()
        return tokens


def _entropy(probabilities: Mapping[Any, float]) -> float:
    return -sum(p * math.log(p) for p in probabilities.values() if p > 0)


def _sample(
    model: DecodeModel, stock: Stock, prompt: Sequence[int], name: str, options: DecodeOptions, samples: int
) -> dict[str, Any]:
    expected = stock.probabilities(prompt, TOP_K, DRAWN)
    asked = replace(options, max_new_tokens=2 * DRAWN, ignore_eos=True)
    engine = Engine(model, 16, Decoding(model, prompt, asked).room, queue_size=samples)
    sampling = SamplingOptions(temperature=1.0, top_k=TOP_K)
    drawn = [engine.submit(prompt, replace(asked, sampling=replace(sampling, seed=seed))) for seed in range(samples)]
    while not engine.is_idle:
        engine.step()
    counts = Counter(tuple(sequence.tokens[:DRAWN]) for sequence in drawn)
    impossible = sum(count for text, count in counts.items() if text not in expected)
    p_value = 0.0 if impossible else chi_square([counts[text] for text in expected], list(expected.values()))
    return {"plan": name, "samples": samples, "entropy": _entropy(expected), "p_value": p_value}
