"""The chunked backend equals the dense reference, forward and backward, whatever the documents."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidar_megatron.attention_mask import clean_tokens, training_layout
from tidar_megatron.models.attention import hybrid_attention, make_plans

BATCH, HEADS, GROUPS, CHANNELS = 2, 4, 2, 8


def documents(lengths, total, batch=BATCH):
    """Rows of documents of the given lengths, the last one cut or grown to ``total``."""
    document, index = torch.zeros(batch, total, dtype=torch.long), torch.zeros(batch, total, dtype=torch.long)
    for row in range(batch):
        start = 0
        order = lengths if row % 2 == 0 else lengths[::-1]
        for number, length in enumerate([*order, total]):
            stop = min(start + length, total)
            document[row, start:stop] = number
            index[row, start:stop] = torch.arange(stop - start)
            start = stop
    return document, index


def run(backend, chunk, visibility, query, key, value, upstream):
    inputs = [t.clone().requires_grad_() for t in (query, key, value)]
    out = hybrid_attention(*inputs, visibility, backend=backend, chunk_size=chunk, scale=0.3)
    return [out, *torch.autograd.grad((out * upstream).sum(), inputs)]


@settings(deadline=None)
@given(
    total=st.integers(1, 40),
    block=st.integers(1, 9),
    chunk=st.integers(1, 50),
    lengths=st.lists(st.integers(1, 20), max_size=4),
    doubled=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_chunked_equals_dense_in_float64(total, block, chunk, lengths, doubled, seed):
    document, index = documents(lengths, total)
    visibility = training_layout(document, index, block) if doubled else clean_tokens(document, index)
    tokens = visibility.shape[1]
    draw = torch.Generator().manual_seed(seed)
    query, upstream = (
        torch.randn(BATCH, HEADS, tokens, CHANNELS, generator=draw, dtype=torch.float64) for _ in range(2)
    )
    key, value = (torch.randn(BATCH, GROUPS, tokens, CHANNELS, generator=draw, dtype=torch.float64) for _ in range(2))
    dense = run("dense", 1, visibility, query, key, value, upstream)
    for ours, theirs in zip(run("chunked", chunk, visibility, query, key, value, upstream), dense, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_cost_follows_the_area_of_the_mask():
    """Scores computed over a single document: about half of each half's S x S, not (2S)^2."""
    S, chunk = 512, 32
    visibility = training_layout(torch.zeros(1, S, dtype=torch.long), torch.arange(S)[None], 8)
    plans = make_plans(visibility, chunk, torch.float32)
    area = sum((p.queries.stop - p.queries.start) * sum(k.stop - k.start for k in p.keys) for p in plans)
    assert area <= 1.2 * S * S
    assert all(len(p.keys) <= 2 for p in plans)


def test_documents_out_of_sight_are_skipped():
    S, chunk = 256, 16
    document, index = documents([32] * 8, S, batch=1)
    plans = make_plans(training_layout(document, index, 8), chunk, torch.float32)
    assert max(sum(k.stop - k.start for k in p.keys) for p in plans) <= 32 + chunk


@pytest.mark.parametrize("change", ["in place", "new tensor"])
def test_plans_are_never_stale(change):
    """A second batch, also one written over the first one's memory, gets its own mask."""
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(1, HEADS, 32, CHANNELS, generator=draw)
    key = torch.randn(1, GROUPS, 32, CHANNELS, generator=draw)
    one = training_layout(*documents([], 16, batch=1), 4)
    two = training_layout(*documents([8], 16, batch=1), 4)
    buffer = one.clone()
    for visibility in (one, two):
        buffer = visibility.clone() if change == "new tensor" else buffer.copy_(visibility)
        ours = hybrid_attention(query, key, key, buffer, backend="chunked", chunk_size=8, scale=1.0)
        dense = hybrid_attention(query, key, key, visibility, backend="dense", chunk_size=8, scale=1.0)
        torch.testing.assert_close(ours, dense)
