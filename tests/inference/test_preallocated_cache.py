"""Writes land behind the committed tokens, reads are views, dropping costs nothing."""

import pytest
import torch

from tidar_megatron.inference.cache import PreallocatedCache


def tokens(*values):
    return torch.tensor(values, dtype=torch.float32).view(1, 1, -1, 1).expand(1, 2, -1, 4)


def values_of(view):
    return view[0, 0, :, 0].tolist()


def test_commit_keeps_a_prefix_and_the_next_forward_overwrites_the_rest():
    cache = PreallocatedCache(8)
    keys, values = cache.update(tokens(1, 2, 3), tokens(-1, -2, -3), 0)
    assert values_of(keys) == [1, 2, 3]
    assert values_of(values) == [-1, -2, -3]
    cache.commit(2)
    assert cache.length == cache.get_seq_length() == 2
    keys, values = cache.update(tokens(7, 8), tokens(-7, -8), 0)
    assert values_of(keys) == [1, 2, 7, 8]
    assert values_of(values) == [-1, -2, -7, -8]
    assert values_of(cache.committed(0)[0]) == [1, 2]
    cache.reset()
    assert values_of(cache.update(tokens(5), tokens(5), 0)[0]) == [5]


def test_layers_are_apart_and_may_differ_in_shape():
    cache = PreallocatedCache(4)
    cache.update(tokens(1), tokens(1), 0)
    cache.update(tokens(2)[:, :1, :, :2], tokens(2)[:, :1, :, :3], 1)
    cache.commit(1)
    assert len(cache) == 2
    assert values_of(cache.committed(0)[0]) == [1]
    assert [tuple(t.shape) for t in cache.committed(1)] == [(1, 1, 1, 2), (1, 1, 1, 3)]


def test_nothing_is_copied_and_nothing_allocated_after_the_first_write():
    cache = PreallocatedCache(64)
    first, _ = cache.update(tokens(1, 2), tokens(1, 2), 0)
    cache.commit(2)
    for _ in range(10):
        keys, _ = cache.update(tokens(3, 4, 5), tokens(3, 4, 5), 0)
        assert keys.data_ptr() == first.data_ptr()
        assert keys.untyped_storage().nbytes() == 2 * 64 * 4 * 4
        cache.commit(3)


def test_more_than_the_capacity_fails_loudly():
    cache = PreallocatedCache(2)
    with pytest.raises(RuntimeError):
        cache.update(tokens(1, 2, 3), tokens(1, 2, 3), 0)
    with pytest.raises(AssertionError):
        cache.commit(3)
