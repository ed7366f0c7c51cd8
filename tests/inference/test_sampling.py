"""The output is distributed as plain AR sampling's, whatever drafts; processors are transformers' own."""

import itertools
import os
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList
from transformers.generation import logits_process as stock

from tests.conftest import THOROUGH
from tidar_megatron.errors import UserError
from tidar_megatron.evaluation.statistics import chi_square
from tidar_megatron.inference import sampling
from tidar_megatron.inference.engine import Engine, generate
from tidar_megatron.inference.request import DecodeOptions
from tidar_megatron.inference.sampling import Sampler, SamplingOptions, accepted, draw, probabilities, residual
from tidar_megatron.inference.sequence import Sequence
from tidar_megatron.inference.wrapping import wrap_model

CPU = torch.device("cpu")
SAMPLES = int(os.environ.get("TIDAR_SAMPLES", 100_000 if THOROUGH else 1_000))


# ---- the parts ----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.floats(0.2, 3),
    top_k=st.none() | st.integers(1, 30),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 0.9),
    penalty=st.floats(0.5, 2),
    short=st.integers(0, 3),
)
def test_processors_are_transformers(seed, temperature, top_k, top_p, min_p, penalty, short):
    """Row by row, each with the history that it has."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(4, 20, generator=generator, dtype=torch.float64)
    history = torch.randint(0, 20, (9,), generator=generator).tolist()
    prompt, emitted, drafts = history[:3], history[3:5], history[4:8]
    options = SamplingOptions(temperature, top_k, top_p, min_p, penalty, len(emitted) + short)
    sampler = Sampler(options, prompt, [7, 3], 20, CPU)
    sampler.emit(emitted)
    ours = probabilities(sampler.process(logits.clone(), drafts), options)
    for row in range(4):
        text = torch.tensor([prompt + emitted + drafts[1 : row + 1]])
        steps = [stock.RepetitionPenaltyLogitsProcessor(penalty)]
        steps += [stock.MinNewTokensLengthLogitsProcessor(len(prompt), options.min_new_tokens, [7, 3], "cpu")]
        steps += [stock.TemperatureLogitsWarper(temperature)]
        steps += [stock.TopKLogitsWarper(top_k)] if top_k else []
        steps += [stock.TopPLogitsWarper(top_p)] if top_p < 1 else []
        steps += [stock.MinPLogitsWarper(min_p)] if min_p > 0 else []
        theirs = LogitsProcessorList(steps)(text, logits[row : row + 1].float()).softmax(-1)[0]
        torch.testing.assert_close(ours[row], theirs, rtol=1e-4, atol=1e-6)


def test_draw_never_takes_what_has_no_weight():
    weights = torch.tensor([[0.0, 1, 0, 2, 0], [0, 0, 0, 0, 1e-30], [3, 0, 0, 0, 0]])
    for uniforms, expected in (([0.0] * 3, [1, 4, 0]), ([1 - 2**-53] * 3, [3, 4, 0]), ([0.33, 0.5, 0.5], [1, 4, 0])):
        assert draw(weights, uniforms).tolist() == expected


@pytest.mark.parametrize("certain", [False, True])
def test_a_draft_and_its_correction_are_distributed_as_p(certain):
    """100,000 drafts of one position; and a correction from p would not be."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(6, generator=generator).mul(2).softmax(-1)
    q = torch.randn(6, generator=generator).mul(2).softmax(-1)
    if certain:
        q = torch.zeros(6).scatter(0, torch.tensor([2]), 1.0)
    assert (p - q).abs().sum() / 2 > 0.3
    n = 100_000
    uniforms = torch.rand(3, n, generator=generator, dtype=torch.float64)
    drafts = draw(q.expand(n, -1), uniforms[0].tolist())
    stays = accepted(p.expand(n, -1), drafts, None if certain else q.expand(n, -1), uniforms[1].tolist())
    for right in (True, False):
        left = torch.stack([residual(p, torch.tensor(x), None if certain else q) if right else p for x in range(6)])
        final = torch.where(stays, drafts, draw(left[drafts], uniforms[2].tolist()))
        value = chi_square(final.bincount(minlength=6).tolist(), p.tolist())
        assert value > 0.001 if right else value < 1e-6


# ---- the engine ---------------------------------------------------------------------------------------------------

VOCABULARY, MASK = 6, 5
PROMPT = [1, 4, 0, 2, 1]
SETTINGS = {
    "temperature 1": SamplingOptions(temperature=1.0),
    "temperature 0.7": SamplingOptions(temperature=0.7),
    "top-p 0.9": SamplingOptions(temperature=1.0, top_p=0.9),
    "penalty": SamplingOptions(temperature=1.0, repetition_penalty=1.5),
}
MODES = {
    "all": DecodeOptions("tidar", 4, "all", 8),
    "one branch": DecodeOptions("tidar", 4, 1, 8),
    "two branches": DecodeOptions("tidar", 4, 2, 8),
    "linear": DecodeOptions("linear", 4, max_new_tokens=8),
    "lookup": DecodeOptions("lookup", 4, max_new_tokens=8),
    "ar": DecodeOptions("ar", max_new_tokens=8),
    "auto": DecodeOptions("auto", max_new_tokens=8),
}


@pytest.fixture(scope="module")
def small(causal_lm):
    lm = causal_lm("qwen3", torch.float32, vocab_size=VOCABULARY, num_hidden_layers=1, initializer_range=1.5)
    with torch.no_grad():
        lm.lm_head.weight *= 0.5  # drafts that disagree with the model and are not sure of themselves
    lm.config.tidar = {"mask_token_id": MASK, "block_size": 4}
    return wrap_model(lm)


def enumerated(model, options):
    """The AR distribution of tokens 3 to 5 after the prompt, by transformers' model and processors.

    The first token comes of the prompt, the next ones of the first drafts; the fifth is the first that a draft may be
    of a branch that is shorter than what was accepted.
    """
    texts = list(itertools.product(range(VOCABULARY - 1), repeat=5))
    ids = torch.tensor([PROMPT + list(text) for text in texts])
    lm = model.causal_lm
    ours = lm.config._attn_implementation
    lm.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = lm(ids).logits
    lm.set_attn_implementation(ours)
    logits[..., MASK] = -torch.inf
    steps = [stock.RepetitionPenaltyLogitsProcessor(options.repetition_penalty)]
    steps += [stock.TemperatureLogitsWarper(options.temperature)]
    steps += [stock.TopPLogitsWarper(options.top_p)] if options.top_p < 1 else []
    total = torch.ones(len(texts))
    for place in range(len(PROMPT), len(PROMPT) + 5):
        p = LogitsProcessorList(steps)(ids[:, :place], logits[:, place - 1].clone()).softmax(-1)
        total *= p.gather(1, ids[:, place : place + 1]).squeeze(1)
    assert total.sum() == pytest.approx(1, abs=1e-4)
    shares = Counter()
    for text, share in zip(texts, total.tolist(), strict=True):
        shares[text[2:]] += share
    return list(shares), list(shares.values())


def sample(model, mode, options, count):
    """How often each text of tokens 3 to 5 is drawn; what would come behind is as planned for, but not waited for."""
    engine = Engine(model, 64, 64, queue_size=count)
    sequences = []
    for seed in range(count):
        sampled = replace(options, seed=seed)
        sequences.append(engine.submit(PROMPT, replace(MODES[mode], sampling=sampled, ignore_eos=True)))
    while not engine.is_idle:
        for sequence, _ in engine.step():
            if len(sequence.tokens) >= 5:
                engine.cancel(sequence)
    return Counter(tuple(sequence.tokens[2:5]) for sequence in sequences)


# every pair, or every mode with one setting and the other settings with the mode that drafts most
CASES = list(itertools.product(MODES, SETTINGS))
if not THOROUGH:
    CASES = [(mode, "temperature 1") for mode in MODES] + [("all", "top-p 0.9"), ("all", "penalty")]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "setting"), CASES)
def test_every_mode_samples_as_ar(small, mode, setting):
    texts, expected = enumerated(small, SETTINGS[setting])
    counts = sample(small, mode, SETTINGS[setting], SAMPLES)
    assert chi_square([counts[text] for text in texts], expected) > 0.001


def from_p(p, draft, q):
    return p


def confident(choose):
    """Only drafts whose own confidence is high are verified: a choice that depends on what was drawn."""

    def wrong(self, logits, drafts, q, best=None):
        if q is not None and len(drafts) > 1:
            confidence = q.gather(-1, torch.tensor(drafts[1:])[:, None]).flatten().tolist()
            count = 1 + next((n for n, c in enumerate(confidence) if c < 0.5), len(confidence))
            logits, drafts, q = logits[:count], drafts[:count], q[: count - 1]
        return choose(self, logits, drafts, q)

    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["correction from p", "cut-off on the drawn token"])
def test_wrong_rules_are_caught(small, monkeypatch, rule):
    if rule == "correction from p":
        monkeypatch.setattr(sampling, "residual", from_p)
    else:
        monkeypatch.setattr(Sampler, "choose", confident(Sampler.choose))
    texts, expected = enumerated(small, SETTINGS["temperature 1"])
    counts = sample(small, "all", SETTINGS["temperature 1"], SAMPLES)
    assert chi_square([counts[text] for text in texts], expected) < 1e-6


@pytest.mark.slow
def test_every_path_is_taken_and_p_and_q_differ(small, monkeypatch):
    """Else the tests above prove less than they say: counted where drafts decide the tokens that are compared."""
    paths, distances = Counter(), []
    choose, accept = Sampler.choose, Sequence.accept

    def spy(self, logits, drafts, q, best=None):
        tokens = choose(self, logits, drafts, q, best)
        if len(drafts) > 1:
            paths["accepted"] += len(tokens) - 1
            paths["rejected"] += len(tokens) < len(drafts)
            paths["all accepted"] += len(tokens) == len(drafts)
            paths["penalty with history"] += len(tokens) > 1 and self._seen is not None
            if q is not None:
                p = probabilities(self.process(logits, drafts)[:-1], self.options)
                distances.append((p - q).abs().sum(-1).mean().item() / 2)
        return tokens

    def spy_accept(self, logits, best=None):
        if not self.reads_prompt:
            paths["fallback"] += self._drafts.lag > 0 and len(self._drafts.tokens) > 1
            paths["pruned miss"] += len(self._drafts.tokens) == 1
        return accept(self, logits, best)

    monkeypatch.setattr(Sampler, "choose", spy)
    monkeypatch.setattr(Sequence, "accept", spy_accept)
    count = SAMPLES if THOROUGH else SAMPLES // 20
    for mode in ("all", "one branch", "two branches"):
        for setting in ("temperature 1", "penalty"):
            sample(small, mode, SETTINGS[setting], count)
    assert sum(distances) / len(distances) >= 0.3
    wanted = ["accepted", "rejected", "all accepted", "fallback", "pruned miss", "penalty with history"]
    assert all(paths[name] >= count / 100 for name in wanted), paths  # so 1,000 times each of 100,000 samples


# ---- what a request sees ------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(small):
    options = DecodeOptions("tidar", 4, 1, 20, ignore_eos=True, sampling=SamplingOptions(1.0, seed=3))
    alone = generate(small, PROMPT, options).token_ids
    assert generate(small, PROMPT, options).token_ids == alone
    engine = Engine(small, 3, 64)
    sequences = [engine.submit(prompt, options) for prompt in ([1], PROMPT, [2, 2])]
    while not engine.is_idle:
        engine.step()
    assert sequences[1].tokens == alone
    assert sequences[0].tokens != alone


def test_temperature_0_is_greedy_whatever_the_rest(small):
    greedy = generate(small, PROMPT, DecodeOptions("ar", max_new_tokens=20)).token_ids
    for mode in ("tidar", "linear", "ar"):
        options = SamplingOptions(top_k=3, top_p=0.5, min_p=0.1, seed=1)
        assert generate(small, PROMPT, DecodeOptions(mode, max_new_tokens=20, sampling=options)).token_ids == greedy


def test_penalty_and_minimum_length_in_greedy_decoding(tiny):
    """As AR with the same, and another text than without."""
    model = tiny("qwen3")
    plain = generate(model, PROMPT, DecodeOptions("ar", max_new_tokens=30)).token_ids
    model = replace(model, eos_token_ids=frozenset([plain[3]]))
    assert len(generate(model, PROMPT, DecodeOptions("tidar")).token_ids) <= 4
    for options in (SamplingOptions(repetition_penalty=1.8), SamplingOptions(min_new_tokens=9)):
        asked = DecodeOptions(max_new_tokens=30, sampling=options, ignore_eos=not options.min_new_tokens)
        modes = ("ar", "tidar", "linear", "lookup")
        (text,) = {tuple(generate(model, PROMPT, replace(asked, mode=mode)).token_ids) for mode in modes}
        assert list(text) != plain[: len(text)]
        assert len(text) > options.min_new_tokens and plain[3] not in text[: options.min_new_tokens]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SamplingOptions(temperature=-1), "temperature -1: must be 0"),
        (SamplingOptions(temperature=float("nan")), "temperature nan"),
        (SamplingOptions(temperature=float("inf")), "temperature inf"),
        (SamplingOptions(temperature="hot"), "temperature 'hot'"),
        (SamplingOptions(top_p=0), "top-p 0: must be above 0"),
        (SamplingOptions(top_p=1.1), r"top-p 1\.1"),
        (SamplingOptions(min_p=-0.1), r"min-p -0\.1"),
        (SamplingOptions(top_k=0), "top-k 0: use an integer of at least 1"),
        (SamplingOptions(repetition_penalty=0), "repetition penalty 0"),
        (SamplingOptions(min_new_tokens=-1), "min new tokens -1"),
        (SamplingOptions(seed=-1), "seed -1"),
    ],
)
def test_bad_options(small, options, message):
    with pytest.raises(UserError, match=message):
        generate(small, PROMPT, DecodeOptions(sampling=options))


@pytest.mark.parametrize("few", [1, 3, 1000])
def test_top_p_sorts_few_tokens_and_keeps_the_same(few, monkeypatch):
    """Against all tokens sorted; many scores are equal here, and of these the lower id comes first."""
    monkeypatch.setattr(sampling, "FEW", few)
    draw = torch.Generator().manual_seed(few)
    for _ in range(50):
        scores = torch.randint(-6, 3, (3, 60), generator=draw) / 2
        top_p = float(torch.rand(1, generator=draw))
        p = sampling.probabilities(scores, SamplingOptions(1.0, top_p=top_p))
        for row, found in zip(scores.double().softmax(-1).tolist(), p.tolist(), strict=True):
            ordered, before, kept = sorted(range(60), key=lambda token: (-row[token], token)), 0.0, []
            for token in ordered:
                assert abs(before - top_p) > 1e-6
                kept += [token] if before < top_p else []
                before += row[token]
            assert [token for token in range(60) if found[token] > 0] == sorted(kept)
