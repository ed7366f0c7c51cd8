"""From files to shards, through the package and through the program."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.programs import call, own_lines
from tidar_megatron.data.prepare import prepare
from tidar_megatron.data.shards import ShardedDocuments
from tidar_megatron.data.texts import find_texts
from tidar_megatron.data.tokenizer import fingerprint, train_bpe
from tidar_megatron.errors import UserError


def texts_of(folder: Path) -> list[str]:
    return [bytes(document[:-1].tolist()).decode() for document in iter(ShardedDocuments(folder))]


def write_lines(path: Path, *lines: object) -> Path:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """40 documents in a folder: 30 JSON lines, 10 files; and things that are not text."""
    folder = tmp_path / "corpus"
    (folder / "below").mkdir(parents=True)
    write_lines(folder / "a.jsonl", *({"text": f"line {n} é\u2028"} for n in range(30)))
    for n in range(10):
        (folder / "below" / f"{n}.md").write_text(f"file {n}\r\n", newline="")
    (folder / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    (folder / "empty.txt").write_text(" \n")
    (folder / ".hidden").write_text("not this")
    return folder


def test_documents_in_order(corpus: Path) -> None:
    texts = find_texts([corpus])
    expected = [f"line {n} é\u2028" for n in range(30)] + [f"file {n}\r\n" for n in range(10)]
    for _ in range(2):  # again and again
        assert sorted(texts) == sorted(expected)
        assert list(texts)[:30] == expected[:30]
        assert (texts.empty, texts.undecodable) == (1, ["picture.png"])


def test_links_to_folders_are_followed_once(corpus: Path, tmp_path: Path) -> None:
    """Also those that lead to where they are."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far.txt").write_text("far")
    before = sorted(find_texts([corpus]))
    (corpus / "link").symlink_to(tmp_path / "elsewhere")
    (corpus / "again").symlink_to(tmp_path / "elsewhere")
    (corpus / "below" / "circle").symlink_to(corpus)
    assert sorted(find_texts([corpus])) == sorted([*before, "far"])


def test_json_lines_of_every_kind(tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / "x.jsonl", b'\xef\xbb\xbf"first"', {"body": "second"}, b"", "third", {"body": ""}, b""
    )
    texts = find_texts([file], text_key="body")
    assert list(texts) == ["first", "second", "third"]
    assert texts.empty == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "line 2: is not JSON"),
        (b"[" * 100_000, "line 2: is not JSON"),
        (b'{"other": "x"}', "line 2: has no key 'text'; .*--text-key"),
        (b'{"text": 5}', "line 2: the text is of type int"),
        (b"[]", "line 2: is an array"),
        (b'"\xff"', "line 2: is not UTF-8"),
        (b'"\\ud800"', "line 2: the text is not valid Unicode"),
    ],
)
def test_broken_lines_are_errors_that_name_them(tmp_path: Path, line: bytes, message: str) -> None:
    file = write_lines(tmp_path / "x.jsonl", "fine", line)
    with pytest.raises(UserError, match=rf"x\.jsonl, {message}"):
        list(find_texts([file]))
    with pytest.raises(UserError, match=message):
        prepare([file], tmp_path / "out", "byte")
    assert not (tmp_path / "out").exists()


def test_a_named_file_must_be_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"x\.txt: is not UTF-8"):
        list(find_texts([tmp_path / "x.txt"]))
    with pytest.raises(UserError, match="no such file or folder"):
        find_texts([tmp_path / "y.txt"])


def test_a_file_name_that_is_not_unicode(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    try:
        (Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/\xff"))).write_bytes(b"\xff")
    except OSError:
        pytest.skip("the file system wants UTF-8 names")
    (tmp_path / "in" / "x.txt").write_text("text")
    prepare([tmp_path / "in"], tmp_path / "out", "byte")
    assert ShardedDocuments(tmp_path / "out").manifest.source["undecodable_files"] == ["?"]


def test_held_out_documents_are_whole_and_others(corpus: Path, tmp_path: Path) -> None:
    chosen = []
    for run, seed in enumerate([1, 1, 2]):
        out, held = tmp_path / f"out{run}", tmp_path / f"held{run}"
        prepare([corpus], out, "byte", held_out_fraction=0.1, held_out_output=held, seed=seed)
        train, held_out = texts_of(out), texts_of(held)
        assert len(held_out) == 4
        assert sorted(train + held_out) == sorted(find_texts([corpus]))
        assert ShardedDocuments(out).manifest.source["part"] == "training"
        assert ShardedDocuments(held).manifest.source["part"] == "held-out"
        chosen.append(held_out)
    assert chosen[0] == chosen[1] != chosen[2]


def test_the_bpe_learns_from_training_documents_alone(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "x.jsonl", *(f"{n:02d} " + "abcdefgh "[n % 4 :] * 40 for n in range(20)))
    out, held = tmp_path / "out", tmp_path / "held"
    train, held_out = prepare([file], out, "bpe:264", held_out_fraction=0.2, held_out_output=held)
    assert train.tokenizer == held_out.tokenizer
    tokenizer = ShardedDocuments(held).load_tokenizer()
    documents = [tokenizer.decode(document[:-1]) for document in iter(ShardedDocuments(out))]
    assert len(documents) == 16
    assert train.tokenizer.fingerprint == fingerprint(train_bpe(documents, 264))
    assert train.tokenizer.vocab_size == 264
    again = prepare([file], tmp_path / "hf", str(out / "tokenizer"))[0]  # and a folder of it does the same
    assert again.tokenizer.fingerprint == train.tokenizer.fingerprint
    assert again.tokenizer.spec == "tokenizer"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out_fraction": 0.1}, "go together"),
        ({"held_out_output": "held"}, "go together"),
        ({"held_out_fraction": 1.0, "held_out_output": "held"}, "less than 1"),
        ({"held_out_fraction": float("nan"), "held_out_output": "held"}, "less than 1"),
        ({"held_out_fraction": 0.99, "held_out_output": "held"}, "so none is left to train on"),
        ({"held_out_fraction": 0.1, "held_out_output": "out"}, "same folder"),
        ({"held_out_fraction": 0.1, "held_out_output": "out/held"}, "are nested"),
        ({"output": "new/out", "held_out_fraction": 0.1, "held_out_output": "new"}, "are nested"),
        ({"inputs": ["corpus", "corpus/a.jsonl"]}, "the same documents would be read twice"),
        ({"inputs": ["corpus/a.jsonl", "corpus/../corpus/a.jsonl"]}, "the same documents would be read twice"),
        ({"inputs": ["/dev/null"]}, "is not a file or folder, but must be read more than once"),
        ({"seed": -1}, "--seed -1"),
        ({"shard_size_mb": 0.0}, "--shard-size-mb"),
        ({"output": "corpus/out"}, "overlap; choose an output"),
        ({"output": "."}, "overlap; choose an output"),
        ({"tokenizer_spec": "gpt2"}, "expected byte, bpe:N, or the path"),
        ({"text_key": "body"}, "has no key 'body'"),
    ],
)
def test_options_that_cannot_be(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], message: str
) -> None:
    monkeypatch.chdir(corpus.parent)
    arguments = {"inputs": [corpus], "output": "out", "tokenizer_spec": "byte"} | options
    with pytest.raises(UserError, match=message):
        prepare(**arguments)  # type: ignore[arg-type]
    assert [path.name for path in corpus.parent.iterdir()] == ["corpus"]


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return call("tools/prepare_data.py", *arguments)


def test_the_program(corpus: Path, tmp_path: Path) -> None:
    out, held = tmp_path / "out", tmp_path / "held"
    options = ["--held-out-fraction", 0.25, "--held-out-output", held, "--seed", 3, "--shard-size-mb", 0.01]
    done = run_tool("--input", corpus, "--output", out, "--tokenizer", "byte", *options)
    assert (done.returncode, own_lines(done.stderr)) == (0, [])
    assert f"{out}: training data: 30 documents" in done.stdout
    assert f"{held}: held-out data: 10 documents" in done.stdout
    assert "not UTF-8: 1 files: picture.png" in done.stdout
    documents = ShardedDocuments(out)
    assert len(documents.manifest.shards) > 1
    assert len(documents) == 30
    source = documents.manifest.source
    assert (source["empty_documents_skipped"], source["undecodable_files"]) == (1, ["picture.png"])
    assert str(tmp_path) not in (out / "manifest.json").read_text()  # names, no paths


def test_the_program_says_what_is_wrong_in_one_line(corpus: Path, tmp_path: Path) -> None:
    broken = write_lines(tmp_path / "broken.jsonl", "fine", b"{")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("")
    for source, output, words in [(broken, "out", "broken.jsonl, line 2"), (corpus, "full", "exists and is not empty")]:
        done = run_tool("--input", source, "--output", tmp_path / output, "--tokenizer", "byte")
        assert done.returncode == 2
        assert done.stdout == ""
        (line,) = own_lines(done.stderr)
        assert line.startswith("error: ") and words in line
