"""The balancing loss of a mixture of experts: clean and mask tokens count, fill does not, ranks do not matter."""

import dataclasses

import pytest
import torch

from tidar_megatron.data.doubled import TokenCounts, set_loss_weights
from tidar_megatron.distributed.groups import initialize, shut_down
from tidar_megatron.models.experts import BalancedRouter, take_balancing_loss
from tidar_megatron.models.gpt import build_model, run_model
from tidar_megatron.models.initialize import initialize_weights
from tidar_megatron.models.loss import joint_loss
from tidar_megatron.training.layout_check import Documents
from tidar_megatron.training.layout_variants import variant_config


@pytest.fixture(scope="module")
def setup():
    config = variant_config("experts", 1)
    ranks = initialize(config.parallel, 0)
    (model,) = build_model(config, 97, ranks)
    initialize_weights([model], 0)
    batches = Documents(config, 9).batches(0, config, ranks, doubled=True)
    yield config, model, batches
    shut_down()


def by_hand(router, hidden, padding, topk):
    """Switch Transformer's loss over the tokens that are not fill: E * sum of (fraction sent) * (mean probability)."""
    logits = (hidden @ router.weight.t()).flatten(0, 1)[~padding.t().flatten()].double()
    probabilities = logits.softmax(-1)
    sent = torch.zeros_like(logits).scatter(1, logits.topk(topk, dim=-1).indices, 1.0)
    return logits.shape[-1] * (sent.mean(0) / topk * probabilities.mean(0)).sum().item()


def test_statistics_count_every_token_but_fill(setup):
    config, model, batches = setup
    batch = max(batches, key=lambda b: int(b.padding.sum()))
    assert batch.padding.sum() > 8
    seen = []
    routers = [module for module in model.modules() if isinstance(module, BalancedRouter)]
    assert len(routers) == config.model.num_layers
    handles = [r.register_forward_pre_hook(lambda router, args: seen.append((router, args[0]))) for r in routers]
    take_balancing_loss([model])
    run_model(model, batch)
    for handle in handles:
        handle.remove()
    total, tokens = take_balancing_loss([model]).tolist()
    assert tokens == batch.num_tokens * len(routers) == int((~batch.padding).sum()) * len(routers)
    wanted = [by_hand(router, hidden, batch.padding, 2) for router, hidden in seen]
    assert total / tokens == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)
    with_fill = [by_hand(router, hidden, torch.zeros_like(batch.padding), 2) for router, hidden in seen]
    assert sum(with_fill) != pytest.approx(sum(wanted), rel=1e-3)
    assert take_balancing_loss([model]).tolist() == [0, 0]


def test_its_weight_is_the_coefficient(setup):
    """What a layer's balancing loss adds to its router's gradient: coefficient x the mean over the batch's tokens."""
    config, model, batches = setup
    total, coefficient = TokenCounts.of(batches), config.model.moe_aux_loss_coeff
    first, *others = [module for module in model.modules() if isinstance(module, BalancedRouter)]
    for router in others:  # their losses reach the first router as well
        router.config = dataclasses.replace(router.config, moe_aux_loss_coeff=0.0)

    def gradient(coefficient):
        first.config = dataclasses.replace(first.config, moe_aux_loss_coeff=coefficient)
        model.zero_grad()
        for batch in batches:
            set_loss_weights(batch, total, 1.0)
            joint_loss(model, batch, run_model(model, batch))[0].backward()
        take_balancing_loss([model])
        return first.weight.grad.double() / total.all

    weight = first.weight.detach().double().requires_grad_()
    inputs = []
    handle = first.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach().double()))
    added = gradient(coefficient) - gradient(0.0)
    handle.remove()
    expected = torch.zeros_like(weight)
    for batch, hidden in zip(batches, inputs[: len(batches)], strict=True):
        logits = (hidden @ weight.t()).flatten(0, 1)[~batch.padding.t().flatten()]
        sent = torch.zeros_like(logits).scatter(1, logits.topk(2, dim=-1).indices, 1.0).detach()
        loss = logits.shape[-1] * (sent.mean(0) / 2 * logits.softmax(-1).mean(0)).sum()
        expected += torch.autograd.grad(loss, weight)[0] * coefficient * batch.num_tokens / total.all
    assert expected.norm() > 1e-4
    torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-8)
