"""The pieces together are the text, and no piece shows half a character."""

import random
from types import SimpleNamespace

import pytest

from tidar_megatron.errors import UserError
from tidar_megatron.inference.text import REPLACEMENT, TextStream, encode_prompt

TEXTS = ["plain", "naïve café", "日本語 テキスト", "🙂🙃 and 🏳️‍🌈", "  spaces  \n\ttabs", ""]


def pieces_of(tokenizer, ids, rng):
    stream, pieces, start = TextStream(tokenizer), [], 0
    while start < len(ids):
        end = start + rng.randrange(1, 5)
        pieces.append(stream.push(ids[start:end]))
        start = end
    return pieces, stream.flush()


@pytest.mark.parametrize("text", TEXTS)
def test_valid_text_in_pieces(byte_tokenizer, text):
    ids = byte_tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    for seed in range(20):
        pieces, rest = pieces_of(byte_tokenizer, ids, random.Random(seed))
        assert "".join(pieces) == text
        assert rest == ""
        assert not any(REPLACEMENT in piece for piece in pieces)


def test_a_character_appears_as_soon_as_it_is_whole(byte_tokenizer):
    stream = TextStream(byte_tokenizer)
    ids = byte_tokenizer("a🙂b")["input_ids"]
    assert [stream.push([i]) for i in ids] == ["a", "", "", "", "🙂", "b"]


def test_an_unfinished_end_is_flushed(byte_tokenizer):
    stream = TextStream(byte_tokenizer)
    ids = byte_tokenizer("ab🙂")["input_ids"][:-1]
    assert stream.push(ids) == "ab"
    assert stream.flush() == REPLACEMENT
    assert stream.flush() == ""


def test_random_bytes_decode_as_a_whole(byte_tokenizer):
    for seed in range(50):
        rng = random.Random(seed)
        ids = [rng.randrange(257) for _ in range(60)]
        pieces, rest = pieces_of(byte_tokenizer, ids, rng)
        assert "".join(pieces) + rest == byte_tokenizer.decode(ids, skip_special_tokens=True)


def test_encode_prompt(byte_tokenizer):
    model = SimpleNamespace(tokenizer=byte_tokenizer, is_tidar=True)
    assert byte_tokenizer.decode(encode_prompt(model, "héllo")) == "héllo"
    with pytest.raises(UserError, match="the prompt is empty"):
        encode_prompt(model, "")
    with pytest.raises(UserError, match="no tokenizer"):
        encode_prompt(SimpleNamespace(tokenizer=None, is_tidar=True), "text")
