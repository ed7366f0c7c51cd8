"""The pieces together are the text, and no piece shows half a character."""

import random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.tokenizer_kinds import KINDS
from tidar_megatron.errors import UserError
from tidar_megatron.inference.text import encode_prompt
from tidar_megatron.text_stream import REPLACEMENT, StopStrings, TextStream, continuation

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
    model = SimpleNamespace(tokenizer=byte_tokenizer, is_tidar=True, drafts=None)
    assert byte_tokenizer.decode(encode_prompt(model, "héllo")) == "héllo"
    with pytest.raises(UserError, match="the prompt is empty"):
        encode_prompt(model, "")
    with pytest.raises(UserError, match="no tokenizer"):
        encode_prompt(SimpleNamespace(tokenizer=None, is_tidar=True, drafts=None), "text")


def drawn(kind, rng, count):
    """Token ids as they may come: many at once or one in a row, special ones, some that the tokenizer lacks."""
    tokenizer, ids = KINDS[kind], []
    while len(ids) < count:
        first = max(0, len(tokenizer) - 50) if rng.random() < 0.5 else 0  # more words than bytes
        few = [rng.randrange(first, len(tokenizer) + 2) for _ in range(rng.choice([1, 2, 5, 40]))]
        if rng.random() < 0.3:  # a special token, or one that is added and none
            few = [len(tokenizer) - 1 - rng.randrange(4)]
        ids += rng.choices(few, k=rng.choice([1, 1, 3, 8, 150]))
    return ids[:count]


@given(
    kind=st.sampled_from(sorted(KINDS)),
    seed=st.integers(0, 2**32),
    lengths=st.tuples(st.sampled_from([0, 1, 2, 5, 40, 700]), st.sampled_from([1, 2, 3, 6, 40, 700])),
    skip_special_tokens=st.booleans(),
    at_once=st.sampled_from([1, 4, 60]),
)
def test_pieces_are_the_text(kind, seed, lengths, skip_special_tokens, at_once):
    """However the tokens are divided into steps, empty ones too."""
    tokenizer, rng = KINDS[kind], random.Random(seed)
    prompt, tokens = (drawn(kind, rng, length) for length in lengths)
    before = tokenizer.decode(prompt, skip_special_tokens=skip_special_tokens)
    whole = tokenizer.decode(prompt + tokens, skip_special_tokens=skip_special_tokens)
    stream, text, start = TextStream(tokenizer, prompt, skip_special_tokens), "", 0
    while start < len(tokens):
        end = start + rng.randrange(at_once + 1)
        text += stream.push(tokens[start:end])
        start = end
    text += stream.flush()
    if whole.startswith(before):
        assert text == whole[len(before) :]
    else:  # the tokens have changed the end of the prompt's text
        assert whole.endswith(text) and before.startswith(whole[: len(whole) - len(text)])
        assert not text or not before.startswith(whole[: len(whole) - len(text) + 1])
    assert text == continuation(tokenizer, prompt, tokens, skip_special_tokens)
    assert stream.flush() == ""


@given(
    kind=st.sampled_from(sorted(KINDS)),
    seed=st.integers(0, 2**32),
    string=st.text("thequickfox .'s日\n", min_size=1, max_size=4),
)
def test_a_stop_string_is_found_with_the_token_that_completes_it(kind, seed, string):
    tokenizer, rng = KINDS[kind], random.Random(seed)
    prompt, tokens = drawn(kind, rng, rng.choice([1, 5, 200])), drawn(kind, rng, 100)
    stop = StopStrings(tokenizer, prompt, [string, "never said"])
    found = next((n for n, token in enumerate(tokens) if stop.ends_with(token)), None)
    texts = (continuation(tokenizer, prompt, tokens[: n + 1], skip_special_tokens=False) for n in range(len(tokens)))
    assert found == next((n for n, text in enumerate(texts) if string in text), None)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("same", [False, True])
def test_a_step_costs_the_same_late_as_early(kind, same, monkeypatch):
    tokenizer, rng = KINDS[kind], random.Random(1)
    decoded, decode = [], tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **options: decoded.append(len(ids)) or decode(ids, **options))
    words = [n for n in range(len(tokenizer)) if not 1 <= n <= 256] or [0]
    one = [[token] * 2000 for token in (1, 200, len(tokenizer) - 2, 300)]
    for ids in one if same else [rng.choices(words, k=2000)]:
        stream = TextStream(tokenizer, ids[:3])
        for token in ids:
            del decoded[:]
            stream.push([token])
            assert sum(decoded) < 1500
