"""The loss of draft weights against the formulas in float64, on one and on several vocabulary-parallel ranks."""

import typing

import pytest
import torch
import torch.nn.functional as F

from tidar_megatron.models.draft_loss import (
    DECAY,
    Kind,
    Weighting,
    linear_draft_loss,
    offset_weights,
    vocab_parallel_topk,
)
from tidar_megatron.models.selector import Selector, selector_loss

KINDS, WEIGHTINGS = typing.get_args(Kind), typing.get_args(Weighting)
B, BLOCKS, H, V, PADDED = 4, 6, 8, 21, 24


def make(seed=0, spread=2.0):
    """hidden, teacher, weight, labels, loss weights: of masks, the last of which are fill."""
    draw = torch.Generator().manual_seed(seed)
    hidden, teacher = (torch.randn(B * BLOCKS, H, generator=draw, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(V, H, generator=draw, dtype=torch.float64) * spread * H**-0.5
    teacher = teacher * 0.6 + hidden  # some drafts are good
    labels = torch.randint(V, (B * BLOCKS,), generator=draw)
    loss_weights = torch.rand(B * BLOCKS, generator=draw)
    loss_weights[-3:] = 0
    return hidden, teacher, weight, labels, loss_weights


def formula(kind, weighting, hidden, teacher, weight, labels, loss_weights):
    """The sum, the losses and the gradient of ``hidden``; token by token where it is easier to read."""
    hidden = hidden.clone().requires_grad_()
    q, p = (hidden @ weight.T).softmax(-1), (teacher @ weight.T).softmax(-1)
    wanted = labels if kind == "ce" else p.argmax(-1)
    overlap = torch.minimum(p, q).sum(-1)
    kl = (p * (p.log() - q.log())).sum(-1)
    if kind in ("ce", "argmax"):
        accepted = q.gather(1, wanted[:, None])[:, 0]
        losses = -accepted.log()
    else:
        accepted, share = overlap, (-3 * overlap).exp().detach()
        losses = {"kl": kl, "tv": 1 - overlap, "hybrid": share * kl + (1 - share) * (1 - overlap)}[kind]
    weights = torch.zeros(B * BLOCKS, dtype=torch.float64)
    for mask in range(B * BLOCKS):
        first, offset = mask // B * B, mask % B
        reach = [(1 + accepted[first + i].item()) / 2 for i in range(1, B)]
        products = [0.0] + [torch.tensor(reach[:m]).prod().item() for m in range(1, B)]
        reached = sum(products[offset:]) / ((B - 1) / 2) if offset else 0.0  # offset 0 drafts nothing
        decays = [0.0] + [torch.tensor(-j / DECAY, dtype=torch.float64).exp().item() for j in range(1, B)]
        of = {"none": 1.0, "reach": reached, "decay": decays[offset] * B / sum(decays)}
        weights[mask] = of[weighting] * loss_weights[mask]
    total = (losses * weights).sum()
    (-3 * total).backward()
    return total.detach(), losses.detach(), hidden.grad, wanted


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_formula(ranks, kind, weighting, size):
    """The padding of the vocabulary would win every softmax."""
    hidden, teacher, weight, labels, loss_weights = make()
    total, losses, grad, wanted = formula(kind, weighting, hidden, teacher, weight, labels, loss_weights)
    padded = torch.cat([weight, 100 * torch.ones(PADDED - V, H, dtype=torch.float64)])

    def run(group):
        own, states = padded.chunk(size)[group.rank()], hidden.clone().requires_grad_()
        given = states, own, labels, loss_weights, B, kind, weighting, group, V
        found, seen = linear_draft_loss(*given, teacher=teacher, top=3, chunk=9)
        (-3 * found).backward()
        return found.detach(), seen, states.grad

    results = ranks(size, run)
    for found, seen, _ in results:
        torch.testing.assert_close(found, total)
        torch.testing.assert_close(seen.losses, losses)
        assert torch.equal(seen.wanted, wanted)
        logits, ids = (hidden @ weight.T).topk(3)
        torch.testing.assert_close(seen.top_logits, logits)
        assert torch.equal(seen.top_ids, ids)
    torch.testing.assert_close(sum(grad for _, _, grad in results), grad)


def test_bfloat16_states_have_float32_losses(ranks):
    hidden, teacher, weight, labels, loss_weights = make()
    hidden, teacher, weight = (tensor.bfloat16().double() for tensor in (hidden, teacher, weight))
    for kind in KINDS:
        total, _losses, grad, _ = formula(kind, "reach", hidden, teacher, weight, labels, loss_weights)
        states = hidden.bfloat16().requires_grad_()
        of = [tensor.bfloat16() for tensor in (weight, teacher)]
        run = lambda group, of=of, kind=kind, states=states: linear_draft_loss(  # noqa: E731
            states, of[0], labels, loss_weights, B, kind, "reach", group, V, teacher=of[1]
        )
        ((found, seen),) = ranks(1, run)
        (-3 * found).backward()
        assert (found.dtype, seen.losses.dtype, states.grad.dtype) == (torch.float32, torch.float32, torch.bfloat16)
        assert found.item() == pytest.approx(total.item(), rel=0.02)
        assert (states.grad.double() - grad).norm() < 0.05 * grad.norm()


def test_a_block_that_is_accepted_has_the_mean_weight_1():
    for weighting in WEIGHTINGS:
        weights = offset_weights(torch.ones(2, 8, dtype=torch.float64), weighting)
        assert weights.mean().item() == pytest.approx(1.0)
        assert weighting == "none" or (not weights[:, 0].any() and (weights[:, 2:] < weights[:, 1:-1]).all())


def test_no_more_than_the_vocabulary_is_likeliest(ranks):
    """A rank with fewer ids than are asked for offers all of them."""
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    for values, ids in ranks(4, lambda group: vocab_parallel_topk(logits.chunk(4, 1)[group.rank()], 6, group)):
        wanted = logits.topk(6)
        assert torch.equal(values, wanted.values) and torch.equal(ids, wanted.indices)


@pytest.mark.parametrize("size", [1, 2])
def test_the_selector_learns_its_formula(ranks, size):
    """Scores token by token; every rank has the whole gradient, and the states have none."""
    hidden, _, weight, labels, loss_weights = make(3)
    draw = torch.Generator().manual_seed(4)
    logits, ids = (hidden @ weight.T).topk(5)
    previous = torch.randint(V, (len(hidden),), generator=draw)
    padded = torch.cat([weight, torch.ones(PADDED - V, H, dtype=torch.float64)])

    def selector():
        own = torch.Generator().manual_seed(7)  # ranks are threads, which share torch's own generator
        made = Selector(H, 3, torch.float64)
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, generator=own)
        return made

    one, total = selector(), 0.0
    for n in range(len(hidden)):
        if labels[n] in ids[n]:
            a, g = one.previous @ weight[previous[n]], one.gate @ hidden[n] + one.gate_bias
            scores = [logits[n, c] + 4 / 3**0.5 * (a * g) @ (one.candidate @ weight[ids[n, c]]) for c in range(5)]
            hit = torch.tensor(ids[n].tolist().index(labels[n].item()))
            total = total + F.cross_entropy(torch.stack(scores), hit) * loss_weights[n]
    total.backward()

    def run(group):
        made, states = selector(), hidden.clone().requires_grad_()
        given = ids, logits, previous, labels, loss_weights
        found = selector_loss(made, states, padded.chunk(size)[group.rank()], *given, group, chunk=7)
        found.backward()
        assert states.grad is None
        return found.detach(), [parameter.grad for parameter in made.parameters()]

    for found, grads in ranks(size, run):
        torch.testing.assert_close(found, total.detach())
        torch.testing.assert_close(grads, [parameter.grad for parameter in one.parameters()])
