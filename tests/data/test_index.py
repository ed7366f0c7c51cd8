"""The index of offsets: built once and whole, built again when it does not fit, found wherever it could be written."""

import multiprocessing
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from data_helpers import some_texts

from tidar_megatron.data import documents as documents_module
from tidar_megatron.data import index as index_module
from tidar_megatron.data.index import (
    _TABLE,
    BLOCK_SIZES,
    GROUP,
    RECORD,
    Add,
    DocumentIndex,
    Facts,
    filled_lengths,
    open_index,
)
from tidar_megatron.data.packing import LengthsInMemory
from tidar_megatron.data.shards import INDEX_FILE, ShardedDocuments
from tidar_megatron.errors import UserError

COUNT = 2 * GROUP + 77


def some_records(count: int = COUNT, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    records = np.empty(count, RECORD)
    records["length"] = records["stored"] = random.integers(1, 5000, count)
    records["offset"] = np.cumsum(records["stored"]) * 2
    return records


def building(records: np.ndarray, piece: int = 1000) -> Callable[[Add], Facts]:
    def build(add: Add) -> Facts:
        for begin in range(0, len(records), piece):
            add(records[begin : begin + piece])
        return {"fact": 7}

    return build


def never(add: Add) -> Facts:
    raise AssertionError("it was there")


@pytest.mark.parametrize("piece", [1, 1000, GROUP, 10**6])
def test_round_trip(tmp_path: Path, piece: int) -> None:
    records = some_records(GROUP + 7 if piece == 1 else COUNT)
    open_index(tmp_path / "x.index", {"of": "this"}, building(records, piece))
    index = open_index(tmp_path / "x.index", {"of": "this"}, never)
    assert (len(index), index.facts) == (len(records), {"fact": 7})
    for document in (0, GROUP - 1, GROUP, len(records) - 1):
        assert index.record(document) == tuple(records[document].tolist())
    for outside in (-1, len(records)):
        with pytest.raises(IndexError):
            index.record(outside)
    lengths = records["length"].astype(np.int64)
    assert (
        np.concatenate([index.lengths(group) for group in range(-(-len(records) // GROUP))]).tolist()
        == lengths.tolist()
    )
    for block_size in (*BLOCK_SIZES, 3, 5000):
        assert index.filled(block_size).tolist() == LengthsInMemory(lengths).filled(block_size).tolist()
        assert index.filled(block_size).sum() == filled_lengths(lengths, block_size).sum()
    assert [path.name for path in tmp_path.iterdir()] == ["x.index"]


def test_of_other_data_it_is_built_again(tmp_path: Path) -> None:
    open_index(tmp_path / "x.index", {"of": 1}, building(some_records(5)))
    assert len(open_index(tmp_path / "x.index", {"of": 2}, building(some_records(6)))) == 6
    assert len(open_index(tmp_path / "x.index", {"of": 2}, never)) == 6


def damage_table(data: bytearray) -> bytearray:
    """The places that the first group's documents take: seeking would lead elsewhere."""
    data[COUNT * RECORD.itemsize + _TABLE.fields["filled"][1]] ^= 1
    return data


def damage_json(data: bytearray) -> bytearray:
    data[data.rindex(b"documents") + 12] ^= 1
    return data


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"garbage" * 1000,
        lambda data: bytes(len(data)),
        lambda data: data[16:],
        lambda data: b"\0" + data,
        damage_table,
        damage_json,
    ],
)
def test_a_damaged_one_is_built_again(tmp_path: Path, damage: Callable[[bytearray], bytes]) -> None:
    path = tmp_path / "x.index"
    open_index(path, {}, building(some_records()))
    whole = path.read_bytes()
    path.write_bytes(damage(bytearray(whole)))
    assert len(open_index(path, {}, building(some_records()))) == COUNT
    assert path.read_bytes() == whole


def test_a_flipped_bit_of_a_record_is_noticed_when_it_is_used(tmp_path: Path) -> None:
    """Opening reads no records; the group's checksum stands before every use. --verify-data builds it again."""
    path = tmp_path / "x.index"
    open_index(path, {}, building(some_records()))
    whole = bytearray(path.read_bytes())
    whole[(GROUP + 5) * RECORD.itemsize + 1] ^= 4
    path.write_bytes(whole)
    index = open_index(path, {}, never)
    assert index.record(0) == tuple(some_records()[0].tolist())
    for use in (lambda: index.record(GROUP + 6), lambda: index.lengths(1)):
        with pytest.raises(UserError, match=r"x\.index: is damaged; remove it"):
            use()
    assert open_index(path, {}, building(some_records()), verify=True).record(GROUP + 5)


def build_slowly(path: Path, seed: int, barrier, gone_without_locks: bool) -> None:
    """In a process of its own; halves of the records with the others' writing between them."""
    if gone_without_locks:
        index_module.fcntl.flock = lambda *_: (_ for _ in ()).throw(OSError("no locks here"))

    def build(add: Add) -> Facts:
        records = some_records(seed=seed)
        add(records[: COUNT // 2])
        if gone_without_locks:
            barrier.wait(60)
        add(records[COUNT // 2 :])
        return {"seed": seed}

    index = open_index(path, {"of": "all"}, build)
    assert zlib.crc32(index.group(0).tobytes()) == zlib.crc32(some_records(seed=index.facts["seed"])[:GROUP].tobytes())


@pytest.mark.parametrize("without_locks", [False, True])
def test_processes_that_build_at_once_leave_one_whole_index(tmp_path: Path, without_locks: bool) -> None:
    """Where locks work, one builds and the others use it; where they do not, the last one's stays, never a mixture."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    path = tmp_path / "x.index"
    processes = [context.Process(target=build_slowly, args=(path, seed, barrier, without_locks)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert [each.name for each in tmp_path.iterdir()] == ["x.index"]
    index = open_index(path, {"of": "all"}, never)
    records = np.concatenate([index.group(group) for group in range(3)])
    assert np.array_equal(records, some_records(seed=index.facts["seed"]))


def test_a_failure_while_building_leaves_nothing(tmp_path: Path) -> None:
    def build(add: Add) -> Facts:
        add(some_records())
        raise UserError("shard 3: is damaged")

    with pytest.raises(UserError, match="shard 3"):
        open_index(tmp_path / "x.index", {}, build)
    assert list(tmp_path.iterdir()) == []


def test_data_that_cannot_be_read_are_named_and_not_the_index(tmp_path: Path) -> None:
    def build(add: Add) -> Facts:
        add(some_records())
        raise PermissionError(13, "Permission denied", "data.idx")

    with pytest.raises(UserError, match=r"^data\.idx: cannot be read \(Permission denied\)$"):
        open_index(tmp_path / "x.index", {}, build)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index goes to the folder of caches, and a copy of the data elsewhere has its own."""
    monkeypatch.setenv("TIDAR_CACHE", str(tmp_path / "cache"))
    (shards / INDEX_FILE).unlink(missing_ok=True)
    elsewhere = Path(shutil.copytree(shards, tmp_path / "elsewhere"))
    real = index_module.tempfile.mkstemp

    def mkstemp(prefix: str, dir: Path) -> tuple[int, str]:  # root, who may run this, may write everywhere
        if dir.parent == tmp_path:
            raise PermissionError(13, "Permission denied")
        return real(prefix=prefix, dir=dir)

    monkeypatch.setattr(index_module.tempfile, "mkstemp", mkstemp)
    for folder in (shards, elsewhere):
        documents = ShardedDocuments(folder)
        assert documents.index.path.is_relative_to(tmp_path / "cache")
        assert ShardedDocuments(folder).index.path == documents.index.path
        assert not (folder / INDEX_FILE).exists()
    monkeypatch.setenv("TIDAR_CACHE", "/proc/nowhere")
    with pytest.raises(UserError, match=r"cannot be written to .*Permission denied.* nor to .*; set TIDAR_CACHE"):
        ShardedDocuments(shards)


def test_threads_share_documents(make_shards: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reads all of them in an order of its own, with more files than are kept open."""
    monkeypatch.setattr(documents_module, "_OPEN_FILES", 4)
    texts = some_texts(200)
    documents = ShardedDocuments(make_shards(texts, shard_bytes=1))
    assert len(documents.manifest.shards) > 10
    wrong = []

    def read(seed: int) -> None:
        for number in np.random.default_rng(seed).permutation(len(texts)):
            if documents[number][:].tolist() != [*texts[number].encode(), 256]:
                wrong.append(number)

    threads = [Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    held = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    assert 0 < sum(path.startswith(documents.name) and path.endswith(".tar") for path in held) <= 4


def test_a_part_of_a_document_is_read_alone(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents, read = ShardedDocuments(shards), []
    number = max(range(37), key=lambda n: len(documents[n]))
    whole = documents[number][:].tolist()
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, offset: read.append(count) or real(fd, count, offset))
    for start, stop in [(0, 1), (3, 9), (5, 10**6), (7, 7), (9, 3), (10**6, 10**7)]:
        assert documents[number][start:stop].tolist() == whole[start:stop]
    assert sum(read) == 2 * (1 + 6 + len(whole) - 5)  # bytes, two a token


def test_opening_reads_neither_shards_nor_records(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their number: what is read is the index's trailer, its table and its JSON."""
    ShardedDocuments(shards)
    size, read = (shards / INDEX_FILE).stat().st_size, []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, offset: read.append((count, offset)) or real(fd, count, offset))
    documents = ShardedDocuments(shards)
    assert isinstance(documents.index, DocumentIndex)
    assert min(offset for _, offset in read) == 37 * RECORD.itemsize
    assert sum(count for count, _ in read) == size - 37 * RECORD.itemsize
