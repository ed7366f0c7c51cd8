"""``manifest.json``, which describes the contents of a folder of shards: it is written last and checked first.

A tar that was truncated between two members still reads without an error, and a flipped byte is still a valid token.
Only the counts, sizes and hashes in the manifest reveal such damage.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tidar_megatron.errors import UserError

FILE_NAME = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"  # beside the manifest, a Hugging Face tokenizer folder
FORMAT: Final = "tidar-shards-1"

Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# A plain file name: it is joined to the folder's path and must not lead outside of the folder.
ShardName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*\.tar$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ShardEntry(_Strict):
    """One shard: a tar of documents."""

    name: ShardName
    bytes: Count
    sha256: Sha256
    documents: Count
    tokens: Count


class TokenizerEntry(_Strict):
    """The tokenizer that the shards were written with; its files are in ``TOKENIZER_FOLDER`` beside them."""

    spec: str
    fingerprint: Sha256
    vocab_size: Count
    eos_token_id: Count


class Manifest(_Strict):
    """The contents of a folder of shards; ``source`` says where the text came from and is only informative.

    If ``marked``, a document is ``[2, n]``: its tokens, and 1 for each token that is supervised, otherwise 0.
    """

    format: Literal["tidar-shards-1"]
    dtype: Literal["uint16", "uint32"]
    marked: bool = False
    documents: Count
    tokens: Count
    tokenizer: TokenizerEntry
    source: dict[str, Any]
    shards: list[ShardEntry]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` into ``folder``."""
    (folder / FILE_NAME).write_text(json.dumps(manifest.model_dump(), indent=2) + "\n", encoding="utf-8")


def local_folder(folder: str | Path) -> Path:
    """Return ``folder`` as a path; refuse a URL, and a webdataset ``pipe:``, which would run a shell.

    Raises:
        UserError: ``folder`` is not a local path.
    """
    if str(folder).startswith("pipe:") or "://" in str(folder):
        raise UserError(f"data {folder}: shards are read from local folders only; copy them to this machine first")
    return Path(folder)


def read_manifest(folder: str | Path) -> Manifest:
    """Return the manifest of a folder of shards, after checking that its totals agree with its shards.

    Raises:
        UserError: ``folder`` is not a local folder, or its manifest is missing or invalid.
    """
    path = local_folder(folder) / FILE_NAME
    remedy = "write the data again with tidar prepare-data"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"data {folder}: has no {FILE_NAME}, so it is no complete folder of shards; {remedy}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {remedy}") from error
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path}: {where}: {first['msg']}; {remedy}") from error
    totals = (sum(shard.documents for shard in manifest.shards), sum(shard.tokens for shard in manifest.shards))
    if totals != (manifest.documents, manifest.tokens):
        raise UserError(f"{path}: its totals differ from the sums over its shards; {remedy}")
    if len({shard.name for shard in manifest.shards}) != len(manifest.shards):
        raise UserError(f"{path}: names a shard twice; {remedy}")
    by_hash: dict[str, str] = {}
    for shard in manifest.shards:
        if not shard.documents:
            raise UserError(f"{path}: {shard.name} holds no documents; {remedy}")
        if (other := by_hash.setdefault(shard.sha256, shard.name)) != shard.name:
            raise UserError(f"{path}: {shard.name} and {other} are the same; {remedy}")
    return manifest
