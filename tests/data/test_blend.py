"""Blends: shares that hold at every prefix, and a place for every number at once."""

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from data_helpers import some_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from tidar_megatron.data.blend import FINEST, Blend, parse_blend
from tidar_megatron.data.loader import SequenceSettings, TrainingData
from tidar_megatron.data.tokenizer import train_bpe
from tidar_megatron.errors import UserError

WEIGHTS = st.lists(st.integers(1, 1000).map(lambda n: Fraction(n, 7)), min_size=1, max_size=6)


def test_three_sources_at_70_20_10() -> None:
    """After 100,000 samples and after each tenth of them within 0.1 percentage points, whatever the weights' unit."""
    for given_weights in ("70 A 20 B 10 C", "0.7 A 0.2 B 0.1 C", "7 A 2 B 1 C"):
        blend = Blend([weight for weight, _ in parse_blend(given_weights.split(), "--train-data")])
        had: Counter = Counter()
        for number in range(100_000):
            source, before = blend.locate(number)
            assert before == had[source]
            had[source] += 1
            if (number + 1) % 10_000 == 0:
                for which, share in enumerate((0.7, 0.2, 0.1)):
                    assert abs(had[which] / (number + 1) - share) < 0.001


@pytest.mark.slow
@given(WEIGHTS)
@settings(deadline=None, max_examples=30)
def test_shares_hold_at_every_prefix(weights: list[Fraction]) -> None:
    """Never a whole sequence more than a source's share, nor as many too few as there are sources."""
    blend, total = Blend(weights), sum(weights)
    had = [0] * len(weights)
    for number in range(1500):
        source, before = blend.locate(number)
        assert (before, blend.number(source, before)) == (had[source], number)
        had[source] += 1
        for which, weight in enumerate(weights):
            due = weight / total * (number + 1)
            inexact = Fraction(number + 1, FINEST)  # where a pattern would be longer than FINEST, shares are rounded
            assert had[which] < due + 1 + inexact and had[which] > due - len(weights) - inexact


def test_a_small_share_is_not_lost() -> None:
    blend = Blend([Fraction(10**6), Fraction(1)])
    assert blend.counts == [FINEST - 1, 1]
    assert {blend.locate(number)[0] for number in range(FINEST)} == {0, 1}


@pytest.mark.parametrize(
    ("given_data", "message"),
    [
        ("A B", r"'A' before B is not a weight"),
        ("0.7 A 0.3", r"give one path, or a weight before each"),
        ("0 A 1 B", r"the weight 0 of A must be above 0"),
        ("-1 A 1 B", r"must be above 0"),
        ("nan A 1 B", r"'nan' before A is not a weight"),
        ("1/0 A 1 B", r"is not a weight"),
        ("1 A 2 A", r"names a source twice"),
        ("1 A 2 A/", r"names a source twice"),
        ("1 A 2 ./A", r"names a source twice"),
        ("", r"give one path"),
    ],
)
def test_what_is_no_blend(given_data: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_blend(given_data.split(), "--train-data")


@pytest.fixture
def blended(make_shards: Callable[..., Path]) -> TrainingData:
    folders = [make_shards(some_texts(9 + 20 * n, seed=n), name=f"part{n}") for n in range(3)]
    given_data = [
        word for weight, folder in zip((5, 3, 2), folders, strict=True) for word in (str(weight), str(folder))
    ]
    return TrainingData(given_data, SequenceSettings(32, 4, 300, seed=3))


def test_each_source_counts_its_own_epochs(blended: TrainingData) -> None:
    """No sample of a source comes again before all of its others did; the smallest begins anew first."""
    ids = [blended.locate(number) for number in range(400)]
    for source, sequences in enumerate(blended.sequences):
        own = [(epoch, n) for which, epoch, n in ids if which == source]
        assert own == [divmod(ordinal, len(sequences)) for ordinal in range(len(own))]
    assert Counter(source for source, *_ in ids) == {0: 200, 1: 120, 2: 80}
    assert max(epoch for source, epoch, _ in ids if source == 0) > max(epoch for source, epoch, _ in ids if source == 2)


def test_batches_of_a_blend_carry_their_ids_on_any_ranks(blended: TrainingData) -> None:
    alone = blended.step_batches(96, 16, 16, 0, 1)[0]
    assert alone.sample_ids == [blended.locate(number) for number in range(96, 112)]
    for dp_size in (2, 4):
        shares = [blended.step_batches(96, 16, 2, rank, dp_size) for rank in range(dp_size)]
        rows = {
            (sample, tuple(batch.tokens[row].tolist()))
            for share in shares
            for batch in share
            for row, sample in enumerate(batch.sample_ids)
        }
        assert rows == {(sample, tuple(alone.tokens[row].tolist())) for row, sample in enumerate(alone.sample_ids)}


def test_evaluation_of_a_blend_ends_where_a_source_does(blended: TrainingData) -> None:
    batches = blended.evaluation_batches(None, 1, 0, 1)
    rows = [tuple(batch.tokens[0].tolist()) for batch in batches]
    taken = Counter(blended._blend.locate(number)[0] for number in range(len(rows)))
    assert any(taken[source] == len(each) for source, each in enumerate(blended.sequences))
    assert all(taken[source] <= len(each) for source, each in enumerate(blended.sequences))


def test_sources_of_two_tokenizers(make_shards: Callable[..., Path]) -> None:
    bytes_, other = make_shards(["x"]), make_shards(["y"], name="bpe", tokenizer=train_bpe(["some text " * 50], 260))
    with pytest.raises(UserError, match=r"bpe was written with another tokenizer than .*made"):
        TrainingData(["1", str(bytes_), "1", str(other)], SequenceSettings(32, 4, 300, seed=0))


def test_the_fingerprint_names_what_differs(blended: TrainingData, make_shards: Callable[..., Path]) -> None:
    """Part by part; the same data in another place are the same."""
    folder = make_shards(some_texts(9), name="again")
    print_of_part = TrainingData(folder, SequenceSettings(32, 4, 300, seed=3)).fingerprint()
    assert print_of_part["data"][0]["manifest"] == blended.fingerprint()["data"][0]["manifest"]
    changes = [
        ("seq_length", {"seq_length": 64}),
        ("block_size", {"block_size": 8}),
        ("mask_token_id", {"mask_token_id": 301}),
        ("seed", {"seed": 4}),
        ("reset_positions", {"reset_positions": False}),
        ("cross_document_attention", {"cross_document_attention": True}),
        ("data", {"data": make_shards(some_texts(10), name="changed")}),
    ]
    both = [str(folder), str(changes[-1][1]["data"])]
    of_weights = [
        TrainingData([a, both[0], b, both[1]], SequenceSettings(32, 4, 300, seed=3)).fingerprint()
        for a, b in (("7", "3"), ("0.7", "0.3"))
    ]
    assert of_weights[0] == of_weights[1]
    for part, change in changes:
        settings = {"data": folder, "seq_length": 32, "block_size": 4, "mask_token_id": 300, "seed": 3} | change
        other = TrainingData(settings.pop("data"), SequenceSettings(**settings)).fingerprint()
        assert [name for name in print_of_part if other[name] != print_of_part[name]] == [part]
