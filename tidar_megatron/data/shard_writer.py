"""Writing of webdataset shards: tars with one ``<key>.npy`` of token ids per document, and a manifest.

Documents may be marked: which of their tokens are supervised travels beside the ids.

A folder is written under a temporary name, and its manifest last, so a folder that has a manifest is complete.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast
from webdataset import TarWriter

from tidar_megatron.data.manifest import (
    FILE_NAME,
    FORMAT,
    TOKENIZER_FOLDER,
    Manifest,
    ShardEntry,
    TokenizerEntry,
    local_folder,
    write_manifest,
)
from tidar_megatron.data.tokenizer import fingerprint, save_tokenizer, vocabulary_size
from tidar_megatron.errors import UserError
from tidar_megatron.files import sha256_of
from tidar_megatron.new_folder import check_free, new_folder


class MarkedDocument(NamedTuple):
    """The token ids of a document, ending with EOS, and which of them are supervised."""

    tokens: Sequence[int]
    supervised: Sequence[bool]


def check_output(folder: str | Path, overwrite: bool) -> None:
    """Refuse an output folder that must not be written to.

    Raises:
        UserError: The folder holds shards and ``overwrite`` is False, or holds something other than shards.
    """
    if not (local_folder(folder) / FILE_NAME).is_file():
        check_free("output", folder)
    elif not overwrite:
        raise UserError(f"output {folder}: already holds shards; choose another folder or pass --overwrite")


def write_shards(
    folder: str | Path,
    documents: Iterable[Sequence[int]] | Iterable[MarkedDocument],
    tokenizer: PreTrainedTokenizerFast,
    tokenizer_spec: str,
    source: dict[str, Any],
    shard_bytes: int = 64 << 20,
    overwrite: bool = False,
    marked: bool = False,
) -> Manifest:
    """Write a folder of shards atomically and return its manifest.

    Args:
        folder: The output folder.
        documents: The token ids of each document, ending with EOS; or documents with marks.
        tokenizer: The tokenizer of the ids; it is saved with the shards.
        tokenizer_spec: The tokenizer's name in the manifest.
        source: What the manifest says about the origin of the text.
        shard_bytes: The approximate size of a shard.
        overwrite: Whether to replace shards that are already in the folder.
        marked: Whether the documents have marks.

    Raises:
        UserError: The folder must not be written to (:func:`check_output`), or writing fails.
    """
    check_output(folder, overwrite)
    size = vocabulary_size(tokenizer)
    dtype: np.dtype = np.dtype(np.uint16 if size <= 1 << 16 else np.uint32)
    with new_folder("output", folder, FILE_NAME, replace=overwrite) as partial:
        shards = list(_write_tars(partial, documents, dtype, shard_bytes))
        save_tokenizer(tokenizer, partial / TOKENIZER_FOLDER)
        manifest = Manifest(
            format=FORMAT,
            dtype="uint16" if dtype == np.uint16 else "uint32",
            marked=marked,
            documents=sum(shard.documents for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            tokenizer=TokenizerEntry(
                spec=tokenizer_spec,
                fingerprint=fingerprint(tokenizer),
                vocab_size=size,
                eos_token_id=tokenizer.eos_token_id,
            ),
            source=source,
            shards=shards,
        )
        write_manifest(partial, manifest)
    return manifest


def _write_tars(
    folder: Path, documents: Iterable[Sequence[int]] | Iterable[MarkedDocument], dtype: np.dtype, shard_bytes: int
) -> Iterator[ShardEntry]:
    numbered = enumerate(documents)
    pending = next(numbered, None)
    for shard in range(1 << 30):
        if pending is None:
            return
        path = folder / f"shard-{shard:06d}.tar"
        count = tokens = 0
        # Members have a fixed modification time, so the same documents give the same bytes and hashes.
        with path.open("wb") as stream, TarWriter(stream, encoder=False, mtime=0) as tar:
            while pending is not None and (count == 0 or stream.tell() < shard_bytes):
                number, document = pending
                array = np.asarray(document, dtype=dtype)
                payload = io.BytesIO()
                np.lib.format.write_array(payload, array, version=(1, 0), allow_pickle=False)
                tar.write({"__key__": f"{number:012d}", "npy": payload.getvalue()})
                count, tokens = count + 1, tokens + array.shape[-1]
                pending = next(numbered, None)
        yield ShardEntry(
            name=path.name, bytes=path.stat().st_size, sha256=sha256_of(path), documents=count, tokens=tokens
        )
