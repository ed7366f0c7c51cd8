"""The pieces together are the text, and no piece shows half a character."""

import random
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tidar_megatron.errors import UserError
from tidar_megatron.inference.text import REPLACEMENT, TextStream, continuation, encode_prompt

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


def test_a_continuation_is_what_it_adds_to_the_prompt(byte_tokenizer):
    """Also where the prompt ends within a character, and where a tokenizer takes a text's first space for its own."""
    ids = byte_tokenizer("a🙂b")["input_ids"]
    for cut in range(len(ids)):
        assert continuation(byte_tokenizer, ids[:cut], ids[cut:]) == ("a🙂b" if cut < 1 else "🙂b" if cut < 5 else "b")
    words = {"<unk>": 0, "x": 1, "\u2581\u2581\u2581\u2581": 2, "return": 3, "\u25811": 4, "<0x0A>": 5}
    of_words = Tokenizer(models.BPE(vocab=words, merges=[], byte_fallback=True))
    of_words.decoder = decoders.Sequence(  # Llama 2's
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    llama2 = PreTrainedTokenizerFast(tokenizer_object=of_words)
    assert llama2.decode([2, 3, 4]) == "   return 1"
    assert continuation(llama2, [1, 5], [2, 3, 4]) == "    return 1"


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
