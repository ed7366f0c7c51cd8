"""The FlexAttention backend: its BlockMask and rule equal the dense reference, and it never runs uncompiled."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from tests.models.test_attention import BATCH, CASES, documents, draw, equal
from tidar_megatron.attention_mask import clean_tokens, may_attend, training_layout
from tidar_megatron.models.attention import flex, hybrid_attention, make_schedule


@pytest.mark.slow
@settings(deadline=None)
@given(**CASES)
def test_flex_equals_dense_in_float64(total, block, chunk, lengths, doubled, alike, groups, seed):
    """Its eager mode: the rule and the BlockMask. The kernel's blocks made small, so that there are many."""
    document, index = documents(lengths, total, alike=alike)
    visibility = training_layout(document, index, block) if doubled else clean_tokens(document, index)
    query, key, value, _ = draw(seed, BATCH, groups, visibility.shape[1])
    dense = hybrid_attention(query, key, value, make_schedule(visibility, backend="dense", chunk_size=1), 0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "BLOCK", chunk)
        schedule = make_schedule(visibility, backend="flex", chunk_size=1)
    equal([hybrid_attention(query, key, value, schedule, 0.3)], [dense])
    # the kernel skips by the BlockMask alone, which the eager mode does not: what it would compute is right as well
    mask = may_attend(visibility, visibility)
    some, full = (part[:, 0].bool() for part in (schedule.block_mask.to_dense(), full_blocks(schedule.block_mask)))
    cells = mask_cells(mask, chunk)
    assert torch.equal(some, cells.any(-1)), "blocks that hold a visible pair, and no others"
    assert bool((cells | ~inside(visibility.shape[1], chunk) | ~full[..., None]).all()), "full blocks are full"
    assert not bool((full[:, :, -1] & bool(visibility.shape[1] % chunk)).any()), "no full block beyond the end"


def full_blocks(mask):
    dense = torch.zeros(mask.kv_indices.shape, dtype=torch.int)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in dense.shape[:3])).reshape(-1, 3).tolist():
        b, h, row = at
        dense[b, h, row, mask.full_kv_indices[b, h, row, : mask.full_kv_num_blocks[b, h, row]].long()] = 1
    return dense


def mask_cells(mask, size):
    """bool ``[b, t, k]`` -> ``[b, rows, columns, size * size]``, False where there is no token."""
    pad = -mask.shape[1] % size
    mask = F.pad(mask, (0, pad, 0, pad))
    rows = mask.shape[1] // size
    return mask.reshape(len(mask), rows, size, rows, size).transpose(2, 3).flatten(3)


def inside(tokens, size):
    return mask_cells(torch.ones(1, tokens, tokens, dtype=torch.bool), size)


@pytest.mark.process
def test_flex_compiles_once():
    """As a compiled CPU forward: other documents of the same shape are other inputs, not another kernel."""
    torch._dynamo.reset()
    attention = torch.compile(flex.flex_attention, dynamic=False)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(flex, "flex_attention", attention)
        for number, lengths in enumerate(([], [40, 60], [20] * 5, [128])):
            visibility = training_layout(*documents(lengths, 128), 16)
            query, key, value, _ = draw(number, BATCH, 2, 256, dtype=torch.float32)
            dense = make_schedule(visibility, backend="dense", chunk_size=1)
            schedule = make_schedule(visibility, backend="flex", chunk_size=1)
            with torch._dynamo.config.patch(error_on_recompile=number > 0):
                ours = hybrid_attention(query, key, value, schedule, 0.3)
            torch.testing.assert_close(ours, hybrid_attention(query, key, value, dense, 0.3), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_flex_is_never_run_uncompiled():
    """Torch's default is to run a kernel's ninth variant uncompiled, and to say so at most."""
    torch._dynamo.reset()
    variants = []

    def backend(graph, inputs):
        variants.append(graph)
        return graph.forward

    def call(places):
        visibility = training_layout(*documents([], places), 16)
        query, key, value, _ = draw(0, BATCH, 2, 2 * places, dtype=torch.float32)
        schedule = make_schedule(visibility, backend="flex", chunk_size=1)
        flex.compiled()(query, key, value, block_mask=schedule.block_mask, enable_gqa=True)

    compile_as = torch.compile
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), torch._dynamo.config.patch(recompile_limit=8):
        patch.setattr(flex, "VARIANTS", 12)
        patch.setattr(torch, "compile", lambda *a, **named: compile_as(*a, **named, backend=backend))
        flex.compiled.cache_clear()
        for number in range(1, 13):
            call(16 * number)
            assert len(variants) == number
        call(16)  # other documents or the same: no new variant
        assert len(variants) == 12
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            call(16 * 13)
    flex.compiled.cache_clear()
    torch._dynamo.reset()
