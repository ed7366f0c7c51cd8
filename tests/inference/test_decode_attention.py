"""Forward layouts, their masks against the predicate, and packed attention against attention written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidar_megatron import attention_kernels
from tidar_megatron.attention_mask import CLEAN, INDEX, MASK_BLOCK, decode_layout, may_attend, prefix_layout
from tidar_megatron.inference import forward
from tidar_megatron.inference.attention import UnknownAttentionError
from tidar_megatron.inference.cache import KVPool
from tidar_megatron.inference.forward import (
    ForwardLayout,
    PackedForward,
    Part,
    in_calls,
    local_mask,
    position_offsets,
)


@st.composite
def layouts(draw):
    num_drafts = draw(st.integers(1, 6))
    branches = tuple(sorted(draw(st.sets(st.integers(1, num_drafts)))))
    return ForwardLayout(num_drafts, branches, draw(st.integers(1, 5)) if branches else 0)


@settings(deadline=None)
@given(layouts(), st.integers(0, 9))
def test_mask_is_the_predicate_for_every_prefix_length(layout, prefix):
    tokens = decode_layout(prefix, layout.num_drafts, layout.branches, layout.draft_length)
    expected = may_attend(tokens, torch.cat([prefix_layout(prefix), tokens]))
    assert expected[:, :prefix].all()
    assert torch.equal(local_mask(layout), expected[:, prefix:])
    assert [prefix + offset for offset in position_offsets(layout)] == tokens[:, INDEX].tolist()


@settings(deadline=None)
@given(layouts())
def test_rows_after_are_the_places_behind_the_certain_token(layout):
    tokens = decode_layout(0, layout.num_drafts, layout.branches, layout.draft_length)
    for accepted in range(1, layout.num_drafts + 1):
        usable = [i for i, r in enumerate(layout.branches) if r <= accepted]
        rows = [
            row
            for row, token in enumerate(tokens.tolist())
            if usable and token[MASK_BLOCK] == usable[-1] != CLEAN and token[INDEX] > accepted
        ]
        assert list(layout.rows_after(accepted)) == rows


def test_masks_of_prompts_are_not_kept():
    kept = forward._kept_bias
    query = torch.zeros(1, 2, 200, 8)
    before = kept.cache_info().currsize
    for length in (150, 160):
        pool = KVPool(1, 256)
        packed = PackedForward(pool, [Part(0, 0, [1] * length, ForwardLayout(length))])
        packed.attend(0, query[:, :, :length], query[:, :1, :length], query[:, :1, :length], 1.0)
    assert kept.cache_info().currsize == before


@settings(deadline=None)
@given(
    parts=st.lists(st.tuples(layouts(), st.integers(0, 9)), min_size=1, max_size=4),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    plain=st.booleans(),
    short=st.sampled_from([-1, 4, 9]),
    threads=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**31),
)
def test_packed_attention_is_grouped_query_attention_of_each(parts, heads, dtype, plain, short, threads, seed):
    """Sequences of other lengths and layouts side by side, with torch's CPU kernel and the plain one; the prefix in the
    masked call and apart; fewer heads than threads."""
    query_heads, kv_heads = heads
    head_dim, generator = 8, torch.Generator().manual_seed(seed)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 4e-2}[dtype]

    def draw(heads, tokens):
        return torch.randn(1, heads, tokens, head_dim, generator=generator).to(dtype)

    total = sum(layout.num_tokens for layout, _ in parts)
    pool = KVPool(len(parts) + 1, 80)
    slots = list(range(len(parts) + 1))[1:][::-1]
    before = [(draw(kv_heads, prefix), draw(kv_heads, prefix)) for _, prefix in parts]
    for slot, (keys, values) in zip(slots, before, strict=True):
        pool.write(3, slot, 0, keys, values)
    query, key, value = draw(query_heads, total), draw(kv_heads, total), draw(kv_heads, total)
    packed = PackedForward(
        pool,
        [Part(s, prefix, [0] * layout.num_drafts, layout) for s, (layout, prefix) in zip(slots, parts, strict=True)],
    )
    with pytest.MonkeyPatch.context() as patch:
        if plain:
            patch.setattr(attention_kernels, "has_flash", lambda device: False)
            patch.setattr(forward, "has_flash", lambda device: False)
        patch.setattr(torch, "get_num_threads", lambda: threads)
        patch.setattr(forward, "KEPT_PREFIX", max(short, 0))
        patch.setattr(forward, "MOST_KEPT", 0 if short < 0 else forward.MOST_KEPT)
        forward._kept_bias.cache_clear()
        out = packed.attend(3, query, key, value, 0.3)
        forward._kept_bias.cache_clear()
    assert out.shape == (1, total, query_heads, head_dim) and out.dtype == dtype
    start = 0
    for (layout, prefix), (keys, values) in zip(parts, before, strict=True):
        rows = slice(start, start := start + layout.num_tokens)
        tokens = decode_layout(prefix, layout.num_drafts, layout.branches, layout.draft_length)
        visible = may_attend(tokens, torch.cat([prefix_layout(prefix), tokens]))
        for head in range(query_heads):
            group = head // (query_heads // kv_heads)
            k, v = (torch.cat([a[0, group], b[0, group, rows]]).double() for a, b in ((keys, key), (values, value)))
            scores = 0.3 * query[0, head, rows].double() @ k.T
            expected = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v
            torch.testing.assert_close(out[0, rows, head].double(), expected, rtol=tolerance, atol=tolerance)


@settings(deadline=None)
@given(
    parts=st.lists(st.tuples(layouts(), st.integers(0, 20)), min_size=2, max_size=5),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    plain=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_several_parts_in_one_call(parts, heads, dtype, plain, seed):
    """One call gives what a call for each gives, and leaves the same pool; stale and unused places do not matter."""
    query_heads, kv_heads = heads
    generator = torch.Generator().manual_seed(seed)

    def draw(heads, tokens):
        return torch.randn(1, heads, tokens, 8, generator=generator).to(dtype)

    total = sum(layout.num_tokens for layout, _ in parts)
    query, key, value = draw(query_heads, total), draw(kv_heads, total), draw(kv_heads, total)
    fill = draw(kv_heads, 24), draw(kv_heads, 24)
    parts = [Part(n, length, [0] * layout.num_drafts, layout) for n, (layout, length) in enumerate(parts, 1)]
    room = max(part.length + part.layout.num_tokens for part in parts)
    results = []
    for together in (True, False):
        pool = KVPool(len(parts) + 2, room)
        for part in parts:
            pool.write(0, part.slot, 0, *(x[:, :, : min(24, part.length + 3, room)] + part.slot for x in fill))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(forward, "A_CALL", 1e9 if together else -1)
            assert len(in_calls(parts, 8 * query_heads)) == (1 if together else len(parts))
            if plain:
                patch.setattr(attention_kernels, "has_flash", lambda device: False)
                patch.setattr(forward, "has_flash", lambda device: False)
            out = PackedForward(pool, parts).attend(0, query, key, value, 0.3)
        held = [tensor for slot in range(pool.slots) for tensor in pool.read(0, slot, pool.capacity)]
        results.append([out, *held])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    ours, theirs = results
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=tolerance)
    assert all(map(torch.equal, ours[1:], theirs[1:]))


def test_the_parts_of_a_call():
    def calls(*parts):
        made = [Part(slot, length, [0] * layout.num_drafts, layout) for slot, length, layout in parts]
        return [[part.slot for part in call] for call in in_calls(made, 256)]

    layout, chunk, one = ForwardLayout(2, (1,), 3), ForwardLayout(200), ForwardLayout(1)
    assert calls((1, 9, layout)) == [[1]]
    assert calls((1, 9, layout), (2, 90, layout), (3, 9, ForwardLayout(3))) == [[1, 2, 3]]
    assert calls((1, 9, layout), (3, 9, layout)) == [[1], [3]]  # slot 2 is idle
    assert calls((2, 9, layout), (1, 9, layout)) == [[2], [1]]
    assert calls((1, 9, layout), (2, 0, chunk), (3, 9, layout), (4, 9, layout)) == [[1], [2], [3, 4]]
    # one long text among short ones would make all read as much
    assert calls((0, 90, one), (1, 99, one), (2, 5000, one), (3, 80, one)) == [[0, 1], [2], [3]]
    assert calls((0, 4000, one), (1, 4900, one), (2, 5000, one)) == [[0, 1, 2]]


def test_a_wrapped_model_refuses_to_look_ahead(tiny):
    """Outside the engine nobody makes our mask, and none at all would let every token see its future."""
    with pytest.raises(UnknownAttentionError, match="set_attn_implementation"):
        tiny("llama").causal_lm(torch.tensor([[1, 2, 3]]))
