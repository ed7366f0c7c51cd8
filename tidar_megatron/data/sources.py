"""Opens data, whatever kind it is: a folder of shards, or the prefix of a Megatron ``.bin/.idx`` pair."""

from collections.abc import Sequence
from pathlib import Path

from tidar_megatron.data.blend import parse_blend
from tidar_megatron.data.documents import StoredDocuments
from tidar_megatron.data.manifest import TOKENIZER_FOLDER, TokenizerEntry, read_manifest
from tidar_megatron.data.megatron_indexed import IndexedDocuments, tokenizer_entry
from tidar_megatron.data.shards import ShardedDocuments
from tidar_megatron.errors import UserError


def open_documents(path: str, tokenizer: str | None = None, verify: bool = False) -> StoredDocuments:
    """The documents at ``path``; ``tokenizer`` is the folder that a ``.bin/.idx`` pair needs.

    Raises:
        UserError: anything wrong with them.
    """
    return IndexedDocuments(path, tokenizer, verify) if is_pair(path) else ShardedDocuments(path, verify)


def tokenizer_of(given: Sequence[str], tokenizer: str | None = None) -> tuple[TokenizerEntry, Path]:
    """What the ids of the first of the sources mean, and where that tokenizer lies; quick, opens no data."""
    path = parse_blend(given, "--train-data")[0][1]
    if is_pair(path):
        return tokenizer_entry(path, tokenizer)
    return read_manifest(path).tokenizer, Path(path) / TOKENIZER_FOLDER


def is_pair(path: str) -> bool:
    """Whether ``path`` is the prefix of a ``.bin/.idx`` pair, or of what is left of one."""
    for suffix in (".bin", ".idx"):
        if path.endswith(suffix) and Path(path).is_file():
            raise UserError(f"data {path}: name both files of the pair at once, without {suffix}")
    return not Path(path).is_dir() and any(Path(path + suffix).is_file() for suffix in (".bin", ".idx"))
