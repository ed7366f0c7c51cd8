"""Whatever drafts, the tokens are those of autoregression: against transformers' own generate, for every plan."""

import random
import types
from dataclasses import replace

import pytest
import torch

from tidar_megatron.errors import UserError
from tidar_megatron.inference import engine
from tidar_megatron.inference.attention import ATTENTION_NAME, Plan
from tidar_megatron.inference.drafting import Lookup, likeliest_outcomes
from tidar_megatron.inference.engine import generate, stream
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.request import DecodeOptions, Generation
from tidar_megatron.inference.sampling import SamplingOptions

MASK = 47
FAMILIES = ["qwen3", "qwen2", "llama", "mistral", "gemma"]


def tidar(draft_length=None, branches="all", max_new_tokens=24, **more):
    return DecodeOptions("tidar", draft_length, branches, max_new_tokens, **more)


def auto(max_new_tokens=24, **more):
    return DecodeOptions("auto", max_new_tokens=max_new_tokens, **more)


def ar(max_new_tokens=24, **more):
    return DecodeOptions("ar", max_new_tokens=max_new_tokens, **more)


def random_prompt(length, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(MASK) for _ in range(length)]


# ---- the same tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_mode_equals_stock_generate(tiny, stock_generate, family, dtype):
    model = tiny(family, dtype)
    for length in (1, 2, 7, 20):
        prompt = random_prompt(length)
        expected = stock_generate(model, prompt, 24)
        assert generate(model, prompt, ar()).token_ids == expected
        for mode in ("lookup", "linear"):
            assert generate(model, prompt, DecodeOptions(mode, 5, max_new_tokens=24)).token_ids == expected
        for draft_length, branches in [(1, "all"), (4, "all"), (4, 1), (9, 2)]:
            assert generate(model, prompt, tidar(draft_length, branches)).token_ids == expected, (
                draft_length,
                branches,
            )


@pytest.mark.parametrize("branches", ["all", 1, 2, 3])
@pytest.mark.parametrize("draft_length", range(1, 10))
def test_every_plan_equals_ar_where_drafts_are_accepted(trained, prompts, draft_length, branches):
    for prompt in prompts[1::2]:
        expected = generate(trained, prompt, ar(30)).token_ids
        got = generate(trained, prompt, tidar(draft_length, branches, 30))
        assert got.token_ids == expected, prompt


def test_trained_model_equals_stock_generate(trained, stock_generate, prompts):
    for prompt in prompts:
        assert generate(trained, prompt, ar(30)).token_ids == stock_generate(trained, prompt, 30)


def test_lookup_equals_ar_and_accepts_drafts(trained, prompts):
    most = 0
    for prompt in prompts:
        got = generate(trained, prompt, DecodeOptions("lookup", 5, max_new_tokens=40))
        assert got.token_ids == generate(trained, prompt, ar(40)).token_ids
        most = max(most, *got.emitted)
    assert most == 5


def test_every_number_of_accepted_drafts_occurs_and_every_fallback(trained, prompts, monkeypatch):
    """Else the tests above prove less than they say: n = 1 .. K with all branches, and n - j = 0 .. K - 1 with one."""
    accepted, lags = set(), set()
    for prompt in prompts:
        accepted |= set(generate(trained, prompt, tidar(8, "all", 60)).emitted)
    assert accepted == set(range(1, 9))

    rows_after = Plan.rows_after

    def spy(plan, n):
        shorter = [r for r in plan.branches if r <= n]
        if plan.num_drafts <= 6 and plan.branches:  # not a prefill
            lags.add(n - max(shorter) if shorter else None)
        return rows_after(plan, n)

    monkeypatch.setattr(Plan, "rows_after", spy)
    for prompt in prompts:
        generate(trained, prompt, tidar(6, 1, 60))
    assert {None, 0, 1, 2, 3} <= lags


def test_all_branches_beat_one_and_one_beats_ar(trained, prompts):
    def tokens_per_forward(options):
        runs = [generate(trained, prompt, options) for prompt in prompts]
        return sum(sum(run.emitted) for run in runs) / sum(run.forwards for run in runs)

    everything, one = tokens_per_forward(tidar(8, "all", 60)), tokens_per_forward(tidar(8, 1, 60))
    assert everything > one > 1.5


def test_draft_length_1_is_plain_ar(trained, prompts):
    got = generate(trained, prompts[4], tidar(1))
    assert got.tokens_per_forward == 1.0
    assert got.token_ids == generate(trained, prompts[4], ar()).token_ids


def test_long_prompt_prefilled_in_chunks(tiny, stock_generate, monkeypatch):
    model = tiny("qwen3", torch.float64)
    prompt = random_prompt(50)
    expected = generate(model, prompt, tidar())
    monkeypatch.setattr(engine, "PROMPT_CHUNK", 16)
    chunked = generate(model, prompt, tidar())
    assert chunked.token_ids == expected.token_ids == stock_generate(model, prompt, 24)
    assert chunked.emitted == expected.emitted  # so the drafts saw the same prompt


# ---- where it stops -----------------------------------------------------------------------------------------------


def test_the_last_forwards_hold_nothing_useless(trained, prompts, monkeypatch):
    plans, forward = [], DecodeModel.forward
    monkeypatch.setattr(
        DecodeModel, "forward", lambda self, packed: plans.append(packed._parts[0].plan) or forward(self, packed)
    )
    generate(trained, prompts[4], tidar(8, "all", 2))
    assert plans == [Plan(16), Plan(1)]
    plans.clear()
    generate(trained, prompts[4], tidar(8, "all", 3))
    assert plans[0] == Plan(16, (16,), 8) and plans[1].num_masks == 0
    plans.clear()
    generate(trained, prompts[4], tidar(8, "all", 1))
    assert plans == [Plan(16)]


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 4, 5, 8, 9, 10, 17])
def test_never_more_than_max_new_tokens(trained, prompts, max_new_tokens):
    for prompt in prompts[3:6]:
        expected = generate(trained, prompt, ar(max_new_tokens))
        for options in (tidar(8, "all", max_new_tokens), tidar(8, 1, max_new_tokens)):
            got = generate(trained, prompt, options)
            assert got.token_ids == expected.token_ids
            assert len(got.token_ids) == max_new_tokens
            assert got.stop == "length"


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


@pytest.mark.parametrize("mode", ["tidar", "linear", "ar", "lookup"])
def test_logprobs_are_the_models(trained, prompts, mode):
    got = generate(trained, prompts[4], DecodeOptions(mode, 8 if mode != "ar" else None, logprobs=True))
    text = prompts[4] + got.token_ids
    trained.causal_lm.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = trained.causal_lm(torch.tensor([text])).logits[0, len(prompts[4]) - 1 : -1]
    trained.causal_lm.set_attn_implementation(ATTENTION_NAME)
    logits[:, MASK] = -torch.inf
    expected = logits.float().log_softmax(-1).gather(1, torch.tensor(got.token_ids)[:, None]).flatten()
    torch.testing.assert_close(torch.tensor(got.logprobs), expected, rtol=0, atol=1e-5)


def test_a_trust_ratio_of_1_is_autoregression_and_of_0_accepts_what_the_masks_say(trained, prompts):
    expected = generate(trained, prompts[4], ar(60))
    half, none = (generate(trained, prompts[4], tidar(8, "all", 60, trust_ratio=beta)) for beta in (0.5, 0.0))
    assert generate(trained, prompts[4], tidar(8, "all", 60, trust_ratio=1.0)).token_ids == expected.token_ids
    assert len(half.token_ids) == len(none.token_ids) == 60
    assert none.token_ids != expected.token_ids
    for beta in (0.0, 0.5):
        drawn = tidar(8, "all", 60, trust_ratio=beta, sampling=SamplingOptions(temperature=1.0, seed=1))
        assert MASK not in half.token_ids + none.token_ids + generate(trained, prompts[4], drawn).token_ids


def test_a_trust_ratio_mixes_the_logits(tiny):
    """Against forwards written out: AR of the whole text, and one mask block behind it, with transformers' model."""
    model, beta, text = tiny("qwen3"), 0.4, random_prompt(7)
    got = generate(model, text, tidar(4, "all", 12, trust_ratio=beta)).token_ids
    lm = model.causal_lm
    lm.set_attn_implementation("sdpa")
    for token in got:
        size = len(text) + 4
        visible = torch.ones(size, size, dtype=torch.bool).tril()
        visible[len(text) :] = True
        with torch.no_grad():
            logits = lm(torch.tensor([text + [MASK] * 4]), attention_mask=visible[None, None]).logits[0]
        mixed = beta * logits[len(text) - 1] + (1 - beta) * logits[len(text)]
        mixed[MASK] = -torch.inf
        assert token == int(mixed.argmax())
        text = [*text, token]
    lm.set_attn_implementation(ATTENTION_NAME)


# ---- the figures --------------------------------------------------------------------------------------------------


def test_figures(trained, prompts):
    plain = generate(trained, prompts[4], ar(30))
    assert plain.tokens_per_forward == 1.0
    assert plain.forwards == 29  # the prefill emitted the first token
    assert plain.decode_seconds > 0
    assert plain.tokens_per_second == pytest.approx(29 / plain.decode_seconds)
    assert (plain.draft_length, plain.branches) == (None, None)
    drafted = generate(trained, prompts[4], tidar(8, 2, 30))
    assert sum(drafted.emitted) == 29
    assert drafted.tokens_per_forward == 29 / drafted.forwards
    assert (drafted.draft_length, drafted.branches) == (8, 2)
    assert generate(trained, prompts[4], tidar(None)).draft_length == 4  # the block size
    only_prefill = generate(trained, prompts[4], ar(1))
    assert (only_prefill.forwards, only_prefill.tokens_per_forward, only_prefill.tokens_per_second) == (0, 0.0, 0.0)


def test_distinct_4grams():
    generation = Generation("ar", None, None)
    assert generation.distinct_4grams == 1.0
    generation.token_ids = [1, 2, 3, 4, 5, 6]
    assert generation.distinct_4grams == 1.0
    generation.token_ids = [7] * 13
    assert generation.distinct_4grams == 0.1


def test_stream_yields_what_each_forward_made_final(trained, prompts):
    steps = list(stream(trained, prompts[4], tidar(8, "all", 40)))
    whole = generate(trained, prompts[4], tidar(8, "all", 40))
    assert [t for step in steps for t in step.tokens] == whole.token_ids
    assert [len(step.tokens) for step in steps[1:]] == whole.emitted
    assert [step.is_prefill for step in steps] == [True] + [False] * whole.forwards
    assert [step.stop for step in steps] == [None] * whole.forwards + ["length"]
    assert len(steps[0].tokens) == 1


def test_the_mask_token_is_never_emitted(causal_lm):
    from tidar_megatron.inference.model import wrap_model

    lm = causal_lm("llama")
    with torch.no_grad():  # every row's favourite is the mask token
        lm.lm_head.weight[MASK] = lm.lm_head.weight[:MASK].sum(0) * 0
    lm.lm_head.bias = torch.nn.Parameter(torch.zeros(48, dtype=torch.float64))
    with torch.no_grad():
        lm.lm_head.bias[MASK] = 1e6
    model = wrap_model(lm)
    for options in (tidar(), tidar(4, 1), ar(), DecodeOptions("lookup", max_new_tokens=24)):
        assert MASK not in generate(model, random_prompt(6), options).token_ids


# ---- drafting alone -----------------------------------------------------------------------------------------------


def test_likeliest_outcomes():
    # exactly 1: 0.1, 2: 0.9 * 0.5 = 0.45, 3: 0.45 * 0.2 = 0.09, all 4: 0.36
    assert likeliest_outcomes([0.9, 0.5, 0.8], 1) == (2,)
    assert likeliest_outcomes([0.9, 0.5, 0.8], 2) == (2, 4)
    assert likeliest_outcomes([0.9, 0.5, 0.8], 3) == (1, 2, 4)
    assert likeliest_outcomes([0.9, 0.5, 0.8], 9) == (1, 2, 3, 4)
    assert likeliest_outcomes([], 1) == (1,)


def brute_force_lookup(text, count):
    for length in (4, 3, 2, 1):
        for start in range(len(text) - length - 1, -1, -1):
            if text[start : start + length] == text[len(text) - length :]:
                return text[start + length : start + length + count]
    return []


def test_lookup_finds_the_latest_longest_match():
    rng = random.Random(0)
    for _ in range(200):
        prompt = [rng.randrange(3) for _ in range(rng.randrange(1, 12))]
        drafts = Lookup(prompt, 6)
        text = list(prompt)
        for _ in range(6):
            emitted = [rng.randrange(3) for _ in range(rng.randrange(1, 4))]
            text += emitted
            assert drafts.look_up(emitted) == brute_force_lookup(text, 5)


# ---- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt is empty"),
        ([1] * 128, "128 tokens and the model's context holds 128: shorten it to at most 127"),
        ([1] * 500, "500 tokens"),
        ([1, MASK, 2], "holds the mask token"),
        ([1, 48], "token id 48 is outside the model's vocabulary of 48"),
        ([-1], "token id -1 is outside"),
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
        (DecodeOptions("auto", 8), "mode auto: has no draft length"),
        (DecodeOptions("ar", branches=2), "mode ar: has no draft length and no branches"),
        (DecodeOptions(max_new_tokens=0), "max new tokens 0"),
        (DecodeOptions(stop="text"), "stop 'text': use strings"),
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
        UserError, match=r"no tidar section.*use --mode ar, or export a TiDAR checkpoint with tools/conv"
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
