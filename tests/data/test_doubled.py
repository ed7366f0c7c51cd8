"""The doubled sequence and the loss weights, against the formulas of the method."""

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidar_megatron.attention_mask import clean_tokens, may_attend, training_layout
from tidar_megatron.context_parallel import own_positions
from tidar_megatron.data.blocks import choose_blocks, choose_starts, strata
from tidar_megatron.data.doubled import Batch, TokenCounts, make_batch, set_loss_weights
from tidar_megatron.data.packing import LengthsInMemory, PackedSequence, PackedSequences, fill_sequence, pack

MASK, EOS = 300, 256


def some_rows(seed: int, seq_length: int = 16, block_size: int = 4, count: int = 12) -> list[PackedSequence]:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 30, count)
    documents = [np.append(random.integers(0, 256, length - 1), EOS) for length in lengths]
    packed = PackedSequences(LengthsInMemory(lengths), seq_length, block_size, seed)
    return [pack(packed.pieces(0, n), documents, EOS) for n in range(len(packed))]


def test_the_doubled_sequence() -> None:
    rows = some_rows(0)[:3]
    batch = make_batch(rows, 4, MASK)
    for name, dtype in [("tokens", torch.int64), ("labels", torch.int64), ("position_ids", torch.int64)]:
        assert (getattr(batch, name).shape, getattr(batch, name).dtype) == ((3, 32), dtype)
    assert (batch.supervised.dtype, batch.loss_weights.dtype) == (torch.bool, torch.float32)
    assert (batch.visibility.shape, batch.visibility.dtype) == ((3, 32, 4), torch.int32)
    for number, row in enumerate(rows):
        assert batch.tokens[number].tolist() == row.tokens.tolist() + [MASK] * 16
        assert batch.supervised[number].tolist() == [*row.ar_supervised, *row.diffusion_supervised]
        for place in range(16):  # the mask at a place is to give the token of that place
            assert batch.labels[number, 16 + place] == (row.tokens[place] if row.diffusion_supervised[place] else 0)
            assert batch.labels[number, place] == row.labels[place]
        layout = training_layout(torch.from_numpy(row.document), torch.from_numpy(row.index), 4)
        assert torch.equal(batch.visibility[number], layout)
    assert batch.ar_tokens == sum(int(row.ar_supervised.sum()) for row in rows)
    assert batch.diffusion_tokens == sum(int(row.diffusion_supervised.sum()) for row in rows)
    assert batch.num_tokens == 2 * batch.diffusion_tokens == (~batch.padding).sum()
    assert torch.equal(batch.padding[:, :16], batch.padding[:, 16:])
    assert not batch.loss_weights.any()


def test_positions_begin_anew_with_each_document_or_run_on() -> None:
    """Also with a document that goes on from the row before: positions stay below S, whatever its index is."""
    rows = some_rows(0)[:3]
    anew, on = make_batch(rows, 4, MASK), make_batch(rows, 4, MASK, reset_positions=False)
    assert any(row.index[0] > 0 for row in rows)
    for number, row in enumerate(rows):
        expected = [place - int(np.argmax(row.document == row.document[place])) for place in range(16)]
        assert anew.position_ids[number].tolist() == expected * 2
        assert on.position_ids[number].tolist() == [*range(16), *range(16)]
    assert on.position_ids.stride() == (0, 1)
    assert make_batch([fill_sequence(16, EOS)] * 3, 4, MASK).position_ids.stride() == (0, 1)  # all rows alike
    assert torch.equal(anew.visibility, on.visibility)


def test_attention_across_documents() -> None:
    """A row is one document to attention alone: what is predicted, and where documents begin, stays as it is."""
    rows = some_rows(0)[:3]
    batch, without = make_batch(rows, 4, MASK, cross_document_attention=True), make_batch(rows, 4, MASK)
    one = training_layout(torch.zeros(16, dtype=torch.int64), torch.arange(16), 4)
    assert all(torch.equal(batch.visibility[row], one) for row in range(3))
    for name in ("tokens", "labels", "supervised", "padding", "position_ids"):
        assert torch.equal(getattr(batch, name), getattr(without, name))
    clean = make_batch(rows, 4, MASK, doubled=False, cross_document_attention=True)
    assert torch.equal(clean.visibility, batch.visibility[:, :16])


def test_the_clean_half_alone() -> None:
    rows = some_rows(1)[:2]
    batch, both = make_batch(rows, 4, MASK, doubled=False), make_batch(rows, 4, MASK)
    for name in ("tokens", "labels", "supervised", "position_ids", "visibility"):
        assert torch.equal(getattr(batch, name), getattr(both, name)[:, :16])
    document, index = torch.from_numpy(rows[0].document), torch.from_numpy(rows[0].index)
    assert torch.equal(batch.visibility[0], clean_tokens(document, index))
    assert (batch.ar_tokens, batch.diffusion_tokens) == (both.ar_tokens, 0)
    assert batch.num_tokens == both.diffusion_tokens  # real tokens, their EOS included
    set_loss_weights(batch, TokenCounts(77, 0, 88), 5.0)
    assert torch.allclose(batch.loss_weights, batch.supervised * 88 / 77)


def test_moving_keeps_positions_expanded() -> None:
    batch = make_batch(some_rows(2)[:3], 4, MASK, reset_positions=False).to("meta")
    assert batch.position_ids.stride() == (0, 1)
    assert {getattr(batch, name).device.type for name in ("tokens", "visibility", "position_ids")} == {"meta"}
    again = make_batch(some_rows(2)[:3], 4, MASK)
    assert torch.equal(again.to(torch.device("cpu")).position_ids, again.position_ids)
    assert again.to("cpu").num_tokens == again.num_tokens


def joint_loss(rows: list[PackedSequence], losses: torch.Tensor, alpha: float) -> float:
    """The method's formula in float64: losses ``[rows, 2S]``."""
    ar = [losses[r, p].item() for r, row in enumerate(rows) for p in range(16) if row.ar_supervised[p]]
    diffusion = [
        losses[r, 16 + p].item() for r, row in enumerate(rows) for p in range(16) if row.diffusion_supervised[p]
    ]
    mean_ar = sum(ar) / len(ar) if ar else 0.0
    return (alpha * mean_ar + sum(diffusion) / len(diffusion)) / (1 + alpha)


@given(st.integers(0, 10**6), st.floats(0, 4), st.data())
@settings(deadline=None)
def test_weights_give_the_formula_however_the_batch_is_split(seed: int, alpha: float, data: st.DataObject) -> None:
    rows = some_rows(seed)
    losses = torch.rand(len(rows), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 5
    cuts = sorted(data.draw(st.sets(st.integers(1, len(rows) - 1)))) if len(rows) > 1 else []
    parts = list(zip([0, *cuts], [*cuts, len(rows)], strict=True))  # micro-batches of any sizes, on whichever ranks
    batches = [make_batch(rows[a:b], 4, MASK) for a, b in parts]
    if data.draw(st.booleans()):
        batches.append(make_batch([fill_sequence(16, EOS)], 4, MASK))  # of a rank without data: adds nothing
        parts.append((0, 1))
    total = TokenCounts.of(batches)
    loss_sum = tokens = 0.0
    for batch, (a, b) in zip(batches, parts, strict=True):
        set_loss_weights(batch, total, alpha)
        assert batch.loss_weights.dtype == torch.float32
        assert not batch.loss_weights[~batch.supervised].any()
        loss_sum += (batch.loss_weights.double() * losses[a:b]).sum().item()
        tokens += batch.num_tokens
    assert tokens == total.all == 2 * total.diffusion
    assert loss_sum / tokens == pytest.approx(joint_loss(rows, losses, alpha), rel=1e-6)


def test_no_supervised_tokens_of_a_kind() -> None:
    def weights(batch: Batch) -> Batch:
        set_loss_weights(batch, TokenCounts.of([batch]), 1.0)
        assert batch.loss_weights.isfinite().all()
        return batch

    packed = PackedSequences(LengthsInMemory(np.array([1] * 4)), 16, 4, 0)
    only_eos = [pack(packed.pieces(0, 0), [np.array([EOS])] * 4, EOS)]
    batch = make_batch(only_eos, 4, MASK)
    assert (batch.ar_tokens, batch.diffusion_tokens) == (0, 4)
    assert weights(batch).loss_weights.sum() == 4 * 0.5 * 8 / 4
    nothing = make_batch([fill_sequence(16, EOS)], 4, MASK)
    assert (nothing.num_tokens, nothing.loss_weights.sum()) == (0, 0)
    assert not weights(nothing).loss_weights.any()
    assert not weights(make_batch([fill_sequence(16, EOS)], 4, MASK, doubled=False)).loss_weights.any()


def some_choice(rows: int, blocks: int, chosen: int) -> np.ndarray:
    return np.stack([choose_blocks(blocks, chosen, 1, n) for n in range(rows)])


def test_chosen_blocks_are_a_selection_of_the_masks() -> None:
    """What is not chosen does not exist; what is, is as it would be among all; each row has its own positions."""
    rows = some_rows(0)[:4]
    chosen = some_choice(4, 4, 2)
    assert len(set(map(tuple, chosen.tolist()))) > 1
    batch, whole = make_batch(rows, 4, MASK, chosen=chosen), make_batch(rows, 4, MASK)
    assert (batch.tokens.shape, batch.visibility.shape) == ((4, 24), (4, 24, 4))
    assert (batch.seq_length, batch.mask_length, batch.doubled) == (16, 8, True)
    for row in range(4):
        places = [*range(16), *(16 + 4 * block + k for block in chosen[row].tolist() for k in range(4))]
        for name in ("tokens", "labels", "supervised", "padding", "position_ids", "visibility"):
            assert torch.equal(getattr(batch, name)[row], getattr(whole, name)[row, places]), name
        assert torch.equal(batch.stands_for[row], batch.supervised[row] * torch.tensor([1.0] * 16 + [2.0] * 8))
    assert (batch.ar_tokens, batch.diffusion_tokens) == (whole.ar_tokens, whole.diffusion_tokens)
    assert batch.num_tokens == (~batch.padding).sum() < whole.num_tokens
    assert torch.equal(batch.to("cpu").position_ids, batch.position_ids)


def test_every_block_chosen_is_the_whole() -> None:
    rows = some_rows(3)[:3]
    batch, whole = make_batch(rows, 4, MASK, chosen=some_choice(3, 4, 4)), make_batch(rows, 4, MASK)
    for each in (batch, whole):
        set_loss_weights(each, TokenCounts.of([each]), 0.7)
    for name, value in vars(whole).items():
        other = getattr(batch, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
    # and that is, to the bit, what it was before there were choices
    counts = whole.ar_tokens, whole.diffusion_tokens
    each = [part * whole.num_tokens / count for part, count in zip((0.7 / 1.7, 1 / 1.7), counts, strict=True)]
    assert torch.equal(whole.loss_weights, whole.supervised * torch.tensor(each).repeat_interleave(16))
    assert torch.equal(whole.stands_for, whole.supervised.float())


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 5))
@settings(deadline=None)
def test_weights_are_unbiased_exactly(seed: int, blocks: int, chosen: int) -> None:
    """Over all choices, each as likely as the other, what a place's mask stands for is 1 on average: no rounding."""
    chosen = min(blocks, chosen)
    for row in some_rows(seed, seq_length=4 * blocks)[:2]:
        edges = strata(blocks, chosen).tolist()
        choices = list(product(*(range(a, b) for a, b in pairwise(edges))))
        total = torch.zeros(4 * blocks, dtype=torch.float64)
        whole = make_batch([row], 4, MASK)
        for choice in choices:
            batch = make_batch([row], 4, MASK, chosen=np.array([choice], dtype=np.int64), reset_positions=False)
            masks = slice(4 * blocks, None)
            total.index_add_(0, batch.position_ids[0, masks], batch.stands_for[0, masks].double())
            assert torch.equal(batch.stands_for[0, : 4 * blocks], whole.stands_for[0, : 4 * blocks])
            assert batch.diffusion_tokens == whole.diffusion_tokens
        assert torch.equal(total, len(choices) * whole.stands_for[0, 4 * blocks :].double())


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("chosen", [8, 16])
def test_shards_of_chosen_blocks(size: int, chosen: int) -> None:
    """Together the whole batch, counts included; each with as many masks."""
    rows = some_rows(4, seq_length=64)[:3]
    batch = make_batch(rows, 4, MASK, chosen=None if chosen == 16 else some_choice(3, 16, chosen))
    shards = [batch.shard(rank, size) for rank in range(size)]
    for name in ("ar_tokens", "diffusion_tokens", "num_tokens"):
        assert sum(getattr(shard, name) for shard in shards) == getattr(batch, name), name
    assert {(shard.seq_length, shard.mask_length) for shard in shards} == {(64 // size, 4 * chosen // size)}
    assert {shard.visibility.shape for shard in shards} == {(3, 64 + 4 * chosen // size, 4)}

    def tokens(parts: list[Batch]) -> list[list[tuple]]:
        names = ("tokens", "labels", "stands_for", "padding", "position_ids")
        columns = [torch.cat([getattr(part, name) for part in parts], dim=1) for name in names]
        return [sorted(zip(*(column[row].tolist() for column in columns), strict=True)) for row in range(3)]

    assert tokens(shards) == tokens([batch])
    for shard in shards:  # a chosen block's clean tokens are on the rank of its masks
        for row in range(3):
            clean, masks = shard.position_ids[row, : shard.seq_length], shard.position_ids[row, shard.seq_length :]
            assert set(masks.tolist()) <= set(clean.tolist())


def test_shards_of_the_clean_half_count_no_masks() -> None:
    batch = make_batch(some_rows(4, seq_length=64)[:3], 4, MASK, doubled=False)
    shards = [batch.shard(rank, 2) for rank in (0, 1)]
    assert [(shard.doubled, shard.diffusion_tokens, shard.seq_length) for shard in shards] == [(False, 0, 32)] * 2
    assert sum(shard.num_tokens for shard in shards) == batch.num_tokens


def marked(rows: list[PackedSequence], seed: int) -> list[PackedSequence]:
    """Return rows in which some tokens are not supervised."""
    draw = np.random.default_rng(seed)
    return [replace(row, diffusion_supervised=row.is_token & (draw.random(len(row.tokens)) < 0.5)) for row in rows]


@given(seed=st.integers(0, 99), count=st.integers(1, 16))
@settings(max_examples=50, deadline=None)
def test_blocks_start_at_supervised_places(seed: int, count: int) -> None:
    supervised = np.random.default_rng(seed).random(16) < 0.5
    starts = choose_starts(supervised, count, seed, 3).tolist()
    assert len(starts) == len({*starts}) == count and starts == sorted(starts)
    assert sum(supervised[start] for start in starts) == min(count, supervised.sum())


def test_masks_of_tokens_that_are_not_supervised_do_not_count() -> None:
    """Aligned blocks keep all masks and what these see; a mask without supervision has no weight, also on shards."""
    rows = marked(some_rows(2, seq_length=32)[:2], 0)
    plain, batch = make_batch(some_rows(2, seq_length=32)[:2], 4, MASK), make_batch(rows, 4, MASK)
    supervised = torch.from_numpy(np.stack([row.diffusion_supervised for row in rows]))
    assert (batch.supervised[:, 32:] == supervised).all() and (batch.labels == plain.labels).all()
    assert not batch.stands_for[:, 32:][~supervised].any() and (batch.teachers == plain.teachers).all()
    assert (batch.visibility == plain.visibility).all() and (batch.padding == plain.padding).all()
    assert batch.diffusion_tokens == supervised.sum() < plain.diffusion_tokens
    assert batch.num_tokens == plain.num_tokens
    assert sum(batch.shard(rank, 2).diffusion_tokens for rank in range(2)) == batch.diffusion_tokens


@pytest.mark.parametrize("across", [False, True])
@given(seed=st.integers(0, 99), count=st.integers(1, 16), some=st.booleans())
@settings(max_examples=30, deadline=None)
def test_blocks_that_start_anywhere(across: bool, seed: int, count: int, some: bool) -> None:
    """Mask by mask: its label, its place, and that it sees its document before its block, or all of the row."""
    rows = marked(some_rows(seed)[:2], seed) if some else some_rows(seed)[:2]
    starts = np.stack([choose_starts(row.is_token, count, seed, number) for number, row in enumerate(rows)])
    batch = make_batch(rows, 4, MASK, starts=starts, cross_document_attention=across)
    assert batch.tokens.shape == (len(rows), 16 + 4 * count) and (batch.tokens[:, 16:] == MASK).all()
    seen = may_attend(batch.visibility[:, 16:], batch.visibility[:, :16])
    for number, row in enumerate(rows):
        for n in range(4 * count):
            start, offset = int(starts[number, n // 4]), n % 4
            place, document = start + offset, row.document[start]
            real = place < 16 and row.document[place] == document and bool(row.is_token[place])
            known = real and bool(row.diffusion_supervised[place])
            assert batch.padding[number, 16 + n] == (not real)
            assert batch.supervised[number, 16 + n] == known
            assert batch.labels[number, 16 + n] == (row.tokens[place] if real else 0)
            assert batch.stands_for[number, 16 + n] == known
            first = next(p for p in range(16) if row.document[p] == document)
            assert batch.position_ids[number, 16 + n] == place - first
            before = [p < start and (across or row.document[p] == document) for p in range(16)]
            assert seen[number, n].tolist() == before
            has_teacher = real and row.index[place] > 0 and place > 0
            assert batch.teachers[number, n] == (place - 1 if has_teacher else -1)
    assert batch.diffusion_tokens == batch.supervised[:, 16:].sum()


def test_more_blocks_than_a_sequence_has_are_shared_by_ranks() -> None:
    """Each context-parallel rank has whole blocks, the same number, and every mask is on one rank."""
    rows = some_rows(5)[:2]
    starts = np.stack([choose_starts(row.is_token, 8, 1, number) for number, row in enumerate(rows)])
    batch = make_batch(rows, 4, MASK, starts=starts)
    parts = [batch.shard(rank, 2) for rank in range(2)]
    assert [part.mask_length for part in parts] == [16, 16]
    assert sum(part.diffusion_tokens for part in parts) == batch.diffusion_tokens
    labels = torch.cat([part.labels[:, part.seq_length :] for part in parts], dim=1)
    assert sorted(labels.flatten().tolist()) == sorted(batch.labels[:, 16:].flatten().tolist())
    for part in parts:  # a teacher is the clean token before, in the order of the keys
        keys = torch.cat([own_positions(16, rank, 2) for rank in range(2)])
        at = keys[part.teachers.clamp(min=0)]
        known = part.teachers >= 0
        assert (batch.tokens.gather(1, at + 1)[known] == part.labels[:, part.seq_length :][known]).all()
