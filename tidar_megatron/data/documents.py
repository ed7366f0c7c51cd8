"""Documents on the disk, found through their index and read when they are sliced: what every kind of source is.

Memory is that of what is being read. Reading is positional, so threads share a source.
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
    """Documents of several files, one after the other: ``documents[i]`` is the i-th, ``documents[i][a:b]`` its tokens.

    Args:
        index: where they are.
        paths: the files.
        counts: documents in each.
        dtype: of a token in the files.
        eos_token_id: what a document that lacks it ends with.

    Attributes:
        index: as given; the lengths of the documents, for packing.
        name: what the user calls the data.
        tokenizer: what the ids mean.
        tokenizer_folder: where it lies, a Hugging Face tokenizer folder.
        identity: hashes that no other data have.
    """

    name: str
    tokenizer: TokenizerEntry
    tokenizer_folder: Path
    identity: dict[str, str]

    def __init__(
        self, index: DocumentIndex, paths: Sequence[Path], counts: Sequence[int], dtype: np.dtype, eos_token_id: int
    ) -> None:
        self.index, self._paths, self._dtype, self._eos = index, paths, dtype, eos_token_id
        self._ends = list(accumulate(counts))
        assert self._ends[-1] == len(index)
        self._open = lru_cache(maxsize=_OPEN_FILES)(OpenFile)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> "StoredDocument":
        return StoredDocument(self, number, *self.index.record(number))

    @property
    def tokens(self) -> int:
        """Tokens in all documents."""
        return int(self.index.filled(1).sum())

    def load_tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that the ids are of."""
        raise NotImplementedError

    def read(self, number: int, offset: int, count: int) -> NDArray[Any]:
        """``count`` tokens of document ``number``'s file from byte ``offset`` on.

        Raises:
            UserError: the file was cut, or holds ids that the tokenizer does not use.
        """
        path = self._paths[bisect_right(self._ends, number)]
        tokens = np.frombuffer(self._open(path).read(count * self._dtype.itemsize, offset), self._dtype)
        if count and not 0 <= tokens.min() <= tokens.max() < self.tokenizer.vocab_size:
            raise UserError(
                f"{path}: holds ids from byte {offset} on that the tokenizer does not use, so it was changed since "
                "its index was built; copy it again, and look at all of it with --verify-data"
            )
        return tokens

    def eos(self, count: int) -> NDArray[Any]:
        """As many EOS in a row."""
        fits = self._eos <= np.iinfo(self._dtype).max  # a pair of 8 bits may lack the EOS of a larger vocabulary
        return np.full(count, self._eos, dtype=self._dtype if fits else np.int64)


class StoredDocument:
    """One document; a slice of it is read from the disk."""

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
