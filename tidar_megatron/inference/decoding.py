"""Greedy generation, batch 1: prefill, then draft, verify, commit until done (TiDAR section 3.3).

Between two forwards a sequence is its committed prefix (K/V in the cache) and a few drafts. The first draft is
*certain*: it is the argmax of autoregressive logits already computed, so it has been emitted and only its K/V is
missing. One forward verifies the drafts and lets the drafter propose new ones; the argmax at the last accepted draft
is the next certain token. Every emitted token is therefore an autoregressive argmax, whatever the drafts were: all
modes emit the same tokens (up to ties within rounding, as matrix products of different shapes round differently).
"""

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tidar_megatron.inference.attention import Plan
from tidar_megatron.inference.cache import PreallocatedCache
from tidar_megatron.inference.drafting import BranchDrafts, Drafter, LookupDrafts, NoDrafts
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.request import DecodeOptions, Generation, Step, StopReason, check_prompt

PREFILL_CHUNK = 512  # prompt tokens per prefill forward: bounds the (dense, local) mask of a long prompt


def generate(
    model: DecodeModel,
    prompt: Sequence[int],
    options: DecodeOptions | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Generation:
    """Generate to the end. Arguments and errors as :func:`stream`; ``on_step`` sees every step as it comes."""
    options = options or DecodeOptions()
    steps = stream(model, prompt, options)
    generation = Generation(
        mode=options.mode,
        draft_length=options.resolved_draft_length(model),
        branches=options.branches if options.mode == "tidar" else None,
    )
    for step in steps:
        generation.add(step)
        if on_step is not None:
            on_step(step)
    return generation


def stream(model: DecodeModel, prompt: Sequence[int], options: DecodeOptions | None = None) -> Iterator[Step]:
    """Generate, one :class:`Step` a forward, the prefill first.

    Args:
        model: what :func:`~tidar_megatron.inference.model.load_model` returned.
        prompt: token ids; prompt and output together never exceed ``model.context_limit`` tokens.

    Raises:
        UserError: here and not in the midst of it, for options or a prompt that cannot be served.
    """
    options = options or DecodeOptions()
    prompt = list(prompt)
    options.check(model)
    check_prompt(model, prompt)
    return _steps(model, prompt, options)


def _steps(model: DecodeModel, prompt: list[int], options: DecodeOptions) -> Iterator[Step]:
    decoder = Decoder(model, prompt, options)
    end_of_text = frozenset() if options.ignore_eos else model.eos_token_ids
    is_prefill, stop = True, None
    while stop is None:
        start = time.perf_counter()
        tokens = decoder.prefill() if is_prefill else decoder.step()
        seconds = time.perf_counter() - start
        tokens, stop = cut_at_end_of_text(tokens, end_of_text)
        if stop is None and decoder.is_full:
            stop = decoder.full_reason
        yield Step(tokens, seconds, stop, is_prefill)
        is_prefill = False


def cut_at_end_of_text(tokens: list[int], end_of_text: frozenset[int]) -> tuple[list[int], StopReason | None]:
    """The tokens up to and with the first end-of-sequence token, and ``"eos"`` if there is one."""
    for i, token in enumerate(tokens):
        if token in end_of_text:
            return tokens[: i + 1], "eos"
    return tokens, None


class Decoder:
    """One sequence on its way. :meth:`prefill` once, then :meth:`step` until :attr:`is_full`."""

    def __init__(self, model: DecodeModel, prompt: list[int], options: DecodeOptions) -> None:
        self._model = model
        self._prompt = prompt
        self._draft_length = options.resolved_draft_length(model) or 1
        self._drafter = make_drafter(options, prompt, self._draft_length)
        wanted = len(prompt) + options.max_new_tokens
        self._end = min(wanted, model.context_limit)  # tokens of prompt and output together
        self.full_reason: StopReason = "length" if wanted <= model.context_limit else "context"
        self._cache = PreallocatedCache(self._end + self._draft_length * (1 + self._drafter.most_branches))
        self._drafts: list[int] = []  # the first is certain

    @property
    def is_full(self) -> bool:
        """All tokens that fit are emitted: the committed ones and the certain one."""
        return self._cache.length + 1 >= self._end

    @torch.inference_mode()
    def prefill(self) -> list[int]:
        """Commit the prompt and draft behind it. Returns the first new token."""
        chunks = [self._prompt[i : i + PREFILL_CHUNK] for i in range(0, len(self._prompt), PREFILL_CHUNK)]
        for chunk in chunks[:-1]:
            self._model.forward(chunk, Plan(len(chunk)), self._cache)
            self._cache.commit(len(chunk))
        last = chunks[-1]
        plan = self._plan(len(last), (len(last),) if self._drafter.most_branches else ())
        hidden = self._model.forward(last, plan, self._cache)
        certain = self._model.logits(hidden[len(last) - 1 : len(last)]).argmax(-1).tolist()
        self._commit_and_draft(hidden, plan, len(last), certain)
        return certain

    @torch.inference_mode()
    def step(self) -> list[int]:
        """One forward: verify the drafts, commit the accepted ones, draft anew. Returns the new final tokens."""
        # The last token that fits needs no K/V: no draft beyond it is worth a place, nor one at the context limit.
        drafts = self._drafts[: self._end - 1 - self._cache.length]
        plan = self._plan(len(drafts), self._drafter.branches(len(drafts)))
        hidden = self._model.forward(drafts, plan, self._cache)
        emitted = self._verify(drafts, hidden)
        self._commit_and_draft(hidden, plan, len(emitted), emitted)
        return emitted

    def _plan(self, num_drafts: int, branches: Sequence[int]) -> Plan:
        """The plan, less branches that could not draft a single useful token, its masks within the context."""
        start = self._cache.length
        useful = tuple(r for r in branches if start + r < self._end - 1)
        if not useful:
            return Plan(num_drafts)
        return Plan(num_drafts, useful, min(self._draft_length, self._model.context_limit - start - max(useful)))

    def _verify(self, drafts: list[int], hidden: Tensor) -> list[int]:
        """The accepted drafts after the certain one, and the token autoregression puts behind them.

        As many tokens as drafts are accepted, the certain one included: at least one.
        """
        predicted = self._model.logits(hidden[: len(drafts)]).argmax(-1).tolist()
        accepted = 1
        while accepted < len(drafts) and drafts[accepted] == predicted[accepted - 1]:
            accepted += 1
        return predicted[:accepted]

    def _commit_and_draft(self, hidden: Tensor, plan: Plan, accepted: int, emitted: list[int]) -> None:
        self._cache.commit(accepted)
        self._drafts = emitted[-1:]
        if not self.is_full:
            self._drafts += self._drafter.propose(self._model, hidden, plan, accepted, emitted)


def make_drafter(options: DecodeOptions, prompt: list[int], draft_length: int) -> Drafter:
    """The drafter of a mode; ``draft_length`` K counts the certain token."""
    if options.mode == "tidar":
        return BranchDrafts(draft_length, None if options.branches == "all" else options.branches)
    if options.mode == "lookup":
        return LookupDrafts(prompt, draft_length - 1)
    return NoDrafts()
