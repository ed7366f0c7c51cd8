"""tools/inspect_data.py tells what there is, what is broken, and what a model will see."""

import io
import shutil
from pathlib import Path

import pytest
from data_helpers import some_texts
from rich.console import Console

from tests.tokenizer_kinds import KINDS
from tidar_megatron.data.prepare import prepare
from tidar_megatron.data.preview import inspect_data
from tidar_megatron.data.shards import ShardedDocuments
from tidar_megatron.errors import UserError


def told(path: Path | str, samples: int = 3, **terminal: bool) -> tuple[bool, str]:
    stream = io.StringIO()
    console = Console(file=stream, width=160, highlight=False, **terminal)
    return inspect_data(str(path), None, 32, 4, samples, console), stream.getvalue()


def test_a_whole_folder(shards_once: Path) -> None:
    whole, text = told(shards_once)
    assert whole
    manifest = ShardedDocuments(shards_once).manifest
    for shard in manifest.shards:
        (line,) = [line for line in text.splitlines() if shard.name in line]
        assert f"{shard.tokens:,}" in line and "ok" in line
    assert f"37 documents, {manifest.tokens:,} tokens; tokenizer byte: 257 ids, EOS 256" in text
    for number in (0, 12, 24):
        assert f"document {number}: {some_texts(37)[number]}<|endoftext|>" in text


def test_a_packed_sequence_in_colour(make_shards) -> None:
    """Two documents in two colours, fill dim, what is not supervised underlined, masks beside what they are to give."""
    whole, text = told(make_shards(["abcdefg", "xy"]), force_terminal=True)
    assert whole
    assert "32 clean tokens, 21 of them fill; parts of documents, or fill at the end: 3; " in text
    assert "32 masks in 8 blocks of 4" in text
    assert "supervised: 9 next tokens, 11 masks" in text
    clean, masks = [line for line in text.splitlines() if "|" in line][-2:]
    assert clean.startswith("\x1b[1mclean: ") and masks.startswith("\x1b[1mmasks give: ")
    colours = {"a": None, "x": None}
    for letter in colours:
        codes = [line.split(f"m{letter}\x1b")[0].rsplit("\x1b[", 1)[1] for line in (clean, masks)]
        assert codes[0] == codes[1] and "4" not in codes[0].split(";")
        colours[letter] = codes[0]
    assert colours["a"] != colours["x"]
    assert "\x1b[4;" in clean and "\x1b[2;4;" in masks  # EOS has no next token; fill is nothing's label


def test_tokens_of_a_packed_sequence_are_shown_with_their_spaces(tmp_path: Path) -> None:
    """Also of a tokenizer that drops the space of a text's first token, and with what clean-up would remove."""
    KINDS["unigram, clean-up"].save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "texts.txt").write_text("the fox jump . é")
    prepare([tmp_path / "texts.txt"], tmp_path / "data", str(tmp_path / "tokenizer"))
    _, text = told(tmp_path / "data", samples=0)
    assert "clean: the fox jump .| é</s>" in text and "masks give: the fox jump .| é</s>" in text


def test_broken_shards_are_named_and_nothing_is_decoded(shards: Path) -> None:
    names = [shard.name for shard in ShardedDocuments(shards).manifest.shards]
    data = bytearray((shards / names[0]).read_bytes())
    data[700] ^= 1
    (shards / names[0]).write_bytes(data)
    (shards / names[1]).unlink()
    (shards / "stray.tar").write_bytes(b"junk")
    whole, text = told(shards)
    assert not whole
    states = {name: line for name in names for line in text.splitlines() if name in line}
    assert "differs" in states[names[0]] and "No such file" in states[names[1]]
    assert all("ok" in states[name] for name in names[2:])
    assert "not in the manifest, so not read: stray.tar" in text
    assert "damaged: copy the folder again, or prepare the data again with --overwrite" in text
    assert "document 0" not in text


def test_documents_do_not_steer_the_terminal(make_shards) -> None:
    _, text = told(make_shards(["\x1b]0;title\x07 [bold]markup[/bold]\r\n"]), samples=1)
    assert "document 0: \\x1b]0;title\\x07 [bold]markup[/bold]\\r\\n" in text
    assert "\x1b" not in text and "\x07" not in text and "\r" not in text


def test_a_folders_name_is_no_markup(make_shards, tmp_path: Path) -> None:
    made = make_shards(["text"])
    for name in ("[x]", "[red]"):
        folder = shutil.copytree(made, tmp_path / name)
        assert name in told(folder)[1]


def test_what_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        told(tmp_path)
    witness = tmp_path / "ran"
    with pytest.raises(UserError, match="local folders only"):
        told(f"pipe:touch {witness}")
    assert not witness.exists()
