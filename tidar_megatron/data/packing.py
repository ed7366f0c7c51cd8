"""Packing of documents into sequences of S tokens; packed sequence n of an epoch is a function of (seed, epoch, n).

An epoch is all documents in a random order, each padded with *fill* to a multiple of the block size B, concatenated and
cut into windows of S tokens. S is a multiple of B, so no block crosses the boundary of a document or window. A document
that is cut continues in the next window. The last window is padded with fill, so an epoch holds every token once. The
windows are then shuffled too, so that a batch does not consist of neighbouring pieces of a few documents.

Nothing is computed over all documents, so any place in any epoch is found quickly, however large the data are.
Documents are shuffled in two levels: the order of the groups, and the order of the documents within a group, which is
computed when it is needed. The order of the windows is computed pointwise. All orders are drawn from (seed, epoch)
(``order.py``).

Data may be marked: only some tokens of a document are supervised, for example what a model answered, not what it was
asked (``shard_writer.py``). A token that is not supervised is the label of no token and no mask.

===========  =====================================  ============================  ==============================
position     next-token label (``ar_supervised``)   ``diffusion_supervised``      visible to
===========  =====================================  ============================  ==============================
token        its document's next token, even if     yes                           its document
             it is in the next window
EOS          none: it is its document's last token  yes                           its document
fill         none                                   no                            fill, and its block's masks
===========  =====================================  ============================  ==============================
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tidar_megatron.data.documents import StoredDocument
from tidar_megatron.data.index import GROUP, filled_lengths
from tidar_megatron.data.order import GROUPS, IN_GROUP, WINDOWS, PointwisePermutation, permutation
from tidar_megatron.errors import UserError

_GROUPS_KEPT = 64


class Documents(Protocol):
    """A collection of documents by number; a document is an array of token ids, or a :class:`StoredDocument`."""

    def __getitem__(self, number: int, /) -> Any: ...


@dataclass(frozen=True)
class Piece:
    """The places ``start .. stop - 1`` of a document; places beyond its length are fill. -1 is a document of fill."""

    document: int
    start: int
    stop: int


@dataclass(frozen=True)
class PackedSequence:
    """One packed sequence, a row of a batch; each field is an array of length S."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]  # the document's next token, 0 if it is not supervised or there is none
    ar_supervised: NDArray[np.bool_]
    diffusion_supervised: NDArray[np.bool_]
    is_token: NDArray[np.bool_]  # otherwise it is fill
    document: NDArray[np.int64]  # ordinal of the document within the row
    index: NDArray[np.int64]  # place within the document, counted from its beginning


class Lengths(Protocol):
    """The lengths of documents, at least 1 token each, in groups of ``group_size`` (the last may be smaller)."""

    group_size: int

    def __len__(self) -> int:
        """Return the number of documents."""

    def filled(self, block_size: int) -> NDArray[np.int64]:
        """Return the places that each group takes, its documents padded to whole blocks: int64 ``[groups]``."""

    def lengths(self, group: int) -> NDArray[np.int64]:
        """Return the number of tokens in each document of a group: int64 ``[<= group_size]``."""


class LengthsInMemory:
    """An implementation of :class:`Lengths` over an array, int64 ``[documents]``."""

    def __init__(self, lengths: NDArray[np.int64], group_size: int = GROUP) -> None:
        assert len(lengths) == 0 or lengths.min() >= 1, "a document has at least its EOS"
        self._lengths, self.group_size = lengths.astype(np.int64), group_size

    def __len__(self) -> int:
        return len(self._lengths)

    def filled(self, block_size: int) -> NDArray[np.int64]:
        """Return the places that each group takes (see :class:`Lengths`)."""
        return np.add.reduceat(filled_lengths(self._lengths, block_size), np.arange(0, len(self), self.group_size))

    def lengths(self, group: int) -> NDArray[np.int64]:
        """Return the lengths of a group's documents (see :class:`Lengths`)."""
        return self._lengths[group * self.group_size : (group + 1) * self.group_size]


class _Epoch(NamedTuple):
    groups: NDArray[np.int64]  # group numbers in this epoch's order
    ends: NDArray[np.int64]  # end place of each group, in this order
    windows: Callable[[int], int]  # packed sequence n -> its window


class _Group(NamedTuple):
    documents: NDArray[np.int64]  # document numbers (global) in this epoch's order
    filled: NDArray[np.int64]  # places of each document, in this order
    ends: NDArray[np.int64]  # end place of each document, counted from the group's beginning


class PackedSequences:
    """The assignment of document places to packed sequences; threads may share it.

    Args:
        lengths: The lengths of the documents.
        seq_length: S, a multiple of ``block_size``.
        block_size: B.
        seed: The seed of the document order, at least 0.
        shuffle: Whether to shuffle; otherwise documents and windows keep their order in every epoch.

    Raises:
        UserError: The block size, sequence length or seed is invalid, or there are no documents.
    """

    def __init__(self, lengths: Lengths, seq_length: int, block_size: int, seed: int, shuffle: bool = True) -> None:
        check_lengths(seq_length, block_size)
        if seed < 0:
            raise UserError(f"seed {seed}: must not be negative; nearest that works: 0")
        if len(lengths) == 0:
            raise UserError("there are no documents to pack; prepare more data")
        self.seq_length, self.block_size = seq_length, block_size
        self._lengths, self._seed, self._shuffle = lengths, seed, shuffle
        self._filled = lengths.filled(block_size)
        self._sequences = -(-int(self._filled.sum()) // seq_length)
        self._epoch = lru_cache(maxsize=2)(self._lay_out_epoch)  # a batch may span two epochs
        self._group = lru_cache(maxsize=_GROUPS_KEPT)(self._lay_out_group)

    def __len__(self) -> int:
        """Return the number of packed sequences in an epoch, which is the same for every epoch."""
        return self._sequences

    def locate(self, number: int) -> tuple[int, int]:
        """Return (epoch, n) of packed sequence ``number``, counted over all epochs."""
        return divmod(number, len(self))

    def pieces(self, epoch: int, n: int) -> list[Piece]:
        """Return the pieces of packed sequence ``n`` of ``epoch``, in order; together they have S places."""
        assert 0 <= n < len(self)
        groups, group_ends, windows = self._epoch(epoch)
        place = windows(n) * self.seq_length
        end = place + self.seq_length
        pieces = []
        at = int(np.searchsorted(group_ends, place, side="right"))
        while place < end and at < len(groups):
            group = int(groups[at])
            group_begin = int(group_ends[at] - self._filled[group])
            documents, filled, ends = self._group(epoch, group)
            rank = int(np.searchsorted(ends, place - group_begin, side="right"))
            while place < end and rank < len(documents):
                document_end = group_begin + int(ends[rank])
                document_begin = document_end - int(filled[rank])
                stop = min(end, document_end)
                pieces.append(Piece(int(documents[rank]), place - document_begin, stop - document_begin))
                place, rank = stop, rank + 1
            at += 1
        if place < end:
            pieces.append(Piece(-1, 0, end - place))
        return pieces

    def _lay_out_epoch(self, epoch: int) -> _Epoch:
        count = len(self._filled)
        if not self._shuffle:
            return _Epoch(np.arange(count), np.cumsum(self._filled), int)
        groups = permutation(count, self._seed, epoch, GROUPS)
        windows = PointwisePermutation(len(self), self._seed, epoch, WINDOWS)
        return _Epoch(groups, np.cumsum(self._filled[groups]), windows)

    def _lay_out_group(self, epoch: int, group: int) -> _Group:
        filled = filled_lengths(self._lengths.lengths(group), self.block_size)
        count = len(filled)
        order = permutation(count, self._seed, epoch, IN_GROUP, group) if self._shuffle else np.arange(count)
        return _Group(group * self._lengths.group_size + order, filled[order], np.cumsum(filled[order]))


def pack(pieces: list[Piece], documents: Documents, fill_token: int) -> PackedSequence:
    """Return the packed sequence that consists of ``pieces``.

    Args:
        pieces: The pieces, in order.
        documents: The documents that the pieces are part of.
        fill_token: The token id of fill.
    """
    length = sum(piece.stop - piece.start for piece in pieces)
    tokens = np.full(length, fill_token, dtype=np.int64)
    labels = np.zeros(length, dtype=np.int64)
    has_label, supervised, is_token = np.zeros((3, length), dtype=np.bool_)
    ordinal, index = np.empty(length, dtype=np.int64), np.empty(length, dtype=np.int64)
    at = 0
    for number, piece in enumerate(pieces):
        places = slice(at, at + piece.stop - piece.start)
        ordinal[places] = number
        index[places] = np.arange(piece.start, piece.stop)
        if piece.document >= 0:
            # one token more than the piece has places: it is the label of the piece's last token
            document = documents[piece.document]
            part = document[piece.start : piece.stop + 1]
            marks = np.ones(len(part), dtype=np.bool_)
            if isinstance(document, StoredDocument):
                marks = document.supervised(piece.start, piece.stop + 1)
            real, following = part[: piece.stop - piece.start], part[1:]
            tokens[at : at + len(real)] = real
            is_token[at : at + len(real)] = True
            supervised[at : at + len(real)] = marks[: len(real)]
            labels[at : at + len(following)] = following * marks[1:]
            has_label[at : at + len(following)] = marks[1:]
        at = places.stop
    return PackedSequence(tokens, labels, has_label, supervised, is_token, ordinal, index)


def fill_sequence(seq_length: int, fill_token: int) -> PackedSequence:
    """Return a packed sequence of fill alone, in which no token is supervised."""
    return pack([Piece(-1, 0, seq_length)], {}, fill_token)


def check_lengths(seq_length: int, block_size: int) -> None:
    """Refuse a block size below 1, and a sequence length that is not a multiple of it.

    Raises:
        UserError: The message names the nearest value that works.
    """
    if block_size < 1:
        raise UserError(f"block size {block_size}: must be at least 1; nearest that works: 1")
    if seq_length < 1 or seq_length % block_size:
        nearest = max(round(seq_length / block_size), 1) * block_size
        raise UserError(
            f"sequence length {seq_length}: must be a positive multiple of the block size {block_size}; "
            f"nearest that works: {nearest}"
        )
