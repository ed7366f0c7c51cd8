"""Two outputs for one prompt part at a tie, or they differ."""

import pytest
import torch

from tests.random_models import write_random_model
from tidar_megatron.evaluation import agreement as module
from tidar_megatron.evaluation.agreement import CHUNK, agreement, agreement_with_ar
from tidar_megatron.inference.engine import generate
from tidar_megatron.inference.loading import load_model
from tidar_megatron.inference.request import DecodeOptions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("model"), max_position_embeddings=1024)


def test_ties_are_counted_apart_from_differences(monkeypatch):
    assert agreement_with_ar(None, [[1]], [[2]], [[2]]) == {"identical_to_ar": True, "ties": 0, "different": 0}
    monkeypatch.setattr(module, "agreement", lambda model, prompt, ours, ar: ours[0])
    ours, ar = [["tie"], ["different"], ["identical"], ["tie"]], [["x"]] * 4
    found = agreement_with_ar(None, [[1]] * 4, ours, ar)
    assert found == {"identical_to_ar": False, "ties": 2, "different": 1}


@pytest.mark.slow
def test_identical_tied_and_different(folder, monkeypatch):
    model = load_model(folder, "cpu", "float32")
    prompt = list(range(1, 20))
    ar = generate(model, prompt, DecodeOptions("ar", max_new_tokens=8, ignore_eos=True)).token_ids
    assert agreement(model, prompt, ar, list(ar)) == "identical"
    assert agreement(model, prompt, ar[:7], ar) == "different"
    other = [*ar[:5], (ar[5] + 1) % 250, *ar[6:]]
    assert agreement(model, prompt, other, ar) == "different"
    monkeypatch.setattr(module, "tie_gap", lambda dtype, logit: 1e9)
    assert agreement(model, prompt, other, ar) == "tie"


@pytest.mark.slow
def test_logits_of_a_long_text_are_of_its_end(folder):
    """The prompt is read in pieces."""
    model = load_model(folder, "cpu", "float32")
    text = torch.randint(250, (CHUNK + 30,), generator=torch.Generator().manual_seed(0)).tolist()
    first = generate(model, text, DecodeOptions("ar", max_new_tokens=1, ignore_eos=True)).token_ids
    assert int(module._last_logits(model, text).argmax()) == first[0]
