"""Check whether drafting leaves every bit as it is: the logits of emitted tokens, by every plan, batch and chunking.

Equal tokens can hide rounding. Equal logits mean that log-probabilities do not depend on how a text was decoded, as
reinforcement learning needs. Whether they are equal is a property of the machine's matrix products too.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tidar_megatron.inference.engine import PROMPT_CHUNK, Engine
from tidar_megatron.inference.logits import Best
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.request import DecodeOptions
from tidar_megatron.inference.sequence import Sequence as Decoding

BATCHES = (1, 8)
CHUNKS = (PROMPT_CHUNK, 48)  # tokens of a prompt per forward


@dataclass
class BitwiseRun:
    """The comparison of one plan, batch size and prompt chunk with AR alone.

    ``equal`` counts the prompts whose logits are equal in every bit, ``same_tokens`` those whose tokens are.
    ``first`` is the first token whose logits differ: the number of the prompt, and the position in its output.
    """

    plan: str
    batch: int
    prompt_chunk: int
    equal: int = 0
    same_tokens: int = 0
    first: dict[str, Any] | None = None


@dataclass
class BitwiseReport:
    """All comparisons for some prompts."""

    prompts: int
    dtype: str
    runs: list[BitwiseRun]
    quantize: str | None = None

    @property
    def weights(self) -> str:
        """Return the dtype, and how the weights are quantized if they are."""
        return self.dtype + (f", {self.quantize} weights" if self.quantize else "")

    @property
    def holds(self) -> bool:
        """Return whether the logits of every run are equal in every bit."""
        return all(run.equal == self.prompts for run in self.runs)

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {**asdict(self), "holds": self.holds}


class _Recorded:
    """The digest of the logits of each emitted token of a sequence."""

    def __init__(self, sequence: Decoding) -> None:
        self.sequence = sequence
        self.digests: list[bytes] = []
        self._accept = sequence.accept
        sequence.accept = self._record  # type: ignore[method-assign]

    def _record(self, logits: Tensor, best: Best | None = None) -> list[int]:
        tokens = self._accept(logits, best)
        for row in logits[: len(tokens)].contiguous().view(torch.uint8).cpu().numpy():
            self.digests.append(hashlib.blake2b(row.tobytes(), digest_size=16).digest())
        return tokens


def check_bitwise(
    model: DecodeModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    plans: Mapping[str, DecodeOptions],
    say: Callable[[str], None] = lambda text: None,
) -> BitwiseReport:
    """Compare the logits of emitted tokens with those of AR alone, for every plan, batch size and prompt chunk.

    Args:
        model: The model.
        prompts: Token ids of each prompt.
        max_new_tokens: The number of tokens to generate per prompt.
        plans: Options by plan name; their ``max_new_tokens`` and ``ignore_eos`` are overridden.
        say: A function that is called with a line of text after each plan.
    """
    expected = _decode(model, prompts, DecodeOptions(mode="ar"), max_new_tokens, 1, PROMPT_CHUNK)
    runs = []
    for number, (name, options) in enumerate({"ar": DecodeOptions(mode="ar"), **plans}.items(), 1):
        for batch in BATCHES:
            for chunk in CHUNKS:
                run = BitwiseRun(name, batch, chunk)
                if (name, batch, chunk) != ("ar", 1, PROMPT_CHUNK):  # that one is what the others are compared with
                    _compare(run, _decode(model, prompts, options, max_new_tokens, batch, chunk), expected)
                    runs.append(run)
        say(f"plan {number} of {1 + len(plans)}: {name}")
    return BitwiseReport(len(prompts), str(model.dtype).removeprefix("torch."), runs, model.quantize)


def _decode(
    model: DecodeModel,
    prompts: Sequence[Sequence[int]],
    options: DecodeOptions,
    max_new_tokens: int,
    batch: int,
    chunk: int,
) -> list[_Recorded]:
    options = DecodeOptions(**{**vars(options), "max_new_tokens": max_new_tokens, "ignore_eos": True})
    room = max(Decoding(model, prompt, options).room for prompt in prompts)
    engine = Engine(model, batch, room, queue_size=len(prompts), prompt_chunk=chunk)
    recorded = [_Recorded(engine.submit(prompt, options)) for prompt in prompts]
    while not engine.is_idle:
        engine.step()
    for one in recorded:
        if one.sequence.error is not None:
            raise one.sequence.error
    return recorded


def _compare(run: BitwiseRun, found: list[_Recorded], expected: list[_Recorded]) -> None:
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        run.same_tokens += ours.sequence.tokens == theirs.sequence.tokens
        run.equal += ours.digests == theirs.digests
        if run.first is None and ours.digests != theirs.digests:
            pairs = zip(ours.digests, theirs.digests, strict=True)
            run.first = {"prompt": number, "position": next(n for n, (a, b) in enumerate(pairs) if a != b)}
