"""Writes documents as webdataset shards: tars with one ``<key>.npy`` of token ids per document, and a manifest.

A folder is written under another name and renamed when it is complete, so a folder with a manifest is whole.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

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
from tidar_megatron.data.tokenizer import fingerprint, vocabulary_size
from tidar_megatron.errors import UserError
from tidar_megatron.files import new_folder, sha256_of


def check_output(folder: str | Path, overwrite: bool) -> None:
    """Refuse a folder that must not be written.

    Raises:
        UserError: it holds something and ``overwrite`` is not given, or holds something other than shards.
    """
    path = local_folder(folder)
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() and not (path / FILE_NAME).is_file():
        raise UserError(f"output {folder}: exists and is not a folder of shards; choose another or remove it yourself")
    if path.exists() and not overwrite:
        raise UserError(f"output {folder}: already holds shards; choose another folder or pass --overwrite")


def write_shards(
    folder: str | Path,
    documents: Iterable[Sequence[int]],
    tokenizer: PreTrainedTokenizerFast,
    tokenizer_spec: str,
    source: dict[str, Any],
    shard_bytes: int = 64 << 20,
    overwrite: bool = False,
) -> Manifest:
    """Write token documents (each ending with EOS) as shards of about ``shard_bytes``; all or nothing.

    Raises:
        UserError: as :func:`check_output`, or the disk refuses.
    """
    check_output(folder, overwrite)
    size = vocabulary_size(tokenizer)
    dtype: np.dtype = np.dtype(np.uint16 if size <= 1 << 16 else np.uint32)
    try:
        with new_folder(folder, FILE_NAME) as partial:
            shards = list(_write_tars(partial, documents, dtype, shard_bytes))
            tokenizer.save_pretrained(partial / TOKENIZER_FOLDER)
            manifest = Manifest(
                format=FORMAT,
                dtype="uint16" if dtype == np.uint16 else "uint32",
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
    except OSError as error:
        raise UserError(f"output {folder}: cannot be written ({error})") from error
    return manifest


def _write_tars(
    folder: Path, documents: Iterable[Sequence[int]], dtype: np.dtype, shard_bytes: int
) -> Iterator[ShardEntry]:
    numbered = enumerate(documents)
    pending = next(numbered, None)
    for shard in range(1 << 30):
        if pending is None:
            return
        path = folder / f"shard-{shard:06d}.tar"
        count = tokens = 0
        # Fixed times: the same documents give the same bytes, hence the same hashes.
        with path.open("wb") as stream, TarWriter(stream, encoder=False, mtime=0) as tar:
            while pending is not None and (count == 0 or stream.tell() < shard_bytes):
                number, document = pending
                array = np.asarray(document, dtype=dtype)
                payload = io.BytesIO()
                np.lib.format.write_array(payload, array, version=(1, 0), allow_pickle=False)
                tar.write({"__key__": f"{number:012d}", "npy": payload.getvalue()})
                count, tokens = count + 1, tokens + len(array)
                pending = next(numbered, None)
        yield ShardEntry(
            name=path.name, bytes=path.stat().st_size, sha256=sha256_of(path), documents=count, tokens=tokens
        )
