"""The chance that a draft is accepted: observed shares, by what is known of a draft before it is verified.

Statistics are learned during generation from all sequences of an engine; the planner (``planner.py``) uses them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tidar_megatron.inference.drafting import LONGEST_MATCH


class Shares:
    """The decayed share of accepted drafts in each of ``len(prior)`` classes; rare classes tend to their prior."""

    FADE = 0.5 ** (1 / 140)  # decay per draft of a class: a half-life of 140 drafts
    WEIGHT = 6.0  # how many drafts the prior counts for

    def __init__(self, prior: Sequence[float]) -> None:
        self._prior = list(prior)
        self._accepted = [0.0] * len(prior)
        self._count = [0.0] * len(prior)

    def __getitem__(self, index: int) -> float:
        return (self._accepted[index] + self.WEIGHT * self._prior[index]) / (self._count[index] + self.WEIGHT)

    def age(self, share: float) -> None:
        """Reduce the weight of all observations to ``share``: a class that is no longer observed tends to its prior."""
        self._accepted = [share * accepted for accepted in self._accepted]
        self._count = [share * count for count in self._count]

    def observe(self, index: int, accepted: bool) -> None:
        """Record the outcome of a draft of this class."""
        self._accepted[index] = self._accepted[index] * self.FADE + accepted
        self._count[index] = self._count[index] * self.FADE + 1


AGREE, DIFFER = 1, 2  # a draft of the model and a copied one at the same place; 0 where there is only one
KINDS = 3


@dataclass
class Acceptance:
    """The conditional probability that a draft is accepted, given that all drafts before it were.

    A draft of the model belongs to a class by its confidence, its offset in the block, whether its branch was shorter
    than the outcome, and whether a copy proposes the same token. A copied draft belongs to a class by the length of the
    match before it, the accepted copies included, and by whether the model's own draft is the same token.
    """

    BINS, OFFSETS = 8, 3  # of confidences; later offsets are like the last one
    MATCHED = (0.05, 0.1, 0.3, 0.7, 0.75, 0.85, 0.9, 0.9, 0.95)  # the prior of a copy, by the length of its match
    own: Shares = field(init=False)
    copied: Shares = field(init=False)

    def __post_init__(self) -> None:
        per_bin = self.OFFSETS * 2 * KINDS
        self.own = Shares([(place // per_bin + 0.5) / self.BINS for place in range(self.BINS * per_bin)])
        by_kind = [(chance, max(chance, 0.8), 0.4 * chance) for chance in self.MATCHED]
        self.copied = Shares([chance for kinds in by_kind for chance in kinds])

    def own_classes(self, confidences: Sequence[float], lag: int, agreement: Sequence[int]) -> list[int]:
        """Return the class of each of the model's own drafts.

        Args:
            confidences: The model's probabilities of the drafts, which follow the certain token.
            lag: How many tokens shorter than the outcome their branch was.
            agreement: For each draft, 0, :data:`AGREE` or :data:`DIFFER`.
        """
        bins, offsets, is_late = self.BINS, self.OFFSETS, 1 if lag else 0
        found = []
        for offset, (chance, kind) in enumerate(zip(confidences, agreement, strict=True), lag):
            place = int(min(chance, 0.999) * bins) if chance > 0 else 0  # NaN is not above 0
            found.append(((place * offsets + min(offset, offsets - 1)) * 2 + is_late) * KINDS + kind)
        return found

    def copied_classes(self, match: int, agreement: Sequence[int]) -> list[int]:
        """Return the class of each copied draft after a match of this length."""
        return [min(match + place, LONGEST_MATCH) * KINDS + kind for place, kind in enumerate(agreement)]


def agreement(one: Sequence[int], other: Sequence[int]) -> tuple[list[int], list[int]]:
    """Compare two proposals for the same places; return what each draft is, for either: :data:`AGREE` and so on."""
    kinds: list[int] = []
    for mine, theirs in zip(one, other, strict=False):
        kinds.append(AGREE if mine == theirs else DIFFER)
        if mine != theirs:
            break
    rest = len(kinds)
    return kinds + [0] * (len(one) - rest), kinds + [0] * (len(other) - rest)
