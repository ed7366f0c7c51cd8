"""Writes land behind the committed tokens of their slot, reads are views, dropping costs nothing."""

import pytest
import torch

from tidar_megatron.inference.cache import KVPool


def tokens(*values):
    return torch.tensor(values, dtype=torch.float32).view(1, 1, -1, 1).expand(1, 2, -1, 4)


def values_of(view):
    return view[0, 0, :, 0].tolist()


def test_the_next_forward_overwrites_what_was_not_kept():
    pool = KVPool(2, 8)
    pool.write(0, 1, 0, tokens(9, 9, 9), tokens(9, 9, 9))
    keys, values = pool.write(0, 0, 0, tokens(1, 2, 3), tokens(-1, -2, -3))
    assert (values_of(keys), values_of(values)) == ([1, 2, 3], [-1, -2, -3])
    keys, values = pool.write(0, 0, 2, tokens(7, 8), tokens(-7, -8))
    assert (values_of(keys), values_of(values)) == ([1, 2, 7, 8], [-1, -2, -7, -8])
    assert pool.read(0, 0, 2)[0][0, :, 0].tolist() == [1, 2]
    assert pool.read(0, 1, 3)[0][0, :, 0].tolist() == [9, 9, 9]


def test_layers_are_apart_and_may_differ_in_shape():
    pool = KVPool(1, 4)
    pool.write(0, 0, 0, tokens(1), tokens(1))
    pool.write(1, 0, 0, tokens(2)[:, :1, :, :2], tokens(2)[:, :1, :, :3])
    assert pool.read(0, 0, 1)[0][0, :, 0].tolist() == [1]
    assert [tuple(t.shape) for t in pool.read(1, 0, 1)] == [(1, 1, 2), (1, 1, 3)]


def test_nothing_is_copied_and_nothing_allocated_after_the_first_write():
    pool = KVPool(3, 64)
    first, _ = pool.write(0, 1, 0, tokens(1, 2), tokens(1, 2))
    held = pool.num_bytes
    assert held == 2 * 3 * 2 * 64 * 4 * 4  # the capacity needs no rounding up
    for length in range(2, 30, 3):
        keys, _ = pool.write(0, 1, length, tokens(3, 4, 5), tokens(3, 4, 5))
        assert keys.data_ptr() == first.data_ptr() and keys.shape[2] == length + 3
    assert pool.num_bytes == held


def test_more_than_the_capacity_fails_loudly():
    with pytest.raises(AssertionError):
        KVPool(1, 2).write(0, 0, 62, tokens(1, 2, 3), tokens(1, 2, 3))
