"""Packs documents into sequences of S tokens; packed sequence n of an epoch is a pure function of (seed, epoch, n).

An epoch is all documents in a random order, each filled up to a multiple of the block size B, laid end to end and cut
every S tokens. S is a multiple of B, so no block straddles a document or a cut. A document that is cut goes on in the
next window. The end of the last window is filled, so an epoch holds every token once. The windows are then taken in a
second random order: a batch is not a few neighbouring pieces of one document.

Nothing is done for all documents, so that any place of any epoch of any amount of data is found at once. Documents are
shuffled in groups: the groups as a whole, and within each its documents, which are laid out when they are needed. The
windows' order is known pointwise. Both orders are drawn from (seed, epoch) (``order.py``).

===========  =====================================  ============================  ==============================
position     next-token label (``ar_supervised``)   ``diffusion_supervised``      visible to
===========  =====================================  ============================  ==============================
token        its document's next token, also when   yes                           its document
             that lies behind the cut
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

from tidar_megatron.data.index import GROUP, filled_lengths
from tidar_megatron.data.order import GROUPS, IN_GROUP, WINDOWS, PointwisePermutation, permutation
from tidar_megatron.errors import UserError

_GROUPS_KEPT = 64


class Documents(Protocol):
    """Whatever gives a document by its number: an array of token ids, or what reads one when it is sliced."""

    def __getitem__(self, number: int, /) -> Any: ...


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


class Lengths(Protocol):
    """The lengths of documents, at least 1 token each, in groups of ``group_size`` (the last may be smaller)."""

    group_size: int

    def __len__(self) -> int:
        """Documents."""

    def filled(self, block_size: int) -> NDArray[np.int64]:
        """Places of each group, its documents filled up to whole blocks: int64 ``[groups]``."""

    def lengths(self, group: int) -> NDArray[np.int64]:
        """Tokens in each document of a group: int64 ``[<= group_size]``."""


class LengthsInMemory:
    """:class:`Lengths` of an array, int64 ``[documents]``."""

    def __init__(self, lengths: NDArray[np.int64], group_size: int = GROUP) -> None:
        assert len(lengths) == 0 or lengths.min() >= 1, "a document has at least its EOS"
        self._lengths, self.group_size = lengths.astype(np.int64), group_size

    def __len__(self) -> int:
        return len(self._lengths)

    def filled(self, block_size: int) -> NDArray[np.int64]:
        """See :class:`Lengths`."""
        return np.add.reduceat(filled_lengths(self._lengths, block_size), np.arange(0, len(self), self.group_size))

    def lengths(self, group: int) -> NDArray[np.int64]:
        """See :class:`Lengths`."""
        return self._lengths[group * self.group_size : (group + 1) * self.group_size]


class _Epoch(NamedTuple):
    groups: NDArray[np.int64]  # their order
    ends: NDArray[np.int64]  # where each of them ends, in that order
    windows: Callable[[int], int]  # which cut is packed sequence n


class _Group(NamedTuple):
    documents: NDArray[np.int64]  # their order, numbered among all
    filled: NDArray[np.int64]  # places of each, in that order
    ends: NDArray[np.int64]  # where each of them ends, from the group's beginning


class PackedSequences:
    """Which places of which documents make up each packed sequence; safe to share between threads.

    Args:
        lengths: of the documents.
        seq_length: S, a multiple of ``block_size``.
        block_size: B.
        seed: of the order of the documents, at least 0.
        shuffle: False keeps the documents in their own order in every epoch.

    Raises:
        UserError: a block size, sequence length or seed that cannot be, or no documents.
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
        self._epoch = lru_cache(maxsize=2)(self._lay_out_epoch)  # batches may lie across an edge
        self._group = lru_cache(maxsize=_GROUPS_KEPT)(self._lay_out_group)

    def __len__(self) -> int:
        """Packed sequences in an epoch, the same in each."""
        return self._sequences

    def locate(self, number: int) -> tuple[int, int]:
        """Number of a packed sequence, counted over all epochs -> (epoch, n)."""
        return divmod(number, len(self))

    def pieces(self, epoch: int, n: int) -> list[Piece]:
        """What packed sequence ``n`` of ``epoch`` is made of, in order; together S places."""
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
            # one token more than its places, beyond the cut if need be: the last one's label
            part = documents[piece.document][piece.start : piece.stop + 1]
            real, following = part[: piece.stop - piece.start], part[1:]
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
