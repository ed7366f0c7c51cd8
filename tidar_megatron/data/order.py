"""Random orders that are the same on every machine and with every numpy version.

A permutation is computed completely, or pointwise if there are too many elements. Every use has its own key, beginning
with the seed, so that no two draws are the same. numpy's SeedSequence treats a missing number as 0, so the third number
of a key is never 0.

=================================  =============================================================
``(seed, epoch, GROUPS)``          the order of an epoch's groups of documents
``(seed, epoch, IN_GROUP, group)`` the order of the documents in a group
``(seed, epoch, WINDOWS)``         the order of an epoch's windows
``(seed, number, BLOCKS)``         which blocks of packed sequence ``number`` have masks (``blocks.py``)
``(seed, number, MASKS)``          which of its places are masked, with random masks (``random_masks.py``)
=================================  =============================================================
"""

import numpy as np
from numpy.typing import NDArray

WINDOWS, BLOCKS, IN_GROUP, GROUPS, MASKS = 1, 2, 3, 4, 5
_ROUNDS = 6
_MASK_64 = (1 << 64) - 1


def draws(count: int, *key: int) -> NDArray[np.uint64]:
    """Return ``count`` random numbers, uint64 ``[count]``.

    They are a bit generator's raw output, the only random output that numpy guarantees not to change.
    """
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


def permutation(count: int, *key: int) -> NDArray[np.int64]:
    """Return a random permutation of ``0 .. count - 1``: int64 ``[count]``."""
    return np.argsort(draws(count, *key), kind="stable").astype(np.int64)


class PointwisePermutation:
    """A random permutation of ``0 .. count - 1`` in which each element is computed without the others.

    A Feistel network permutes the range up to the next power of four. A result outside of ``0 .. count - 1`` is
    permuted again until it is inside (cycle walking, at most four times on average), so the result is a permutation.
    """

    def __init__(self, count: int, *key: int) -> None:
        assert count >= 1
        self._count = count
        self._half = max(1, -(-(count - 1).bit_length() // 2))  # bits
        self._keys = [int(number) for number in draws(_ROUNDS, *key)]

    def __call__(self, place: int) -> int:
        """Return the element at ``place``."""
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
    """Return MurmurHash3's 64-bit finalizer of ``number``: every output bit depends on every input bit."""
    number ^= number >> 33
    number = number * 0xFF51AFD7ED558CCD & _MASK_64
    number ^= number >> 33
    number = number * 0xC4CEB9FE1A85EC53 & _MASK_64
    return number ^ number >> 33
