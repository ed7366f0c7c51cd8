"""Which source each packed sequence comes from: a pattern that repeats, so it is a pure function of the number.

The pattern is built greedily: each place goes to the source that lags furthest behind its share. So the shares hold at
every prefix and not only in the end, and no state is needed to know how many of a source came before any number.
"""

import math
import os
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from tidar_megatron.errors import UserError

FINEST = 10_000  # places of the longest pattern: shares are multiples of its inverse


class Blend:
    """A pattern of sources.

    Args:
        weights: of each source, above 0; they need not add up to 1.

    Attributes:
        counts: places of each source in the pattern.
    """

    def __init__(self, weights: Sequence[Fraction]) -> None:
        self.counts = _counts(weights)
        self._period = sum(self.counts)
        wanted = np.array(self.counts, dtype=np.int64)
        had = np.zeros_like(wanted)
        self._source = np.empty(self._period, dtype=np.int64)
        self._before = np.empty(self._period, dtype=np.int64)  # of the same source, in the pattern
        for place in range(self._period):
            chosen = int(np.argmax(wanted * (place + 1) - had * self._period))
            self._source[place], self._before[place] = chosen, had[chosen]
            had[chosen] += 1
        assert had.tolist() == self.counts  # a source is chosen only while it lags, so none has more than its share

    def locate(self, number: int) -> tuple[int, int]:
        """Packed sequence ``number`` -> its source, and how many of that source come before it."""
        times, place = divmod(number, self._period)
        source = int(self._source[place])
        return source, times * self.counts[source] + int(self._before[place])

    def number(self, source: int, ordinal: int) -> int:
        """The inverse of :meth:`locate`."""
        times, before = divmod(ordinal, self.counts[source])
        return times * self._period + int(np.flatnonzero(self._source == source)[before])


def parse_blend(given: Sequence[str], flag: str) -> list[tuple[Fraction, str]]:
    """One path, or weight, path, weight, path, ... as Megatron's ``--data-path`` takes them -> weights and paths.

    Raises:
        UserError: a weight that is none, or a path without one.
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
            raise UserError(f"{flag}: {text!r} before {path} is no weight; give {flag} 0.7 A 0.3 B") from None
        if weight <= 0:
            raise UserError(f"{flag}: the weight {text} of {path} must be above 0; or leave that source out")
        blend.append((weight, path))
    if len({os.path.realpath(path) for _, path in blend}) < len(blend):
        raise UserError(f"{flag}: names a source twice; give it once, with the sum of its weights")
    return blend


def _counts(weights: Sequence[Fraction]) -> list[int]:
    """Exactly in proportion where the pattern is not too long; else as near as ``FINEST`` places allow."""
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
