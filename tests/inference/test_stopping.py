"""Where a text stops: end of text, strings, lengths, the context; and no forward holds what is of no use."""

import copy
import types
from dataclasses import replace

import pytest

from tests.inference.conftest import MASK
from tests.inference.options import ar, tidar
from tidar_megatron.inference.engine import generate
from tidar_megatron.inference.forward import ForwardLayout
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.request import DecodeOptions


def test_the_last_forwards_hold_nothing_useless(trained, prompts, monkeypatch):
    plans, forward = [], DecodeModel.forward
    monkeypatch.setattr(
        DecodeModel, "forward", lambda self, packed: plans.append(packed.parts[0].layout) or forward(self, packed)
    )
    generate(trained, prompts[4], tidar(8, "all", 2))
    assert plans == [ForwardLayout(16), ForwardLayout(1)]
    plans.clear()
    generate(trained, prompts[4], tidar(8, "all", 3))
    assert plans[0] == ForwardLayout(16, (16,), 8) and plans[1].num_masks == 0
    plans.clear()
    generate(trained, prompts[4], tidar(8, "all", 1))
    assert plans == [ForwardLayout(16)]


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 4, 5, 8, 9, 10, 17])
def test_never_more_than_max_new_tokens(trained, prompts, max_new_tokens):
    for prompt in prompts[3:6]:
        expected = generate(trained, prompt, ar(max_new_tokens))
        for options in (tidar(8, "all", max_new_tokens), tidar(8, 1, max_new_tokens)):
            got = generate(trained, prompt, options)
            assert got.token_ids == expected.token_ids
            assert len(got.token_ids) == max_new_tokens
            assert got.stop == "length"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["tidar", "linear", "ar", "lookup"])
def test_stops_with_the_first_eos(trained, stock_generate, prompts, mode):
    prompt = prompts[4]
    text = generate(trained, prompt, ar(40)).token_ids
    for eos in sorted(set(text)):
        model = DecodeModel(trained.causal_lm, None, MASK, 4, 128, frozenset([eos]))
        got = generate(model, prompt, DecodeOptions(mode, 8 if mode != "ar" else None, max_new_tokens=40))
        assert got.token_ids == text[: text.index(eos) + 1] == stock_generate(model, prompt, 40, eos)
        assert got.stop == "eos"
        on = generate(model, prompt, DecodeOptions(mode, max_new_tokens=40, ignore_eos=True))
        assert on.token_ids == text
        assert on.stop == "length"


@pytest.mark.parametrize("branches", ["all", 1])
@pytest.mark.parametrize("draft_length", [1, 3, 8])
def test_stops_where_the_context_ends(trained, prompts, draft_length, branches, monkeypatch):
    prompt = prompts[5]
    text = generate(trained, prompt, ar(60)).token_ids
    largest = -1
    forward = trained.causal_lm.base_model.forward

    def spy(*args, **kwargs):
        nonlocal largest
        largest = max(largest, int(kwargs["position_ids"].max()))
        return forward(*args, **kwargs)

    monkeypatch.setattr(trained.causal_lm.base_model, "forward", spy)
    for limit in range(len(prompt) + 1, len(prompt) + 25):
        model = DecodeModel(trained.causal_lm, None, MASK, 4, limit, frozenset())
        largest = -1
        got = generate(model, prompt, tidar(draft_length, branches, 60))
        assert got.token_ids == text[: limit - len(prompt)]
        assert got.stop == "context"
        assert largest < limit
    # A prompt and an output that fit exactly are no overflow.
    assert generate(model, prompt, tidar(draft_length, branches, limit - len(prompt))).stop == "length"


def test_stops_with_a_special_token_that_is_asked_for(trained, prompts, byte_tokenizer):
    """As chat models end a turn, whatever their folder says ends a text; it is no part of what is shown."""
    text = generate(trained, prompts[4], ar(40)).token_ids
    byte_tokenizer = copy.deepcopy(byte_tokenizer)
    byte_tokenizer.add_special_tokens({"additional_special_tokens": [byte_tokenizer.convert_ids_to_tokens(text[9])]})
    model = replace(trained, tokenizer=byte_tokenizer)
    stop = byte_tokenizer.decode(text[9])
    assert byte_tokenizer.decode(text[9], skip_special_tokens=True) == ""
    for mode in ("tidar", "ar"):
        got = generate(model, prompts[4], DecodeOptions(mode, stop=(stop,), max_new_tokens=40))
        assert (got.token_ids, got.stop) == (text[: text.index(text[9]) + 1], "stop")


@pytest.mark.parametrize("mode", ["tidar", "linear", "ar"])
def test_stops_with_a_string(trained, prompts, mode):
    """Also one that several tokens make up, in the midst of what a forward commits."""
    letters = types.SimpleNamespace(decode=lambda tokens, **unused: "".join(chr(65 + token) for token in tokens))
    model = replace(trained, tokenizer=letters)
    tokens = generate(model, prompts[4], ar(40)).token_ids
    text = letters.decode(tokens)
    for string in (text[5], text[7:10], text[20:24], text[38:]):
        options = DecodeOptions(mode, 8 if mode != "ar" else None, stop=(string, "never said"), max_new_tokens=60)
        got = generate(model, prompts[4], options)
        assert got.stop == "stop"
        assert letters.decode(got.token_ids) == text[: text.index(string) + len(string)]
