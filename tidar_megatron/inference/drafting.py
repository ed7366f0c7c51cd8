"""What the next forward of a sequence holds, and where its drafts come from.

All modes are one loop: a forward verifies the drafts at hand, and its masks, if it has any, draft what comes next.
A :class:`Policy` only says how many drafts and which branches of masks a forward shall have:

=============  ====================================================================================================
`ar`           the certain token alone
`tidar`        all drafts, and a branch of K masks for each outcome, or for the likeliest few (TiDAR section 3.3)
`linear`       two forwards in turn: the certain token and K masks; then the drafts alone
`lookup`       drafts copied from where the text said the same before: the baseline without a model
=============  ====================================================================================================
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from tidar_megatron.inference.attention import Plan


@dataclass
class Drafts:
    """What waits to be verified.

    ``tokens[0]`` is certain: it is final already, only its K/V is missing. ``q [n - 1, V]`` is what the others were
    drawn from, None where nothing was drawn. ``confidences`` are the model's own probabilities of the others, where
    the policy asks for them.
    """

    tokens: list[int] = field(default_factory=list)
    q: Tensor | None = None
    confidences: list[float] = field(default_factory=list)


class Policy(Protocol):
    """What a mode must offer. ``most_branches`` is how many one of its forwards may hold, 0 without masks."""

    draft_length: int
    most_branches: int
    wants_confidences: bool

    def plan(self, drafts: Drafts) -> Plan:
        """What the next forward shall hold; ``num_drafts`` at most what is there."""

    def look_up(self, emitted: Sequence[int]) -> list[int]:
        """Drafts that need no model, behind the last of the tokens that just became final."""


class Autoregression:
    """One token a forward."""

    draft_length, most_branches, wants_confidences = 1, 0, False

    def plan(self, drafts: Drafts) -> Plan:
        """The certain token."""
        return Plan(1)

    def look_up(self, emitted: Sequence[int]) -> list[int]:
        """None."""
        return []


class Branches:
    """TiDAR: verify and draft in one forward.

    Args:
        draft_length: K, the certain token included.
        most_branches: None for a branch of every outcome (the paper's K x K), N for the N likeliest.
    """

    def __init__(self, draft_length: int, most_branches: int | None = None) -> None:
        self.draft_length = draft_length
        # A block's first mask stands where the certain token is: of one mask nothing is left to draft.
        self.most_branches = min(draft_length, most_branches or draft_length) if draft_length > 1 else 0
        self.wants_confidences = 0 < self.most_branches < draft_length

    def plan(self, drafts: Drafts) -> Plan:
        """All drafts, and the branches."""
        count = len(drafts.tokens)
        if self.most_branches >= count:
            return Plan(count, tuple(range(1, count + 1)), self.draft_length)
        return Plan(count, likeliest_outcomes(drafts.confidences, self.most_branches), self.draft_length)

    def look_up(self, emitted: Sequence[int]) -> list[int]:
        """None."""
        return []


class Linear:
    """Draft with one forward, verify with the next. ``draft_length`` K counts the certain token."""

    most_branches, wants_confidences = 1, False

    def __init__(self, draft_length: int) -> None:
        self.draft_length = draft_length
        self.most_branches = 1 if draft_length > 1 else 0

    def plan(self, drafts: Drafts) -> Plan:
        """Masks behind a certain token that has no drafts."""
        count = len(drafts.tokens)
        return Plan(count) if count > 1 or not self.most_branches else Plan(1, (1,), self.draft_length)

    def look_up(self, emitted: Sequence[int]) -> list[int]:
        """None."""
        return []


class Lookup:
    """Prompt lookup: find the latest earlier place of the text's last (up to) 4 tokens and copy what followed.

    Args:
        prompt: token ids.
        draft_length: K, the certain token included.
    """

    most_branches, wants_confidences = 0, False
    LONGEST_SUFFIX = 4

    def __init__(self, prompt: Sequence[int], draft_length: int) -> None:
        self.draft_length = draft_length
        self._text: list[int] = []
        self._followed_at: dict[tuple[int, ...], int] = {}  # n-gram -> where the text goes on after its latest place
        self._append(prompt)

    def plan(self, drafts: Drafts) -> Plan:
        """All drafts."""
        return Plan(len(drafts.tokens))

    def look_up(self, emitted: Sequence[int]) -> list[int]:
        """Up to K - 1 tokens."""
        self._append(emitted)
        for length in range(self.LONGEST_SUFFIX, 0, -1):
            place = self._followed_at.get(tuple(self._text[-length:]))
            if place is not None:
                return self._text[place : place + self.draft_length - 1]
        return []

    def _append(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            for length in range(1, min(self.LONGEST_SUFFIX, len(self._text)) + 1):
                self._followed_at[tuple(self._text[-length:])] = len(self._text)
            self._text.append(token)


def likeliest_outcomes(confidences: Sequence[float], count: int) -> tuple[int, ...]:
    """The ``count`` likeliest numbers of accepted drafts, ascending.

    Args:
        confidences: of the drafts after the certain one; draft i + 1 is accepted with probability ``confidences[i]``
            if all before it were. So exactly n are accepted with the product of the first n - 1 times
            (1 - the n-th), and all of them with the product of all.
    """
    outcomes, reached = [], 1.0
    for accepted, confidence in enumerate(confidences, start=1):
        outcomes.append((reached * (1 - confidence), accepted))
        reached *= confidence
    outcomes.append((reached, len(confidences) + 1))
    return tuple(sorted(accepted for _, accepted in sorted(outcomes, reverse=True)[:count]))
