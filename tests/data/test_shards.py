"""Shards: what is written is read, by webdataset too; whatever was done to them since is noticed and named."""

import hashlib
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from data_helpers import some_texts, write_bytes_shards

from tidar_megatron.data.packing import Piece, pack
from tidar_megatron.data.shard_writer import MarkedDocument, write_shards
from tidar_megatron.data.shards import ShardedDocuments
from tidar_megatron.data.tokenizer import byte_tokenizer, fingerprint, train_bpe
from tidar_megatron.errors import UserError


def rewrite(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def bless(folder: Path, name: str = "shard-000000.tar") -> None:
    """Make the manifest agree with the bytes of a shard, as a forger would."""
    data = (folder / name).read_bytes()

    def change(manifest: dict) -> None:
        entry = next(shard for shard in manifest["shards"] if shard["name"] == name)
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    rewrite(folder, change)


def refused(folder: Path | str, message: str, verify: bool = False) -> None:
    with pytest.raises(UserError, match=message) as caught:
        ShardedDocuments(folder, verify)
    assert "\n" not in str(caught.value)


def test_round_trip(shards_once: Path) -> None:
    documents = ShardedDocuments(shards_once)
    texts = some_texts(37)
    assert len(documents) == 37
    assert len(documents.manifest.shards) > 2
    assert documents.index.lengths(0).tolist() == [len(text) + 1 for text in texts]
    assert documents.index.lengths(0).dtype == np.int64
    for number in (5, 0, 36, 17):  # in any order
        assert documents[number][:].tolist() == [*texts[number].encode(), 256]
        assert documents[number][:].dtype == np.uint16


def test_webdataset_reads_them(shards_once: Path) -> None:
    texts = some_texts(37)
    urls = sorted(str(path) for path in shards_once.glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode())
    assert [sample["npy"].tolist() for sample in samples] == [[*text.encode(), 256] for text in texts]
    assert len({sample["__key__"] for sample in samples}) == 37


def test_manifest_says_what_there_is(shards_once: Path) -> None:
    manifest = json.loads((shards_once / "manifest.json").read_text())
    assert manifest["documents"] == 37 == sum(shard["documents"] for shard in manifest["shards"])
    assert manifest["tokens"] == sum(len(text) + 1 for text in some_texts(37))
    for shard in manifest["shards"]:
        data = (shards_once / shard["name"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    tokenizer = byte_tokenizer()
    entry = {"spec": "byte", "fingerprint": fingerprint(tokenizer), "vocab_size": 257, "eos_token_id": 256}
    assert manifest["tokenizer"] == entry
    assert ShardedDocuments(shards_once).load_tokenizer().decode([104, 105]) == "hi"


def test_the_same_documents_give_the_same_bytes(shards_once: Path, tmp_path: Path) -> None:
    again = write_bytes_shards(tmp_path / "again", some_texts(37))
    for path in shards_once.iterdir():
        if path.is_file() and path.suffix != ".index":  # which knows when its shards were written
            assert path.read_bytes() == (again / path.name).read_bytes()


@pytest.mark.slow
def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"extra{n}" for n in range(65536 - 257)])
    assert write_shards(tmp_path / "two", [[65535, 256]], tokenizer, "x", {}).dtype == "uint16"
    tokenizer.add_tokens(["one more"])
    assert write_shards(tmp_path / "four", [[65536, 256]], tokenizer, "x", {}).dtype == "uint32"
    assert ShardedDocuments(tmp_path / "four")[0][:].tolist() == [65536, 256]


def test_missing_shard(shards: Path) -> None:
    (shards / "shard-000001.tar").unlink()
    refused(shards, r"missing shard .*shard-000001\.tar")


def test_flipped_byte(shards: Path) -> None:
    path = shards / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    refused(shards, r"shard-000001\.tar: its SHA-256 differs .* write the data again")


@pytest.mark.parametrize("cut", [1, 512, 2048])
def test_truncation(shards: Path, cut: int) -> None:
    path = shards / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:-cut])
    refused(shards, r"shard-000000\.tar: has \d+ bytes")


def test_cut_on_a_member_boundary_though_the_manifest_agrees(shards: Path) -> None:
    path = shards / "shard-000000.tar"
    with tarfile.open(path) as tar:
        boundary = tar.getmembers()[3].offset
    path.write_bytes(path.read_bytes()[:boundary] + bytes(path.stat().st_size - boundary))
    bless(shards)
    refused(shards, r"shard-000000\.tar: holds less than the manifest says")


def test_more_members_than_the_manifest_says(shards: Path) -> None:
    path = shards / "shard-000000.tar"
    with tarfile.open(path, "a") as tar:
        payload = io.BytesIO()
        np.save(payload, np.array([256], dtype=np.uint16))
        add(tar, "one_more.npy", payload.getvalue())
    bless(shards)
    refused(shards, r"shard-000000\.tar: holds more than the manifest says")


def test_what_changed_since_the_index_was_built(shards: Path) -> None:
    """Its time of change gives a shard away; where that was put back, only reading all of it again (--verify-data)."""
    path = shards / "shard-000000.tar"
    ShardedDocuments(shards)
    data, before = bytearray(path.read_bytes()), path.stat()
    data[512 + 128] ^= 1  # the first token
    path.write_bytes(data)
    refused(shards, r"shard-000000\.tar: its SHA-256 differs")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(ShardedDocuments(shards)) == 37
    refused(shards, r"shard-000000\.tar: its SHA-256 differs", verify=True)
    path.write_bytes(bytes(len(data)))
    refused(shards, r"shard-000000\.tar: its SHA-256 differs")


def test_a_shard_cut_while_it_is_read(shards: Path) -> None:
    documents = ShardedDocuments(shards)
    documents[0][:]
    path = shards / "shard-000000.tar"
    begin, *_ = documents.index.record(3)
    os.truncate(path, begin + 4)
    with pytest.raises(UserError, match=rf"shard-000000\.tar: ends at byte {begin + 4}, was it truncated"):
        documents[3][:]


def test_ids_that_nobody_uses_are_noticed_when_they_are_read(shards: Path) -> None:
    """A shard that changed behind the index's back, its time and size as before."""
    documents, path = ShardedDocuments(shards), shards / "shard-000000.tar"
    begin, *_ = documents.index.record(0)
    before = path.stat()
    with path.open("r+b") as stream:
        stream.seek(begin)
        stream.write(b"\xff\xff")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    wrong = r"shard-000000\.tar: holds ids that the tokenizer does not use from byte \d+ on, .*--verify-data"
    with pytest.raises(UserError, match=wrong):
        ShardedDocuments(shards)[0][:]


def test_many_missing_shards_are_counted_and_the_first_named(shards: Path) -> None:
    names = [shard.name for shard in ShardedDocuments(shards).manifest.shards]
    for name in names:
        (shards / name).unlink()
    refused(shards, rf"{names[0]}; .*{names[1]}; .*{names[2]} and {len(names) - 3} more of {len(names)}; copy")


def test_duplicate_and_empty_shards(shards: Path) -> None:
    """A copy under another name repeats documents; a shard without any is a mistake of whoever wrote it."""
    manifest = json.loads((shards / "manifest.json").read_text())
    copy = manifest["shards"][0] | {"name": "copy.tar"}
    (shards / "copy.tar").write_bytes((shards / "shard-000000.tar").read_bytes())

    def add_entry(entry: dict) -> Callable[[dict], None]:
        def change(m: dict) -> None:
            m["shards"] = [*manifest["shards"], entry]
            m["documents"] = manifest["documents"] + entry["documents"]
            m["tokens"] = manifest["tokens"] + entry["tokens"]

        return change

    rewrite(shards, add_entry(copy))
    refused(shards, r"manifest\.json: copy\.tar and shard-000000\.tar are the same")
    rewrite(shards, add_entry(copy | {"documents": 0, "tokens": 0, "sha256": "0" * 64}))
    refused(shards, r"manifest\.json: copy\.tar holds no documents")


def test_a_sparse_member_is_refused(shards: Path) -> None:
    """Its bytes do not lie where a plain one's do, so an offset would lead elsewhere."""
    path = shards / "shard-000000.tar"
    header = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "x.npy", "GNU.sparse.realsize": "9"}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("x.npy")
        payload = b"1\n0\n9\n".ljust(512, b"\0") + b"x" * 9
        member.size, member.pax_headers = len(payload), header
        tar.addfile(member, io.BytesIO(payload))
        add(tar, "pad.npy", bytes(8192))
    with tarfile.open(path) as tar:
        assert tar.getmembers()[0].issparse()
    bless(shards)
    refused(shards, r"member 'x\.npy' is not a \.npy file")


def test_no_manifest_or_garbage(shards: Path) -> None:
    path = shards / "manifest.json"
    whole = path.read_text()
    for garbage in ("", "{", "[]", '{"format": "other"}', whole[: len(whole) // 2], "\0" * 100):
        path.write_text(garbage)
        refused(shards, r"manifest\.json: .*write the data again")
    path.write_bytes(b"\xff\xfe")
    refused(shards, r"manifest\.json: cannot be read")
    path.unlink()
    refused(shards, r"has no manifest\.json")
    refused(shards / "nowhere", r"has no manifest\.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(tokens=m["tokens"] + 1), "totals differ"),
        (lambda m: m.update(dtype="object"), "dtype"),
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m["tokenizer"].pop("eos_token_id"), "eos_token_id"),
        (lambda m: m["shards"][0].update(name="../shard-000000.tar"), r"shards\.0\.name"),
        (lambda m: m["shards"][0].update(name="pipe:touch x;.tar"), r"shards\.0\.name"),
        (lambda m: m["shards"][0].update(name="/etc/x.tar"), r"shards\.0\.name"),
        (lambda m: m["shards"].append(m["shards"][0] | {"documents": 0, "tokens": 0}), "names a shard twice"),
        (lambda m: m["tokenizer"].update(vocab_size=100), "do not match manifest.json"),
        (lambda m: m["tokenizer"].update(eos_token_id=1), "do not match manifest.json"),
    ],
)
def test_a_manifest_that_lies(shards: Path, change: Callable[[dict], object], message: str) -> None:
    rewrite(shards, change)
    refused(shards, message)


def test_huge_counts_take_no_memory(shards: Path) -> None:
    def change(manifest: dict) -> None:
        manifest["shards"][0]["tokens"] += 10**15
        manifest["tokens"] += 10**15

    rewrite(shards, change)
    refused(shards, r"shard-000000\.tar: is too small for the counts")


class Payload:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.witness),)


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("kind", ["pyd", "pickle", "npy of objects", "npz", "text as npy", "bad header"])
def test_payloads_are_refused_and_not_run(shards: Path, tmp_path: Path, kind: str) -> None:
    witness = tmp_path / "ran"
    buffer = io.BytesIO()
    name = "x.npy"
    if kind in ("pyd", "pickle"):
        name = f"x.{kind}"
        buffer.write(pickle.dumps(Payload(witness)))
    elif kind == "npy of objects":
        np.save(buffer, np.array([Payload(witness)], dtype=object), allow_pickle=True)
    elif kind == "npz":
        np.savez(buffer, x=np.array([256], dtype=np.uint16))
    elif kind == "bad header":
        buffer.write(b"\x93NUMPY\x01\x00\x10\x00__import__('os')")
    else:
        buffer.write(pickle.dumps(Payload(witness)))
    with tarfile.open(shards / "shard-000000.tar", "w") as tar:
        add(tar, name, buffer.getvalue())
        add(tar, "pad.npy", bytes(8192))
    bless(shards)
    refused(
        shards,
        r"shard-000000\.tar: " + (r"member 'x\.\w+' is not a \.npy file" if name != "x.npy" else "cannot be read"),
    )
    assert not witness.exists()
    pickle.loads(pickle.dumps(Payload(witness)))  # the payload would have worked
    assert witness.exists()


@pytest.mark.parametrize("array", [np.array([[1, 256]], np.uint16), np.array([256], np.int64), np.array([], np.uint16)])
def test_arrays_of_another_kind(shards: Path, array: np.ndarray) -> None:
    payload = io.BytesIO()
    np.save(payload, array)
    with tarfile.open(shards / "shard-000000.tar", "w") as tar:
        add(tar, "x.npy", payload.getvalue())
        add(tar, "pad.npy", bytes(8192))
    bless(shards)
    refused(shards, "is not a row of uint16 tokens")


def marked_documents(count: int = 9) -> list[MarkedDocument]:
    draw = np.random.default_rng(0)
    texts = [[*draw.integers(0, 256, draw.integers(1, 30)).tolist(), 256] for _ in range(count)]
    return [MarkedDocument(text, (draw.random(len(text)) < 0.5).tolist()) for text in texts]


def test_marked_documents(tmp_path: Path) -> None:
    """The marks come back, for any part of a document, and a packed sequence supervises these tokens alone."""
    documents = marked_documents()
    write_shards(tmp_path / "marked", documents, byte_tokenizer(), "byte", {}, marked=True)
    stored = ShardedDocuments(tmp_path / "marked")
    assert stored.manifest.marked and len(stored) == len(documents)
    for number, (tokens, marks) in enumerate(documents):
        assert stored[number][:].tolist() == tokens
        for start in range(len(tokens)):
            for stop in range(start, len(tokens) + 2):
                assert stored[number].supervised(start, stop).tolist() == marks[start:stop]
    row = pack([Piece(0, 0, 4), Piece(3, 0, 40), Piece(5, 1, 3)], stored, 7)
    for number, start, at, count in ((0, 0, 0, 4), (3, 0, 4, 40), (5, 1, 44, 2)):
        tokens, marks = documents[number]
        for place in range(count):
            there, label = start + place < len(tokens), start + place + 1 < len(tokens)
            assert row.is_token[at + place] == there
            assert row.diffusion_supervised[at + place] == (there and marks[start + place])
            assert row.ar_supervised[at + place] == (label and marks[start + place + 1])
            assert row.labels[at + place] == (tokens[start + place + 1] if row.ar_supervised[at + place] else 0)


@pytest.mark.parametrize("wrong", [np.array([1, 256]), np.array([[1, 256], [0, 2]]), np.array([[1, 256]] * 3)])
def test_marks_that_are_none(tmp_path: Path, wrong: np.ndarray) -> None:
    write_shards(tmp_path / "marked", marked_documents(1), byte_tokenizer(), "byte", {}, marked=True)
    payload = io.BytesIO()
    np.save(payload, wrong.astype(np.uint16))
    with tarfile.open(tmp_path / "marked" / "shard-000000.tar", "w") as tar:
        add(tar, "x.npy", payload.getvalue())
        add(tar, "pad.npy", bytes(8192))
    bless(tmp_path / "marked")
    refused(tmp_path / "marked", "is not a row of tokens and a row of marks")


def test_keys_never_become_paths_and_links_are_refused(shards: Path) -> None:
    path = shards / "shard-000000.tar"
    with tarfile.open(path) as tar:
        payloads = [tar.extractfile(member).read() for member in tar.getmembers()]  # type: ignore[union-attr]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, payload in enumerate(payloads):
            add(tar, "../" * number + "x.npy" if number % 2 else f"/tmp/{number}.npy", payload)
    bless(shards)
    before = sorted(shards.parent.rglob("*"))
    assert len(ShardedDocuments(shards)) == 37
    assert sorted(shards.parent.rglob("*")) == before
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("x.npy")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        add(tar, "pad.npy", bytes(8192))
    bless(shards)
    refused(shards, "is not a .npy file")


def test_only_local_folders(tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    for url in (f"pipe:touch {witness}", "https://example.org/data", "s3://bucket/data"):
        refused(url, "local folders only")
    assert not witness.exists()


def test_another_tokenizer_beside_the_shards(shards: Path) -> None:
    train_bpe(["some text " * 50], 260).save_pretrained(shards / "tokenizer")
    with pytest.raises(UserError, match="is not the tokenizer"):
        ShardedDocuments(shards).load_tokenizer()


def test_overwriting(make_shards: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_shards(["old"])
    with pytest.raises(UserError, match=r"already holds shards.*--overwrite"):
        make_shards(["new"])
    assert make_shards(["new"], overwrite=True) == folder
    assert ShardedDocuments(folder)[0][:].tolist() == [*b"new", 256]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]  # nothing is left beside it
    precious = tmp_path / "precious"
    precious.mkdir()
    make_shards(["into an empty folder"], name="precious")
    (precious / "manifest.json").unlink()
    for overwrite in (False, True):
        with pytest.raises(UserError, match="exists and is not empty"):
            make_shards(["x"], name="precious", overwrite=overwrite)
    assert any(precious.iterdir())


def test_a_failure_on_the_way_leaves_the_old_folder(make_shards: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_shards(["old"])

    def texts() -> object:
        yield "new"
        raise UserError("half way")

    with pytest.raises(UserError, match="half way"):
        make_shards(texts(), overwrite=True)
    assert ShardedDocuments(folder)[0][:].tolist() == [*b"old", 256]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"nothing was written .*Not a directory"):
        make_shards(["x"], name="file/below")
