"""The comparison of decoding plans: its counts are those of the engine, and it notices a plan that says otherwise."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tidar_megatron.evaluation import decoding
from tidar_megatron.evaluation.decoding import compare_plans, spread_pieces
from tidar_megatron.inference.engine import generate
from tidar_megatron.inference.loading import load_model
from tidar_megatron.inference.request import DecodeOptions

PROMPTS = [[1, 2, 3], [4, 5, 6, 7], [9]]
PLANS = {
    "all": DecodeOptions("tidar", 4),
    "one": DecodeOptions("tidar", branches=1),
    "lookup": DecodeOptions(mode="lookup"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=20, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, eos_token_id=None, bos_token_id=None,
        tidar={"mask_token_id": 19, "block_size": 4},
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    Qwen3ForCausalLM(config).save_pretrained(path)
    return str(path)


def test_figures_are_those_of_the_engine(folder):
    model = load_model(folder)
    figures = compare_plans(model, PROMPTS, PLANS, 16, transformers_folder=folder)
    assert list(figures) == ["ar", "all", "one", "lookup", "transformers generate"]
    assert figures["ar"].tokens_per_forward == figures["ar"].speedup_over_ar == 1.0
    assert figures["transformers generate"].tokens_per_forward == 1.0
    for name, options in PLANS.items():
        done = [
            generate(model, p, DecodeOptions(options.mode, options.draft_length, options.branches, 16, True))
            for p in PROMPTS
        ]
        assert figures[name].tokens_per_forward == pytest.approx(3 * 15 / sum(g.forwards for g in done))
        assert figures[name].distinct_4grams == pytest.approx(sum(g.distinct_4grams for g in done) / 3)
        assert figures[name].identical_to_ar
    assert figures["transformers generate"].identical_to_ar


def test_a_plan_that_says_otherwise_is_noticed(folder, monkeypatch):
    real = decoding.ours

    def wrong(model, prompt, options):
        run = real(model, prompt, options)
        if options.branches == 1:
            run.token_ids[-1] += 1
        return run

    monkeypatch.setattr(decoding, "ours", wrong)
    figures = compare_plans(load_model(folder), PROMPTS, PLANS, 16)
    assert [f.identical_to_ar for f in figures.values()] == [True, True, False, True]
    assert [(f.ties, f.different) for f in figures.values()] == [(0, 0), (0, 0), (0, 3), (0, 0)]


def test_near_ties_of_bfloat16_are_no_differences(folder, monkeypatch):
    """Each odd token's logits are 1% larger than those of the even one before it; a plan says the other of the two."""
    model = load_model(folder, dtype="bfloat16", keep_weights=True)
    rows = model.causal_lm.lm_head.weight.data
    rows[1::2] = 1.01 * rows[::2]
    rows[18] = 0  # the other of this one is the mask
    real = decoding.ours

    def other(model, prompt, options):
        run = real(model, prompt, options)
        if options.branches == 1:
            run.token_ids[-1] ^= 1
        return run

    monkeypatch.setattr(decoding, "ours", other)
    found = compare_plans(model, PROMPTS, PLANS, 16)["one"]
    assert (found.identical_to_ar, found.ties, found.different) == (False, 3, 0)


def test_a_slow_moment_changes_no_speed(folder, monkeypatch):
    """Two tokens a second by AR and six by the others, but one decoding of each plan takes a thousand times as long."""
    real, calls = decoding.ours, []

    def timed(model, prompt, options):
        calls.append(options)
        seconds = 7.5 if options.mode == "ar" else 2.5
        slow = 1000.0 if len(calls) - len(PLANS) - 1 in (1, 3, 6, 8) else 1.0  # after the warm-up; one of each plan
        return dataclasses.replace(real(model, prompt, options), seconds=seconds * slow)

    monkeypatch.setattr(decoding, "ours", timed)
    figures = compare_plans(load_model(folder), [*PROMPTS, *PROMPTS], PLANS, 16)
    assert figures.pop("ar").tokens_per_second == 2
    assert [(f.tokens_per_second, f.speedup_over_ar) for f in figures.values()] == [(6, 3)] * 3
    first = [options.mode for options in calls[len(PLANS) + 1 :: len(PLANS) + 1]]
    assert len(set(first)) > 1  # the order rotates


def test_pieces_are_spread_over_the_documents():
    documents = [np.arange(100) + 1000 * n for n in range(8)]
    pieces = spread_pieces(documents, 4, 10)
    assert [piece[0] for piece in pieces] == [0, 2000, 4000, 6000]
    assert pieces[1] == [*range(2000, 2010)]
    assert len(spread_pieces(documents, 100, 10)) == 8 * 3
    assert spread_pieces(documents, 5, 101) == []
