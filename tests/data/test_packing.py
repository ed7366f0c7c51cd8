"""Packing: pure, whole, and right at every edge of the method."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidar_megatron.data.order import GROUPS, IN_GROUP, WINDOWS, PointwisePermutation, permutation
from tidar_megatron.data.packing import LengthsInMemory, PackedSequence, PackedSequences, Piece, fill_sequence, pack
from tidar_megatron.errors import UserError

EOS = 9999


def some_documents(lengths: list[int]) -> list[np.ndarray]:
    """Every token its own id, so that a token tells where it is from; EOS last."""
    ends = np.cumsum(lengths)
    documents = [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    for document in documents:
        document[-1] = EOS
    return documents


def packed(lengths: list[int], length: int, block: int, **options: int) -> PackedSequences:
    group_size = options.pop("group_size", 4096)
    return PackedSequences(LengthsInMemory(np.array(lengths), group_size), length, block, **({"seed": 0} | options))


def rows_of(sequences: PackedSequences, epoch: int, lengths: list[int]) -> list[PackedSequence]:
    documents = some_documents(lengths)
    return [pack(sequences.pieces(epoch, n), documents, EOS) for n in range(len(sequences))]


LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=12)
SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 5)).map(lambda shape: (shape[0] * shape[1], shape[0]))  # S, B


@given(LENGTHS, SHAPES, st.integers(0, 3), st.booleans())
@settings(deadline=None)
def test_an_epoch_holds_every_token_once(lengths: list[int], shape: tuple[int, int], epoch: int, shuffle: bool) -> None:
    length, block = shape
    rows = rows_of(packed(lengths, length, block, shuffle=shuffle), epoch, lengths)
    documents = some_documents(lengths)
    diffusion = Counter(int(t) for row in rows for t in row.tokens[row.diffusion_supervised])
    assert diffusion == Counter(int(t) for document in documents for t in document)
    # Every token but a document's first is the AR label of its predecessor, wherever the windows cut.
    labels = Counter(
        (int(t), int(y)) for row in rows for t, y, s in zip(row.tokens, row.labels, row.ar_supervised, strict=True) if s
    )
    assert labels == Counter((int(a), int(b)) for document in documents for a, b in pairwise(document))


@given(LENGTHS, SHAPES, st.integers(0, 3))
@settings(deadline=None)
def test_every_row_keeps_the_rules(lengths: list[int], shape: tuple[int, int], epoch: int) -> None:
    length, block = shape
    rows = rows_of(packed(lengths, length, block), epoch, lengths)
    overfull = 0
    for row in rows:
        for array in (row.tokens, row.labels, row.ar_supervised, row.diffusion_supervised, row.document, row.index):
            assert array.shape == (length,)
        starts = np.flatnonzero(np.diff(row.document, prepend=-1))
        assert (starts % block == 0).all()  # documents start at multiples of B
        assert (row.index[starts] % block == 0).all()  # ... as do their continuations, so blocks are whole
        assert (row.index[starts[1:]] == 0).all()  # only a row's first document can be a continuation
        assert (np.diff(row.document) >= 0).all()
        same = np.diff(row.document) == 0
        assert (np.diff(row.index)[same] == 1).all()
        eos = row.diffusion_supervised & (row.tokens == EOS)
        assert not row.ar_supervised[eos].any()  # EOS is a mask label, and has no AR label of its own
        assert (row.diffusion_supervised | ~row.ar_supervised).all()
        fill = ~row.diffusion_supervised
        assert (row.tokens[fill] == EOS).all()
        assert (row.labels[~row.ar_supervised] == 0).all()
        assert (row.labels[row.ar_supervised & (row.labels != EOS)] < EOS).all()
        # at most B-1 fill tokens after a document, and they belong to it; more only where the epoch ends
        overfull += any(count >= block for count in Counter(row.document[fill].tolist()).values())
    assert overfull <= 1


def test_a_small_example_by_hand() -> None:
    # Document 0: 0 1 2 3 4 EOS and 2 fill. Document 1: 6 7 EOS and 1 fill. Then 4 fill up to the end of the window.
    rows = rows_of(packed([6, 3], 8, 4, shuffle=False), 0, [6, 3])
    assert rows[0].tokens.tolist() == [0, 1, 2, 3, 4, EOS, EOS, EOS]
    assert rows[0].labels.tolist() == [1, 2, 3, 4, EOS, 0, 0, 0]
    assert rows[0].ar_supervised.tolist() == [True] * 5 + [False] * 3
    assert rows[0].diffusion_supervised.tolist() == [True] * 6 + [False] * 2
    assert rows[0].index.tolist() == list(range(8))  # the index runs on into the fill
    assert rows[1].tokens.tolist() == [6, 7, EOS, EOS] + [EOS] * 4
    assert rows[1].labels.tolist() == [7, EOS, 0, 0] + [0] * 4
    assert rows[1].document.tolist() == [0] * 4 + [1] * 4  # the end of the epoch: fill is its own document
    assert rows[1].index.tolist() == [0, 1, 2, 3] * 2
    assert rows[1].diffusion_supervised.tolist() == [True] * 3 + [False] * 5
    assert len(rows) == 2


def test_a_document_cut_by_the_window_goes_on_and_keeps_its_label() -> None:
    rows = rows_of(packed([11], 4, 4, shuffle=False), 0, [11])
    assert [row.index.tolist() for row in rows] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert rows[0].labels.tolist() == [1, 2, 3, 4]  # 4 is the first token of the next window
    assert rows[1].labels.tolist() == [5, 6, 7, 8]
    assert rows[2].labels.tolist() == [9, EOS, 0, 0]
    assert rows[1].ar_supervised.all()


def laid_out(lengths: list[int], length: int, block: int, seed: int, epoch: int, group: int) -> list[list[tuple]]:
    """The obvious way, all at once: documents in order, filled, cut into windows, these in order. (document, place)."""
    groups = [list(range(first, min(first + group, len(lengths)))) for first in range(0, len(lengths), group)]
    places: list[tuple[int, int]] = []
    for number in permutation(len(groups), seed, epoch, GROUPS):
        for rank in permutation(len(groups[number]), seed, epoch, IN_GROUP, number):
            document = groups[number][rank]
            places += [(document, place) for place in range(-(-lengths[document] // block) * block)]
    places += [(-1, place) for place in range(-len(places) % length)]
    windows = [places[begin : begin + length] for begin in range(0, len(places), length)]
    order = PointwisePermutation(len(windows), seed, epoch, WINDOWS)
    return [windows[order(n)] for n in range(len(windows))]


@given(LENGTHS, SHAPES, st.integers(0, 3), st.integers(1, 5), st.integers(0, 10**6))
@settings(deadline=None)
def test_any_sequence_is_found_without_laying_out_the_others(
    lengths: list[int], shape: tuple[int, int], epoch: int, group: int, seed: int
) -> None:
    length, block = shape
    expected = laid_out(lengths, length, block, seed, epoch, group)
    sequences = packed(lengths, length, block, seed=seed, group_size=group)
    assert len(sequences) == len(expected)
    for n in reversed(range(len(expected))):
        pieces = sequences.pieces(epoch, n)
        places = [(piece.document, place) for piece in pieces for place in range(piece.start, piece.stop)]
        assert places == expected[n]


def test_purity() -> None:
    """Sequence n of an epoch does not depend on what was asked before, or of which instance."""
    lengths = np.random.default_rng(0).integers(1, 50, 40).tolist()
    reference = {(e, n): packed(lengths, 24, 4, seed=5).pieces(e, n) for e in range(3) for n in range(20)}
    shared = packed(lengths, 24, 4, seed=5)
    keys = list(reference)
    np.random.default_rng(1).shuffle(keys)
    for epoch, n in keys:
        assert shared.pieces(epoch, n) == reference[epoch, n]


def test_order_depends_on_seed_and_epoch_and_nothing_else() -> None:
    lengths = [4] * 50
    one = packed(lengths, 8, 4, seed=1)
    orders = [[p.document for n in range(len(one)) for p in one.pieces(epoch, n)] for epoch in (0, 1)]
    assert orders[0] != orders[1] != sorted(orders[1])
    other = packed(lengths, 8, 4, seed=2)
    assert orders[0] != [p.document for n in range(len(other)) for p in other.pieces(0, n)]
    kept = packed(lengths, 8, 4, shuffle=False)
    for epoch in (0, 3):
        assert [p.document for n in range(len(kept)) for p in kept.pieces(epoch, n)] == list(range(50))


def test_global_numbers() -> None:
    sequences = packed([8] * 5, 8, 4)
    assert len(sequences) == 5
    assert [sequences.locate(n) for n in (0, 4, 5, 14)] == [(0, 0), (0, 4), (1, 0), (2, 4)]


def test_a_row_of_fill() -> None:
    row = fill_sequence(8, EOS)
    assert (row.tokens == EOS).all()
    assert not row.ar_supervised.any()
    assert not row.diffusion_supervised.any()
    assert row.index.tolist() == list(range(8))
    assert packed([3], 8, 4).pieces(0, 0) == [Piece(0, 0, 4), Piece(-1, 0, 4)]


@pytest.mark.parametrize(
    ("length", "block", "message"),
    [
        (8, 0, "block size 0.*nearest that works: 1"),
        (8, -3, "block size -3"),
        (10, 4, "sequence length 10.*nearest that works: 8"),
        (11, 4, "sequence length 11.*nearest that works: 12"),
        (1, 4, "sequence length 1.*nearest that works: 4"),
        (0, 4, "sequence length 0.*nearest that works: 4"),
    ],
)
def test_lengths_that_cannot_be(length: int, block: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        packed([5], length, block)


def test_nothing_to_pack() -> None:
    with pytest.raises(UserError, match="no documents"):
        packed([], 8, 4)
    with pytest.raises(UserError, match="seed -1"):
        packed([5], 8, 4, seed=-1)
