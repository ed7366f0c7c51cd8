"""Masks of chosen blocks alone, through the real model: the losses they had among all, and an unbiased estimate."""

import dataclasses
from itertools import pairwise, product

import numpy as np
import pytest
import torch

from tidar_megatron.config import ModelConfig
from tidar_megatron.data.blocks import choose_blocks, strata
from tidar_megatron.data.doubled import TokenCounts, make_batch, set_loss_weights
from tidar_megatron.data.packing import LengthsInMemory, PackedSequences, pack
from tidar_megatron.distributed.groups import initialize, shut_down
from tidar_megatron.models.gpt import build_model, run_model
from tidar_megatron.models.initialize import initialize_weights
from tidar_megatron.models.layers import PositionRotaryEmbedding
from tidar_megatron.models.loss import joint_loss, token_losses
from tidar_megatron.training.layout_check import Documents
from tidar_megatron.training.layout_variants import MASK_TOKEN_ID, variant_config

S, B = 20, 4


@pytest.fixture(scope="module", params=["packed", "experts"])
def setup(request):
    """A tiny model of float32 weights, and rows of packed documents with fill."""
    config = variant_config(request.param, 1, model={"num_layers": 2})
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_length=S))
    ranks = initialize(config.parallel, 0)
    (model,) = build_model(config, 97, ranks)
    initialize_weights([model], 0)
    documents = Documents(config, 14)
    sequences = PackedSequences(LengthsInMemory(np.array([len(d) for d in documents.tokens])), S, B, seed=1)
    rows = [pack(sequences.pieces(0, n), documents.tokens, 0) for n in range(6)]
    assert any((~row.diffusion_supervised).any() for row in rows)
    yield model, rows
    shut_down()


def losses_of(model, batch):
    with torch.no_grad():
        return token_losses(model, batch, run_model(model, batch))[1]


@pytest.mark.parametrize("chosen", [1, 2, 3, 5])
def test_a_blocks_losses_do_not_depend_on_the_others(setup, chosen):
    """Rows with choices of their own, at positions of their own, in one micro-batch."""
    model, rows = setup
    choice = np.stack([choose_blocks(S // B, chosen, 0, n) for n in range(len(rows))])
    part = make_batch(rows, B, MASK_TOKEN_ID, chosen=choice, reset_positions=False)
    whole = make_batch(rows, B, MASK_TOKEN_ID, reset_positions=False)
    ours, theirs = losses_of(model, part), losses_of(model, whole)
    places = torch.cat([part.position_ids[:, :S], S + part.position_ids[:, S:]], dim=1)
    torch.testing.assert_close(ours, theirs.gather(1, places), rtol=1e-5, atol=1e-5)


def gradient(model, batch, alpha=0.8):
    """Of the joint loss over this batch alone; the logged losses, and the diffusion loss's estimate."""
    set_loss_weights(batch, TokenCounts.of([batch]), alpha)
    model.zero_grad()
    total, count, sums = joint_loss(model, batch, run_model(model, batch))
    (total / count).backward()
    gradients = [parameter.grad.double() for parameter in model.parameters()]
    return [(total / count).detach().double(), sums[0] / batch.ar_tokens, sums[1] / batch.diffusion_tokens, *gradients]


def test_loss_and_gradient_are_unbiased(setup):
    """The mean over every choice, each as likely as the other, of loss, logged losses and every gradient: the whole's.

    Five blocks in strata of two and of three, so weights that ignored the strata's sizes would be found.
    """
    model, rows = setup
    if model.config.num_moe_experts:
        model.config.moe_aux_loss_coeff = 0.0  # balance is that of the tokens there are
        for layer in model.decoder.layers:
            layer.mlp.router.config.moe_aux_loss_coeff = 0.0
    edges = strata(S // B, 2).tolist()
    assert np.diff(edges).tolist() == [2, 3]
    for row in rows[:3]:
        whole = gradient(model, make_batch([row], B, MASK_TOKEN_ID))
        choices = list(product(*(range(a, b) for a, b in pairwise(edges))))
        each = [gradient(model, make_batch([row], B, MASK_TOKEN_ID, chosen=np.array([c]))) for c in choices]
        for n, wanted in enumerate(whole):
            mean = torch.stack([of_choice[n] for of_choice in each]).mean(0)
            torch.testing.assert_close(mean, wanted, rtol=1e-4, atol=1e-6)
        assert torch.stack([of_choice[0] for of_choice in each]).std() > 1e-3  # the choices do differ


def test_angles_are_the_products_to_the_bit(setup):
    model, _ = setup
    rotary = PositionRotaryEmbedding(model.config, ModelConfig())
    draw = torch.Generator().manual_seed(0)
    for positions in (
        torch.arange(16).repeat(2).expand(3, -1),
        torch.randint(0, 4096, (2, 4096), generator=draw),
        torch.randint(0, 48, (3, 48), generator=draw),
    ):
        wanted = positions.t().float().unsqueeze(-1) * rotary.inv_freq
        angles = rotary(positions)
        rows = 1 if positions.stride(0) == 0 else len(positions)
        assert (angles.shape, angles.dtype) == ((positions.shape[1], rows, 1, 8), torch.float32)
        assert torch.equal(angles.expand(-1, len(positions), -1, -1), torch.cat([wanted, wanted], dim=-1).unsqueeze(2))
    on_device = PositionRotaryEmbedding(model.config, ModelConfig(), "meta")  # no forward copies the frequencies
    assert on_device.inv_freq.device.type == on_device(torch.arange(4, device="meta")[None]).device.type == "meta"
    table = rotary.angles
    rotary(torch.arange(4)[None])
    assert rotary.angles is table  # nothing is computed again
