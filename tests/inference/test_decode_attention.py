"""Plans, their masks against the predicate, and folded attention against attention written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidar_megatron.attention_mask import CLEAN, INDEX, MASK_BLOCK, decode_layout, may_attend, prefix_layout
from tidar_megatron.inference import attention
from tidar_megatron.inference.attention import Plan, decode_mask, folded_attention, local_mask, position_offsets

CPU = torch.device("cpu")


@st.composite
def plans(draw):
    num_drafts = draw(st.integers(1, 6))
    branches = tuple(sorted(draw(st.sets(st.integers(1, num_drafts)))))
    return Plan(num_drafts, branches, draw(st.integers(1, 5)) if branches else 0)


@settings(deadline=None)
@given(plans(), st.integers(0, 9), st.integers(1, 3))
def test_mask_is_the_predicate_for_every_prefix_length(plan, prefix, groups):
    layout = decode_layout(prefix, plan.num_drafts, plan.branches, plan.draft_length)
    keys = torch.cat([prefix_layout(prefix), layout])
    expected = may_attend(layout, keys)
    assert torch.equal(local_mask(plan), expected[:, prefix:])
    assert torch.equal(position_offsets(plan, CPU)[0] + prefix, layout[:, INDEX].long())
    mask = decode_mask(plan, prefix, groups, torch.float32, CPU)
    if mask is None:
        assert expected.all()
        assert len(layout) == 1
    else:
        assert torch.equal(mask[0, 0] == 0, expected.repeat(groups, 1))
        assert torch.equal(mask[0, 0] == -torch.inf, ~expected.repeat(groups, 1))


@settings(deadline=None)
@given(plans())
def test_rows_after_are_the_places_behind_the_certain_token(plan):
    layout = decode_layout(0, plan.num_drafts, plan.branches, plan.draft_length)
    for accepted in range(1, plan.num_drafts + 1):
        usable = [i for i, r in enumerate(plan.branches) if r <= accepted]
        rows = [
            row
            for row, token in enumerate(layout.tolist())
            if usable and token[MASK_BLOCK] == usable[-1] != CLEAN and token[INDEX] > accepted
        ]
        assert list(range(len(layout)))[plan.rows_after(accepted)] == rows


def test_masks_of_prompts_do_not_fill_the_cache():
    before = attention._cached_folded_local_mask.cache_info().currsize
    for length in range(100, 110):
        decode_mask(Plan(length), 0, 1, torch.float32, CPU)
    assert attention._cached_folded_local_mask.cache_info().currsize == before
    small = Plan(5, (2, 5), 3)
    assert decode_mask(small, 7, 2, torch.float64, CPU).shape == (1, 1, 2 * 11, 18)
    hits = attention._cached_folded_local_mask.cache_info().hits
    decode_mask(small, 8, 2, torch.float64, CPU)
    assert attention._cached_folded_local_mask.cache_info().hits == hits + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("plan", [Plan(1), Plan(4), Plan(3, (1, 3), 2)])
def test_folded_attention_is_grouped_query_attention(dtype, heads, plan):
    query_heads, kv_heads = heads
    prefix, tokens, head_dim = 5, plan.num_drafts + plan.num_masks, 8
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, query_heads, tokens, head_dim, generator=generator).to(dtype)
    store = torch.randn(2, 1, kv_heads, 40, head_dim, generator=generator).to(dtype)
    key, value = store[:, :, :, : prefix + tokens]  # views into a larger buffer, as the cache gives them
    mask = decode_mask(plan, prefix, query_heads // kv_heads, dtype, CPU)
    out, weights = folded_attention(None, query, key, value, mask, scaling=0.3)
    assert weights is None

    layout = decode_layout(prefix, plan.num_drafts, plan.branches, plan.draft_length)
    visible = may_attend(layout, torch.cat([prefix_layout(prefix), layout]))
    for head in range(query_heads):
        group = head // (query_heads // kv_heads)
        scores = 0.3 * query[0, head].double() @ key[0, group].double().T
        expected = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value[0, group].double()
        tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
        torch.testing.assert_close(out[0, :, head].double(), expected, rtol=tolerance, atol=tolerance)


def test_a_mask_of_another_dtype_is_a_defect_and_not_a_wrong_result():
    query = torch.zeros(1, 2, 3, 8, dtype=torch.float64)
    with pytest.raises(AssertionError):
        folded_attention(None, query, query, query, decode_mask(Plan(3), 0, 1, torch.float32, CPU))


def test_a_wrapped_model_refuses_to_look_ahead(tiny):
    """Outside the engine nobody makes our mask, and none at all would let every token see its future."""
    with pytest.raises(AssertionError, match="set_attn_implementation"):
        tiny("llama").causal_lm(torch.tensor([[1, 2, 3]]))
