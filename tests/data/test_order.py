"""Random orders: permutations, written in stone, and known at any place without the others."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from tidar_megatron.data.order import PointwisePermutation, permutation


def test_orders_are_written_in_stone() -> None:
    """Another numpy or machine must give these: a resumed run depends on it."""
    assert permutation(8, 1234, 0).tolist() == [1, 6, 2, 0, 3, 5, 7, 4]
    assert permutation(8, 1234, 1).tolist() == [3, 6, 7, 0, 5, 4, 1, 2]
    assert sorted(permutation(1000, 3).tolist()) == list(range(1000))
    assert [PointwisePermutation(10, 1234, 0, 1)(n) for n in range(10)] == [3, 1, 4, 5, 2, 8, 0, 7, 6, 9]
    large = PointwisePermutation(10**12, 1234, 7, 1)
    assert [large(n) for n in (0, 1, 10**12 - 1)] == [567373498837, 143557385344, 870914831564]


@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 5))
@settings(deadline=None)
def test_a_pointwise_permutation_is_one(count: int, seed: int, epoch: int) -> None:
    pointwise = PointwisePermutation(count, seed, epoch, 1)
    assert sorted(pointwise(place) for place in range(count)) == list(range(count))


def test_every_place_is_as_likely_as_another() -> None:
    """Over keys, whatever stands at a place of a small range, and whatever two neighbours are."""
    singles, pairs = Counter(), Counter()
    for key in range(6000):
        pointwise = PointwisePermutation(6, key, 0, 1)
        singles[pointwise(2)] += 1
        pairs[pointwise(0), pointwise(1)] += 1
    assert len(singles) == 6 and len(pairs) == 30
    assert all(abs(count - 1000) < 200 for count in singles.values())  # 7 standard deviations
    assert all(abs(count - 200) < 100 for count in pairs.values())


def test_neighbours_are_torn_apart() -> None:
    """A batch is not a few neighbouring pieces of one document."""
    pointwise = PointwisePermutation(10**6, 0, 0, 1)
    near = sum(abs(pointwise(n) - pointwise(n + 1)) < 10**4 for n in range(2000))
    assert near < 120  # 40 are expected
