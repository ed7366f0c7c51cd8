"""Opening of data of either kind: a folder of shards, or the prefix of a Megatron ``.bin/.idx`` pair."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tidar_megatron.data.blend import parse_blend
from tidar_megatron.data.documents import StoredDocuments
from tidar_megatron.data.manifest import FILE_NAME, TOKENIZER_FOLDER, TokenizerEntry, local_folder, read_manifest
from tidar_megatron.data.megatron_indexed import IndexedDocuments, tokenizer_entry
from tidar_megatron.data.shards import ShardedDocuments, tokenizer_of_shards
from tidar_megatron.data.tokenizer import load_tokenizer, reserved_ids
from tidar_megatron.errors import UserError

_SHOWN = 3  # prefixes that an error suggests


def open_documents(path: str, tokenizer: str | None = None, verify: bool = False) -> StoredDocuments:
    """Return the documents at ``path``.

    Args:
        path: A folder of shards, or the prefix of a ``.bin/.idx`` pair.
        tokenizer: The Hugging Face tokenizer folder, required for a pair.
        verify: Whether to read and check all data, including data that was checked before.

    Raises:
        UserError: There are no data, or they are invalid.
    """
    if is_pair(path):
        return IndexedDocuments(path, tokenizer, verify)
    return ShardedDocuments(path, verify)


@dataclass(frozen=True)
class DataTokenizer:
    """The tokenizer of data: its entry in a manifest, its folder, and the ids that it never produces from text."""

    entry: TokenizerEntry
    folder: Path
    reserved: Sequence[int]


def tokenizer_of(train: Sequence[str], valid: Sequence[str] = (), tokenizer: str | None = None) -> DataTokenizer:
    """Return the tokenizer of the first source, without opening the data.

    Args:
        train: The words of ``--train-data``.
        valid: The words of ``--valid-data``.
        tokenizer: The Hugging Face tokenizer folder, required for ``.bin/.idx`` pairs and refused without any.

    Raises:
        UserError: A source, its manifest or its tokenizer is missing or invalid.
    """
    given = {"--train-data": train, "--valid-data": valid}
    paths = [path for flag, words in given.items() if words for _, path in parse_blend(words, flag)]
    if tokenizer and not any(map(is_pair, paths)):
        raise UserError(f"--tokenizer {tokenizer}: is for .bin/.idx pairs; shards carry their own")
    if is_pair(paths[0]):
        entry, folder = tokenizer_entry(paths[0], tokenizer)
    else:
        manifest, folder = read_manifest(paths[0]), Path(paths[0]) / TOKENIZER_FOLDER
        tokenizer_of_shards(Path(paths[0]), manifest)
        entry = manifest.tokenizer
    return DataTokenizer(entry, folder, reserved_ids(load_tokenizer(folder)))


def is_pair(path: str) -> bool:
    """Return whether ``path`` is the prefix of a ``.bin/.idx`` pair, complete or not; otherwise it is a folder.

    Raises:
        UserError: ``path`` is neither; the message suggests what may have been meant.
    """
    for suffix in (".bin", ".idx"):
        if path.endswith(suffix) and Path(path).is_file():
            raise UserError(f"data {path}: name both files of the pair at once, without {suffix}")
    folder = Path(path)
    if folder.is_dir():
        if not (folder / FILE_NAME).exists() and (pairs := _prefixes(folder)):
            raise UserError(
                f"data {path}: is a folder of .bin/.idx pairs; name a pair by its prefix, which is its path without "
                f".bin and .idx: {_some(pairs[:_SHOWN], len(pairs))}"
            )
        return False
    if any(Path(path + suffix).is_file() for suffix in (".bin", ".idx")):
        return True
    if local_folder(path).exists():
        raise UserError(f"data {path}: is a file; write its text as shards with tidar prepare-data --input {path}")
    raise UserError(
        f"data {path}: there is neither a folder of shards nor a pair {folder.name}.bin and {folder.name}.idx; "
        f"{_instead(folder)}"
    )


def _instead(folder: Path) -> str:
    if pairs := _prefixes(folder.parent):
        near = sorted(pairs, key=lambda pair: -difflib.SequenceMatcher(None, Path(pair).name, folder.name).ratio())
        return f"the prefix of a pair is its path without .bin and .idx; there are {_some(near[:_SHOWN], len(pairs))}"
    if folder.parent.is_dir():
        return f"{folder.parent} holds no pair; name a pair, or a folder that tidar prepare-data wrote"
    return f"there is no folder {folder.parent}"


def _prefixes(folder: Path) -> list[str]:
    """Return the prefixes of the complete pairs in a folder, sorted."""
    try:
        return sorted(str(path.with_suffix("")) for path in folder.glob("*.idx") if path.with_suffix(".bin").is_file())
    except OSError:
        return []


def _some(names: Sequence[str], count: int) -> str:
    return ", ".join(names) + (f" and {count - len(names)} more" if count > len(names) else "")
