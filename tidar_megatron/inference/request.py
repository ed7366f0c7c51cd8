"""What is asked of generation and what comes back: options, the checks on them, steps, and the result with its figures.

Counting. The prefill emits the first token. A decode forward emits as many tokens as it accepted drafts, so plain
autoregression is exactly 1 token per forward. Seconds are those of the forwards with what belongs to them, never of
what the caller does between two steps.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from tidar_megatron.errors import UserError
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.sampling import SamplingOptions

Mode = Literal["auto", "tidar", "linear", "ar", "lookup"]
StopReason = Literal["eos", "stop", "length", "context", "cancelled", "error"]

LOOKUP_DRAFT_LENGTH = 8  # for a model without a block size
MOST_TOKENS = 2**16  # of one sequence in one forward, drafts and masks


@dataclass(frozen=True)
class DecodeOptions:
    """How to generate.

    ``mode`` ``auto`` lets the planner choose among ``ar``, ``linear`` and ``tidar`` as it goes (``planner.py``);
    without a ``tidar`` section that is plain autoregression. The others are fixed: ``tidar`` (one forward drafts and
    verifies), ``linear`` (two in turn), ``lookup`` (drafts copied from the text), ``ar``.
    ``draft_length`` K counts the certain token (None: the model's block size); ``branches`` is ``"all"`` or how many
    of the likeliest outcomes get a branch (mode ``tidar`` only). Generation ends with the first end-of-sequence token
    (unless ``ignore_eos``), with the token that completes a ``stop`` string, after ``max_new_tokens``, or when prompt
    and output fill the model's context.

    ``trust_ratio`` beta mixes the logits that verify, beta * AR + (1 - beta) * diffusion (the paper's; mode ``tidar``
    with all branches). Below 1 the output is no longer autoregression's. ``logprobs`` keeps each emitted token's
    log-probability under the logits that verified it, before penalties and temperature.
    """

    mode: Mode = "auto"
    draft_length: int | None = None
    branches: int | Literal["all"] = "all"
    max_new_tokens: int = 128
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    sampling: SamplingOptions = SamplingOptions()
    trust_ratio: float = 1.0
    logprobs: bool = False

    def check(self, model: DecodeModel) -> None:
        """Raises UserError for options that ``model`` cannot serve."""
        if self.mode not in get_args(Mode):
            raise UserError(f"mode {self.mode!r}: use one of {', '.join(get_args(Mode))}")
        self.sampling.check()
        if self.mode in ("tidar", "linear") and model.mask_token_id is None:
            raise UserError(
                "the model's config.json has no tidar section, so it cannot draft: "
                "use mode ar (--plan ar), or export a TiDAR checkpoint with tools/convert_checkpoint.py"
            )
        if self.mode in ("auto", "ar") and self.draft_length is not None:
            raise UserError(f"mode {self.mode}: has no draft length of its own; leave it out, or use mode tidar")
        if self.mode != "tidar" and self.branches != "all":
            raise UserError(f"mode {self.mode}: has no branches; leave them out, or use mode tidar")
        if self.draft_length is not None and not _positive(self.draft_length):
            raise UserError(f"draft length {self.draft_length!r}: use a positive integer, such as the block size")
        if self.branches != "all" and not _positive(self.branches):
            raise UserError(f"branches {self.branches!r}: use all or a positive integer")
        if not _positive(self.max_new_tokens):
            raise UserError(f"max new tokens {self.max_new_tokens!r}: use a positive integer")
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop {self.stop!r}: use a tuple of strings of at least one character")
        if self.stop and model.tokenizer is None:
            raise UserError("stop strings need a tokenizer: export the checkpoint with its tokenizer")
        number = isinstance(self.trust_ratio, int | float) and not isinstance(self.trust_ratio, bool)
        if not number or not 0 <= self.trust_ratio <= 1:
            raise UserError(f"trust ratio {self.trust_ratio!r}: must be from 0 to 1")
        if self.trust_ratio < 1 and (self.mode != "tidar" or self.branches != "all"):
            raise UserError(f"trust ratio {self.trust_ratio:g}: below 1 needs mode tidar with all branches")
        if self.trust_ratio < 1 and self.resolved_draft_length(model) == 1:
            raise UserError(f"trust ratio {self.trust_ratio:g}: below 1 needs a draft length of 2 or more")

    def resolved_draft_length(self, model: DecodeModel) -> int | None:
        """K: as asked, else the model's block size; None where nothing is drafted."""
        if self.mode in ("auto", "ar"):
            return None
        return min(self.draft_length or model.block_size or LOOKUP_DRAFT_LENGTH, model.context_limit)


def parse_plan(name: str) -> DecodeOptions:
    """``auto``, or a fixed plan: ``ar``, ``linear:K``, ``lookup:K``, ``all:K``, or ``N:K`` with N branches.

    Raises:
        UserError: it is none of them.
    """
    kind, _, length = name.partition(":")
    if name in ("auto", "ar"):
        return DecodeOptions("auto" if name == "auto" else "ar")
    if length.isdecimal() and kind in ("linear", "lookup"):
        return DecodeOptions("linear" if kind == "linear" else "lookup", int(length))
    if length.isdecimal() and (kind == "all" or kind.isdecimal()):
        return DecodeOptions("tidar", int(length), "all" if kind == "all" else int(kind))
    raise UserError(f"plan {name!r}: use auto, ar, linear:8, lookup:8, all:8 or 2:8 (two branches of 8)")


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_prompt(model: DecodeModel, prompt: Sequence[int]) -> None:
    """Raises UserError for token ids that ``model`` cannot continue."""
    if not prompt:
        raise UserError("the prompt is empty: give at least one token to continue")
    if len(prompt) >= model.context_limit:
        raise UserError(
            f"the prompt has {len(prompt)} tokens and the model's context holds {model.context_limit}: "
            f"shorten it to at most {model.context_limit - 1}"
        )
    check_token_ids(model, prompt)
    if model.mask_token_id in prompt:
        raise UserError(
            f"the prompt holds the mask token (id {model.mask_token_id}), which only the engine may use: remove it"
        )


def check_token_ids(model: DecodeModel, token_ids: Sequence[int]) -> None:
    """Raises UserError for ids that are none of ``model``'s."""
    for token in token_ids:
        try:
            operator.index(token)
        except TypeError:
            raise UserError(f"token id {token!r}: must be an integer") from None
        if not 0 <= token < model.vocab_size:
            remedy = "use the tokenizer of the same folder"
            if model.tokenizer is not None and 0 <= token < len(model.tokenizer):
                name = model.tokenizer.convert_ids_to_tokens(int(token))
                remedy = (
                    f"the folder's tokenizer has {len(model.tokenizer)} ids, {name!r} among them; grow the model by "
                    "the missing rows (transformers' resize_token_embeddings), or leave the token out"
                )
            raise UserError(f"token id {token} is outside the model's vocabulary of {model.vocab_size}: {remedy}")


@dataclass(slots=True)
class Step:
    """What one forward added to a sequence: the tokens that became final, and why generation ended, if it did."""

    tokens: list[int]
    seconds: float
    stop: StopReason | None
    is_prefill: bool = False
    logprobs: list[float] = field(default_factory=list)
    forward_tokens: int = 0  # of all sequences in it
    share: float = 0.0  # of the seconds, by tokens: those of all sequences in a forward sum to its seconds


@dataclass
class Generation:
    """The outcome. ``emitted`` has one entry for each decode forward; the prefill's one token is not among them.

    ``decode_seconds`` are of whole forwards, so how long this one took; ``decode_share`` is its part of them, which is
    what sums over requests of a batch.
    """

    mode: Mode
    draft_length: int | None
    branches: int | Literal["all"] | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_share: float = 0.0
    stop: StopReason | None = None

    @staticmethod
    def of(model: DecodeModel, options: DecodeOptions) -> "Generation":
        """One that is about to begin."""
        branches = options.branches if options.mode == "tidar" else None
        return Generation(options.mode, options.resolved_draft_length(model), branches)

    def add(self, step: Step) -> None:
        self.token_ids += step.tokens
        self.logprobs += step.logprobs
        self.stop = step.stop
        if step.is_prefill:
            self.prefill_seconds += step.seconds
        else:
            self.emitted.append(len(step.tokens))
            self.decode_seconds += step.seconds
            self.decode_share += step.share

    @property
    def forwards(self) -> int:
        """Decode forwards, without the prefill."""
        return len(self.emitted)

    @property
    def tokens_per_forward(self) -> float:
        """Tokens emitted by decode forwards / decode forwards; 0 when the prefill's token was the only one."""
        return sum(self.emitted) / len(self.emitted) if self.emitted else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens emitted by decode forwards / their seconds; 0 when there were none."""
        return sum(self.emitted) / self.decode_seconds if self.emitted else 0.0

    @property
    def distinct_4grams(self) -> float:
        """:func:`distinct_4grams` of the output."""
        return distinct_4grams(self.token_ids)

    def summary(self) -> dict[str, Any]:
        """The figures, ready for JSON. ``draft_length`` and ``branches`` are null where the mode has none."""
        return {
            "mode": self.mode,
            "draft_length": self.draft_length,
            "branches": self.branches,
            "token_ids": self.token_ids,
            "forwards": self.forwards,
            "tokens_per_forward": self.tokens_per_forward,
            "tokens_per_second": self.tokens_per_second,
            "distinct_4grams": self.distinct_4grams,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "stop": self.stop,
            **({"logprobs": self.logprobs} if self.logprobs else {}),
        }


def distinct_4grams(tokens: list[int]) -> float:
    """Distinct / all 4-grams: 1 says nothing repeats, near 0 that the output loops and flatters every drafter."""
    grams = list(zip(*(tokens[i:] for i in range(4)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0
