"""Reads the documents of webdataset shards, with suspicion.

Nothing is trusted but what is written here: local files, plain ``.npy`` members without pickles (webdataset's generic
decoder would run a ``.pyd`` member), keys that never become paths, and counts, sizes and hashes as in the manifest.
"""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from tidar_megatron.data.manifest import TOKENIZER_FOLDER, ShardEntry, file_sha256, local_folder, read_manifest
from tidar_megatron.data.tokenizer import fingerprint, load_tokenizer
from tidar_megatron.errors import UserError


class ShardedDocuments:
    """The documents of a folder of shards, by number: ``documents[i]`` is a 1-D array of token ids, EOS last.

    All tokens are held in memory once, in the manifest's dtype (2 bytes a token for most tokenizers); an index of
    offsets into the tars is the way for data larger than that.

    Args:
        folder: a local folder written by :func:`write_shards`.
        verify: compare each shard's SHA-256 with the manifest (else only sizes, counts and contents).

    Attributes:
        manifest: the folder's manifest.
        lengths: int64 ``[documents]``, tokens in each document.

    Raises:
        UserError: anything missing, cut, changed or not as written; the message names the shard.
    """

    def __init__(self, folder: str | Path, verify: bool = True) -> None:
        self.folder = local_folder(folder)
        self.manifest = read_manifest(folder)
        paths = [self.folder / shard.name for shard in self.manifest.shards]
        for shard, path in zip(self.manifest.shards, paths, strict=True):  # all cheap checks before the first long one
            _check_file(shard, path, np.dtype(self.manifest.dtype))
        self._tokens = np.empty(self.manifest.tokens, dtype=self.manifest.dtype)
        self.lengths: NDArray[np.int64] = np.empty(self.manifest.documents, dtype=np.int64)
        document = token = 0
        for shard, path in zip(self.manifest.shards, paths, strict=True):
            _check_hash(shard, path, verify)
            end = token + shard.tokens, document + shard.documents
            for array in _read_tar(path, self._tokens.dtype):
                if token + len(array) > end[0] or document == end[1]:
                    raise _damaged(path, "holds more than the manifest says")
                self._tokens[token : token + len(array)] = array
                self.lengths[document] = len(array)
                document, token = document + 1, token + len(array)
            if (token, document) != end:
                raise _damaged(path, "holds less than the manifest says")
        self._ends = np.cumsum(self.lengths)
        self._check_tokens()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> NDArray[np.unsignedinteger]:
        end = self._ends[number]
        return self._tokens[end - self.lengths[number] : end]

    def load_tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer saved with the shards.

        Raises:
            UserError: it cannot be loaded or is not the one the shards were written with.
        """
        tokenizer = load_tokenizer(self.folder / TOKENIZER_FOLDER)
        if fingerprint(tokenizer) != self.manifest.tokenizer.fingerprint:
            raise UserError(f"{self.folder / TOKENIZER_FOLDER}: is not the tokenizer the shards were written with")
        return tokenizer

    def _check_tokens(self) -> None:
        tokenizer = self.manifest.tokenizer
        if len(self) == 0:
            raise UserError(f"data {self.folder}: holds no documents")
        if self._tokens.max() >= tokenizer.vocab_size or (self._tokens[self._ends - 1] != tokenizer.eos_token_id).any():
            raise UserError(f"data {self.folder}: its tokens are not those of its tokenizer; prepare the data again")


def _read_tar(path: Path, dtype: np.dtype) -> Iterator[NDArray]:
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile() or not member.name.endswith(".npy"):
                    raise _damaged(path, f"member {member.name!r} is not a .npy file")
                payload = tar.extractfile(member)
                assert payload is not None
                array = np.lib.format.read_array(io.BytesIO(payload.read()), allow_pickle=False)
                if array.ndim != 1 or array.dtype != dtype or len(array) == 0:
                    raise _damaged(path, f"member {member.name!r} is not a row of {dtype} tokens")
                yield array
    except UserError:
        raise
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise _damaged(path, f"cannot be read ({error})") from error


def _check_file(shard: ShardEntry, path: Path, dtype: np.dtype) -> None:
    if not path.is_file():
        raise UserError(f"missing shard {path}; copy it again or write the data again with tools/prepare_data.py")
    if path.stat().st_size != shard.bytes:
        raise _damaged(path, f"has {path.stat().st_size} bytes, the manifest says {shard.bytes}")
    if shard.tokens * dtype.itemsize + shard.documents * tarfile.BLOCKSIZE > shard.bytes:
        raise _damaged(path, "is too small for the counts of the manifest")  # before memory is taken for them


def _check_hash(shard: ShardEntry, path: Path, verify: bool) -> None:
    try:
        if verify and file_sha256(path) != shard.sha256:
            raise _damaged(path, "its SHA-256 differs from the manifest's")
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from error


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"shard {path}: {what}; copy it again or write the data again with tools/prepare_data.py")
