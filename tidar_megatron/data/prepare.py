"""Preparation of data: encodes text as training and held-out shards (launched by ``tidar prepare-data``)."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerFast

from tidar_megatron.data.manifest import Manifest
from tidar_megatron.data.order import permutation
from tidar_megatron.data.plain_text import unknown_id
from tidar_megatron.data.shard_writer import check_output, write_shards
from tidar_megatron.data.shards import ShardedDocuments
from tidar_megatron.data.texts import Texts, find_texts, printable
from tidar_megatron.data.tokenizer import encode_documents, make_tokenizer
from tidar_megatron.errors import UserError

T = TypeVar("T")
_NAMES_KEPT, _NAMES_SHOWN = 20, 3  # names of skipped files: in the manifest, on the console


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    tokenizer_spec: str,
    text_key: str = "text",
    held_out_fraction: float = 0.0,
    held_out_output: str | Path | None = None,
    seed: int = 0,
    shard_size_mb: float = 64.0,
    overwrite: bool = False,
    skip_bad_rows: int = 0,
) -> list[Manifest]:
    """Write the documents of ``inputs`` as shards: training data in ``output``, held-out data in ``held_out_output``.

    Each folder is written atomically, and both contain the same tokenizer. A BPE is trained on the training documents
    alone.

    Args:
        inputs: Files and folders of text.
        output: The folder of the training shards.
        tokenizer_spec: ``byte``, ``bpe:N``, or a Hugging Face tokenizer folder (``data/tokenizer.py``).
        text_key: The key of the text in a JSON object.
        held_out_fraction: The fraction of documents that are held out (at least one); 0: none.
        held_out_output: The folder of the held-out shards.
        seed: The seed of the choice of held-out documents.
        shard_size_mb: The approximate size of a shard in MiB.
        overwrite: Whether to replace shards that are already in the output folders.
        skip_bad_rows: The number of JSON rows without text that may be skipped.

    Returns:
        The manifest of the training shards, and that of the held-out shards if there are any.

    Raises:
        UserError: An input, an output or an option is invalid.
    """
    _check_options(inputs, output, held_out_fraction, held_out_output, seed, shard_size_mb, skip_bad_rows)
    outputs = [output] if held_out_output is None else [output, held_out_output]
    for folder in outputs:
        check_output(folder, overwrite)
    texts = find_texts(inputs, text_key, skip_bad_rows)
    count = sum(1 for _ in texts)  # read everything once, to find a broken line before encoding starts
    held_out = _choose(count, held_out_fraction, seed)
    if count <= len(held_out):
        raise UserError(
            f"the inputs hold {count} documents and {len(held_out)} are held out, so none is left to train on; "
            "add documents"
        )
    tokenizer = make_tokenizer(tokenizer_spec, _part(texts, held_out, chosen=False))
    spec = tokenizer_spec if not Path(tokenizer_spec).is_dir() else Path(tokenizer_spec).resolve().name
    source = _describe(inputs, texts, count, held_out_fraction, seed)
    shard_bytes = math.ceil(shard_size_mb * 2**20)
    manifests = []
    for folder, chosen in zip(outputs, (False, True), strict=False):
        part = source | {"part": "held-out" if chosen else "training", "unknown_tokens": 0}
        documents = _count_unknown(_encode(tokenizer, texts, held_out, chosen), unknown_id(tokenizer), part)
        manifests.append(write_shards(folder, documents, tokenizer, spec, part, shard_bytes, overwrite))
        ShardedDocuments(folder)  # read and check all shards, and write the index that training needs
    return manifests


def summary(outputs: Sequence[str | Path], manifests: Sequence[Manifest]) -> str:
    """Return a few lines that say what was written, where, and what was skipped."""
    lines = []
    for output, manifest in zip(outputs, manifests, strict=True):
        size = sum(shard.bytes for shard in manifest.shards) / 2**20
        lines.append(
            f"{output}: {manifest.source['part']} data: {manifest.documents:,} documents, {manifest.tokens:,} tokens, "
            f"{size:.1f} MiB (shards: {len(manifest.shards)})"
        )
    tokenizer, source = manifests[0].tokenizer, manifests[0].source
    lines.append(f"tokenizer {tokenizer.spec}: {tokenizer.vocab_size:,} ids, fingerprint {tokenizer.fingerprint[:12]}")
    if empty := source["empty_documents_skipped"]:
        lines.append(f"skipped, no text in them: {empty:,} documents")
    if undecodable := source["undecodable_files_skipped"]:
        lines.append(f"skipped, not UTF-8: {undecodable:,} files: {_some(source['undecodable_files'], undecodable)}")
    if bad := source["bad_rows_skipped"]:
        lines.append(f"skipped, bad rows: {bad:,}: {_some(source['bad_rows'], bad, '; ')}")
    if plain := source["json_files_read_as_text"]:
        lines.append(f"read as plain text, not JSON rows: {plain:,} files: {_some(source['json_as_text'], plain)}")
    if unknown := sum(manifest.source["unknown_tokens"] for manifest in manifests):
        tokens = sum(manifest.tokens for manifest in manifests)
        lines.append(f"unknown to the tokenizer: {unknown:,} of {tokens:,} tokens are its unknown token")
    return "\n".join(lines)


def _some(names: Sequence[str], count: int, separator: str = ", ") -> str:
    return separator.join([*names[:_NAMES_SHOWN], *(["..."] if count > _NAMES_SHOWN else [])])


def _check_options(
    inputs: Sequence[str | Path],
    output: str | Path,
    held_out_fraction: float,
    held_out_output: str | Path | None,
    seed: int,
    shard_size_mb: float,
    skip_bad_rows: int,
) -> None:
    if not 0 <= held_out_fraction < 1:
        raise UserError(f"--held-out-fraction {held_out_fraction}: must be at least 0 and less than 1")
    if (held_out_fraction > 0) != (held_out_output is not None):
        raise UserError("--held-out-fraction and --held-out-output go together: give both or neither")
    if seed < 0:
        raise UserError(f"--seed {seed}: must not be negative")
    if not 0 < shard_size_mb < math.inf:
        raise UserError(f"--shard-size-mb {shard_size_mb}: must be more than 0")
    if skip_bad_rows < 0:
        raise UserError(f"--skip-bad-rows {skip_bad_rows}: must not be negative")
    folders = [Path(folder).resolve() for folder in (output, held_out_output) if folder is not None]
    if len(set(folders)) < len(folders):
        raise UserError(f"--held-out-output {held_out_output}: is the same folder as --output; choose another")
    if any(one in other.parents for one in folders for other in folders):
        raise UserError(f"--held-out-output {held_out_output} and --output {output} are nested; choose another folder")
    paths = [Path(given).resolve() for given in inputs]
    for number, given in enumerate(paths):
        for other in paths[:number]:
            if given == other or given in other.parents or other in given.parents:
                raise UserError(f"inputs {other} and {given}: the same documents would be read twice; leave one out")
    for given in paths:
        for folder in folders:
            if given == folder or given in folder.parents or folder in given.parents:
                raise UserError(f"output {folder} and input {given} overlap; choose an output folder elsewhere")


def _choose(count: int, fraction: float, seed: int) -> frozenset[int]:
    """Return the numbers of the held-out documents."""
    if fraction == 0:
        return frozenset()
    chosen = permutation(count, seed)[: max(round(fraction * count), 1)]
    return frozenset(chosen.tolist())


def _part(texts: Iterable[T], held_out: frozenset[int], chosen: bool) -> Iterator[T]:
    return (text for number, text in enumerate(texts) if (number in held_out) == chosen)


def _encode(
    tokenizer: PreTrainedTokenizerFast, texts: Texts, held_out: frozenset[int], chosen: bool
) -> Iterator[list[int]]:
    def place(number: int) -> str:  # called at most once, so reading again is cheaper than keeping all
        return next(itertools.islice(_part(texts.documents(), held_out, chosen), number, None)).place

    return encode_documents(tokenizer, _part(texts, held_out, chosen), place)


def _count_unknown(documents: Iterable[list[int]], unknown: int | None, source: dict[str, Any]) -> Iterator[list[int]]:
    """Yield the documents unchanged, and count their unknown tokens in ``source``, which the manifest stores."""
    for document in documents:
        source["unknown_tokens"] += 0 if unknown is None else document.count(unknown)
        yield document


def _describe(
    inputs: Sequence[str | Path], texts: Texts, count: int, held_out_fraction: float, seed: int
) -> dict[str, Any]:
    """Return the manifest's ``source``; it has names but no paths, because a manifest may be published."""
    return {
        "inputs": [printable(Path(given).resolve().name) for given in inputs],
        "text_key": texts.text_key,
        "documents_of_inputs": count,
        "held_out_fraction": held_out_fraction,
        "seed": seed,
        "empty_documents_skipped": texts.empty,
        "undecodable_files_skipped": len(texts.undecodable),
        "undecodable_files": texts.undecodable[:_NAMES_KEPT],
        "bad_rows_skipped": texts.bad_rows,
        "bad_rows": texts.bad_row_names,
        "json_files_read_as_text": len(texts.json_as_text),
        "json_as_text": texts.json_as_text[:_NAMES_KEPT],
    }
