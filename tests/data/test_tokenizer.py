"""Every tokenizer is one kind of thing, text is only text, and the fingerprint follows the definition."""

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidar_megatron.data.tokenizer import (
    byte_tokenizer,
    encode_document,
    encode_documents,
    fingerprint,
    load_tokenizer,
    make_tokenizer,
    train_bpe,
    vocabulary_size,
)
from tidar_megatron.errors import UserError

CORPUS = ["the quick brown fox jumps over the lazy dog, " * 20, "l'été est là, où va-t-on ? " * 20]
BYTE = byte_tokenizer()


def test_byte_ids_are_the_bytes() -> None:
    assert len(BYTE) == vocabulary_size(BYTE) == 257
    assert (BYTE.eos_token, BYTE.eos_token_id) == ("<|endoftext|>", 256)
    every_byte_of_utf8 = "".join(map(chr, [*range(0x800), 0xFFFF, 0x10FFFF]))
    assert encode_document(BYTE, every_byte_of_utf8) == [*every_byte_of_utf8.encode(), 256]
    for byte in range(256):  # also those that occur in no UTF-8 text
        assert len(BYTE.convert_ids_to_tokens(byte)) == 1


@given(st.text())
@settings(deadline=None)
def test_byte_round_trip(text: str) -> None:
    ids = encode_document(BYTE, text)
    assert ids == [*text.encode(), 256]
    assert BYTE.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_the_name_of_a_special_token_is_plain_text(kind: str) -> None:
    tokenizer = BYTE if kind == "byte" else train_bpe(CORPUS, 300)
    text = "a<|endoftext|>b<|endoftext|>"
    assert tokenizer(text)["input_ids"].count(tokenizer.eos_token_id) == 2  # what a plain call does
    ids = encode_document(tokenizer, text)
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == text


def test_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["", "a", "bc" * 50, "é"]
    whole = list(encode_documents(BYTE, texts))
    monkeypatch.setattr("tidar_megatron.data.tokenizer._BATCH_CHARACTERS", 3)
    assert list(encode_documents(BYTE, iter(texts))) == whole == [[*text.encode(), 256] for text in texts]


def test_bpe_has_as_many_ids_as_asked_and_is_reproducible() -> None:
    first, second = train_bpe(CORPUS, 300), make_tokenizer("bpe:300", iter(CORPUS))
    assert len(first) == vocabulary_size(first) == 300
    assert first.eos_token_id == 299
    assert fingerprint(first) == fingerprint(second)
    assert len(encode_document(first, CORPUS[0])) < len(CORPUS[0]) / 2
    assert first.decode(encode_document(first, "naïve \x00 日本")[:-1]) == "naïve \x00 日本"


def test_bpe_that_cannot_be() -> None:
    with pytest.raises(UserError, match="bpe:257 or more"):
        make_tokenizer("bpe:256", CORPUS)
    with pytest.raises(UserError, match=r"bpe:999999: the text yields only \d+ ids; use bpe:\d+"):
        make_tokenizer("bpe:999999", CORPUS)


def test_folder_round_trip(tmp_path: Path) -> None:
    tokenizer = train_bpe(CORPUS, 300)
    tokenizer.save_pretrained(tmp_path)
    loaded = make_tokenizer(str(tmp_path), [])
    assert fingerprint(loaded) == fingerprint(tokenizer) != fingerprint(BYTE)
    text = "a dog <|endoftext|>"
    assert encode_document(loaded, text) == encode_document(tokenizer, text)


def test_template_and_truncation_of_a_folder_do_not_touch_documents(tmp_path: Path) -> None:
    BYTE.save_pretrained(tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    definition["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    eos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [eos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [eos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [256], "tokens": ["<|endoftext|>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer = load_tokenizer(tmp_path)
    before = fingerprint(tokenizer)
    assert encode_document(tokenizer, "longer than four") == [*b"longer than four", 256]
    assert fingerprint(tokenizer) == before


def test_ids_with_holes_count_as_used(tmp_path: Path) -> None:
    BYTE.save_pretrained(tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    definition["model"]["vocab"]["ab"] = 1000
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    assert vocabulary_size(load_tokenizer(tmp_path)) == 1001


def test_folders_that_are_refused(tmp_path: Path) -> None:
    for spec in ("Byte", "bpe:x", "gpt2", str(tmp_path / "none")):
        with pytest.raises(UserError, match="expected byte, bpe:N, or the path"):
            make_tokenizer(spec, [])
    with pytest.raises(UserError, match=r"the folder has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    no_eos = tmp_path / "no_eos"
    BYTE.save_pretrained(no_eos)
    config = json.loads((no_eos / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (no_eos / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no EOS token"):
        load_tokenizer(no_eos)
    (no_eos / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_tokenizer(no_eos)


def test_code_in_a_folder_is_not_run(tmp_path: Path) -> None:
    BYTE.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    witness = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(witness)!r}, 'w')\nclass Evil: pass\n")
    with contextlib.suppress(UserError):  # transformers may fall back on tokenizer.json, or refuse
        load_tokenizer(tmp_path)
    assert not witness.exists()
