"""The certificate: it holds where it should, and notices another token, another distribution, and a tie."""

import random

import pytest
import torch

from tests.conftest import THOROUGH
from tests.inference.conftest import FAMILIES, MASK, make_causal_lm
from tidar_megatron.errors import UserError
from tidar_megatron.evaluation import certificate
from tidar_megatron.evaluation.certificate import certify, plans, read_prompts
from tidar_megatron.evaluation.statistics import chi_square
from tidar_megatron.inference import sampling
from tidar_megatron.inference.loading import load_model
from tidar_megatron.inference.sequence import Sequence

PROMPTS = [[1, 2, 3], [40, 5, 6, 7, 9], [9]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_causal_lm("qwen3", torch.float32).save_pretrained(path)
    return path


def run(folder, names=("ar", "all:4", "1:3"), samples=0, new=20):
    runs = {name: options for name, options in plans((3, 4)).items() if name in names}
    assert len(runs) == len(names)
    return certify(load_model(folder), folder, PROMPTS, new, runs, samples)


@pytest.mark.slow
def test_it_holds(folder):
    found = run(folder, ("ar", "auto", "lookup:4", "linear:4", "all:4", "1:3"), samples=150)
    assert (found.prompts, found.identical, found.ties, found.holds) == (3, 3, 0, True)
    assert {(r.plan, r.batch) for r in found.runs} >= {("auto", 1), ("linear:4", 8)}
    assert all(r.identical == 3 and not r.ties and not r.differences for r in found.runs)
    assert len(found.sampled) == 6 and all(test["entropy"] > 0.5 for test in found.sampled)


def test_every_mode_length_and_number_of_branches():
    assert len(plans()) == 2 + 4 + 4 * 4
    assert set(plans(drafts=False)) == {"ar", "lookup:2", "lookup:4", "lookup:8", "lookup:16"}


def test_another_token_is_a_difference(folder, monkeypatch):
    accept = Sequence.accept

    def wrong(self, logits, best=None):
        if len(self.tokens) == 0 and self.options.mode == "tidar":
            logits = logits.clone()
            logits[:, logits[-1].argmax()] -= 50
        return accept(self, logits)

    monkeypatch.setattr(Sequence, "accept", wrong)
    found = run(folder)
    assert (found.identical, found.ties, found.holds) == (0, 0, False)
    (first, *_) = next(r for r in found.runs if r.plan == "all:4").differences
    assert first["position"] == 0 and first["logits_apart"]["transformers"] > certificate.TIE


def test_a_tie_is_told_apart(folder, monkeypatch):
    """Two tokens whose logits are the same up to rounding: either is right."""
    accept = Sequence.accept

    def wobbly(self, logits, best=None):
        if len(self.tokens) == 0 and self.options.mode == "tidar":
            order = logits[-1].argsort(descending=True)
            logits = logits.clone()
            logits[-1, order[1]] = logits[-1, order[0]] + 1e-6
        return accept(self, logits)

    monkeypatch.setattr(Sequence, "accept", wobbly)
    monkeypatch.setattr(certificate, "TIE", 100.0)
    found = run(folder)
    assert (found.identical, found.ties) == (0, 3)
    assert not found.holds  # more than 1% of the prompts


@pytest.mark.slow
def test_another_distribution_is_noticed(folder, monkeypatch):
    monkeypatch.setattr(sampling, "residual", lambda p, draft, q: p)
    found = run(folder, ("ar", "all:4"), samples=800, new=4)
    values = {test["plan"]: test["p_value"] for test in found.sampled}
    assert values["ar"] > certificate.LEAST_P_VALUE > values["all:4"]
    assert found.identical == 3 and not found.holds


def test_chi_square_is_uniform_where_the_hypothesis_is_true():
    draw = random.Random(0)
    probabilities = [0.0, 0.5, 0.3, 0.199, 0.001]
    values = []
    for _ in range(300):
        counts = [0] * 5
        for place in draw.choices(range(5), probabilities, k=400):
            counts[place] += 1
        values.append(chi_square(counts, probabilities))
    assert 0.4 < sum(values) / 300 < 0.6 and 0.05 < sum(value < 0.1 for value in values) / 300 < 0.16
    assert chi_square([1, 9, 9], [0.0, 0.5, 0.5]) == 0.0
    assert chi_square([0, 300, 100], [0.0, 0.5, 0.5]) < 1e-10
    assert chi_square([40, 0], [1.0, 1e-9]) == 1.0


def test_prompts_are_read(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('"one"\n{"prompt": "two", "more": 1}\n')
    assert read_prompts(path) == ["one", "two"]
    for text, message in (("", "holds no prompts"), ('"a"\n5\n', "line 2: must be"), ("{}\n", "line 1: must be")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_prompts(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path / "none")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES if THOROUGH else ["mistral", "gemma"])
def test_every_family_in_every_plan(family, tmp_path):
    """Random weights: exactness may not depend on training, nor on a family's details."""
    make_causal_lm(family, torch.float32).save_pretrained(tmp_path)
    draw = random.Random(0)
    lengths = (1, 7, 50) if not THOROUGH else range(1, 60)
    prompts = [[draw.randrange(MASK) for _ in range(length)] for length in lengths]
    found = certify(load_model(tmp_path), tmp_path, prompts, 24 if THOROUGH else 14, plans(), 0)
    assert found.holds and found.identical == len(prompts) and len(found.runs) == 2 * 22


def test_what_cannot_be_certified_is_refused_before_it_begins(folder):
    model = load_model(folder)
    with pytest.raises(UserError, match=r"prompt 2: .* more than the model's context"):
        certify(model, folder, [[1], [1] * (model.context_limit - 4)], 8, plans([2]), 0)
    with pytest.raises(UserError, match="3 samples are too few"):
        certify(model, folder, [[1]], 8, plans([2]), 3)
    with pytest.raises(UserError, match="no prompt leaves 6 tokens"):
        certify(model, folder, [[1] * (model.context_limit - 2)], 2, plans([2]), 50)
    with pytest.raises(UserError, match="--samples 0"):
        certify(load_model(folder, dtype="bfloat16"), folder, [[1]], 8, plans([2]), 10)
