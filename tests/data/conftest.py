"""Small folders of shards."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tidar_megatron.data.shard_writer import write_shards
from tidar_megatron.data.tokenizer import byte_tokenizer, encode_documents

torch.set_num_threads(1)


def some_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 0 to 40 letters, so that some documents are shorter than a block and some longer than a window."""
    random = np.random.default_rng(seed)
    return ["".join(map(chr, random.integers(97, 123, random.integers(0, 41)))) for _ in range(count)]


def write_bytes_shards(folder: Path, texts: list[str], shard_bytes: int = 8192, overwrite: bool = False) -> Path:
    tokenizer = byte_tokenizer()
    documents = encode_documents(tokenizer, texts)
    write_shards(folder, documents, tokenizer, "byte", {}, shard_bytes=shard_bytes, overwrite=overwrite)
    return folder


@pytest.fixture(scope="session")
def shards_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 documents in several shards; not to be changed."""
    return write_bytes_shards(tmp_path_factory.mktemp("shards") / "data", some_texts(37))


@pytest.fixture
def shards(shards_once: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(shards_once, tmp_path / "data"))


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., Path]:
    """Write given texts as shards with the byte tokenizer."""
    return lambda texts, name="made", **options: write_bytes_shards(tmp_path / name, texts, **options)
