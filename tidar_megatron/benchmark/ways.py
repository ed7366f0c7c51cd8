"""Ways of decoding that a benchmark compares: the engine, and transformers' own ``generate``."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from tidar_megatron.benchmark.energy import Sizes, Work
from tidar_megatron.evaluation.stock import load_stock
from tidar_megatron.inference.engine import Engine
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.request import DecodeOptions
from tidar_megatron.inference.sequence import Sequence as Decoding

Texts = Sequence[Sequence[int]]


@dataclass
class Run:
    """A request that was decoded: one text, or a batch of them.

    Attributes:
        tokens: The new tokens of each text.
        forwards: The forwards that emitted tokens; None if unknown.
        first_token_seconds: The time until every text had a token.
        work: What all forwards read and computed, those of the prompts included; None if unknown.
    """

    tokens: list[list[int]]
    forwards: int | None
    first_token_seconds: float
    work: Work | None


Way = Callable[[Texts], Run]


def ours(model: DecodeModel, options: DecodeOptions, texts: Texts) -> Run:
    """Decode the texts as one batch of the engine, ignoring EOS."""
    options = replace(options, ignore_eos=True)
    start = time.perf_counter()
    room = max(Decoding(model, text, options).room for text in texts)
    engine = Engine(model, len(texts), room)
    sequences = [engine.submit(text, options) for text in texts]
    forwards, first, work = 0, 0.0, Work(Sizes.of(model))
    while not engine.is_idle:
        done = engine.step()
        forwards += sum(bool(step.tokens) for _, step in done)
        first = first or (time.perf_counter() - start if all(one.tokens for one in sequences) else 0.0)
        rows, parts = 0, []
        for sequence, step in done:
            part = sequence.last_part
            parts.append((part.length, part.layout.num_tokens))
            rows += bool(step.tokens) if step.is_prefill else part.layout.num_drafts
            rows += len(sequence.draft_rows)
        work.add(parts, rows)
    return Run([sequence.tokens for sequence in sequences], forwards, first, work)


class _FirstToken(BaseStreamer):
    """A streamer that records the time of the first token: transformers passes the prompt, then token by token."""

    def __init__(self, start: float) -> None:
        self._start, self._puts, self.seconds = start, 0, 0.0

    def put(self, value: Tensor) -> None:
        """Count calls, and record the time of the second, which has the first token."""
        self._puts += 1
        if self._puts == 2:
            self.seconds = time.perf_counter() - self._start

    def end(self) -> None:
        """Do nothing at the end of the stream."""


class Transformers:
    """transformers' own model of the same weights in the same dtype, with greedy ``generate`` and its own attention.

    Attributes:
        causal_lm: The model.
    """

    def __init__(self, model: DecodeModel, folder: str | Path) -> None:
        self.causal_lm = load_stock(folder, model, never_masks=False)
        assert self.causal_lm.dtype == model.dtype
        sizes = Sizes.of(model)  # those of the engine's weights, which may be quantized
        weight_bytes = (sizes.weights + sizes.output_weights) * model.dtype.itemsize
        self._sizes = replace(sizes, weight_bytes=weight_bytes)
        self._work, self._forwards = Work(self._sizes), 0
        self.causal_lm.register_forward_pre_hook(self._count, with_kwargs=True)

    @torch.inference_mode()
    def run(self, texts: Texts, max_new_tokens: int, **more: Any) -> Run:
        """Decode the texts as one batch; shorter texts are padded on the left.

        Args:
            texts: The prompts.
            max_new_tokens: The new tokens of each text.
            more: Further arguments of ``generate``. The work of an ``assistant_model`` is unknown.
        """
        width = max(map(len, texts))
        padded = [[0] * (width - len(text)) + list(text) for text in texts]
        seen = [[0] * (width - len(text)) + [1] * len(text) for text in texts]
        ids, mask = (torch.tensor(rows, device=self.causal_lm.device) for rows in (padded, seen))
        self._work, self._forwards = Work(self._sizes), 0
        first = _FirstToken(time.perf_counter())
        out = self.causal_lm.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, streamer=first, **more)
        known = self._forwards > 0  # a custom_generate calls the base model
        work = self._work if known and "assistant_model" not in more else None
        forwards = self._forwards * len(texts) if known else None
        return Run(out[:, width:].tolist(), forwards, first.seconds, work)

    def _count(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids, cache = kwargs["input_ids"], kwargs.get("past_key_values")
        before = 0 if cache is None else int(cache.get_seq_length())
        batch, tokens = ids.shape
        self._forwards += 1
        self._work.add([(before, tokens)] * batch, batch * (kwargs.get("logits_to_keep") or tokens))
