"""Which blocks have masks: one of each stratum, each as likely as the other, the same for whoever asks."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidar_megatron.context_parallel import own_positions
from tidar_megatron.data.blocks import choose_blocks, strata

KNOWN = ([2, 4, 7, 10, 14], [0, 5, 7, 11, 13])  # of 16 blocks in 5 strata, seed 1234, sequences 0 and 10**12


def sizes_of(data: st.DataObject) -> tuple[int, int]:
    blocks = data.draw(st.integers(1, 300))
    return blocks, data.draw(st.integers(1, blocks))


@given(st.data(), st.integers(0, 2**40), st.integers(0, 2**40))
def test_one_block_of_each_stratum(data: st.DataObject, seed: int, number: int) -> None:
    blocks, chosen = sizes_of(data)
    edges = strata(blocks, chosen)
    assert (edges[0], edges[-1], len(edges), edges.dtype) == (0, blocks, chosen + 1, np.int64)
    assert set(np.diff(edges)) <= {blocks // chosen, -(-blocks // chosen)}
    picked = choose_blocks(blocks, chosen, seed, number)
    assert (picked.dtype, len(picked)) == (np.int64, chosen)
    assert ((edges[:-1] <= picked) & (picked < edges[1:])).all()
    assert picked.tolist() == choose_blocks(blocks, chosen, seed, number).tolist()
    if chosen == blocks:
        assert picked.tolist() == list(range(blocks))


def test_the_choice_depends_on_seed_and_number_and_on_no_machine() -> None:
    picked = {(s, n): tuple(choose_blocks(64, 16, s, n).tolist()) for s in range(20) for n in range(20)}
    assert len(set(picked.values())) == 400
    # a new numpy, or another machine, would have to go on with the same choices
    assert choose_blocks(16, 5, 1234, 0).tolist() == KNOWN[0]
    assert choose_blocks(16, 5, 1234, 10**12).tolist() == KNOWN[1]


@pytest.mark.parametrize(("blocks", "chosen"), [(4, 2), (5, 2), (7, 3), (8, 3)])
def test_every_block_is_drawn_as_often_as_its_stratum_allows(blocks: int, chosen: int) -> None:
    """Inclusion probability 1 / len(stratum), and every combination as likely: five standard deviations allowed."""
    draws = 20_000
    picked = [tuple(choose_blocks(blocks, chosen, 3, n).tolist()) for n in range(draws)]
    edges = strata(blocks, chosen)
    counts = Counter(block for row in picked for block in row)
    for size, first in zip(np.diff(edges).tolist(), edges.tolist(), strict=False):
        for block in range(first, first + size):
            p = 1 / size
            assert abs(counts[block] / draws - p) <= 5 * (p * (1 - p) / draws) ** 0.5
    together, p = Counter(picked), 1 / np.diff(edges).prod()
    assert len(together) == round(1 / p)
    assert all(abs(count / draws - p) <= 5 * (p * (1 - p) / draws) ** 0.5 for count in together.values())


@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))
def test_every_zigzag_chunk_has_as_many(size: int, share: int, times: int, number: int) -> None:
    """m a multiple of 2 x CP: the chosen blocks, cut as the positions are cut, stay with their clean tokens."""
    chunks = 2 * size
    blocks, chosen = chunks * share * times, chunks * share
    picked = choose_blocks(blocks, chosen, 5, number)
    for rank in range(size):
        own = own_positions(blocks, rank, size).tolist()  # in units of blocks
        mine = picked[own_positions(chosen, rank, size).numpy()].tolist()
        assert mine == [block for block in own if block in set(picked.tolist())]
        assert len(mine) == chosen // size
