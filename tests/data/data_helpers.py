"""Texts and shards for the tests of the data."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from tidar_megatron.data.shard_writer import write_shards
from tidar_megatron.data.tokenizer import byte_tokenizer, encode_documents


def some_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 0 to 40 letters, so that some documents are shorter than a block and some longer than a window."""
    random = np.random.default_rng(seed)
    return ["".join(map(chr, random.integers(97, 123, random.integers(0, 41)))) for _ in range(count)]


def write_bytes_shards(
    folder: Path,
    texts: Iterable[str],
    shard_bytes: int = 8192,
    overwrite: bool = False,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    tokenizer = tokenizer or byte_tokenizer()
    documents = encode_documents(tokenizer, texts)
    write_shards(folder, documents, tokenizer, "byte", {}, shard_bytes=shard_bytes, overwrite=overwrite)
    return folder
