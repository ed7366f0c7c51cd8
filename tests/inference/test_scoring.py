"""Likelihoods against a plain forward of transformers' own model in float64."""

import random

import pytest
import torch

from tests.inference.conftest import FAMILIES, make_causal_lm
from tidar_megatron.errors import UserError
from tidar_megatron.inference import scoring
from tidar_megatron.inference.scoring import score
from tidar_megatron.inference.wrapping import wrap_model


def reference(causal_lm, context, continuation):
    logits = causal_lm(torch.tensor([[*context, *continuation]])).logits[0, len(context) - 1 : -1].double()
    targets = torch.tensor(continuation)
    logprobs = logits.log_softmax(-1).gather(-1, targets[:, None])
    return logprobs.sum().item(), bool((logits.argmax(-1) == targets).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_one_plain_forward(family, monkeypatch):
    """Ragged texts, in pieces and in groups, also a continuation that greedy decoding would take."""
    monkeypatch.setattr(scoring, "CHUNK", 5)
    monkeypatch.setattr(scoring, "TOKENS", 40)
    draw = random.Random(0)
    texts = []
    for _ in range(9):
        ids = [draw.randrange(16) for _ in range(draw.randint(2, 17))]
        cut = draw.randint(1, len(ids) - 1)
        texts.append((ids[:cut], ids[cut:]))
    stock = make_causal_lm(family, tidar=False).double().eval()
    with torch.no_grad():
        logits = stock(torch.tensor([[1, 2, 3]])).logits[0, -1]
        texts.append(([1, 2, 3], [logits.argmax().item()]))
        expected = [reference(stock, *text) for text in texts]
    found = score(wrap_model(make_causal_lm(family, tidar=False).double()), texts)
    assert [one.greedy for one in found] == [greedy for _, greedy in expected]
    assert any(one.greedy for one in found)
    for (logprob, _), (should, _) in zip(found, expected, strict=True):
        assert logprob == pytest.approx(should, rel=1e-9)


def test_what_cannot_be_scored():
    model = wrap_model(make_causal_lm("llama", tidar=False))
    for text, said in [
        (([], [1]), "at least one token each"),
        (([1], []), "at least one token each"),
        (([1], [10**6]), "outside the model's vocabulary"),
        (([1] * model.context_limit, [1, 1]), "the model's context holds"),
    ]:
        with pytest.raises(UserError, match=said):
            score(model, [text])
    assert len(score(model, [([1] * model.context_limit, [1])])) == 1  # the last is only looked up
