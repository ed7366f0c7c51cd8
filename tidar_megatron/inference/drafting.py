"""Where drafts come from. Verification (:mod:`tidar_megatron.inference.decoding`) is the same for all of them.

A drafter first says which branches of mask tokens the next forward shall hold, then, once it is known how many
drafts were accepted, returns the drafts that follow the next certain token:

* :class:`NoDrafts` - plain autoregression, one token a forward.
* :class:`BranchDrafts` - TiDAR: the forward that verifies also pre-drafts, one branch of masks for each outcome.
* :class:`LookupDrafts` - the baseline without a model: copy what followed the same words earlier in the text.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from tidar_megatron.inference.attention import Plan
from tidar_megatron.inference.model import DecodeModel


class Drafter(Protocol):
    """What a decoding mode must offer. ``most_branches`` is how many one of its forwards may hold, 0 without masks."""

    most_branches: int

    def branches(self, num_drafts: int) -> tuple[int, ...]:
        """The branches (1 <= r <= ``num_drafts``, ascending) for a forward that verifies ``num_drafts`` drafts."""

    def propose(
        self, model: DecodeModel, hidden: Tensor, plan: Plan, accepted: int, emitted: Sequence[int]
    ) -> list[int]:
        """The drafts after the next certain token.

        Args:
            hidden: the forward's final hidden states ``[T, hidden]`` in the layout of ``plan``.
            accepted: how many of its drafts were accepted.
            emitted: the tokens that became final in this forward; the last is the next certain token.
        """


class NoDrafts:
    most_branches = 0

    def branches(self, num_drafts: int) -> tuple[int, ...]:
        return ()

    def propose(
        self, model: DecodeModel, hidden: Tensor, plan: Plan, accepted: int, emitted: Sequence[int]
    ) -> list[int]:
        return []


class BranchDrafts:
    """TiDAR's pre-drafts of K = ``draft_length`` tokens.

    ``max_branches`` None branches for every outcome (the paper's K x K), N only for the N likeliest.
    """

    def __init__(self, draft_length: int, max_branches: int | None = None) -> None:
        # A block's first mask stands where the certain token is: of one mask nothing is left to draft.
        self.most_branches = min(draft_length, max_branches or draft_length) if draft_length > 1 else 0
        self._keep_all = self.most_branches == draft_length
        self._confidences: list[float] = []  # of the drafts after the certain one, the model's own probabilities

    def branches(self, num_drafts: int) -> tuple[int, ...]:
        if self.most_branches >= num_drafts:
            return tuple(range(1, num_drafts + 1))
        return likeliest_outcomes(self._confidences[: num_drafts - 1], self.most_branches)

    def propose(
        self, model: DecodeModel, hidden: Tensor, plan: Plan, accepted: int, emitted: Sequence[int]
    ) -> list[int]:
        rows = hidden[plan.rows_after(accepted)]
        if not len(rows):
            return []
        logits = model.logits(rows)
        if self._keep_all:
            return logits.argmax(-1).tolist()
        best = logits.float().softmax(-1).max(-1)
        self._confidences = best.values.tolist()
        return best.indices.tolist()


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


class LookupDrafts:
    """Prompt lookup: find the latest earlier place of the text's last (up to) 4 tokens and copy what followed.

    Args:
        prompt: token ids.
        count: how many tokens to copy at most.
    """

    most_branches = 0
    LONGEST_SUFFIX = 4

    def __init__(self, prompt: Sequence[int], count: int) -> None:
        self._count = count
        self._text: list[int] = []
        self._followed_at: dict[tuple[int, ...], int] = {}  # n-gram -> where the text goes on after its latest place
        self._append(prompt)

    def branches(self, num_drafts: int) -> tuple[int, ...]:
        return ()

    def propose(
        self, model: DecodeModel, hidden: Tensor, plan: Plan, accepted: int, emitted: Sequence[int]
    ) -> list[int]:
        self._append(emitted)
        for length in range(self.LONGEST_SUFFIX, 0, -1):
            place = self._followed_at.get(tuple(self._text[-length:]))
            if place is not None:
                return self._text[place : place + self._count]
        return []

    def _append(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            for length in range(1, min(self.LONGEST_SUFFIX, len(self._text)) + 1):
                self._followed_at[tuple(self._text[-length:])] = len(self._text)
            self._text.append(token)
