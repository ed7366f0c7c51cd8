"""Packs documents into sequences of S tokens; packed sequence n of an epoch is a pure function of (seed, epoch, n).

An epoch is all documents, in an order drawn from (seed, epoch), each filled up to a multiple of the block size B, laid
end to end and cut every S tokens. S is a multiple of B, so no block straddles a document or a cut. A document that is
cut goes on in the next window. The end of the last window is filled, so an epoch holds every token once. The windows
are then taken in a second order drawn from (seed, epoch): a batch is not a few neighbouring pieces of one document.

===========  =====================================  ============================  ==============================
position     next-token label (``ar_supervised``)   ``diffusion_supervised``      visible to
===========  =====================================  ============================  ==============================
token        its document's next token, also when   yes                           its document
             that lies behind the cut
EOS          none: it is its document's last token  yes                           its document
fill         none                                   no                            fill, and its block's masks
===========  =====================================  ============================  ==============================
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tidar_megatron.errors import UserError


class Documents(Protocol):
    """Whatever gives the token ids of a document by its number."""

    def __getitem__(self, number: int, /) -> NDArray[Any]: ...


@dataclass(frozen=True)
class Piece:
    """Places ``start .. stop - 1`` of one document; places from its length on are fill. ``document`` -1: all fill."""

    document: int
    start: int
    stop: int


@dataclass(frozen=True)
class PackedSequence:
    """One row; arrays of length S."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]  # the document's next token, 0 where there is none
    ar_supervised: NDArray[np.bool_]
    diffusion_supervised: NDArray[np.bool_]
    document: NDArray[np.int64]  # ordinal within the row
    index: NDArray[np.int64]  # place in the whole document


class _Epoch(NamedTuple):
    order: NDArray[np.int64]  # of the documents
    ends: NDArray[np.int64]  # where each of them ends, in that order
    windows: NDArray[np.int64]  # which cut is packed sequence n


class PackedSequences:
    """Which places of which documents make up each packed sequence.

    Args:
        lengths: int64 ``[documents]``, tokens in each, at least 1.
        seq_length: S, a multiple of ``block_size``.
        block_size: B.
        seed: of the order of the documents, at least 0.
        shuffle: False keeps the documents in their own order in every epoch.

    Raises:
        UserError: a block size, sequence length or seed that cannot be, or no documents.
    """

    def __init__(
        self, lengths: NDArray[np.int64], seq_length: int, block_size: int, seed: int, shuffle: bool = True
    ) -> None:
        check_lengths(seq_length, block_size)
        if seed < 0:
            raise UserError(f"seed {seed}: must not be negative; nearest that works: 0")
        if len(lengths) == 0:
            raise UserError("there are no documents to pack; prepare more data")
        assert lengths.min() >= 1, "a document has at least its EOS"
        self.seq_length = seq_length
        self._filled = -(-lengths.astype(np.int64) // block_size) * block_size
        self._sequences = -(-int(self._filled.sum()) // seq_length)
        self._seed, self._shuffle = seed, shuffle
        self._laid_out: tuple[int, _Epoch] | None = None  # the epoch last asked for

    def __len__(self) -> int:
        """Packed sequences in an epoch, the same in each."""
        return self._sequences

    def locate(self, number: int) -> tuple[int, int]:
        """Global number of a packed sequence, counted over all epochs -> (epoch, n)."""
        return divmod(number, len(self))

    def pieces(self, epoch: int, n: int) -> list[Piece]:
        """What packed sequence ``n`` of ``epoch`` is made of, in order; together S places."""
        assert 0 <= n < len(self)
        order, ends, windows = self._lay_out(epoch)
        window = int(windows[n])
        begin, end = window * self.seq_length, (window + 1) * self.seq_length
        pieces = []
        place = begin
        rank = int(np.searchsorted(ends, begin, side="right"))
        while place < end and rank < len(order):
            document = int(order[rank])
            document_begin = int(ends[rank] - self._filled[document])
            stop = min(end, int(ends[rank]))
            pieces.append(Piece(document, place - document_begin, stop - document_begin))
            place, rank = stop, rank + 1
        if place < end:
            pieces.append(Piece(-1, 0, end - place))
        return pieces

    def _lay_out(self, epoch: int) -> "_Epoch":
        laid_out = self._laid_out  # read once, and replaced whole: threads may ask for different epochs
        if laid_out is None or laid_out[0] != epoch:
            count = len(self._filled)
            order = permutation(count, self._seed, epoch) if self._shuffle else np.arange(count)
            windows = permutation(len(self), self._seed, epoch, 1) if self._shuffle else np.arange(len(self))
            laid_out = self._laid_out = (epoch, _Epoch(order, np.cumsum(self._filled[order]), windows))
        return laid_out[1]


def pack(pieces: list[Piece], documents: Documents, fill_token: int) -> PackedSequence:
    """The tokens, labels and places of ``pieces``."""
    length = sum(piece.stop - piece.start for piece in pieces)
    tokens = np.full(length, fill_token, dtype=np.int64)
    labels = np.zeros(length, dtype=np.int64)
    has_label = np.zeros(length, dtype=np.bool_)
    is_token = np.zeros(length, dtype=np.bool_)
    ordinal, index = np.empty(length, dtype=np.int64), np.empty(length, dtype=np.int64)
    at = 0
    for number, piece in enumerate(pieces):
        places = slice(at, at + piece.stop - piece.start)
        ordinal[places] = number
        index[places] = np.arange(piece.start, piece.stop)
        if piece.document >= 0:
            document = documents[piece.document]
            real = document[piece.start : piece.stop]
            following = document[piece.start + 1 : piece.stop + 1]  # one place further, beyond the cut if need be
            tokens[at : at + len(real)] = real
            is_token[at : at + len(real)] = True
            labels[at : at + len(following)] = following
            has_label[at : at + len(following)] = True
        at = places.stop
    return PackedSequence(tokens, labels, has_label, is_token, ordinal, index)


def fill_sequence(seq_length: int, fill_token: int) -> PackedSequence:
    """A row of nothing but fill: no token is supervised."""
    return pack([Piece(-1, 0, seq_length)], {}, fill_token)


def check_lengths(seq_length: int, block_size: int) -> None:
    """Refuse a block size below 1, and a sequence length that is not a multiple of it.

    Raises:
        UserError: with the nearest that works.
    """
    if block_size < 1:
        raise UserError(f"block size {block_size}: must be at least 1; nearest that works: 1")
    if seq_length < 1 or seq_length % block_size:
        nearest = max(round(seq_length / block_size), 1) * block_size
        raise UserError(
            f"sequence length {seq_length}: must be a positive multiple of the block size {block_size}; "
            f"nearest that works: {nearest}"
        )


def permutation(count: int, *seeds: int) -> NDArray[np.int64]:
    """A random order of ``0 .. count - 1``, int64 ``[count]``, the same on every machine and numpy version.

    numpy promises that for the raw output of a bit generator, not for ``Generator.permutation``.
    """
    bits = np.random.Philox(np.random.SeedSequence(seeds))
    return np.argsort(bits.random_raw(count), kind="stable").astype(np.int64)
