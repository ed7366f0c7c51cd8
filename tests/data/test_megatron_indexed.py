"""Megatron's .bin/.idx: what is in them is read; what is cut, mixed up or of another tokenizer is refused by name."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_helpers import some_texts

from tidar_megatron.data.loader import SequenceSettings, TrainingData
from tidar_megatron.data.megatron_indexed import IndexedDocuments
from tidar_megatron.data.sources import open_documents, tokenizer_of
from tidar_megatron.data.tokenizer import byte_tokenizer
from tidar_megatron.errors import UserError


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def write_pair(prefix: Path, documents: list[list[int]], dtype: type = np.uint16, sentences: int = 1) -> str:
    """As Megatron's tools/preprocess_data.py; every document in so many sequences."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        parts = np.array_split(np.array(document), sentences)
        builder.add_document(np.array(document), [len(part) for part in parts])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def ids(count: int, seed: int = 0, eos: bool = True) -> list[list[int]]:
    return [[*text.encode(), *[256] * eos] for text in some_texts(count, seed)]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("sentences", [1, 3])
def test_documents_are_read(tmp_path: Path, tokenizer: str, dtype: type, sentences: int) -> None:
    written = ids(40)
    documents = open_documents(write_pair(tmp_path / "pair", written, dtype, sentences), tokenizer)
    assert isinstance(documents, IndexedDocuments)
    assert [documents[n][:].tolist() for n in range(40)] == written
    assert documents.tokens == sum(map(len, written))


def test_an_eos_beyond_the_dtype(tmp_path: Path, tokenizer: str) -> None:
    documents = open_documents(write_pair(tmp_path / "pair", [[65, 66], [67]], np.uint8), tokenizer)
    assert [documents[n][:].tolist() for n in range(2)] == [[65, 66, 256], [67, 256]]


def test_a_document_of_more_tokens_than_an_index_counts(tmp_path: Path, tokenizer: str) -> None:
    """Of three sequences, in a file that is a hole."""
    lengths = np.full(3, 2**31 - 1, np.int32)
    pointers, edges = np.arange(3, dtype=np.int64) * (2**31 - 1), np.array([0, 3], np.int64)
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 1, 3, 2)
    (tmp_path / "pair.idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + edges.tobytes())
    with (tmp_path / "pair.bin").open("wb") as stream:
        stream.truncate(3 * (2**31 - 1))
    with pytest.raises(UserError, match=r"pair\.idx: holds a document of 2\*\*32 tokens or more"):
        open_documents(str(tmp_path / "pair"), tokenizer)


def test_documents_without_eos_get_one(tmp_path: Path, tokenizer: str) -> None:
    """Whole and in parts, the empty one too; those that have it get no second."""
    written = [*ids(20, eos=False), [], [65, 256], [256], []]
    documents = open_documents(write_pair(tmp_path / "pair", written), tokenizer)
    expected = [*([*document, 256] for document in written[:21]), [65, 256], [256], [256]]
    assert [len(documents[n]) for n in range(24)] == [len(document) for document in expected]
    for number, document in enumerate(expected):
        for start, stop in [(0, 10**6), (3, 7), (len(document) - 1, len(document) + 1), (len(document), 10**6)]:
            assert documents[number][start:stop].tolist() == document[start:stop]


def test_the_same_batches_as_from_shards(tmp_path: Path, tokenizer: str, make_shards: Callable[..., Path]) -> None:
    """A pair and shards of the same documents train the same, since both are packed by lengths alone."""
    pair = write_pair(tmp_path / "pair", ids(37, eos=False))
    ours = TrainingData(pair, SequenceSettings(32, 4, 300, seed=5), tokenizer=tokenizer)
    theirs = TrainingData(make_shards(some_texts(37)), SequenceSettings(32, 4, 300, seed=5))
    ours.check_same_tokenizer(theirs)
    for number in range(3 * len(theirs.sequences[0])):
        assert ours.sequence(number).tokens.tolist() == theirs.sequence(number).tokens.tolist()
    assert ours.fingerprint()["data"] != theirs.fingerprint()["data"]
    assert (
        tokenizer_of([pair], tokenizer=tokenizer).entry.fingerprint
        == tokenizer_of([theirs.sources[0].name]).entry.fingerprint
    )


@pytest.fixture
def pair(tmp_path: Path) -> str:
    return write_pair(tmp_path / "pair", ids(40))


def refused(pair: str, tokenizer: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_documents(pair, tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("opened_before", [False, True])
def test_a_bin_that_was_cut_or_grew(pair: str, tokenizer: str, opened_before: bool) -> None:
    if opened_before:
        open_documents(pair, tokenizer)
    path = Path(f"{pair}.bin")
    data = path.read_bytes()
    for other in (data[:-2], data[:-1], data[: len(data) // 2], data + b"\0\0"):
        path.write_bytes(other)
        refused(pair, tokenizer, rf"pair\.bin: has {len(other)} bytes, pair\.idx says {len(data)}; copy both")
    path.write_bytes(b"")
    refused(pair, tokenizer, r"pair\.bin: is empty")
    path.unlink()
    refused(pair, tokenizer, r"pair\.bin: No such file.*go together")


@pytest.mark.parametrize("kept", [0, 5, 9, 17, 20, 34, 100, -1])
def test_an_idx_that_was_cut(pair: str, tokenizer: str, kept: int) -> None:
    path = Path(f"{pair}.idx")
    path.write_bytes(path.read_bytes()[:kept])
    refused(pair, tokenizer, r"pair\.idx: (is truncated within its header|has \d+ bytes, which do not fit)")


def test_an_idx_that_is_missing_or_of_another_pair(pair: str, tokenizer: str, tmp_path: Path) -> None:
    other = write_pair(tmp_path / "other", ids(39, seed=1))
    Path(f"{pair}.idx").write_bytes(Path(f"{other}.idx").read_bytes())
    refused(pair, tokenizer, r"pair\.bin: has \d+ bytes, pair\.idx says")
    Path(f"{pair}.idx").unlink()
    refused(pair, tokenizer, r"pair\.idx: No such file")


def test_an_idx_that_lies(pair: str, tokenizer: str) -> None:
    path = Path(f"{pair}.idx")
    whole = path.read_bytes()
    lengths, pointers, edges = 34, 34 + 4 * 40, 34 + 12 * 40

    def with_number(offset: int, kind: str, number: int) -> None:
        path.write_bytes(whole[:offset] + struct.pack(kind, number) + whole[offset + struct.calcsize(kind) :])

    with_number(pointers + 8, "<q", 10**9)
    refused(pair, tokenizer, r"pair\.idx: does not describe consecutive sequences")
    with_number(lengths, "<i", -5)
    refused(pair, tokenizer, r"pair\.idx: does not describe")
    with_number(edges + 8, "<q", 30)
    refused(pair, tokenizer, r"pair\.idx: its documents do not consist of its sequences")
    with_number(17, "<B", 7)
    refused(pair, tokenizer, r"pair\.idx: says that tokens are float32")
    for offset in (0, 9, 17):
        with_number(offset, "<B", 99)
        refused(pair, tokenizer, r"pair\.idx: is not a Megatron index")
    with_number(18, "<q", 2**61)
    refused(pair, tokenizer, r"pair\.idx: has \d+ bytes, which do not fit its 2305843009213693952 sequences")
    with_number(edges + 8 * 40, "<q", 39)
    refused(pair, tokenizer, r"pair\.idx: cannot be read")


def test_ids_of_another_tokenizer(tmp_path: Path, tokenizer: str) -> None:
    refused(write_pair(tmp_path / "large", [[65, 300, 256]]), tokenizer, r"large\.bin: holds the id 300, .*0 to 256")
    refused(write_pair(tmp_path / "below", [[65, -3, 256]], np.int32), tokenizer, r"below\.bin: holds the id -3")
    refused(write_pair(tmp_path / "none", [[65, 256]]), None, r"none: .*give it with --tokenizer")
    refused(str(tmp_path / "none.bin"), tokenizer, r"name both files of the pair at once, without \.bin")


def test_a_mistyped_prefix_is_told_what_is_there(tmp_path: Path, tokenizer: str) -> None:
    neither = "there is neither a folder of shards nor a pair "
    refused(str(tmp_path / "new" / "x"), tokenizer, rf"x: {neither}x\.bin and x\.idx; there is no folder .*new$")
    refused(
        str(tmp_path / "x"), tokenizer, rf"x: {neither}x\.bin and x\.idx; .* holds no pair; name a pair, or a folder"
    )
    (tmp_path / "pairs").mkdir()
    for name in ["wiki_text_document", "code_text_document", "books", "other"]:
        write_pair(tmp_path / "pairs" / name, [[65, 256]])
    (tmp_path / "pairs" / "alone.idx").write_bytes(b"")
    for given in ("wiki", "wiki_text_documents"):
        for named in (tokenizer, None):
            refused(
                str(tmp_path / "pairs" / given),
                named,
                rf"{given}: {neither}.*without \.bin and \.idx; there are \S*/pairs/wiki_text_document, .* and 1 more$",
            )
    folder = r"pairs: is a folder of \.bin/\.idx pairs; name a pair by its prefix.*: \S*pairs/books, .* and 1 more$"
    refused(str(tmp_path / "pairs"), tokenizer, folder)
    (tmp_path / "x.jsonl").write_text('"text"')
    refused(
        str(tmp_path / "x.jsonl"),
        tokenizer,
        r"x\.jsonl: is a file; write its text as shards with tidar prepare-data --input \S*x\.jsonl$",
    )
    with pytest.raises(UserError, match=r"wiki: there is neither .*wiki_text_document"):  # also where weights are given
        tokenizer_of(["0.5", str(tmp_path), "0.5", f"{tmp_path}/pairs/wiki"], tokenizer=tokenizer)
    both = ["0.5", f"{tmp_path}/pairs/books", "0.5", str(tmp_path)]
    assert tokenizer_of(both, tokenizer=tokenizer).folder == Path(tokenizer)


def test_a_multimodal_index_is_called_one(pair: str, tokenizer: str) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{pair}.bin", dtype=np.uint16, multimodal=True)
    for document in ids(3):
        builder.add_document(np.array(document), [len(document)], [0])
    builder.finalize(f"{pair}.idx")
    refused(pair, tokenizer, r"pair\.idx: is a multimodal index .*, which is not read here; prepare the text alone")


def test_a_changed_pair_is_looked_at_again(tmp_path: Path, tokenizer: str) -> None:
    pair = write_pair(tmp_path / "pair", ids(40))
    before = open_documents(pair, tokenizer).identity
    write_pair(tmp_path / "pair", ids(41, seed=2))
    after = open_documents(pair, tokenizer)
    assert len(after) == 41 and after.identity != before
