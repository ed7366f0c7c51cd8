"""Whatever drafts, the tokens are those of autoregression: against transformers' own generate, for every plan."""

import pytest
import torch

from tests.conftest import THOROUGH
from tests.inference.conftest import FAMILIES, MASK
from tests.inference.options import ar, random_prompt, tidar
from tidar_megatron.inference import engine
from tidar_megatron.inference.attention import ATTENTION_NAME
from tidar_megatron.inference.engine import generate, stream
from tidar_megatron.inference.forward import ForwardLayout
from tidar_megatron.inference.request import DecodeOptions, Generation
from tidar_megatron.inference.sampling import SamplingOptions

# ---- the same tokens ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_mode_equals_stock_generate(tiny, stock_generate, family, dtype):
    model = tiny(family, dtype)
    for length in (1, 2, 7, 20) if THOROUGH else (2, 20):
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


@pytest.mark.slow
@pytest.mark.parametrize("branches", ["all", 1, 2, 3])
@pytest.mark.parametrize("draft_length", range(1, 10))
def test_every_plan_equals_ar_where_drafts_are_accepted(trained, prompts, draft_length, branches):
    for prompt in prompts[1::2] if THOROUGH else prompts[1::4]:
        expected = generate(trained, prompt, ar(30)).token_ids
        got = generate(trained, prompt, tidar(draft_length, branches, 30))
        assert got.token_ids == expected, prompt


@pytest.mark.slow
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


@pytest.mark.slow
def test_every_number_of_accepted_drafts_occurs_and_every_fallback(trained, prompts, monkeypatch):
    """Else the tests above prove less than they say: n = 1 .. K with all branches, and n - j = 0 .. K - 1 with one."""
    accepted, lags = set(), set()
    for prompt in prompts:
        accepted |= set(generate(trained, prompt, tidar(8, "all", 60)).emitted)
    assert accepted == set(range(1, 9))

    rows_after = ForwardLayout.rows_after

    def spy(layout, n):
        shorter = [r for r in layout.branches if r <= n]
        if layout.num_drafts <= 6 and layout.branches:  # not a prefill
            lags.add(n - max(shorter) if shorter else None)
        return rows_after(layout, n)

    monkeypatch.setattr(ForwardLayout, "rows_after", spy)
    for prompt in prompts:
        generate(trained, prompt, tidar(6, 1, 60))
    assert {None, 0, 1, 2, 3} <= lags


@pytest.mark.slow
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
    from tidar_megatron.inference.wrapping import wrap_model

    lm = causal_lm("llama")
    with torch.no_grad():  # every row's favourite is the mask token
        lm.lm_head.weight[MASK] = lm.lm_head.weight[:MASK].sum(0) * 0
    lm.lm_head.bias = torch.nn.Parameter(torch.zeros(48, dtype=torch.float64))
    with torch.no_grad():
        lm.lm_head.bias[MASK] = 1e6
    model = wrap_model(lm)
    for options in (tidar(), tidar(4, 1), ar(), DecodeOptions("lookup", max_new_tokens=24)):
        assert MASK not in generate(model, random_prompt(6), options).token_ids
