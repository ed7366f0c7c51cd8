"""The interface of generation: options and their checks, steps, and the result with its statistics.

How tokens are counted: the prefill emits the first token. A decode forward emits one token for each accepted draft, so
plain autoregression has exactly 1 token per forward. Seconds are those of the engine's steps and exclude the caller's
work between steps.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from tidar_megatron.errors import UserError
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.plans import Mode, plan_named
from tidar_megatron.inference.sampling import SamplingOptions

StopReason = Literal["eos", "stop", "length", "context", "cancelled", "error"]

LOOKUP_DRAFT_LENGTH = 8  # for a model without a block size
MOST_TOKENS = 2**16  # largest number of tokens of a sequence in a forward, drafts and masks


@dataclass(frozen=True)
class DecodeOptions:
    """The options of a generation: decoding mode, length, stopping and sampling.

    Generation ends with the first end-of-sequence token (unless ``ignore_eos``), with the token that completes a
    ``stop`` string, after ``max_new_tokens``, or when prompt and output fill the model's context.

    Attributes:
        mode: ``auto`` lets the planner choose what each forward verifies and drafts (``planner.py``);
            without a ``tidar`` section it is plain autoregression. The other modes are fixed:
            ``tidar`` (one forward drafts and verifies), ``linear`` (two alternating forwards), ``lookup`` (drafts
            copied from the text), ``ar``.
        draft_length: K, the certain token included; None for the model's block size.
        branches: ``"all"``, or how many of the likeliest outcomes get a branch (mode ``tidar`` only).
        max_new_tokens: The largest number of tokens to emit.
        ignore_eos: Whether to continue after an end-of-sequence token.
        stop: Strings that end the text.
        sampling: How the next token is chosen.
        trust_ratio: beta in the verifying logits, beta * AR + (1 - beta) * diffusion, as in the paper (mode ``tidar``
            with all branches). Below 1 the output differs from autoregression.
        logprobs: Whether to keep each emitted token's log-probability under the logits that verified it, before
            penalties and temperature.
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
        """Check that ``model`` can serve these options.

        Raises:
            UserError: an option is invalid or not supported by the model.
        """
        if self.mode not in get_args(Mode):
            raise UserError(f"mode {self.mode!r}: use one of {', '.join(get_args(Mode))}")
        self.sampling.check()
        if self.mode in ("tidar", "linear") and model.mask_token_id is None:
            raise UserError(
                "the model's config.json has no tidar section, so it cannot draft: "
                "use mode ar (--plan ar), or export a TiDAR checkpoint with tidar convert export"
            )
        if self.mode in ("auto", "ar") and self.draft_length is not None:
            raise UserError(f"mode {self.mode}: takes no draft length; leave it out, or use mode tidar")
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
        """Return K: the requested one, or else the model's block size; None in the modes ``auto`` and ``ar``."""
        if self.mode in ("auto", "ar"):
            return None
        return min(self.draft_length or model.block_size or LOOKUP_DRAFT_LENGTH, model.context_limit)


def parse_plan(name: str) -> DecodeOptions:
    """Parse a plan: ``auto``, ``ar``, ``linear:K``, ``lookup:K``, ``all:K``, or ``N:K`` with N branches.

    Returns:
        Options with mode, draft length and branches set.

    Raises:
        UserError: the name is not a plan.
    """
    return DecodeOptions(*plan_named(name))


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_prompt(model: DecodeModel, prompt: Sequence[int]) -> None:
    """Check that ``model`` can continue a prompt.

    Raises:
        UserError: the prompt is empty, too long, holds the mask token or ids outside the vocabulary.
    """
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
            f"the prompt contains the mask token (id {model.mask_token_id}), which only the engine may use: remove it"
        )


def check_token_ids(model: DecodeModel, token_ids: Sequence[int]) -> None:
    """Check that token ids are in ``model``'s vocabulary.

    Raises:
        UserError: an id is not an integer or outside the vocabulary.
    """
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
                    f"the folder's tokenizer has {len(model.tokenizer)} ids, including {name!r}; add the missing rows "
                    "to the model (transformers' resize_token_embeddings), or leave the token out"
                )
            raise UserError(f"token id {token} is outside the model's vocabulary of {model.vocab_size}: {remedy}")


@dataclass(slots=True)
class Step:
    """The result of one forward for a sequence: the tokens that became final, and why generation ended, if it did."""

    tokens: list[int]
    seconds: float  # the duration of the engine's step
    stop: StopReason | None
    is_prefill: bool = False
    logprobs: list[float] = field(default_factory=list)
    forward_tokens: int = 0  # the tokens of the forward, all sequences together
    share: float = 0.0  # this sequence's share of the seconds, in proportion to its tokens in the forward


@dataclass
class Generation:
    """The output of a request and its statistics.

    ``emitted`` holds the number of tokens of each decode forward; the prefill's token is not counted.
    ``decode_seconds`` is the duration of the request's decode forwards, which other requests share; ``decode_share`` is
    the request's share of it. Only shares may be summed over the requests of a batch.
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
        """Return an empty generation for a request that is about to begin."""
        branches = options.branches if options.mode == "tidar" else None
        return Generation(options.mode, options.resolved_draft_length(model), branches)

    def add(self, step: Step) -> None:
        """Add the result of a step."""
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
        """The number of decode forwards, without the prefill."""
        return len(self.emitted)

    @property
    def tokens_per_forward(self) -> float:
        """The average number of tokens emitted per decode forward; 0 without decode forwards."""
        return sum(self.emitted) / len(self.emitted) if self.emitted else 0.0

    @property
    def tokens_per_second(self) -> float:
        """The tokens emitted by decode forwards per second of decoding; 0 without decode forwards."""
        return sum(self.emitted) / self.decode_seconds if self.emitted else 0.0

    @property
    def distinct_4grams(self) -> float:
        """The fraction of distinct 4-grams in the output; see :func:`distinct_4grams`."""
        return distinct_4grams(self.token_ids)

    def summary(self) -> dict[str, Any]:
        """Return output and statistics as a JSON-serializable dict; values that the mode does not have are None."""
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
    """Return the fraction of 4-grams that are distinct: 1 without repetition, near 0 for looping output.

    Looping output is easy to draft and inflates the acceptance rate of every drafter.
    """
    grams = list(zip(*(tokens[i:] for i in range(4)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0
