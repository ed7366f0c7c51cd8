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

from torch import Tensor

from tidar_megatron.inference.forward import ForwardLayout


@dataclass
class Drafts:
    """What waits to be verified.

    ``tokens[0]`` is certain: it is final already, only its K/V is missing. ``q [n - 1, V]`` is what the others were
    drawn from, None where nothing was drawn. ``confidences`` are the model's own probabilities of the others, where
    the policy asks for them. ``lag`` is by how many tokens their branch was shorter than what was accepted.
    """

    tokens: list[int] = field(default_factory=list)
    q: Tensor | None = None
    confidences: list[float] = field(default_factory=list)
    lag: int = 0


class Policy:
    """Plain autoregression, one token a forward; the other modes say what they do otherwise.

    ``draft_length`` is K, the certain token included. A prompt is followed by masks if ``drafts_at_once``; no forward
    of a sequence holds more than ``most_tokens``; drafts come with confidences if ``wants_confidences``.
    """

    draft_length = 1
    drafts_at_once = False
    wants_confidences = False
    most_tokens = 1

    def layout(self, drafts: Drafts) -> ForwardLayout:
        """What the next forward shall hold; ``num_drafts`` at most what is there."""
        return ForwardLayout(1)

    def look_up(self, emitted: Sequence[int]) -> list[int]:
        """Drafts that need no model, behind the last of the tokens that just became final."""
        return []

    def observe(self, drafts: Drafts, layout: ForwardLayout, accepted: int) -> None:
        """What became of drafts that ``layout`` verified."""


class Branches(Policy):
    """TiDAR: verify and draft in one forward.

    Args:
        draft_length: K, the certain token included.
        most_branches: None for a branch of every outcome (the paper's K x K), N for the N likeliest.
    """

    def __init__(self, draft_length: int, most_branches: int | None = None) -> None:
        self.draft_length = draft_length
        # A block's first mask stands where the certain token is: of one mask nothing is left to draft.
        self.most_branches = min(draft_length, most_branches or draft_length) if draft_length > 1 else 0
        self.drafts_at_once = draft_length > 1
        self.wants_confidences = 0 < self.most_branches < draft_length
        self.most_tokens = draft_length * (1 + self.most_branches)

    def layout(self, drafts: Drafts) -> ForwardLayout:
        """All drafts, and the branches."""
        count = len(drafts.tokens)
        if self.most_branches >= count:
            return ForwardLayout(count, tuple(range(1, count + 1)), self.draft_length)
        # drafts of another policy may come without
        confidences = drafts.confidences or [0.5] * (count - 1)
        return ForwardLayout(count, likeliest_outcomes(confidences, self.most_branches), self.draft_length)


class Linear(Policy):
    """Draft with one forward, verify with the next. ``draft_length`` K counts the certain token."""

    def __init__(self, draft_length: int) -> None:
        self.draft_length = draft_length
        self.drafts_at_once = draft_length > 1
        self.most_tokens = 1 + draft_length

    def layout(self, drafts: Drafts) -> ForwardLayout:
        """Masks behind a certain token that has no drafts."""
        count = len(drafts.tokens)
        return (
            ForwardLayout(count) if count > 1 or not self.drafts_at_once else ForwardLayout(1, (1,), self.draft_length)
        )


class Lookup(Policy):
    """Prompt lookup: find the latest earlier place of the text's last (up to) 4 tokens and copy what followed.

    Args:
        prompt: token ids.
        draft_length: K, the certain token included.
    """

    LONGEST_SUFFIX = 4

    def __init__(self, prompt: Sequence[int], draft_length: int) -> None:
        self.draft_length = self.most_tokens = draft_length
        self._text: list[int] = []
        self._followed_at: dict[tuple[int, ...], int] = {}  # n-gram -> where the text goes on after its latest place
        self._append(prompt)

    def layout(self, drafts: Drafts) -> ForwardLayout:
        """All drafts."""
        return ForwardLayout(len(drafts.tokens))

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
    """The ``count`` likeliest numbers of accepted drafts, ascending."""
    return tuple(sorted(ranked_outcomes(confidences)[:count]))


def ranked_outcomes(confidences: Sequence[float]) -> list[int]:
    """The numbers of drafts that may be accepted, 1 to all of them, the likeliest first.

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
    return [accepted for _, accepted in sorted(outcomes, reverse=True)]
