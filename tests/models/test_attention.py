"""Every backend equals the dense reference, forward and (those that have one on a CPU) backward."""

import gc
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tidar_megatron import attention_kernels as kernels
from tidar_megatron.attention_mask import clean_tokens, may_attend, training_layout
from tidar_megatron.benchmark.measuring import peak_bytes
from tidar_megatron.context_parallel import key_tokens, own_tokens, query_slices
from tidar_megatron.data.blocks import choose_blocks
from tidar_megatron.models.attention import choose_backend, hybrid_attention, make_schedule
from tidar_megatron.models.attention.schedules import AttentionSchedules
from tidar_megatron.models.attention.tiles import Squares, make_tilings

BATCH, HEADS, CHANNELS = 2, 4, 8


def documents(lengths, total, batch=BATCH, alike=False):
    """Rows of documents of the given lengths, the last one cut or grown to ``total``; every second row the other way
    round, unless they are to be ``alike``."""
    document, index = torch.zeros(batch, total, dtype=torch.long), torch.zeros(batch, total, dtype=torch.long)
    for row in range(batch):
        start = 0
        order = lengths if row % 2 == 0 or alike else lengths[::-1]
        for number, length in enumerate([*order, total]):
            stop = min(start + length, total)
            document[row, start:stop] = number
            index[row, start:stop] = torch.arange(stop - start)
            start = stop
    return document, index


def single(length, block):
    """The doubled sequence of one document."""
    return training_layout(torch.zeros(1, length, dtype=torch.long), torch.arange(length)[None], block)


def draw(seed, batch, groups, tokens, keys=None, dtype=torch.float64):
    """Query, key, value, and a gradient from above."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, tokens), (groups, keys or tokens), (groups, keys or tokens), (HEADS, tokens))
    return [torch.randn(batch, n, t, CHANNELS, generator=generator, dtype=dtype) for n, t in shapes]


def choose(visibility, block, chosen, seed):
    """Of the doubled sequence, the clean tokens and the masks of ``chosen`` blocks of each row."""
    S = visibility.shape[1] // 2
    rows = [torch.from_numpy(choose_blocks(S // block, chosen, seed, row)) for row in range(len(visibility))]
    places = S + (torch.stack(rows).unsqueeze(-1) * block + torch.arange(block)).flatten(1)
    masks = visibility[torch.arange(len(visibility))[:, None], places]
    return torch.cat([visibility[:, :S], masks], dim=1)


def run(schedule, query, key, value, upstream):
    inputs = [t.clone().requires_grad_() for t in (query, key, value)]
    out = hybrid_attention(*inputs, schedule, 0.3)
    return [out, *torch.autograd.grad((out * upstream).sum(), inputs)]


def equal(ours, theirs):
    """To 1e-10; gradients to 1e-8."""
    for tolerance, mine, other in zip([1e-10, 1e-8, 1e-8, 1e-8], ours, theirs, strict=False):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance / 100)


CASES = {
    "total": st.integers(1, 40),
    "block": st.integers(1, 9),
    "chunk": st.integers(1, 50),
    "lengths": st.lists(st.integers(1, 20), max_size=4),
    "doubled": st.booleans(),
    "alike": st.booleans(),
    "groups": st.sampled_from([1, 2, 4]),
    "seed": st.integers(0, 2**31),
}


@settings(deadline=None)
@given(**CASES, plain=st.booleans(), threads=st.sampled_from([1, 3, 16]))
def test_chunked_equals_dense_in_float64(total, block, chunk, lengths, doubled, alike, groups, seed, plain, threads):
    """With torch's CPU kernel, whose backward splits rows among threads, and with the plain one of other devices."""
    document, index = documents(lengths, total, alike=alike)
    visibility = training_layout(document, index, block) if doubled else clean_tokens(document, index)
    tensors = draw(seed, BATCH, groups, visibility.shape[1])
    dense = run(make_schedule(visibility, backend="dense", chunk_size=1), *tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        if plain:
            patch.setattr(kernels, "has_flash", lambda device: False)
        equal(run(make_schedule(visibility, backend="chunked", chunk_size=chunk), *tensors), dense)


@pytest.mark.slow
@settings(deadline=None)
@given(
    size=st.integers(1, 4),
    blocks=st.integers(1, 4),
    block=st.integers(1, 5),
    chunk=st.integers(1, 50),
    lengths=st.lists(st.integers(1, 6), max_size=4),
    masks=st.sampled_from(["none", "all", "some"]),
    groups=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 2**31),
)
def test_context_parallel_ranks_compute_the_whole(size, blocks, block, chunk, lengths, masks, groups, seed):
    """Random documents (in whole blocks): the ranks together equal dense, outputs and gradients. flex: outputs.

    "some": each row has masks of blocks of its own, one of each zigzag chunk or two.
    """
    S = 2 * size * blocks * block
    document, index = documents([length * block for length in lengths], S)
    visibility = clean_tokens(document, index) if masks == "none" else training_layout(document, index, block)
    if masks == "some":
        visibility = choose(visibility, block, 2 * size * min(blocks, 1 + seed % 2), seed)
    doubled, length = masks != "none", visibility.shape[1] - S
    *inputs, upstream = draw(seed, BATCH, groups, visibility.shape[1])
    wanted = run(make_schedule(visibility, backend="dense", chunk_size=1), *inputs, upstream)
    got = [torch.zeros_like(t) for t in wanted]
    for rank in range(size):
        own, keys = (tokens(S, rank, size, doubled, length) for tokens in (own_tokens, key_tokens))
        queries = query_slices(len(own), len(keys), rank, size)
        parts = inputs[0][:, :, own], inputs[1][:, :, keys], inputs[2][:, :, keys]
        out, *grads = run(
            make_schedule(visibility[:, keys], queries, backend="chunked", chunk_size=chunk),
            *parts,
            upstream[:, :, own],
        )
        got[0][:, :, own] = out.detach()
        got[1][:, :, own] = grads[0]
        got[2][:, :, keys] += grads[1]  # what reduce-scatter adds up
        got[3][:, :, keys] += grads[2]
        with torch.no_grad():
            schedule = make_schedule(visibility[:, keys], queries, backend="flex", chunk_size=1)
            equal([hybrid_attention(*parts, schedule, 0.3)], [wanted[0][:, :, own]])
    equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_equals_dense_in_lower_precision(dtype):
    visibility = training_layout(*documents([70, 90], 256), 8)
    tensors = [t.to(dtype) for t in draw(0, BATCH, 2, 512)]
    exact = run(make_schedule(visibility, backend="dense", chunk_size=1), *(t.double() for t in tensors))
    chunked = run(make_schedule(visibility, backend="chunked", chunk_size=32), *tensors)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(chunked, exact, strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("sharpness", [1.0, 3.0, 6.0])
def test_scores_of_half_precision_are_not_rounded(sharpness, monkeypatch):
    """The plain operations: the error of rounded scores grows with the scores, to 0.04 at the last sharpness."""
    monkeypatch.setattr(kernels, "has_flash", lambda device: False)
    generator = torch.Generator().manual_seed(0)
    query, key, value, upstream = (torch.randn(1, 4, rows, 128, generator=generator) for rows in (32, 512, 512, 32))
    query, key = query * sharpness, key * sharpness
    half = [tensor.bfloat16() for tensor in (query, key, value, upstream)]
    query, key, value, upstream = (tensor.double() for tensor in half)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    exact = F.scaled_dot_product_attention(*leaves, scale=128**-0.5)
    grads = torch.autograd.grad(exact, leaves, upstream)
    out, lse = kernels.attend(*half[:3], None, 128**-0.5)
    ours = kernels.attend_backward(half[3], *half[:3], out, lse, None, 128**-0.5)
    for found, expected, error in zip((out, *ours), (exact, *grads), (0.004, 0.02, 0.02, 0.02), strict=True):
        assert (found.double() - expected).norm() <= error * expected.norm()


class CausalOverDocuments(torch.nn.Module):
    """What transformer-engine's fused attention is asked for, in plain torch."""

    def __init__(
        self, heads, channels, *, num_gqa_groups, attention_dropout, qkv_format, attn_mask_type, softmax_scale
    ):
        super().__init__()
        assert (attention_dropout, qkv_format, attn_mask_type) == (0.0, "thd", "padding_causal")
        self.scale = softmax_scale

    def forward(self, query, key, value, *, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv):
        assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_kv)
        out = []
        for begin, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
            assert 0 < end - begin <= max_seqlen_q == max_seqlen_kv
            parts = (t[begin:end].transpose(0, 1)[None] for t in (query, key, value))
            one = F.scaled_dot_product_attention(*parts, is_causal=True, scale=self.scale, enable_gqa=True)
            out.append(one[0].transpose(0, 1).flatten(1))
        return torch.cat(out)


@pytest.mark.parametrize("doubled", [True, False])
def test_fused_clean_half(monkeypatch, doubled):
    """transformer-engine cannot be run here: a stand-in shows what it is asked for, and that both halves fit."""
    engine = types.ModuleType("transformer_engine.pytorch")
    engine.DotProductAttention = CausalOverDocuments
    monkeypatch.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", engine)
    document, index = documents([12, 30], 64)
    visibility = training_layout(document, index + 5, 4) if doubled else clean_tokens(document, index + 5)
    query, key, value, _ = draw(3, BATCH, 2, visibility.shape[1])
    dense = hybrid_attention(query, key, value, make_schedule(visibility, backend="dense", chunk_size=1), 0.3)
    schedule = make_schedule(visibility, backend="transformer_engine", chunk_size=1)
    assert type(schedule).__name__ == "FusedCleanSchedule"
    equal([hybrid_attention(query, key, value, schedule, 0.3)], [dense])
    # clean keys of other ranks among the keys: flex does both halves
    keys = key_tokens(64, 0, 2, doubled)
    parts = query_slices(visibility.shape[1] // 2, len(keys), 0, 2)
    other = make_schedule(visibility[:, keys], parts, backend="transformer_engine", chunk_size=1)
    assert type(other).__name__ == "FlexSchedule"


def test_auto(monkeypatch):
    assert choose_backend("auto", "cpu", 64, False) == "chunked"
    assert choose_backend("dense", "cuda", 64, False) == "dense"
    for found, best in ((None, "flex"), (object(), "transformer_engine")):
        monkeypatch.setattr("tidar_megatron.models.attention.hybrid.find_spec", lambda name, found=found: found)
        assert choose_backend("auto", "cuda", 64, True) == best
        assert choose_backend("auto", "cuda", 64, False) == "flex"  # transformer-engine's kernels have no float32
        assert choose_backend("auto", "cuda", 8, True) == "chunked"  # flex's have no small heads


def test_cost_follows_the_area_of_the_mask():
    """Pairs computed over a single document: about half of each half's S x S, in few tiles, with two masks."""
    S, chunk = 512, 32
    (tiling,) = make_tilings(single(S, 8), (slice(0, 2 * S),), chunk)
    assert tiling.area <= 1.05 * S * S
    tree = 2 * S // chunk - 1  # a masked tile for each chunk, the rest a binary tree
    assert len(tiling.steps) == 1 + 1 + tree  # all blocks with themselves, the clean half, the masks' clean keys
    assert [mask.shape for mask in tiling.masks] == [(1, chunk, chunk)]
    (tiling,) = make_tilings(single(S, 8), (slice(0, 2 * S),), chunk, causal=False)
    assert tiling.area <= 1.1 * S * S
    assert len(tiling.steps) == 1 + 2 * tree
    assert [mask.shape for mask in tiling.masks] == [(1, chunk, chunk)] * 2


@settings(deadline=None)
@given(**CASES, size=st.integers(1, 3), causal=st.booleans())
def test_the_tiles_hold_each_visible_pair_once(
    total, block, chunk, lengths, doubled, alike, groups, seed, size, causal
):
    """Without what their masks hide: the rule itself, no more and no less."""
    S = 2 * size * block * (1 + total // 8)
    document, index = documents([length * block for length in lengths], S, alike=alike)
    visibility = training_layout(document, index, block) if doubled else clean_tokens(document, index)
    for rank in range(size):
        own, keys = (tokens(S, rank, size, doubled) for tokens in (own_tokens, key_tokens))
        tilings = make_tilings(visibility[:, keys], query_slices(len(own), len(keys), rank, size), chunk, causal)
        held = torch.zeros(BATCH, len(own), len(keys), dtype=torch.int)
        for tiling in tilings:
            for step in tiling.steps:
                n, k = step.queries.stop - step.queries.start, step.keys.stop - step.keys.start
                seen = torch.ones(n, k, dtype=torch.int)
                if isinstance(step, Squares):
                    seen = torch.block_diag(*[torch.ones(step.size, step.size, dtype=torch.int)] * (n // step.size))
                elif step.causal:
                    seen = seen.tril()
                elif step.mask is not None:
                    seen = tiling.masks[step.mask].int()
                held[tiling.rows, step.queries, step.keys] += seen
        assert torch.equal(held, may_attend(visibility[:, own], visibility[:, keys]).int())


def test_documents_out_of_sight_are_skipped():
    S, chunk = 256, 16
    (tiling,) = make_tilings(training_layout(*documents([32] * 8, S, batch=1), 8), (slice(0, 2 * S),), chunk)
    assert tiling.area <= 2 * S * (32 + 16) / 2 + S * 8
    # not on chunks' edges, and smaller than a chunk: still no more than the chunks beside the diagonal
    (tiling,) = make_tilings(training_layout(*documents([8, 24, 8] * 6, S, batch=1), 8), (slice(0, 2 * S),), chunk)
    assert tiling.area <= 2 * S * 2 * chunk + S * 8


def test_rows_are_tiled_together_or_apart_as_is_cheaper():
    few, many = documents([16], 32), documents([1536, 256], 2048)
    whole = slice(0, 64), slice(0, 4096)
    assert len(make_tilings(training_layout(*few, 4), whole[:1], 16)) == 1
    assert len(make_tilings(training_layout(*many, 4), whole[1:], 128)) == 2
    assert len(make_tilings(single(2048, 4).repeat(3, 1, 1), whole[1:], 128)) == 1


def test_nothing_larger_than_a_chunks_mask_is_made():
    """No tensor of the forward or the backward, and no mask, comes near S x S; K and V are never expanded (GQA)."""
    S, chunk, groups = 1024, 64, 1
    query, key, value, upstream = draw(0, 1, groups, 2 * S, dtype=torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            made = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor)]
            largest = max([largest, *(t.untyped_storage().nbytes() // 4 for t in made)])
            return out

    schedule = make_schedule(single(S, 8), backend="chunked", chunk_size=chunk)
    with Watch():
        run(schedule, query, key, value, upstream)
    assert largest <= max(query.numel(), HEADS * chunk * chunk)
    assert largest < S * S / 8

    def expanded():
        inputs = [t.clone().requires_grad_() for t in (query, key, value)]
        heads = inputs[0], *(t.repeat_interleave(HEADS, 1) for t in inputs[1:])
        return torch.autograd.grad((hybrid_attention(*heads, schedule, 0.3) * upstream).sum(), inputs)

    grouped = peak_bytes(lambda: run(schedule, query, key, value, upstream))
    assert grouped < peak_bytes(expanded) - key.numel() * 4 * HEADS  # at least one of K and V less, expanded


@pytest.mark.parametrize("change", ["in place", "new tensor"])
def test_schedules_are_never_stale(change):
    """A second batch, also one written over the first one's memory, gets its own schedule; one not prepared, too."""
    schedules = AttentionSchedules("chunked", 8, types.SimpleNamespace(rank=lambda: 0, size=lambda: 1))
    query, key, value, _ = draw(0, 1, 2, 32, dtype=torch.float32)
    one = training_layout(*documents([], 16, batch=1), 4)
    two = training_layout(*documents([8], 16, batch=1), 4)
    buffer = one.clone()
    for prepared in (True, False):
        for visibility in (one, two):
            buffer = visibility.clone() if change == "new tensor" else buffer.copy_(visibility)
            if prepared:
                schedules.prepare(buffer, visibility, 32)
            schedule = schedules.find(buffer.detach().view(buffer.shape), 32)  # as a recomputed layer gets it
            assert (schedule is schedules.find(buffer, 32)) == prepared
            dense = make_schedule(visibility, backend="dense", chunk_size=8)
            ours, theirs = (hybrid_attention(query, key, value, p, 1.0) for p in (schedule, dense))
            torch.testing.assert_close(ours, theirs)
    del buffer
    gc.collect()
    assert not schedules._schedules, "a schedule outlives its batch"


def test_blocks_torn_apart_are_refused():
    visibility = single(16, 4)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="contiguous"):
        make_tilings(visibility[:, order], (slice(0, 32),), 8)
