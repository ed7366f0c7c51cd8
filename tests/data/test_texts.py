"""What a file of text is, its content says where its suffix does not: JSON lines, an array, compressed, or refused."""

import bz2
import gzip
import io
import json
import lzma
import runpy
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidar_megatron.data import json_rows
from tidar_megatron.data.prepare import prepare, summary
from tidar_megatron.data.shards import ShardedDocuments
from tidar_megatron.data.texts import find_texts
from tidar_megatron.errors import UserError

PROGRAM = Path(__file__).parents[2] / "tools" / "prepare_data.py"

ROWS = [{"text": "first"}, {"text": "second\u2028é"}, {"id": 3, "text": "third"}]
TEXTS = ["first", "second\u2028é", "third"]


def json_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(path: Path, message: str, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        list(find_texts([path], **options))
    assert "\n" not in str(caught.value)


WAYS = {
    "lines": json_lines(ROWS),
    "lines without an end, blank ones between": b"\n  \n" + json_lines(ROWS).replace(b"\n", b"\n\n").strip(),
    "a byte order mark": b"\xef\xbb\xbf" + json_lines(ROWS),
    "an array": json.dumps(ROWS).encode(),
    "an array, indented": b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2).encode() + b"\n\n",
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["x.json", "x.JSON", "x.jsonl", "x.ndjson"])
@pytest.mark.parametrize("walked", [False, True])
def test_json_by_content(tmp_path: Path, way: str, name: str, walked: bool) -> None:
    path = write(tmp_path / "in" / name, WAYS[way])
    if "array" in way and name in ("x.jsonl", "x.ndjson"):  # they promise lines
        refused(path, "line 1: ")
        return
    texts = find_texts([path.parent if walked else path])
    assert list(texts) == TEXTS
    assert texts.json_as_text == []
    assert [document.text for document in texts.documents()] == TEXTS


def test_places_and_strings(tmp_path: Path) -> None:
    lines = write(tmp_path / "a.json", b'\n"one"\n{"text": "two"}\n')
    array = write(tmp_path / "b.json", b'["one", {"text": ""}, {"text": "two"}]')
    texts = find_texts([lines, array])
    places = [(document.text, document.place.removeprefix(f"{tmp_path}/")) for document in texts.documents()]
    assert places == [
        ("one", "a.json, line 2"),
        ("two", "a.json, line 3"),
        ("one", "b.json, item 1"),
        ("two", "b.json, item 3"),
    ]
    assert texts.empty == 1
    assert list(find_texts([write(tmp_path / "none.json", b"[ ]"), write(tmp_path / "empty.json", b" \n")])) == []


@given(st.lists(st.text(max_size=30)), st.sampled_from([None, 0, 3]), st.booleans(), st.integers(1, 40))
def test_arrays_in_chunks_of_any_size(texts: list[str], indent: int | None, ascii_only: bool, chunk: int) -> None:
    values = [{"n": 12.5e3, "text": text} for text in texts]
    content = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "replace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_CHUNK", chunk)
        rows = list(json_rows.array_rows(io.BytesIO(content), "text"))
        numbers = list(json_rows._array_items(io.BytesIO(b"[ 123456 , 7.25e2,[1, [2]] ]")))
    expected = [text.encode("utf-8", "replace").decode() for text in texts] if not ascii_only else texts
    assert [text for _, text in rows] == expected
    assert numbers == [123456, 725.0, [1, [2]]]


def test_an_array_is_not_held_in_memory() -> None:
    """Not more than a few chunks of it are read ahead."""
    stream = io.BytesIO(b"[" + b", ".join(json.dumps({"text": "x" * 1000}).encode() for _ in range(5000)) + b"]")
    rows = json_rows.array_rows(stream, "text")
    for _ in range(10):
        next(rows)
    assert stream.tell() < 1.2 * json_rows._CHUNK


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"text": "a"} {"text": "b"}]', r"item 1: .*\(a comma or \] is expected after it\)"),
        (b'[{"text": "a"}, {"text": "b"', r"item 2: .*\(Expecting ',' delimiter\)"),
        (b'[{"text": "a"}', r"item 1: .*\(the file ends after it\)"),
        (b'[{"text": "a"},]', r"item 2: .*\(.*\)"),
        (b'["a"]\n["b"]\n', r"item 2: .*\(something follows the array\)"),
        (b'["a", "\xff"]', r"item 1: .*utf-8"),
        (b'["a", ' + b"[" * 100_000, "item 2: .*recursion"),
        (b"[5]", "item 1: the text is of type int"),
        (b'["\\ud800"]', "item 1: the text is not valid Unicode"),
        (b'[{"body": "b", "title": ""}]', r"item 1: has no key 'text'; it has 'body', 'title'; .*--text-key"),
    ],
)
def test_broken_arrays(tmp_path: Path, content: bytes, message: str) -> None:
    refused(write(tmp_path / "x.json", content), r"x\.json, " + message)


def test_a_broken_item_is_not_sought_through_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "_CHUNK", 10)
    monkeypatch.setattr(json_rows, "_LONGEST", 100)
    path = write(tmp_path / "x.json", b'["fine", "' + b"x" * 1000 + b'"]')
    refused(path, r"x\.json, item 2: .*\(it is broken, or longer than 100 characters\)")


@pytest.mark.parametrize(
    "content", ['{\n  "text": "a"\n}\n', '{\n  "text": "a"\n}\n{\n  "text": "b"\n}\n', "5\n6\n", "x"]
)
def test_other_json_is_refused(tmp_path: Path, content: str) -> None:
    path = write(tmp_path / "x.json", content)
    if content.startswith("5"):
        refused(path, r"x\.json, line 1: the text is of type int")
    else:
        refused(
            path, r"x\.json: holds neither JSON lines nor one JSON array \(its first line is not JSON .*; write one"
        )


@pytest.mark.parametrize("name", ["x.txt", "part-00000", "x.log", "x.txt.gz"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("walked", [False, True])
def test_rows_under_a_name_of_text_are_refused(tmp_path: Path, name: str, way: str, walked: bool) -> None:
    path = write(tmp_path / "in" / name, WAYS[way])
    message = rf"{name}: holds only JSON objects with the key 'text', but its name does not say so; name it \.json"
    refused(path.parent if walked else path, message)
    assert len(list(find_texts([path], text_key="body"))) == 1  # another key: a text like any


@pytest.mark.parametrize(
    "content", ['{"text": "a"}\nand more\n', '"a"\n"b"\n', "[link](x)\n", '[1, 2]\n["a"]', "[]", ""]
)
def test_text_that_resembles_rows(tmp_path: Path, content: str) -> None:
    assert "".join(find_texts([write(tmp_path / "x.txt", content)])) == content


def test_a_folder_of_code_and_data(tmp_path: Path) -> None:
    """Data are rows; what programs write in JSON for themselves is text like other sources, and named."""
    folder = tmp_path / "code"
    sources = {
        "main.py": "print()\n",
        "package.json": '{\n  "name": "x"\n}\n',
        "minified.json": '{"name":"x"}',
        "presets.json": '["env", "react"]',
        "fixtures.json": '[{"id": 1}, {"id": 2}]',
        "tsconfig.json": '// comments\n{"x": 1}\n',
        "zero.json": "0",
        "none.json": "[]",
    }
    for name, content in sources.items():
        write(folder / name, content)
    write(folder / "a.json", json_lines([{"text": "line 1"}, {"text": "line 2"}]))
    write(folder / "b.json", json.dumps([{"text": "item 1"}], indent=1))
    write(folder / "c.json", json_lines([{"text": "alone"}]))
    texts = find_texts([folder])
    assert sorted(texts) == sorted([*sources.values(), "line 1", "line 2", "item 1", "alone"])
    assert sorted(texts.json_as_text) == sorted(name for name in sources if name.endswith(".json"))
    manifests = prepare([folder], tmp_path / "out", "byte")
    assert manifests[0].source["json_files_read_as_text"] == len(sources) - 1
    told = summary([tmp_path / "out"], manifests)
    assert "read as plain text, not JSON rows: 7 files: fixtures.json, minified.json, none.json, ..." in told
    write(folder / "d.json", json_lines([{"body": "x"}, {"body": "y"}]))  # data, and the key of another
    refused(folder, r"d\.json, line 1: has no key 'text'; it has 'body'; name the key")


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:]),  # as many tools write it, in members
    "bz2": lambda data: bz2.compress(data, 3),
    "xz": lzma.compress,
}


@pytest.mark.parametrize("kind", COMPRESS)
def test_compressed_files(tmp_path: Path, kind: str) -> None:
    """What they are is seen from the content: a suffix may be missing, or be left over."""
    compress = COMPRESS[kind]
    folder = tmp_path / "in"
    write(folder / f"a.jsonl.{kind}", compress(json_lines(ROWS)))
    write(folder / f"b.JSON.{kind.upper()}", compress(json.dumps(ROWS).encode()))
    write(folder / f"c.txt.{kind}", compress(b"\xef\xbb\xbftext\r\n"))
    write(folder / "d.jsonl", compress(json_lines(ROWS)))
    write(folder / f"e.jsonl.{kind}", json_lines(ROWS))
    write(folder / f"f.txt.{kind}", b"plain")
    expected = [*TEXTS, *TEXTS, "text\r\n", *TEXTS, *TEXTS, "plain"]
    assert list(find_texts([folder])) == list(find_texts(sorted(folder.iterdir()))) == expected
    prepare([folder], tmp_path / "out", "byte")
    assert len(ShardedDocuments(tmp_path / "out")) == len(expected)
    empty = write(tmp_path / f"empty.txt.{kind}", compress(b""))
    assert list(find_texts([empty])) == []


@pytest.mark.parametrize("kind", COMPRESS)
@pytest.mark.parametrize("name", ["x.jsonl", "x.txt", "x.json"])
def test_damaged_compressed_files(tmp_path: Path, kind: str, name: str) -> None:
    whole = COMPRESS[kind](json_lines([{"text": f"{n} " * 50} for n in range(200)]))
    path = tmp_path / f"{name}.{kind}"
    message = rf"{path.name}: cannot be decompressed as (gzip|bzip2|xz) \(.+\); copy it again"
    for damaged in (whole[: len(whole) // 2], whole[:-3], whole[:40] + b"\0\xff\0\xff" + whole[44:]):
        write(path, damaged)
        refused(path, message)
        refused(tmp_path, message)  # it may be data: not left out of a folder


def a_tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("x.txt"), io.BytesIO())
    return stream.getvalue()


FOREIGN = {
    "x.jsonl.zst": (b"\x28\xb5\x2f\xfd\x04\x00", "is a Zstandard file, not UTF-8 text; decompress it with zstd -d"),
    "x.lz4": (b"\x04\x22\x4d\x18\x64", "is an LZ4 file"),
    "x.zip": (b"PK\x03\x04\x14\0", "is a zip archive, not UTF-8 text; unpack it and name the folder"),
    "x.7z": (b"7z\xbc\xaf\x27\x1c\0\4", "is a 7z archive"),
    "x.tar": (a_tar(), "is a tar archive"),
    "x.tar.gz": (gzip.compress(a_tar()), "holds, under gzip, a tar archive"),
    "x.tgz": (gzip.compress(a_tar()), "holds, under gzip, a tar archive"),
    "x.parquet": (b"PAR1\x15\x04\x15", "is a Parquet file, not UTF-8 text; convert it to JSON lines"),
    "x.arrow": (b"ARROW1\0\0\xff", "is an Arrow file"),
    "stream.arrow": (b"\xff\xff\xff\xff\x10", "is an Arrow stream"),
    "x.avro": (b"Obj\x01\x04", "is an Avro file"),
    "x.idx": (b"MMIDIDX\0\0\1", r"is the index of a \.bin/\.idx pair, .*--train-data PREFIX"),
    "x.npy": (b"\x93NUMPY\1\0", "is a NumPy array"),
    "x.pdf": (b"%PDF-1.7\n", "is a PDF"),
    "utf16.txt": ("text".encode("utf-16"), "is UTF-16 or UTF-32 text, .*iconv"),
    "no_mark_le.txt": ("text".encode("utf-16-le"), "is UTF-16 text, .*iconv"),
    "no_mark_be.txt": ("text".encode("utf-16-be"), "is UTF-16 text, .*iconv"),
    "x.bin": (b"\0\xff", r"is not UTF-8 text \(invalid start byte at byte 1\)"),
    "x.txt.gz": (gzip.compress(b"a\xff"), "is not UTF-8 text"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_formats_are_named_with_a_remedy(tmp_path: Path, name: str) -> None:
    content, message = FOREIGN[name]
    path = write(tmp_path / "in" / name, content)
    refused(path, rf"{name}: {message}")
    write(tmp_path / "in" / "y.txt", "text")
    texts = find_texts([tmp_path / "in"])
    if name == "x.jsonl.zst":  # its name says that it is data: not left out of a folder
        refused(tmp_path / "in", message)
    else:
        assert (list(texts), texts.undecodable) == (["text"], [name])


def test_an_array_in_a_file_of_json_lines_is_told(tmp_path: Path) -> None:
    refused(write(tmp_path / "x.jsonl", '[{"text": "a"}]'), r"x.jsonl, line 1: is an array, .*named \.json")


def test_real_parquet_and_arrow_files(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import feather, ipc, parquet

    table = pyarrow.table({"text": ["a", "b"]})
    parquet.write_table(table, tmp_path / "x.parquet")
    feather.write_feather(table, str(tmp_path / "x.feather"))
    with ipc.new_stream(tmp_path / "x.arrow", table.schema) as stream:
        stream.write_table(table)
    for name, kind in [("x.parquet", "a Parquet file"), ("x.feather", "an Arrow file"), ("x.arrow", "an Arrow stream")]:
        refused(tmp_path / name, f"{name}: is {kind}")


NAMES = ["x.txt", "x.json", "x.jsonl", "x.ndjson.gz", "x"]
BITS = [
    b'{"text": "a"}',
    b"\n",
    b"[",
    b"]",
    b",",
    b'"',
    b"\xff",
    b"\xef\xbb\xbf",
    b"5",
    b" ",
    b"{",
    b"PK",
    b"\x1f\x8b\x08",
    b"\\u",
]


@given(st.lists(st.sampled_from(BITS)).map(b"".join), st.sampled_from(NAMES), st.booleans())
def test_any_content_is_read_or_refused(tmp_path_factory: Any, content: bytes, name: str, walked: bool) -> None:
    folder = tmp_path_factory.mktemp("any")
    path = write(folder / name, content)
    texts = find_texts([folder if walked else path], skip_bad_rows=2)
    found, refusal = [], f"{name} "
    try:
        found = list(texts)
    except UserError as error:
        refusal = str(error)
    assert all(text.strip() for text in found)
    assert "\n" not in refusal and name in refusal
    assert texts.bad_rows <= 2 or "--skip-bad-rows 2" in refusal


BAD = [b'{"text": "cut', b'{"body": "x"}', b'{"text": null}', b'"\xff"', b'"\\ud800"', b"5"]


def test_bad_rows_are_skipped_counted_and_named(tmp_path: Path) -> None:
    lines = write(tmp_path / "a.jsonl.gz", gzip.compress(b"\n".join([b'"one"', *BAD, b'"two"'])))
    array = write(tmp_path / "b.json", b'["three", 5, {"body": "x"}, "four"]')
    bad = len(BAD) + 2
    manifests = prepare([lines, array], tmp_path / "out", "byte", "text", 0.25, tmp_path / "held", skip_bad_rows=bad)
    assert [manifest.documents for manifest in manifests] == [3, 1]
    for manifest in manifests:
        source = manifest.source
        assert (source["documents_of_inputs"], source["bad_rows_skipped"]) == (4, bad)
        assert source["bad_rows"][0].startswith("a.jsonl.gz, line 2: is not JSON (")
        assert source["bad_rows"][-1].startswith("b.json, item 3: has no key 'text'; it has 'body'")
        assert str(tmp_path) not in json.dumps(source)  # names only: a manifest may be published
    told = summary([tmp_path / "out", tmp_path / "held"], manifests)
    assert "skipped, bad rows: 8: a.jsonl.gz, line 2: is not JSON" in told and told.count("\n") == 3
    for enough in (bad + 5, 1000):
        assert len(list(find_texts([lines, array], skip_bad_rows=enough))) == 4


def test_more_bad_rows_than_may_be_skipped(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", b"\n".join([b'"one"', *BAD]))
    second = write(tmp_path / "b.jsonl", b'"two"\n\n5\n')
    files = [first, second]
    with pytest.raises(UserError, match=r"b\.jsonl, line 3: .*int.* \(more bad rows than --skip-bad-rows 6\)$"):
        list(find_texts(files, skip_bad_rows=len(BAD)))
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: is not JSON .*--skip-bad-rows N skips up to N bad rows"):
        prepare(files, tmp_path / "out", "byte")
    with pytest.raises(UserError, match="--skip-bad-rows -1: must not be negative"):
        prepare(files, tmp_path / "out", "byte", skip_bad_rows=-1)
    assert not (tmp_path / "out").exists()
    assert list(find_texts(files, skip_bad_rows=7)) == ["one", "two"]


def test_the_program_skips_bad_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "x.json", b'"one"\n{"body": "x"}\n5\n"two"')
    flags = ["--input", path, "--output", tmp_path / "out", "--tokenizer", "byte", "--skip-bad-rows"]
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), *map(str, flags), "1"])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    error = capsys.readouterr().err
    assert leaving.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"error: {path}, line 3: the text is of type int, not a string (more bad rows than")
    sys.argv[-1] = "2"
    runpy.run_path(str(PROGRAM), run_name="__main__")
    out = capsys.readouterr().out
    assert "training data: 2 documents" in out
    assert "skipped, bad rows: 2: x.json, line 2: has no key 'text'; it has 'body'; " in out
