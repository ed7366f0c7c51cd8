"""The choice of a forward's contents: the drafts to verify and the branches of masks, for the most tokens per second.

A forward of one sequence gives the tokens it accepts now, and through its masks drafts for the next forward. It costs
time, which is worth the tokens that an average forward would give in it. :func:`choose` weighs the three:

    value = E[accepted tokens] + E[gain of the next forward's drafts] - rate * seconds
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Contents(NamedTuple):
    """The contents of the next forward of a sequence.

    Attributes:
        copies: Whether its drafts are the copied ones, not the model's own.
        num_drafts: The drafts to verify, the certain token included.
        branches: The numbers of accepted drafts that get a branch of masks, ascending.
        draft_length: K, the masks of a branch.
        gains: By how many of the model's own drafts were at hand (from 1), what they added to the value.
    """

    copies: bool
    num_drafts: int
    branches: tuple[int, ...]
    draft_length: int
    gains: tuple[float, ...] = ()

    @property
    def num_tokens(self) -> int:
        """The tokens of the forward."""
        return self.num_drafts + len(self.branches) * self.draft_length


@dataclass
class Prices:
    """The cost of time and the worth of drafts, in tokens.

    Attributes:
        plain: By the tokens of a forward without masks, its seconds times the rate; the first entry is unused.
        drafting: The same with masks.
        lengths: The lengths K of branches, ascending.
        fresh: By the number of drafts, what they add to the next forward if their branch fits the outcome.
        late: The same if their branch was shorter than the outcome.
    """

    plain: Sequence[float]
    drafting: Sequence[float]
    lengths: Sequence[int]
    fresh: Sequence[float]
    late: Sequence[float]
    alone: tuple[float, Contents] | None = None  # the best contents without drafts and their value, once computed


MOST_BRANCHES = (1, 2, 3)  # the numbers of branches that are weighed, besides one for each outcome
WORTH = 0.1  # tokens that masks must add: gains are of the best choices, so their estimates are optimistic


def choose(own: Sequence[float], copied: Sequence[float], prices: Prices) -> Contents:
    """Return the contents with the highest value.

    Args:
        own: The chances of the model's own drafts, each given that those before it are accepted; empty for none.
        copied: Those of the copied drafts.
        prices: The prices of this moment.
    """
    if prices.alone is None:
        prices.alone = _best(False, [], prices, 1)
    without, chosen = prices.alone
    if copied:
        count, _ = _most_valuable(copied, prices)
        if count > 1:
            without, chosen = max((without, chosen), _best(True, copied, prices, count), key=_first)
    if not own:
        return chosen
    count, values = _most_valuable(own, prices)
    value, own_contents = _best(False, own, prices, count)
    gain = max(value - without, 0.0)
    # what fewer drafts would have added: as much less as the tokens they give now, for the same masks
    most, gains = max(values), []
    best = values[0]
    for one in values[1:]:
        best = max(best, one)
        gains.append(max(gain - (most - best), 0.0))
    return (own_contents if value > without else chosen)._replace(gains=tuple(gains))


def outcomes_of(chances: Sequence[float], count: int) -> tuple[list[float], float]:
    """Return the probabilities that exactly 1, 2, ..., ``count`` drafts are accepted, and the mean number."""
    reached, tokens, outcomes = 1.0, 1.0, []
    for chance in chances[: count - 1]:
        outcomes.append(reached * (1 - chance))
        reached *= chance
        tokens += reached
    return [*outcomes, reached], tokens


def value_of(contents: Contents, own: Sequence[float], copied: Sequence[float], prices: Prices) -> float:
    """Return the value of given contents; arguments are as for :func:`choose`."""
    outcomes, tokens = outcomes_of(copied if contents.copies else own, contents.num_drafts)
    if not contents.branches:
        return tokens - prices.plain[contents.num_tokens]
    gain = _expected_gain(outcomes, contents.branches, contents.draft_length, prices)
    return tokens + gain - WORTH - prices.drafting[contents.num_tokens]


def _first(pair: tuple[float, Contents]) -> float:
    return pair[0]


def _most_valuable(chances: Sequence[float], prices: Prices) -> tuple[int, list[float]]:
    """Return how many drafts to verify, the certain token included, and the values of 1, 2, ... without masks."""
    values, tokens, reached = [1.0 - prices.plain[1]], 1.0, 1.0
    for count, chance in enumerate(chances, start=2):
        reached *= chance
        tokens += reached
        values.append(tokens - prices.plain[count])
    return values.index(max(values)) + 1, values


def _best(copies: bool, chances: Sequence[float], prices: Prices, count: int) -> tuple[float, Contents]:
    """Return the value of verifying ``count`` drafts, with the best choice of branches, and the contents."""
    outcomes, tokens = outcomes_of(chances, count)
    best, found = tokens - prices.plain[count], Contents(copies, count, (), 0)
    most = [max(prices.fresh[length - 1], prices.late[length - 1]) for length in prices.lengths]
    for branches in _branches(outcomes):
        for length, gain in zip(prices.lengths, most, strict=True):
            value = tokens - prices.drafting[count + len(branches) * length] - WORTH
            if value + gain <= best:
                continue  # not even if every outcome had its branch
            value += _expected_gain(outcomes, branches, length, prices)
            if value > best:
                best, found = value, Contents(copies, count, branches, length)
    return best, found


def _branches(outcomes: Sequence[float]) -> Iterator[tuple[int, ...]]:
    """Yield the sets of branches to weigh: for the likeliest outcomes (ties go to the longest), and for all."""
    likeliest = sorted(range(len(outcomes), 0, -1), key=lambda outcome: -outcomes[outcome - 1])
    for most in MOST_BRANCHES:
        if most < len(outcomes):
            yield tuple(sorted(likeliest[:most]))
    yield tuple(range(1, len(outcomes) + 1))


def _expected_gain(outcomes: Sequence[float], branches: tuple[int, ...], length: int, prices: Prices) -> float:
    """Return the mean gain of the next drafts, which come from the longest branch that is not beyond the outcome."""
    gain, branch, remaining = 0.0, 0, iter((*branches, len(outcomes) + 1))
    upcoming = next(remaining)
    for outcome, chance in enumerate(outcomes, start=1):
        if outcome == upcoming:
            branch, upcoming = outcome, next(remaining)
            gain += chance * prices.fresh[length - 1]
        elif branch and (left := length - 1 - outcome + branch) > 0:
            gain += chance * prices.late[left]
    return gain
