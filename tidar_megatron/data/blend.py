"""The source of each packed sequence: a repeating pattern, so a pure function of the sequence's number.

The pattern is built greedily: each place goes to the source that lags furthest behind its share. The shares therefore
hold at every prefix, not only at the end, and no state is needed to know how many sequences of a source came before.
"""

import math
import os
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from tidar_megatron.errors import UserError

FINEST = 10_000  # most places in a pattern; a longer one would be needed only for shares finer than 1 / FINEST


class Blend:
    """A repeating pattern of sources.

    Args:
        weights: The weight of each source, above 0; the weights need not add up to 1.

    Attributes:
        counts: The number of places of each source in the pattern.
    """

    def __init__(self, weights: Sequence[Fraction]) -> None:
        self.counts = _counts(weights)
        self._period = sum(self.counts)
        wanted = np.array(self.counts, dtype=np.int64)
        had = np.zeros_like(wanted)
        self._source = np.empty(self._period, dtype=np.int64)
        self._before = np.empty(self._period, dtype=np.int64)  # earlier places of the same source
        for place in range(self._period):
            chosen = int(np.argmax(wanted * (place + 1) - had * self._period))
            self._source[place], self._before[place] = chosen, had[chosen]
            had[chosen] += 1
        assert had.tolist() == self.counts  # a source is chosen only while it lags, so none has more than its share

    def locate(self, number: int) -> tuple[int, int]:
        """Return the source of packed sequence ``number``, and how many sequences of that source come before it."""
        times, place = divmod(number, self._period)
        source = int(self._source[place])
        return source, times * self.counts[source] + int(self._before[place])

    def number(self, source: int, ordinal: int) -> int:
        """Return the number of a source's packed sequence ``ordinal``: the inverse of :meth:`locate`."""
        times, before = divmod(ordinal, self.counts[source])
        return times * self._period + int(np.flatnonzero(self._source == source)[before])


def parse_blend(given: Sequence[str], flag: str) -> list[tuple[Fraction, str]]:
    """Return the weights and paths of a blend.

    Args:
        given: One path, or weight, path, weight, path, ... as in Megatron-LM's ``--data-path``.
        flag: The flag, for messages.

    Raises:
        UserError: A weight is invalid or missing, or a source is named twice.
    """
    if len(given) == 1:
        return [(Fraction(1), given[0])]
    if not given or len(given) % 2:
        raise UserError(f"{flag} {' '.join(given)}: give one path, or a weight before each: {flag} 0.7 A 0.3 B")
    blend = []
    for text, path in zip(given[::2], given[1::2], strict=True):
        try:
            weight = Fraction(text)
        except (ValueError, ZeroDivisionError):
            raise UserError(f"{flag}: {text!r} before {path} is not a weight; give {flag} 0.7 A 0.3 B") from None
        if weight <= 0:
            raise UserError(f"{flag}: the weight {text} of {path} must be above 0; or leave that source out")
        blend.append((weight, path))
    if len({os.path.realpath(path) for _, path in blend}) < len(blend):
        raise UserError(f"{flag}: names a source twice; give it once, with the sum of its weights")
    return blend


def _counts(weights: Sequence[Fraction]) -> list[int]:
    """Return the places of each source: exact shares if ``FINEST`` places suffice, otherwise the nearest ones."""
    total = sum(weights, Fraction(0))
    shares = [weight / total for weight in weights]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= FINEST:
        return [int(share * period) for share in shares]
    assert len(shares) <= FINEST
    counts = [max(1, math.floor(share * FINEST)) for share in shares]
    lacking = [share * FINEST - count for share, count in zip(shares, counts, strict=True)]
    for source in sorted(range(len(shares)), key=lambda source: -lacking[source])[: max(0, FINEST - sum(counts))]:
        counts[source] += 1
    return counts
