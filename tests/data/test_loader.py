"""Each rank's batches: together the global batch, whatever the number of ranks; nothing but a count to remember."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from data_helpers import some_texts

from tidar_megatron.data.doubled import Batch
from tidar_megatron.data.loader import SequenceSettings, TrainingData
from tidar_megatron.data.tokenizer import byte_tokenizer
from tidar_megatron.errors import UserError


@pytest.fixture(scope="module")
def data(shards_once: Path) -> TrainingData:
    return TrainingData(shards_once, SequenceSettings(seq_length=32, block_size=4, mask_token_id=300, seed=7))


def rows(batches: list[Batch]) -> list[tuple]:
    """Each row as one hashable thing: everything the model sees of it."""
    names = ("tokens", "labels", "supervised", "position_ids", "visibility")
    return [
        tuple(tuple(getattr(batch, name)[row].flatten().tolist()) for name in names)
        for batch in batches
        for row in range(len(batch.tokens))
    ]


@pytest.mark.parametrize("consumed", [0, 8, 21, 1000])
def test_the_global_batch_does_not_depend_on_ranks_or_micro_batches(data: TrainingData, consumed: int) -> None:
    reference = Counter(rows(data.step_batches(consumed, 16, 16, 0, 1)))
    for micro_batch_size, dp_size in [(1, 1), (4, 1), (2, 2), (8, 2), (4, 4), (1, 4), (2, 8)]:
        union: Counter = Counter()
        for rank in range(dp_size):
            batches = data.step_batches(consumed, 16, micro_batch_size, rank, dp_size)
            assert len(batches) == 16 // (micro_batch_size * dp_size)
            assert all(len(batch.tokens) == micro_batch_size for batch in batches)
            union += Counter(rows(batches))
        assert union == reference


def test_steps_follow_each_other_across_epochs(data: TrainingData) -> None:
    """Steps of any sizes, resumed by another instance on other ranks, read one and the same stream."""
    count = len(data.sequences[0])
    stream = [data.sequence(n).tokens.tolist() for n in range(2 * count)]
    assert sorted(stream[:count]) != sorted(stream[count:])  # epochs cut other windows
    consumed, seen = 0, []
    for global_batch_size, dp_size in [(4, 1), (8, 2), (8, 4), (4, 2), (count, 1)]:
        other = TrainingData(data.sources[0].name, SequenceSettings(32, 4, 300, seed=7))
        shares = [other.step_batches(consumed, global_batch_size, 1, rank, dp_size) for rank in range(dp_size)]
        seen += [shares[n % dp_size][n // dp_size].tokens[0, :32].tolist() for n in range(global_batch_size)]
        consumed += global_batch_size
    assert consumed > count
    assert seen == stream[:consumed]


def test_an_epoch_of_steps_supervises_every_token_once(data: TrainingData) -> None:
    batches = data.step_batches(0, len(data.sequences[0]), 1, 0, 1)
    manifest = data.sources[0].manifest
    assert sum(batch.diffusion_tokens for batch in batches) == manifest.tokens
    assert sum(batch.ar_tokens for batch in batches) == manifest.tokens - manifest.documents


def test_the_clean_half_alone_is_the_same_data(data: TrainingData) -> None:
    clean, doubled = data.step_batches(4, 4, 4, 0, 1, doubled=False), data.step_batches(4, 4, 4, 0, 1)
    assert torch.equal(clean[0].tokens, doubled[0].tokens[:, :32])


@pytest.mark.parametrize("max_sequences", [None, 0, 1, 5, 8, 10**6])
def test_evaluation_takes_each_sequence_once(data: TrainingData, max_sequences: int | None) -> None:
    whole = data.evaluation_batches(max_sequences, 1, 0, 1)
    total = len(whole)
    assert total == min(len(data.sequences[0]), 10**6 if max_sequences is None else max_sequences)
    reference = Counter(rows(whole))
    for micro_batch_size, dp_size in [(1, 2), (3, 1), (4, 4), (2, 3)]:
        shares = [data.evaluation_batches(max_sequences, micro_batch_size, rank, dp_size) for rank in range(dp_size)]
        assert len({len(share) for share in shares}) == 1
        assert all(batch.tokens.shape == (micro_batch_size, 64) for share in shares for batch in share)
        union = Counter(row for share in shares for row in rows(share))
        stand_ins = union - reference
        assert not reference - union
        assert len(stand_ins) <= 1
        assert not any(any(row[2]) for row in stand_ins)  # nothing in them is supervised
        assert sum(stand_ins.values()) == len(shares[0]) * micro_batch_size * dp_size - total


def test_evaluation_is_in_the_documents_order(data: TrainingData) -> None:
    first = data.evaluation_batches(None, 1, 0, 1)[0].tokens[0, :32].tolist()
    assert first == data.sources[0][0][:32].tolist()


@pytest.mark.parametrize("sizes", [(6, 4, 0, 1), (9, 2, 0, 2), (0, 2, 0, 2), (4, 0, 0, 2)])
def test_batch_sizes_that_cannot_be(data: TrainingData, sizes: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="sequences cannot be split into micro-batches"):
        data.step_batches(0, *sizes)


def test_the_mask_token_is_outside_the_tokenizer(shards_once: Path) -> None:
    for mask in (0, 65, 256):
        with pytest.raises(UserError, match=f"mask token id {mask}: .*ids 0..256; nearest that works: 257"):
            TrainingData(shards_once, SequenceSettings(32, 4, mask, seed=0))
    TrainingData(shards_once, SequenceSettings(32, 4, 257, seed=0))


def test_block_sizes_that_cannot_be(shards_once: Path) -> None:
    with pytest.raises(UserError, match="block size 0"):
        TrainingData(shards_once, SequenceSettings(32, 0, 300, seed=0))
    with pytest.raises(UserError, match=r"sequence length 30.*nearest that works: 32"):
        TrainingData(shards_once, SequenceSettings(30, 4, 300, seed=0))


def test_held_out_data_of_another_tokenizer(data: TrainingData, make_shards: Callable[..., Path]) -> None:
    same = TrainingData(make_shards(some_texts(5, seed=1)), SequenceSettings(32, 4, 300, seed=0))
    data.check_same_tokenizer(same)
    other = TrainingData(make_shards(["x"], name="other", tokenizer=larger()), SequenceSettings(32, 4, 300, seed=0))
    with pytest.raises(UserError, match="another tokenizer"):
        data.check_same_tokenizer(other)


def larger() -> object:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    return tokenizer


@pytest.fixture(scope="module")
def half(shards_once: Path) -> TrainingData:
    return TrainingData(
        shards_once, SequenceSettings(seq_length=32, block_size=4, mask_token_id=300, seed=7, chosen_blocks=4)
    )


def test_chosen_blocks_do_not_depend_on_ranks_or_micro_batches(half: TrainingData) -> None:
    reference = Counter(rows(half.step_batches(21, 16, 16, 0, 1)))
    for micro_batch_size, dp_size in [(1, 1), (4, 1), (2, 2), (4, 4), (2, 8)]:
        shares = [half.step_batches(21, 16, micro_batch_size, rank, dp_size) for rank in range(dp_size)]
        assert all(batch.tokens.shape == (micro_batch_size, 48) for share in shares for batch in share)
        assert sum((Counter(rows(share)) for share in shares), Counter()) == reference


def test_blocks_are_chosen_anew_for_every_sequence_and_epoch(half: TrainingData, data: TrainingData) -> None:
    """Keyed on the number over all epochs: the next epoch trains other blocks of the same text."""
    count = len(half.sequences[0])
    chosen = [batch.position_ids[0, 32::4].tolist() for batch in half.step_batches(0, 2 * count, 1, 0, 1)]
    assert len(set(map(tuple, chosen))) > min(count, 10)
    assert chosen[:count] != chosen[count:]
    first, second = half.step_batches(0, 8, 8, 0, 1)[0], half.step_batches(8, 8, 8, 0, 1)[0]
    assert torch.equal(half.step_batches(4, 8, 8, 0, 1)[0].tokens, torch.cat([first.tokens[4:], second.tokens[:4]]))
    everything = data.step_batches(0, 8, 8, 0, 1)[0]
    assert torch.equal(first.tokens[:, :32], everything.tokens[:, :32])
    assert (first.diffusion_tokens, first.ar_tokens) == (everything.diffusion_tokens, everything.ar_tokens)


def test_evaluation_and_the_ar_phase_know_no_choice(half: TrainingData, data: TrainingData) -> None:
    assert rows(half.evaluation_batches(5, 2, 0, 1)) == rows(data.evaluation_batches(5, 2, 0, 1))
    ours, theirs = (each.step_batches(4, 4, 4, 0, 1, doubled=False) for each in (half, data))
    assert rows(ours) == rows(theirs)
