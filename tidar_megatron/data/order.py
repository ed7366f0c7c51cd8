"""Random orders, the same on every machine and with every numpy: as a whole, or pointwise where there are too many.

Every use has a key of its own, beginning with the seed, so that no two draws are the same. numpy's SeedSequence takes
a missing number as 0: the third is never 0.

=================================  =============================================================
``(seed, epoch, GROUPS)``          the order of an epoch's groups of documents
``(seed, epoch, IN_GROUP, group)`` the order of the documents of a group
``(seed, epoch, WINDOWS)``         the order of an epoch's windows
``(seed, number, BLOCKS)``         which blocks of packed sequence ``number`` have masks (``blocks.py``)
``(seed, number, MASKS)``          which of its places are masked, where not all are (``random_masks.py``)
=================================  =============================================================
"""

import numpy as np
from numpy.typing import NDArray

WINDOWS, BLOCKS, IN_GROUP, GROUPS, MASKS = 1, 2, 3, 4, 5
_ROUNDS = 6
_MASK_64 = (1 << 64) - 1


def draws(count: int, *key: int) -> NDArray[np.uint64]:
    """``count`` random numbers. numpy promises the raw output of a bit generator for good, and no more than that."""
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


def permutation(count: int, *key: int) -> NDArray[np.int64]:
    """A random order of ``0 .. count - 1``, int64 ``[count]``."""
    return np.argsort(draws(count, *key), kind="stable").astype(np.int64)


class PointwisePermutation:
    """A random order of ``0 .. count - 1`` of which any place is known without the others.

    A Feistel network permutes the next power of four; whatever falls outside of the range is permuted again until it
    falls inside (cycle walking: four times at most on average), which leaves a permutation of the range.
    """

    def __init__(self, count: int, *key: int) -> None:
        assert count >= 1
        self._count = count
        self._half = max(1, -(-(count - 1).bit_length() // 2))  # bits
        self._keys = [int(number) for number in draws(_ROUNDS, *key)]

    def __call__(self, place: int) -> int:
        """What stands at ``place``."""
        assert 0 <= place < self._count
        half, mask = self._half, (1 << self._half) - 1
        while True:
            left, right = place >> half, place & mask
            for key in self._keys:
                left, right = right, left ^ (_mix(right ^ key) & mask)
            place = left << half | right
            if place < self._count:
                return place


def _mix(number: int) -> int:
    """The finalizer of MurmurHash3: every bit of 64 depends on every other."""
    number ^= number >> 33
    number = number * 0xFF51AFD7ED558CCD & _MASK_64
    number ^= number >> 33
    number = number * 0xC4CEB9FE1A85EC53 & _MASK_64
    return number ^ number >> 33
