"""Prompts and options that cannot be served: one line that says why, and the engine goes on."""

import pytest

from tests.inference.conftest import MASK
from tests.inference.options import ar, tidar
from tidar_megatron.errors import UserError
from tidar_megatron.inference.engine import generate, stream
from tidar_megatron.inference.request import DecodeOptions
from tidar_megatron.inference.sampling import SamplingOptions


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt is empty"),
        ([1] * 128, "128 tokens and the model's context holds 128: shorten it to at most 127"),
        ([1] * 500, "500 tokens"),
        ([1, MASK, 2], "contains the mask token"),
        ([1, 48], "token id 48 is outside the model's vocabulary of 48"),
        ([-1], "token id -1 is outside"),
        ([1.5, 2], "token id 1.5: must be an integer"),
        (["a"], "token id 'a': must be an integer"),
    ],
)
@pytest.mark.parametrize("mode", ["tidar", "linear", "ar", "lookup"])
def test_bad_prompt(tiny, prompt, message, mode):
    with pytest.raises(UserError, match=message) as error:
        stream(tiny("llama"), prompt, DecodeOptions(mode))  # before the first step is asked for
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (DecodeOptions("tidar", 0), "draft length 0"),
        (DecodeOptions("tidar", -3), "draft length -3"),
        (DecodeOptions("tidar", True), "draft length True"),
        (DecodeOptions("lookup", 1.5), "draft length 1.5"),
        (DecodeOptions("tidar", branches=0), "branches 0: use all or a positive integer"),
        (DecodeOptions("tidar", branches="some"), "branches 'some'"),
        (DecodeOptions("tidar", branches=-1), "branches -1"),
        (DecodeOptions("auto", 8), "mode auto: takes no draft length"),
        (DecodeOptions("ar", branches=2), "mode ar: has no branches"),
        (DecodeOptions("linear", 4, branches=2), "mode linear: has no branches"),
        (DecodeOptions("lookup", 4, branches=2), "mode lookup: has no branches"),
        (DecodeOptions(max_new_tokens=0), "max new tokens 0"),
        (DecodeOptions(stop="text"), "stop 'text': use a tuple of strings"),
        (DecodeOptions(stop=["text"]), "use a tuple of strings"),
        (tidar(1, trust_ratio=0.5), "trust ratio 0.5: below 1 needs a draft length of 2"),
        (DecodeOptions(sampling=SamplingOptions(min_new_tokens=None)), "min new tokens None"),
        (DecodeOptions(stop=("",)), "stop"),
        (DecodeOptions(stop=("a",)), "stop strings need a tokenizer"),
        (DecodeOptions(trust_ratio=1.5), "trust ratio 1.5"),
        (DecodeOptions("linear", trust_ratio=0.5), "trust ratio 0.5: below 1 needs mode tidar with all branches"),
        (tidar(4, 2, trust_ratio=0.5), "trust ratio 0.5: below 1 needs"),
        (DecodeOptions("beam"), "mode 'beam': use one of auto, tidar, linear, ar, lookup"),
    ],
)
def test_bad_options(tiny, options, message):
    with pytest.raises(UserError, match=message):
        generate(tiny("llama"), [1, 2], options)


def test_tidar_needs_its_section(tiny):
    model = tiny("llama", tidar=False)
    with pytest.raises(
        UserError, match=r"no tidar section.*use mode ar \(--plan ar\), or export a TiDAR checkpoint with tidar conv"
    ):
        generate(model, [1, 2], tidar())
    expected = generate(model, [1, 2], ar()).token_ids
    assert generate(model, [1, 2], DecodeOptions("lookup", max_new_tokens=24)).token_ids == expected


def test_engine_is_usable_after_an_error(tiny):
    model = tiny("llama")
    before = generate(model, [1, 2], tidar()).token_ids
    with pytest.raises(UserError):
        generate(model, [], tidar())
    assert generate(model, [1, 2], tidar()).token_ids == before
