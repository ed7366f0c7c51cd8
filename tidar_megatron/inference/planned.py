"""The policy of mode ``auto``: what a planner chooses before each forward of a sequence, and what it learns from it."""

import time
from collections.abc import Sequence

from tidar_megatron.inference.acceptance import Shares, agreement
from tidar_megatron.inference.choosing import Contents
from tidar_megatron.inference.drafting import NOTHING, Copier, Drafts, Policy
from tidar_megatron.inference.forward import ForwardLayout
from tidar_megatron.inference.planner import Planner

PLAIN = ForwardLayout(1)


class Planned(Policy):
    """The policy of a sequence in mode ``auto``, which follows a planner.

    Args:
        longest: The largest K of any branch (:func:`longest_draft`).
        prompt: Token ids of the prompt, which drafts may be copied from.
    """

    planner: Planner  # the engine's, set when the sequence is queued
    wants_confidences = True

    def __init__(self, longest: int, prompt: Sequence[int] = ()) -> None:
        self.draft_length = longest
        self.most_tokens = longest * (1 + longest)
        self._copier = Copier(prompt)
        self._own, self._copied = Drafts(), NOTHING  # what the latest choice was made from, and its classes
        self._classes: tuple[list[int], list[int]] = [], []
        self._contents = Contents(False, 1, (), 0)
        self._rested = False  # whether nothing was weighed
        self._decided, self._seconds = False, 0.0  # whether it was decided, and how long that took

    @property
    def drafts_at_once(self) -> bool:  # type: ignore[override]
        """Return whether the last forward of the prompt should have masks."""
        return self.planner.drafts_at_once

    def plan(self, drafts: Drafts, most: int) -> tuple[Drafts, ForwardLayout]:
        """Return the drafts that the planner chooses from the model's own and copied ones, and the layout."""
        planner = self.planner
        self._rested = planner.rests and len(drafts.tokens) == 1
        if self._rested:
            planner.rested += 1
            return drafts, PLAIN
        self._decided = planner.decides(len(drafts.tokens) > 1)
        if self._decided:
            start = time.perf_counter()
            self._contents = contents = self._choose(drafts, most)
            self._seconds = time.perf_counter() - start
        else:
            self._contents = contents = self.planner.routine(drafts.confidences)
        layout = ForwardLayout(contents.num_drafts, contents.branches, contents.draft_length)
        if contents.copies:
            return Drafts([drafts.tokens[0], *self._copied.tokens[: contents.num_drafts - 1]]), layout
        return drafts.first(contents.num_drafts), layout

    def _choose(self, drafts: Drafts, most: int) -> Contents:
        copied = self._copier.copy(min(self.draft_length, most) - 1)
        _, *own = drafts.tokens
        # What is verified must not depend on what was drawn: a draft that is dropped for its value comes too seldom.
        known = own if drafts.q is None else []
        of_own, of_copied = agreement(known, copied.tokens)
        of_own += [0] * (len(own) - len(known))
        acceptance = self.planner.acceptance
        self._own, self._copied = drafts, copied
        self._classes = (
            acceptance.own_classes(drafts.confidences, drafts.lag, of_own),
            acceptance.copied_classes(copied.match, of_copied),
        )
        return self.planner.choose(*self._classes, drafts.lag)

    def observe(self, tokens: Sequence[int], verified: int) -> None:
        """Learn from the tokens, and after a decision which drafts were right, also of those that were not verified."""
        self._copier.append(tokens)
        if not verified or self._rested:
            return
        self.planner.observe(self._contents, len(tokens), self._decided)
        if self._decided:
            start = time.perf_counter()
            self._learn(tokens, verified)
            self.planner.spend(self._seconds + time.perf_counter() - start)

    def _learn(self, tokens: Sequence[int], verified: int) -> None:
        own, copied = self._classes
        acceptance = self.planner.acceptance
        if self._own.q is None:
            _compare(self._own.tokens[1:], tokens, own, acceptance.own)
            _compare(self._copied.tokens, tokens, copied, acceptance.copied)
        elif verified > 1 and not self._contents.copies:
            # drawn drafts are accepted by chance: only verified ones tell, and the tokens are not drawn from AR's alone
            _compare(self._own.tokens[1:], tokens[: verified - 1], own, acceptance.own)
        else:
            _compare(self._copied.tokens, tokens, copied, acceptance.copied)


def _compare(drafts: Sequence[int], tokens: Sequence[int], classes: Sequence[int], shares: Shares) -> None:
    """Record the drafts up to the first that is not the token that came."""
    for draft, token, one in zip(drafts, tokens, classes, strict=False):
        shares.observe(one, draft == token)
        if draft != token:
            return
