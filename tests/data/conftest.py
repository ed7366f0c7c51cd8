"""Small folders of shards."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from data_helpers import some_texts, write_bytes_shards

torch.set_num_threads(1)


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
