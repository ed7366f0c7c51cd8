"""Documents of ``.bin/.idx`` pairs, as Megatron-LM's ``tools/preprocess_data.py`` writes them.

Building our own index reads the ``.idx`` through megatron-core and checks all of the ``.bin``, because such pairs have
no counts or hashes that would reveal a truncated file. After that, pairs are read like shards.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from tidar_megatron.data.documents import StoredDocuments
from tidar_megatron.data.index import RECORD, Add, Facts, OpenFile, open_index
from tidar_megatron.data.manifest import TokenizerEntry, local_folder
from tidar_megatron.data.tokenizer import fingerprint, load_tokenizer, vocabulary_size
from tidar_megatron.errors import UserError
from tidar_megatron.files import sha256_of

_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, number of sequences, number of document edges
_CHUNK = 1 << 22  # tokens read at a time


class IndexedDocuments(StoredDocuments):
    """The documents of ``PREFIX.bin`` and ``PREFIX.idx``; EOS is appended to a document that does not end with it.

    An EOS inside a document is treated as an ordinary token and does not split the document.

    Args:
        prefix: The prefix of the two local files.
        tokenizer: The Hugging Face folder of the tokenizer that gave the ids.
        verify: Whether to read and check all data, including data that was checked before.

    Raises:
        UserError: A file is missing, truncated, or does not belong to the other, or holds ids that the tokenizer does
            not use; the message names the file.
    """

    def __init__(self, prefix: str, tokenizer: str | None, verify: bool = False) -> None:
        self.tokenizer, self.tokenizer_folder = tokenizer_entry(prefix, tokenizer)
        local_folder(prefix)
        bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        self.name = prefix
        for path in (bin_path, idx_path):
            if path.exists() and not path.is_file():
                raise UserError(f"{path}: is not a file; copy both files again or prepare the data again")
        try:
            stats = [path.stat() for path in (bin_path, idx_path)]
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}; a .bin and its .idx go together") from None
        meaning = {"vocab_size": self.tokenizer.vocab_size, "eos_token_id": self.tokenizer.eos_token_id}
        of: Facts = {"changed": [[stat.st_size, stat.st_mtime_ns] for stat in stats], **meaning}
        index = open_index(Path(f"{prefix}.index"), of, lambda add: self._build(bin_path, idx_path, add), verify)
        if len(index) == 0:
            raise UserError(f"{idx_path}: holds no documents; prepare the data again")
        try:
            self.identity = {"bin": index.facts["bin"], "idx": index.facts["idx"]}
            dtype = np.dtype(index.facts["dtype"])
        except (KeyError, TypeError):
            raise UserError(f"index {index.path}: is damaged; remove it, and the next start builds it again") from None
        super().__init__(index, [bin_path], [len(index)], dtype, self.tokenizer.eos_token_id)

    def load_tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the tokenizer that was given."""
        return load_tokenizer(self.tokenizer_folder)

    def _build(self, bin_path: Path, idx_path: Path, add: Add) -> Facts:
        dtype, ends = _read_idx(bin_path, idx_path)
        begin = 0
        for first, last, tokens in _documents_of(bin_path, dtype, ends):
            lengths = np.diff(ends[first:last], prepend=begin)
            if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.tokenizer.vocab_size:
                wrong = tokens.min() if tokens.min() < 0 else tokens.max()
                raise UserError(
                    f"{bin_path}: holds the id {wrong}, but its tokenizer {self.tokenizer_folder} uses "
                    f"0 to {self.tokenizer.vocab_size - 1}; name the tokenizer it was prepared with (--tokenizer)"
                )
            lasts = tokens[np.maximum(ends[first:last] - begin - 1, 0)] if len(tokens) else np.zeros(len(lengths))
            lacking = (lengths == 0) | (lasts != self.tokenizer.eos_token_id)
            records = np.empty(last - first, RECORD)
            records["offset"] = (ends[first:last] - lengths) * dtype.itemsize
            records["length"], records["stored"] = lengths + lacking, lengths
            add(records)
            begin = int(ends[last - 1])
        return {"dtype": dtype.str, "bin": sha256_of(bin_path), "idx": sha256_of(idx_path)}


def tokenizer_entry(prefix: str, tokenizer: str | None) -> tuple[TokenizerEntry, Path]:
    """Return the manifest entry and the folder of a pair's tokenizer, since a pair has no manifest.

    Args:
        prefix: The pair's prefix, for messages.
        tokenizer: The tokenizer's Hugging Face folder.

    Raises:
        UserError: No tokenizer was given, or it cannot be loaded.
    """
    if tokenizer is None:
        raise UserError(f"data {prefix}: a .bin/.idx pair does not name its tokenizer; give it with --tokenizer")
    loaded = load_tokenizer(tokenizer)
    return TokenizerEntry(
        spec=Path(tokenizer).resolve().name,
        fingerprint=fingerprint(loaded),
        vocab_size=vocabulary_size(loaded),
        eos_token_id=int(loaded.eos_token_id),
    ), Path(tokenizer)


def _read_idx(bin_path: Path, idx_path: Path) -> tuple[np.dtype, NDArray[np.int64]]:
    """Return the dtype of the tokens, and where each document ends, in tokens: int64 ``[documents]``."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset  # slow to import; only index building needs it

    def wrong(path: Path, what: str) -> UserError:
        return UserError(f"{path}: {what}; copy both files again or prepare the data again")

    if bin_path.stat().st_size == 0:
        raise wrong(bin_path, "is empty")
    with idx_path.open("rb") as stream:  # megatron-core's reader does not check the header's counts
        header, size = stream.read(_HEADER.size), os.fstat(stream.fileno()).st_size
    if len(header) < _HEADER.size:
        raise wrong(idx_path, "is truncated within its header")
    magic, version, code, sequences, edges_count = _HEADER.unpack(header)
    if (magic, version) != (b"MMIDIDX\0\0", 1) or not 1 <= code <= 8:
        raise wrong(idx_path, "is not a Megatron index")
    if size == _HEADER.size + 13 * sequences + 8 * edges_count and sequences:
        raise UserError(
            f"{idx_path}: is a multimodal index (each sequence has a mode), which is not read here; "
            "prepare the text alone, as Megatron's tools/preprocess_data.py or tidar prepare-data do"
        )
    if edges_count < 1 or size != _HEADER.size + 12 * sequences + 8 * edges_count:
        raise wrong(idx_path, f"has {size} bytes, which do not fit its {sequences} sequences; was it truncated?")
    try:
        # Keep a reference: megatron-core unmaps the files when the data set is deleted.
        data = IndexedDataset(str(bin_path.with_suffix("")))
        dtype = np.dtype(data.index.dtype)
        lengths = data.index.sequence_lengths.astype(np.int64)
        pointers = data.index.sequence_pointers.astype(np.int64)
        edges = data.index.document_indices.astype(np.int64)
        del data
    except (AssertionError, ValueError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise wrong(idx_path, f"cannot be read by megatron-core ({why})") from error
    if dtype.kind not in "iu":
        raise wrong(idx_path, f"says that tokens are {dtype}, not integers")
    sequence_ends = np.cumsum(lengths)
    if (lengths < 0).any() or not np.array_equal(pointers, (sequence_ends - lengths) * dtype.itemsize):
        raise wrong(idx_path, "does not describe consecutive sequences")
    if edges[0] != 0 or (np.diff(edges) < 0).any() or edges[-1] != len(lengths):
        raise wrong(idx_path, "its documents do not consist of its sequences")
    wanted = int(lengths.sum()) * dtype.itemsize
    if bin_path.stat().st_size != wanted:
        raise wrong(bin_path, f"has {bin_path.stat().st_size} bytes, {idx_path.name} says {wanted}")
    ends = np.concatenate([[0], sequence_ends])[edges[1:]]
    if np.diff(ends, prepend=0).max(initial=0) >= 2**32 - 1:  # with an EOS, more than a record's 32 bits hold
        raise wrong(idx_path, "holds a document of 2**32 tokens or more, which is not supported")
    return dtype, ends


def _documents_of(bin_path: Path, dtype: np.dtype, ends: NDArray[np.int64]) -> Iterator[tuple[int, int, NDArray[Any]]]:
    """Yield runs of consecutive documents: the first number, the last number + 1, and their tokens ``[tokens]``."""
    file, first, begin = OpenFile(bin_path), 0, 0
    while first < len(ends):
        last = max(first + 1, int(np.searchsorted(ends, begin + _CHUNK, side="right")))
        end = int(ends[last - 1])
        data = file.read((end - begin) * dtype.itemsize, begin * dtype.itemsize)
        yield first, last, np.frombuffer(data, dtype)
        first, begin = last, end
