"""Reading of webdataset shards, treated as untrusted input.

A shard must be a local file with plain ``.npy`` members without pickles (webdataset's generic decoder would run a
``.pyd`` member); keys never become paths; counts, sizes and hashes must match the manifest. All of this is checked
once, when the index is built. After that, a shard's size and modification time tell whether it is still the file that
was checked.
"""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from tidar_megatron.data.documents import StoredDocuments
from tidar_megatron.data.index import RECORD, Add, Facts, open_index
from tidar_megatron.data.manifest import (
    FILE_NAME,
    TOKENIZER_FOLDER,
    Manifest,
    ShardEntry,
    local_folder,
    read_manifest,
)
from tidar_megatron.data.tokenizer import fingerprint, load_tokenizer, vocabulary_size
from tidar_megatron.errors import UserError
from tidar_megatron.files import sha256_of

INDEX_FILE = "documents.index"
_NAMED = 3  # invalid shards that an error names; the others are counted


class ShardedDocuments(StoredDocuments):
    """The documents of a folder of shards, by number: ``documents[i][:]`` is a 1-D array of token ids, EOS last.

    Args:
        folder: A local folder written by :func:`write_shards`.
        verify: Whether to read all data and verify each shard's SHA-256, even if that was done before.

    Attributes:
        folder: The folder.
        manifest: The folder's manifest.

    Raises:
        UserError: A file is missing, truncated, changed or invalid; the message names the shard.
    """

    def __init__(self, folder: str | Path, verify: bool = False) -> None:
        self.folder = local_folder(folder)
        self.manifest = read_manifest(folder)
        paths = [self.folder / shard.name for shard in self.manifest.shards]
        dtype = np.dtype(self.manifest.dtype)
        of = built_from(self.folder, self.manifest)

        def build(add: Add) -> Facts:
            for shard, path in zip(self.manifest.shards, paths, strict=True):
                _check_hash(shard, path)
                add(_scan(shard, path, dtype, self.manifest))
            return {}

        index = open_index(self.folder / INDEX_FILE, of, build, verify)
        if len(index) == 0:
            raise UserError(f"data {self.folder}: holds no documents")
        super().__init__(
            index,
            paths,
            [shard.documents for shard in self.manifest.shards],
            dtype,
            self.manifest.tokenizer.eos_token_id,
            self.manifest.marked,
        )
        self.name, self.identity = str(self.folder), {"manifest": of["manifest"]}
        self.tokenizer, self.tokenizer_folder = self.manifest.tokenizer, self.folder / TOKENIZER_FOLDER

    def load_tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the tokenizer that is saved with the shards.

        Raises:
            UserError: The tokenizer cannot be loaded, or is not the one that the shards were written with.
        """
        return tokenizer_of_shards(self.folder, self.manifest)


def tokenizer_of_shards(folder: Path, manifest: Manifest) -> PreTrainedTokenizerFast:
    """Return the tokenizer that is saved with the shards in ``folder``.

    Raises:
        UserError: The tokenizer cannot be loaded, is not the one that the shards were written with, or does not match
            the manifest.
    """
    path = folder / TOKENIZER_FOLDER
    tokenizer, entry = load_tokenizer(path), manifest.tokenizer
    if fingerprint(tokenizer) != entry.fingerprint:
        raise UserError(f"{path}: is not the tokenizer that the shards were written with; copy the folder again")
    for name, said, found in (
        ("vocab_size", entry.vocab_size, vocabulary_size(tokenizer)),
        ("eos_token_id", entry.eos_token_id, tokenizer.eos_token_id),
    ):
        if said != found:
            raise UserError(
                f"{folder / FILE_NAME}: tokenizer.{name} is {said}, but {path} has {found}; copy the folder again"
            )
    return tokenizer


def built_from(folder: Path, manifest: Manifest) -> Facts:
    """Return the description that ties an index to these shards: the manifest's hash and the modification times in ns.

    Raises:
        UserError: Shards are missing or have another size; the message names the first few and counts the others.
    """
    changed, wrong, paths = [], [], [folder / shard.name for shard in manifest.shards]
    for shard, path in zip(manifest.shards, paths, strict=True):
        try:
            stat = path.stat()
        except OSError as error:
            wrong.append(f"{path} cannot be read ({error.strerror})" if path.exists() else f"missing shard {path}")
            continue
        changed.append(stat.st_mtime_ns)
        if not path.is_file():
            wrong.append(f"shard {path}: is not a file")
        elif stat.st_size != shard.bytes:
            wrong.append(f"shard {path}: has {stat.st_size} bytes, the manifest says {shard.bytes}")
        elif shard.tokens * np.dtype(manifest.dtype).itemsize + shard.documents * tarfile.BLOCKSIZE > shard.bytes:
            wrong.append(f"shard {path}: is too small for the counts of the manifest")
    if wrong:
        more = f" and {len(wrong) - _NAMED} more of {len(paths)}" if len(wrong) > _NAMED else ""
        remedy = "copy the folder again or write the data again with tidar prepare-data"
        raise UserError(f"{'; '.join(wrong[:_NAMED])}{more}; {remedy}")
    return {"manifest": sha256_of(folder / FILE_NAME), "changed": changed}


def _check_hash(shard: ShardEntry, path: Path) -> None:
    try:
        if sha256_of(path) != shard.sha256:
            raise _damaged(path, "its SHA-256 differs from the manifest's")
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from error


def _scan(shard: ShardEntry, path: Path, dtype: np.dtype, manifest: Manifest) -> NDArray:
    """Return the records of a shard's documents, after checking that ids are in the vocabulary and EOS is last."""
    records = np.empty(shard.documents, RECORD)
    documents = tokens = 0
    for offset, array in _read_tar(path, dtype, manifest.marked):
        documents, tokens = documents + 1, tokens + len(array)
        if documents > shard.documents or tokens > shard.tokens:
            raise _damaged(path, "holds more than the manifest says")
        if array.max() >= manifest.tokenizer.vocab_size or array[-1] != manifest.tokenizer.eos_token_id:
            ids = f"below {manifest.tokenizer.vocab_size}, EOS {manifest.tokenizer.eos_token_id} at the end"
            raise _damaged(path, f"the tokens of document {documents - 1} do not match {FILE_NAME} ({ids})")
        records[documents - 1] = (offset, len(array), len(array))
    if (documents, tokens) != (shard.documents, shard.tokens):
        raise _damaged(path, f"holds less than the manifest says ({documents} of {shard.documents} documents)")
    return records


def _read_tar(path: Path, dtype: np.dtype, marked: bool) -> Iterator[tuple[int, NDArray]]:
    """Yield for each member the offset in bytes where its tokens begin, and the tokens."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile() or member.issparse() or not member.name.endswith(".npy"):
                    raise _damaged(path, f"member {member.name!r} is not a .npy file")
                payload = tar.extractfile(member)
                assert payload is not None
                stream = io.BytesIO(payload.read())
                array = np.lib.format.read_array(stream, allow_pickle=False)
                offset = member.offset_data + stream.tell() - array.nbytes
                if marked and array.ndim == 2 and len(array) == 2 and array.flags.c_contiguous and array[1].max() <= 1:
                    array = array[0]
                elif marked:
                    raise _damaged(path, f"member {member.name!r} is not a row of tokens and a row of marks")
                if array.ndim != 1 or array.dtype != dtype or len(array) == 0:
                    raise _damaged(path, f"member {member.name!r} is not a row of {dtype} tokens")
                yield offset, array
    except UserError:
        raise
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise _damaged(path, f"cannot be read ({error})") from error


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"shard {path}: {what}; copy it again or write the data again with tidar prepare-data")
