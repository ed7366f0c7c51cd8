"""The state of one request: its committed tokens, the drafts that wait for verification, and why it ends.

Between forwards a sequence consists of its committed prefix (K/V in the pool) and a few drafts. The first draft is the
*certain* token: it was chosen from autoregressive logits, so it has been emitted and only its K/V is missing. A forward
verifies the drafts and may draft new ones; the model's prediction after the last accepted draft gives the next certain
token. Every emitted token is therefore chosen from autoregressive logits, whatever the drafts were.
"""

from collections.abc import Sequence as Tokens
from typing import Protocol

import torch
from torch import Tensor

from tidar_megatron.errors import UserError
from tidar_megatron.inference.draft_weights import Drafted
from tidar_megatron.inference.drafting import Branches, Drafts, Linear, Lookup, Policy
from tidar_megatron.inference.forward import ForwardLayout, Part
from tidar_megatron.inference.logits import Best
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.planned import Planned
from tidar_megatron.inference.planner import Planner, longest_draft
from tidar_megatron.inference.request import MOST_TOKENS, DecodeOptions, StopReason, check_prompt
from tidar_megatron.inference.sampling import Sampler
from tidar_megatron.inference.text import StopStrings


class Ending(Protocol):
    """A rule that decides from the tokens whether a text has ended."""

    def ends_with(self, token: int) -> bool:
        """Add a token; return whether it ends the text."""
        ...


class Sequence:
    """A request in the engine.

    In each step, the engine takes :meth:`part` into the forward, passes the logits of :attr:`rows` to :meth:`accept`,
    then those of :attr:`draft_rows` to :meth:`draft`.

    Args:
        model: The model that decodes.
        prompt: Token ids of the prompt.
        options: How to generate.
        ending: A rule that ends the text; used only if ``options.stop`` is empty.

    Raises:
        UserError: the options or the prompt cannot be served.
    """

    def __init__(
        self, model: DecodeModel, prompt: Tokens[int], options: DecodeOptions, ending: Ending | None = None
    ) -> None:
        options.check(model)
        prompt = list(prompt)
        check_prompt(model, prompt)
        self.options = options
        self.slot: int | None = None
        self.length = 0  # number of committed tokens
        self.tokens: list[int] = []  # emitted tokens
        self.logprobs: list[float] = []  # of the emitted tokens, if options.logprobs
        self.stop: StopReason | None = None
        self.error: Exception | None = None
        self._context_limit = model.context_limit
        self._policy = make_policy(model, options, prompt)
        if (most := self._policy.most_tokens) > MOST_TOKENS:
            raise UserError(
                f"draft length {self._policy.draft_length}: a forward would hold {most} tokens, and the limit is "
                f"{MOST_TOKENS}; use a shorter draft length or fewer branches"
            )
        end_of_text = frozenset() if options.ignore_eos else model.eos_token_ids
        self._end_of_text = end_of_text
        self._sampler = Sampler(options.sampling, prompt, end_of_text, model.vocab_size, model.device)
        self._ending = StopStrings(model.tokenizer, prompt, options.stop) if options.stop else ending
        wanted = len(prompt) + options.max_new_tokens
        self._end = min(wanted, model.context_limit)  # largest length of prompt and output together
        self._full: StopReason = "length" if wanted <= model.context_limit else "context"
        self._unread = prompt
        self._drafts = Drafts()
        self._part = Part(0, 0, (), ForwardLayout(0))
        self._accepted = 0  # tokens of the last part that were committed

    @property
    def is_planned(self) -> bool:
        """Return whether a planner plans its forwards (mode ``auto`` with a mask token)."""
        return isinstance(self._policy, Planned)

    def follow(self, planner: Planner) -> None:
        """Follow the engine's planner; for a sequence that :attr:`is_planned` only."""
        assert isinstance(self._policy, Planned)
        self._policy.planner = planner

    @property
    def room(self) -> int:
        """The slot size it needs, in tokens: the longest prompt and output, plus the largest forward."""
        return self._end + self._policy.most_tokens

    def part(self, prompt_tokens: int) -> Part:
        """Return its part of the next forward: at most ``prompt_tokens`` of the unread prompt, or its drafts."""
        assert self.slot is not None and self.stop is None
        if self._unread:
            tokens = self._unread[:prompt_tokens]
            is_last = len(tokens) == len(self._unread)
            branches = (len(tokens),) if is_last and self._policy.drafts_at_once else ()
            layout = ForwardLayout(len(tokens), branches, self._policy.draft_length)
        else:
            # The last token that fits needs no K/V, so drafts from there on are useless.
            last = self._end - 1 - self.length
            self._drafts, layout = self._policy.plan(self._drafts.first(last), last)
            tokens = self._drafts.tokens
        self._part = Part(self.slot, self.length, tokens, self._useful(layout))
        return self._part

    @property
    def last_part(self) -> Part:
        """The sequence's part of the last forward."""
        return self._part

    @property
    def context(self) -> int:
        """The number of tokens that are committed, the unread prompt included."""
        return self.length + len(self._unread)

    @property
    def reads_prompt(self) -> bool:
        """Return whether the next forward reads a part of the prompt."""
        return bool(self._unread)

    @property
    def rows(self) -> Tokens[int]:
        """The rows of its part whose logits verify: those of the drafts or of the prompt's last token.

        With a trust ratio below 1 they include the first mask of each branch, which predicts the same token.
        """
        layout = self._part.layout
        if self._unread and layout.num_drafts < len(self._unread):
            return range(0)
        rows = range(layout.num_drafts - 1 if self._unread else 0, layout.num_drafts)
        if self.options.trust_ratio < 1 and layout.branches:
            assert layout.branches == tuple(row + 1 for row in rows)
            return [*rows, *range(layout.num_drafts, layout.num_tokens, layout.draft_length)]
        return rows

    @property
    def draft_rows(self) -> range:
        """The rows of its part whose logits give the next drafts."""
        if self.stop is not None or self._unread:
            return range(0)
        return self._part.layout.rows_after(self._accepted)

    @property
    def wants_confidences(self) -> bool:
        """Return whether its part drafts, greedily, for a policy that uses the drafts' probabilities."""
        return self._policy.wants_confidences and bool(self._part.layout.branches) and self.options.sampling.greedy

    def accept(self, logits: Tensor, best: Best | None = None) -> list[int]:
        """Verify the drafts and commit the accepted ones; return the newly final tokens.

        Args:
            logits: The logits of :attr:`rows`, ``[rows, V]``.
            best: Their likeliest tokens, if they are on the host already.
        """
        layout, drafts = self._part.layout, self._part.tokens
        if not len(logits):  # a chunk of the prompt, not the last
            self._commit(layout.num_drafts)
            return []
        if (beta := self.options.trust_ratio) < 1 and layout.branches:
            verifying, drafting = logits.chunk(2)
            # both are minus infinity for the mask token, and 0 times that would be NaN
            logits, best = drafting if beta == 0 else beta * verifying + (1 - beta) * drafting, None
        if self._unread:
            tokens = self._sampler.choose(logits, drafts[-1:], None, best)
            self._policy.observe(tokens, 0)
            self._commit(layout.num_drafts)
        else:
            tokens = self._sampler.choose(logits, drafts, self._drafts.q, best)
            self._policy.observe(tokens, layout.num_drafts)
            self._commit(len(tokens))
        tokens = self._cut(tokens)
        if self.options.logprobs:
            rows = logits[: len(tokens)].float().log_softmax(-1)
            self.logprobs += rows.gather(-1, torch.tensor(tokens, device=rows.device)[:, None]).flatten().tolist()
        self.tokens += tokens
        self._sampler.emit(tokens)
        self._drafts = Drafts(tokens[-1:] if self.stop is None else [])
        return tokens

    def draft(self, logits: Tensor, best: Best | None = None, offered: Drafted | None = None) -> None:
        """Append drafts after the certain token.

        Args:
            logits: The logits of :attr:`draft_rows`, ``[rows, V]``.
            best: Their likeliest tokens, if they are on the host already.
            offered: What the model's selector offers for these rows, if it has one.
        """
        confidences: list[float] = []
        if offered is not None and self.options.sampling.greedy:
            best = offered.likeliest()
            tokens, q = best.tokens, None
        elif offered is not None:
            tokens, q = self._sampler.walk(offered.ids, offered.scores, logits.shape[-1])
            # what is verified must not depend on what was drawn, and the later distributions do
            confidences = [float(q[0].max())] * len(tokens)
        else:
            tokens, q = self._sampler.propose(logits, best)
        if self._policy.wants_confidences and not confidences:
            if q is None and best is not None and best.probabilities is not None:
                confidences = best.probabilities
            else:
                likely = logits.float().softmax(-1) if q is None else q
                confidences = likely.amax(-1).tolist()
        branch = self._part.layout.branch_after(self._accepted)
        assert branch is not None
        self._drafts = Drafts([*self._drafts.tokens, *tokens], q, confidences, self._accepted - branch)

    def _commit(self, count: int) -> None:
        self.length += count
        self._accepted = count
        self._unread = self._unread[count:]

    def _useful(self, layout: ForwardLayout) -> ForwardLayout:
        """Return the layout without branches that cannot draft a useful token, and with masks within the context."""
        last = self._end - 1 if self.options.trust_ratio < 1 else self._end - 3  # mixing needs a branch's first mask
        if not layout.branches:
            return layout
        useful = tuple(r for r in layout.branches if self.length + r <= last)
        if not useful:
            return ForwardLayout(layout.num_drafts)
        room = self._context_limit - self.length - useful[-1]
        if useful == layout.branches and layout.draft_length <= room:
            return layout
        return ForwardLayout(layout.num_drafts, useful, min(layout.draft_length, room))

    def _cut(self, tokens: list[int]) -> list[int]:
        """Return the tokens up to the first that ends the text, and set ``stop`` if one does."""
        for count, token in enumerate(tokens, 1):
            if token in self._end_of_text:
                self.stop = "eos"
            elif self._ending is not None and self._ending.ends_with(token):
                self.stop = "stop"
            if self.stop is not None:
                return tokens[:count]
        if self.length + 1 >= self._end:
            self.stop = self._full
        return tokens


def make_policy(model: DecodeModel, options: DecodeOptions, prompt: Tokens[int]) -> Policy:
    """Return the policy for the options' mode."""
    draft_length = options.resolved_draft_length(model) or 1
    if options.mode == "auto" and model.mask_token_id is not None:
        return Planned(longest_draft(model), prompt)
    if options.mode == "tidar":
        return Branches(draft_length, None if options.branches == "all" else options.branches)
    if options.mode == "linear":
        return Linear(draft_length)
    if options.mode == "lookup":
        return Lookup(prompt, draft_length)
    return Policy()
