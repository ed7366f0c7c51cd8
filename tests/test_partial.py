"""The experiment that trains a part of the weights: what is to stay stays to the bit, what changes is of low rank."""

import argparse
import sys

import pytest
import torch

from tests.conftest import ROOT
from tests.training.small_runs import small
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.errors import UserError

sys.path.insert(0, str(ROOT / "examples" / "smollm2"))
import partial

sys.path.pop(0)


def settings(shards, **changes):
    return small(shards, tidar={"ar_warmup_fraction": 0.0}, optimizer={"weight_decay": 0.0}, **changes)


def trained(config, **wanted):
    """Weights before and after four joint steps, by name; and the trainer."""
    trainer = partial.build(argparse.Namespace(**{"freeze_layers": 0, "low_rank": 0} | wanted), config)
    weights = dict(trainer.model[0].named_parameters())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    for _ in range(4):
        trainer.step()
    trainer.close()
    shut_down()
    return before, {name: weight.detach() for name, weight in weights.items()}, trainer


@pytest.mark.parametrize("bf16", [False, True])
def test_frozen_layers_stay(shards, bf16):
    before, after, _ = trained(settings(shards, training={"bf16": bf16}), freeze_layers=1)
    stays = {name for name in before if torch.equal(before[name], after[name])}
    assert stays == {name for name in before if name.startswith("decoder.layers.0.")}
    assert len(stays) >= 6


def test_low_rank_updates(shards):
    before, after, trainer = trained(settings(shards, model={"untie_embeddings_and_output_weights": True}), low_rank=2)
    changed = {name: after[name] - before[name] for name in before if not torch.equal(before[name], after[name])}
    embeddings = changed.pop("embedding.word_embeddings.weight")
    mask = trainer.config.tidar.mask_token_id
    assert embeddings.any(dim=1).nonzero().flatten().tolist() == [mask]
    assert changed.keys() == {n for n in before if n.startswith("decoder.layers.") and before[n].ndim == 2}
    for name, change in changed.items():
        values = torch.linalg.svdvals(change.double())
        assert values[1] > 0, name
        assert values[2] < 1e-5 * values[0], name


def test_bfloat16_weights_are_their_rounded_sums(shards):
    before, after, trainer = trained(settings(shards, training={"bf16": True}), low_rank=2)
    names = [name for name in before if name.startswith("decoder.layers.") and before[name].ndim == 2]
    for name, one in zip(names, trainer.low_rank, strict=True):
        assert torch.equal(one.start.bfloat16(), before[name])
        assert torch.equal(after[name], (one.start + partial.SCALE * one.B @ one.A).bfloat16())
        assert not torch.equal(after[name], before[name])
    norms = [name for name in before if "norm" in name]
    assert norms
    assert all(torch.equal(before[name], after[name]) for name in norms)


def test_a_step_that_is_skipped_changes_nothing(shards, monkeypatch):
    config = settings(shards)
    trainer = partial.build(argparse.Namespace(freeze_layers=0, low_rank=2), config)
    trainer.step()
    before = [one.B.clone() for one in trainer.low_rank]
    weight = trainer.model[0].decoder.final_layernorm.weight
    monkeypatch.setattr(weight, "data", weight.data * float("nan"))
    trainer.step()
    trainer.close()
    shut_down()
    assert all(
        torch.equal(one.B, was) and not one.B.grad.any() for one, was in zip(trainer.low_rank, before, strict=True)
    )


def test_the_factors_gradients_are_autograds():
    torch.manual_seed(0)
    weight, inputs, wanted = torch.nn.Parameter(torch.randn(5, 7)), torch.randn(4, 7), torch.randn(4, 5)
    factors = partial.LowRank(weight, 3)
    factors.B.normal_()
    factors.write()
    A, B = (factor.double().requires_grad_() for factor in (factors.A, factors.B))
    whole = factors.start.double() + partial.SCALE * B @ A
    for rows in (slice(0, 2), slice(2, 4)):  # two micro-batches
        ((inputs[rows] @ weight.t() - wanted[rows]) ** 2).sum().backward()
    ((inputs.double() @ whole.t() - wanted.double()) ** 2).sum().backward()
    torch.testing.assert_close(factors.A.grad.double(), A.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(factors.B.grad.double(), B.grad, rtol=1e-4, atol=1e-4)
    assert not weight.grad.any()


def test_weight_decay_would_move_what_is_frozen(shards):
    with pytest.raises(UserError, match="weight-decay 0"):
        partial.build(argparse.Namespace(freeze_layers=1, low_rank=0), small(shards, optimizer={"weight_decay": 0.1}))


def test_more_than_one_rank_is_refused(shards, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one rank"):
        partial.build(argparse.Namespace(freeze_layers=1, low_rank=0), settings(shards))
