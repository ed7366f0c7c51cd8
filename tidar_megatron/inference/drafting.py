"""Policies: the layout of a sequence's next forward, and the source of its drafts.

All modes share one loop: a forward verifies the current drafts, and its masks, if it has any, draft the next tokens.
A :class:`Policy` only chooses which drafts and which branches of masks the forward contains:

=============  ====================================================================================================
`ar`           the certain token alone
`tidar`        all drafts, and a branch of K masks for each outcome, or for the likeliest few (TiDAR section 3.3)
`linear`       two alternating forwards: the certain token and K masks; then the drafts alone
`lookup`       drafts copied from an earlier occurrence of the same tokens: the baseline without a draft model
`auto`         what a planner chooses before each forward (``planner.py``), from own drafts and copied ones
=============  ====================================================================================================
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from tidar_megatron.inference.forward import ForwardLayout

LONGEST_MATCH = 8  # the longest match that is told from longer ones


@dataclass
class Drafts:
    """The tokens of a sequence that wait for verification.

    ``tokens[0]`` is the certain token: it is final, and only its K/V is missing. ``q [n - 1, V]`` holds the
    distributions that the other tokens were drawn from, or None if nothing was drawn. ``confidences`` are the model's
    probabilities of the other tokens, if the policy wants them. ``lag`` is how many tokens shorter than the number of
    accepted drafts their branch was.
    """

    tokens: list[int] = field(default_factory=list)
    q: Tensor | None = None
    confidences: list[float] = field(default_factory=list)
    lag: int = 0

    def first(self, count: int) -> "Drafts":
        """Return the first ``count`` tokens, the certain one included."""
        if count >= len(self.tokens):
            return self
        q = None if self.q is None else self.q[: count - 1]
        return Drafts(self.tokens[:count], q, self.confidences[: count - 1], self.lag)


class Copied(NamedTuple):
    """Drafts copied from the text: what followed the last ``match`` tokens when they occurred before."""

    tokens: list[int]
    match: int


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

    def plan(self, drafts: Drafts, most: int) -> tuple[Drafts, ForwardLayout]:
        """Return the drafts that the next forward verifies, and its layout, which holds as many.

        Args:
            drafts: The certain token and the model's own drafts, at most ``most`` together.
            most: The number of tokens that the text may still have.
        """
        return drafts.first(1), ForwardLayout(1)

    def observe(self, tokens: Sequence[int], verified: int) -> None:
        """Record tokens that became final, and how many drafts their forward verified; 0 for the prompt's forward."""


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

    def plan(self, drafts: Drafts, most: int) -> tuple[Drafts, ForwardLayout]:
        """Return all drafts, and a layout of them and the branches."""
        count = len(drafts.tokens)
        if self.most_branches >= count:
            return drafts, ForwardLayout(count, tuple(range(1, count + 1)), self.draft_length)
        branches = likeliest_outcomes(drafts.confidences, self.most_branches)
        return drafts, ForwardLayout(count, branches, self.draft_length)


class Linear(Policy):
    """The policy of mode ``linear``: one forward drafts and the next one verifies.

    Args:
        draft_length: K, the certain token included.
    """

    def __init__(self, draft_length: int) -> None:
        self.draft_length = draft_length
        self.drafts_at_once = draft_length > 1
        self.most_tokens = 1 + draft_length

    def plan(self, drafts: Drafts, most: int) -> tuple[Drafts, ForwardLayout]:
        """Return all drafts and a layout of them alone, or, if there are none, of the certain token and K masks."""
        if len(drafts.tokens) > 1 or not self.drafts_at_once:
            return drafts, ForwardLayout(len(drafts.tokens))
        return drafts, ForwardLayout(1, (1,), self.draft_length)


class Copier:
    """The tokens that followed an earlier occurrence of the last (up to) 4 tokens of a text.

    It is the one where most of these tokens are the same, and the latest of those; :data:`SEEN` occurrences of the last
    token are looked at.

    Args:
        prompt: Token ids of the prompt.
    """

    LONGEST_SUFFIX, SEEN = 4, 64

    def __init__(self, prompt: Sequence[int]) -> None:
        self._text: list[int] = []
        self._latest: dict[int, int] = {}  # the position after the latest occurrence of a token
        self._before: list[int] = []  # for each token, that of its occurrence before; 0 if there is none
        self.append(prompt)

    def append(self, tokens: Sequence[int]) -> None:
        """Add tokens to the text."""
        text, latest, before = self._text, self._latest, self._before
        for token in tokens:
            before.append(latest.get(token, 0))
            text.append(token)
            latest[token] = len(text)

    def copy(self, count: int) -> Copied:
        """Return up to ``count`` tokens of the text, to go on with; a match counts up to :data:`LONGEST_MATCH`."""
        text, before = self._text, self._before
        place = before[-1] if text else 0
        found, length, seen = 0, 0, 0
        while place and length < self.LONGEST_SUFFIX and seen < self.SEEN:
            same = 1
            while same < min(place, self.LONGEST_SUFFIX) and text[place - same - 1] == text[-same - 1]:
                same += 1
            if same > length:
                found, length = place, same
            place, seen = before[place - 1], seen + 1
        if not found:
            return NOTHING
        if length == self.LONGEST_SUFFIX:
            while length < min(found, LONGEST_MATCH) and text[found - length - 1] == text[-length - 1]:
                length += 1
        return Copied(text[found : found + count], length)


class Lookup(Policy):
    """The policy of mode ``lookup``, whose drafts are all copied from the text.

    Args:
        prompt: Token ids of the prompt.
        draft_length: K, the certain token included.
    """

    def __init__(self, prompt: Sequence[int], draft_length: int) -> None:
        self.draft_length = self.most_tokens = draft_length
        self._copier = Copier(prompt)

    def plan(self, drafts: Drafts, most: int) -> tuple[Drafts, ForwardLayout]:
        """Return up to K - 1 drafts, copied from the text, and a layout of them without masks."""
        tokens = [*drafts.tokens[:1], *self._copier.copy(min(self.draft_length, most) - 1).tokens]
        return Drafts(tokens), ForwardLayout(len(tokens))

    def observe(self, tokens: Sequence[int], verified: int) -> None:
        """Add the tokens to the text that is copied from."""
        self._copier.append(tokens)


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
