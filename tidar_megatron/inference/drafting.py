"""Policies: the layout of a sequence's next forward, and the source of its drafts.

All modes share one loop: a forward verifies the current drafts, and its masks, if it has any, draft the next tokens.
A :class:`Policy` only chooses how many drafts and which branches of masks the forward contains:

=============  ====================================================================================================
`ar`           the certain token alone
`tidar`        all drafts, and a branch of K masks for each outcome, or for the likeliest few (TiDAR section 3.3)
`linear`       two alternating forwards: the certain token and K masks; then the drafts alone
`lookup`       drafts copied from an earlier occurrence of the same tokens: the baseline without a draft model
`auto`         what a planner chooses (``planner.py``), and copies where copies are accepted more than drafts
=============  ====================================================================================================
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from tidar_megatron.inference.forward import ForwardLayout


@dataclass
class Drafts:
    """The tokens of a sequence that wait for verification.

    ``tokens[0]`` is the certain token: it is final, and only its K/V is missing. ``q [n - 1, V]`` holds the
    distributions that the other tokens were drawn from, or None if nothing was drawn. ``confidences`` are the model's
    probabilities of the other tokens, if the policy wants them. ``lag`` is how many tokens shorter than the number of
    accepted drafts their branch was. If the tokens were copied, ``copied`` is the length of the match, else 0.
    """

    tokens: list[int] = field(default_factory=list)
    q: Tensor | None = None
    confidences: list[float] = field(default_factory=list)
    lag: int = 0
    copied: int = 0


class Copied(NamedTuple):
    """Drafts copied from the text: what followed the last ``match`` tokens when they occurred before."""

    tokens: list[int]
    match: int
    confidences: Sequence[float] = ()


NOTHING = Copied([], 0)


class Policy:
    """Plain autoregression, one token per forward, and the base class of the other policies.

    ``draft_length`` is K, the certain token included. If ``drafts_at_once``, the last forward of the prompt already
    contains masks. No forward of a sequence contains more than ``most_tokens`` tokens. If ``wants_confidences``, drafts
    carry confidences.
    """

    draft_length = 1
    drafts_at_once = False
    wants_confidences = False
    most_tokens = 1

    def layout(self, drafts: Drafts) -> ForwardLayout:
        """Return the layout of the next forward, with at most ``len(drafts.tokens)`` drafts."""
        return ForwardLayout(1)

    def look_up(self, emitted: Sequence[int]) -> Copied:
        """Return drafts that need no model, to follow the last of the tokens that just became final."""
        return NOTHING

    def observe(self, drafts: Drafts, layout: ForwardLayout, accepted: int) -> None:
        """Record how many tokens a forward with this layout accepted, the certain token included."""


class Branches(Policy):
    """The policy of mode ``tidar``, which verifies and drafts in one forward.

    Args:
        draft_length: K, the certain token included.
        most_branches: None for a branch per outcome (the paper's K x K), N for the N likeliest outcomes.
    """

    def __init__(self, draft_length: int, most_branches: int | None = None) -> None:
        self.draft_length = draft_length
        # A block's first mask is at the certain token's position, so a block of one mask drafts nothing.
        self.most_branches = min(draft_length, most_branches or draft_length) if draft_length > 1 else 0
        self.drafts_at_once = draft_length > 1
        self.wants_confidences = 0 < self.most_branches < draft_length
        self.most_tokens = draft_length * (1 + self.most_branches)

    def layout(self, drafts: Drafts) -> ForwardLayout:
        """Return a layout of all drafts and the branches."""
        count = len(drafts.tokens)
        if self.most_branches >= count:
            return ForwardLayout(count, tuple(range(1, count + 1)), self.draft_length)
        # drafts made under another policy may have no confidences
        confidences = drafts.confidences or [0.5] * (count - 1)
        return ForwardLayout(count, likeliest_outcomes(confidences, self.most_branches), self.draft_length)


class Linear(Policy):
    """The policy of mode ``linear``: one forward drafts and the next one verifies.

    Args:
        draft_length: K, the certain token included.
    """

    def __init__(self, draft_length: int) -> None:
        self.draft_length = draft_length
        self.drafts_at_once = draft_length > 1
        self.most_tokens = 1 + draft_length

    def layout(self, drafts: Drafts) -> ForwardLayout:
        """Return a layout of the drafts alone, or, if there are none, of the certain token and K masks."""
        count = len(drafts.tokens)
        return (
            ForwardLayout(count) if count > 1 or not self.drafts_at_once else ForwardLayout(1, (1,), self.draft_length)
        )


class Copier:
    """The tokens that followed the latest earlier occurrence of the last (up to) 4 tokens of a text.

    Args:
        prompt: Token ids of the prompt.
    """

    LONGEST_SUFFIX = 4

    def __init__(self, prompt: Sequence[int]) -> None:
        self._text: list[int] = []
        self._followed_at: dict[tuple[int, ...], int] = {}  # n-gram -> position after its latest occurrence
        self.append(prompt)

    def append(self, tokens: Sequence[int]) -> None:
        """Add tokens to the text."""
        for token in tokens:
            for length in range(1, min(self.LONGEST_SUFFIX, len(self._text)) + 1):
                self._followed_at[tuple(self._text[-length:])] = len(self._text)
            self._text.append(token)

    def copy(self, count: int) -> Copied:
        """Return up to ``count`` tokens of the text, to go on with."""
        for length in range(self.LONGEST_SUFFIX, 0, -1):
            place = self._followed_at.get(tuple(self._text[-length:]))
            if place is not None:
                return Copied(self._text[place : place + count], length)
        return NOTHING


class Lookup(Policy):
    """The policy of mode ``lookup``, whose drafts are all copied from the text.

    Args:
        prompt: Token ids of the prompt.
        draft_length: K, the certain token included.
    """

    def __init__(self, prompt: Sequence[int], draft_length: int) -> None:
        self.draft_length = self.most_tokens = draft_length
        self._copier = Copier(prompt)

    def layout(self, drafts: Drafts) -> ForwardLayout:
        """Return a layout of all drafts, without masks."""
        return ForwardLayout(len(drafts.tokens))

    def look_up(self, emitted: Sequence[int]) -> Copied:
        """Return up to K - 1 drafts, copied from the text."""
        self._copier.append(emitted)
        return self._copier.copy(self.draft_length - 1)


def likeliest_outcomes(confidences: Sequence[float], count: int) -> tuple[int, ...]:
    """Return the ``count`` likeliest outcomes, in ascending order; see :func:`ranked_outcomes`."""
    return tuple(sorted(ranked_outcomes(confidences)[:count]))


def ranked_outcomes(confidences: Sequence[float]) -> list[int]:
    """Return the outcomes, the possible numbers of accepted drafts from 1 to all of them, likeliest first.

    Args:
        confidences: The confidences of the drafts after the certain token. Draft i + 1 is accepted with probability
            ``confidences[i]`` if all earlier ones were. Thus exactly n are accepted with the probability that is the
            product of the first n - 1 confidences times (1 - the n-th), and all with the product of all confidences.
    """
    outcomes, reached = [], 1.0
    for accepted, confidence in enumerate(confidences, start=1):
        outcomes.append((reached * (1 - confidence), accepted))
        reached *= confidence
    outcomes.append((reached, len(confidences) + 1))
    return [accepted for _, accepted in sorted(outcomes, reverse=True)]
