"""Documents on disk, located through an index and read when they are sliced: the base of every kind of source.

Only the tokens being read are in memory. Reads are positional, so threads can share a source.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from tidar_megatron.data.index import DocumentIndex, OpenFile
from tidar_megatron.data.manifest import TokenizerEntry
from tidar_megatron.errors import UserError

_OPEN_FILES = 64


class StoredDocuments:
    """The documents of several files, in order: ``documents[i]`` is the i-th, and ``documents[i][a:b]`` its tokens.

    Args:
        index: The index of the documents.
        paths: The files.
        counts: The number of documents in each file.
        dtype: The dtype of a token in the files.
        eos_token_id: The EOS token, appended to a document that is stored without it.
        marked: Whether the marks of a document's tokens follow them in the file; no EOS is appended to such a document.

    Attributes:
        index: The index; it also gives the lengths of the documents, for packing.
        name: The data's name in messages, as the user gave it.
        tokenizer: The manifest entry of the tokenizer.
        tokenizer_folder: The tokenizer's Hugging Face folder.
        identity: Hashes that identify the data.
    """

    name: str
    tokenizer: TokenizerEntry
    tokenizer_folder: Path
    identity: dict[str, str]

    def __init__(
        self,
        index: DocumentIndex,
        paths: Sequence[Path],
        counts: Sequence[int],
        dtype: np.dtype,
        eos_token_id: int,
        marked: bool = False,
    ) -> None:
        self.index, self._paths, self._dtype, self._eos, self.marked = index, paths, dtype, eos_token_id, marked
        self._ends = list(accumulate(counts))
        assert self._ends[-1] == len(index)
        self._open = lru_cache(maxsize=_OPEN_FILES)(OpenFile)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> "StoredDocument":
        return StoredDocument(self, number, *self.index.record(number))

    @property
    def tokens(self) -> int:
        """The number of tokens in all documents."""
        return int(self.index.filled(1).sum())

    def load_tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the tokenizer of the token ids."""
        raise NotImplementedError

    def read(self, number: int, offset: int, count: int) -> NDArray[Any]:
        """Return ``count`` tokens from the file of document ``number``, starting at byte ``offset``.

        Raises:
            UserError: The file was truncated, or holds ids that the tokenizer does not use.
        """
        return self._read(number, offset, count, self.tokenizer.vocab_size, "ids that the tokenizer does not use")

    def read_marks(self, number: int, offset: int, count: int) -> NDArray[np.bool_]:
        """Return ``count`` marks from the file of document ``number``, starting at byte ``offset``.

        Raises:
            UserError: The file was truncated, or holds other numbers than 0 and 1 there.
        """
        return self._read(number, offset, count, 2, "marks that are neither 0 nor 1").astype(np.bool_)

    def _read(self, number: int, offset: int, count: int, limit: int, wrong: str) -> NDArray[Any]:
        path = self._paths[bisect_right(self._ends, number)]
        found = np.frombuffer(self._open(path).read(count * self._dtype.itemsize, offset), self._dtype)
        if count and not 0 <= found.min() <= found.max() < limit:
            raise UserError(
                f"{path}: holds {wrong} from byte {offset} on, so it was changed since its index was built; copy it "
                "again, and check all of it with --verify-data"
            )
        return found

    def eos(self, count: int) -> NDArray[Any]:
        """Return ``count`` EOS tokens, in the dtype of the files if it holds the EOS id, otherwise int64."""
        fits = self._eos <= np.iinfo(self._dtype).max  # 8-bit .bin files may use a larger vocabulary
        return np.full(count, self._eos, dtype=self._dtype if fits else np.int64)


class StoredDocument:
    """One document; slicing it reads the tokens from disk, and ``supervised`` reads which of them are supervised."""

    def __init__(self, documents: StoredDocuments, number: int, offset: int, length: int, stored: int) -> None:
        self._documents, self._number, self._offset = documents, number, offset
        self._length, self._stored = length, stored

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, places: slice) -> NDArray[Any]:
        start, stop, step = places.indices(self._length)
        assert step == 1
        stop = max(start, stop)
        count = max(0, min(stop, self._stored) - start)
        itemsize = self._documents._dtype.itemsize
        tokens = self._documents.read(self._number, self._offset + start * itemsize, count)
        if stop - start > count:
            return np.concatenate([tokens, self._documents.eos(stop - start - count)])
        return tokens

    def supervised(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Return which of the tokens ``start .. stop - 1`` are supervised, up to the document's end; unmarked: all."""
        stop = max(start, min(stop, self._length))
        if not self._documents.marked:
            return np.ones(stop - start, dtype=np.bool_)
        first = self._offset + (self._length + start) * self._documents._dtype.itemsize
        return self._documents.read_marks(self._number, first, stop - start)
