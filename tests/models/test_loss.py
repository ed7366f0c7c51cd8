"""The fused output layer and cross-entropy against the formula, on one and on several vocabulary-parallel ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tidar_megatron.distributed.groups import initialize, shut_down
from tidar_megatron.models import cross_entropy
from tidar_megatron.models.cross_entropy import linear_cross_entropy
from tidar_megatron.models.gpt import build_model
from tidar_megatron.training.layout_check import Documents
from tidar_megatron.training.layout_variants import variant_config
from tidar_megatron.training.optimizer import wrap_model
from tidar_megatron.training.step import evaluate, forward_backward


def make(n, h, vocabulary, dtype=torch.float64, spread=1.0, seed=0):
    """hidden, weight, labels, loss weights: a third of these are 0, and so are all of a fill's."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=draw, dtype=torch.float64)
    weight = torch.randn(vocabulary, h, generator=draw, dtype=torch.float64) * spread * h**-0.5
    labels = torch.randint(vocabulary, (n,), generator=draw)
    loss_weights = torch.rand(n, generator=draw) * (torch.rand(n, generator=draw) > 1 / 3)
    return hidden.to(dtype), weight.to(dtype), labels, loss_weights


def fused(group, hidden, weight, labels, loss_weights, chunk, factor=1.0, vocab_size=None):
    """The weighted sum, the losses, and what ``factor`` times the sum gives as gradients of hidden and own weight."""
    part = len(weight) // group.size()
    own = weight[group.rank() * part : (group.rank() + 1) * part].clone().requires_grad_()
    hidden = hidden.clone().requires_grad_()
    total, losses = linear_cross_entropy(hidden, own, labels, loss_weights, group, vocab_size or len(weight), chunk)
    assert not losses.requires_grad
    (factor * total).backward()
    return total.detach(), losses, hidden.grad, own.grad


def formula(hidden, weight, labels, loss_weights, factor=1.0):
    """The same by log_softmax, in float64."""
    hidden, weight = (tensor.to(torch.float64, copy=True).requires_grad_() for tensor in (hidden, weight))
    losses = -(hidden @ weight.T).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    total = (losses * loss_weights.double()).sum()
    (factor * total).backward()
    return total.detach(), losses.detach(), hidden.grad, weight.grad


def error(ours, theirs):
    return ((ours.double() - theirs).norm() / theirs.norm().clamp(min=1e-12)).item()


@pytest.mark.slow
@given(
    n=st.integers(1, 40),
    h=st.integers(1, 12),
    part=st.integers(1, 30),
    padding=st.sampled_from([0, 1, 7, 31, 45]),
    chunk=st.integers(1, 45),
    size=st.sampled_from([1, 2, 3]),
    spread=st.sampled_from([0.1, 1.0, 5.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_equals_the_formula(ranks, n, h, part, padding, chunk, size, spread, dtype, seed):
    """Losses, the weighted sum and both gradients; hidden's is a sum over ranks, the weight's is each rank's own.

    The padding of the vocabulary would win every softmax, and the last ranks may have nothing else.
    """
    vocab_size = max(1, part * size - padding)
    hidden, ids, labels, loss_weights = make(n, h, vocab_size, dtype, spread, seed)
    wanted = formula(hidden, ids, labels, loss_weights, factor=-3.0)
    padded = torch.cat([ids, 100 * torch.ones(part * size - vocab_size, h, dtype=dtype)])
    given = hidden, padded, labels, loss_weights
    results = ranks(size, lambda group: fused(group, *given, chunk, factor=-3.0, vocab_size=vocab_size))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    for total, losses, _, _ in results:
        assert (total.dtype, losses.dtype) == (dtype, dtype)
        torch.testing.assert_close(losses.double(), wanted[1], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(total.double(), wanted[0], rtol=tolerance, atol=tolerance)
    _, _, grad_hidden, grad_weight = zip(*results, strict=True)
    scale = max(1.0, given[3].norm().item())  # where a softmax is nearly its label, the formula's gradient vanishes
    close = {"rtol": 0, "atol": tolerance * scale}
    torch.testing.assert_close(sum(grad_hidden).double(), wanted[2], **close)
    torch.testing.assert_close(torch.cat(grad_weight)[:vocab_size].double(), wanted[3], **close)
    assert not torch.cat(grad_weight)[vocab_size:].any()


@pytest.mark.parametrize("size", [1, 2])
def test_chunks_cost_bfloat16_no_accuracy(ranks, size):
    """Products in bfloat16, softmax and sums over chunks in float32: as near to the formula as one chunk is."""
    given = make(512, 32, 200, torch.bfloat16)
    wanted = formula(*given)
    for chunk in (512, 16):
        results = ranks(size, lambda group, chunk=chunk: fused(group, *given, chunk))
        assert error(results[0][1], wanted[1]) < 2e-3
        assert results[0][1].dtype == torch.float32
        assert results[0][2].dtype == results[0][3].dtype == torch.bfloat16
        assert error(sum(r[2].float() for r in results), wanted[2]) < 5e-3
        assert error(torch.cat([r[3] for r in results]), wanted[3]) < 4e-3


class LikeCuda(TorchFunctionMode):
    """Tensors that say to be on a CUDA device, and CUDA's products with an ``out_dtype``, which a CPU does not have."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function == torch.Tensor.device.__get__:
            return torch.device("cuda")
        if (out_dtype := kwargs.pop("out_dtype", None)) is not None:
            args = [arg.to(out_dtype) if isinstance(arg, torch.Tensor) else arg for arg in args]
        return function(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_cuda_a_product_is_not_rounded_before_it_is_added(dtype):
    """The sum is float32; a product rounded to half precision has an error of 2e-3 or 2e-4."""
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(40, 40, generator=draw).to(dtype) for _ in range(2))
    total = torch.randn(40, 40, generator=draw)
    wanted = total.double() + left.double() @ right.double()
    with LikeCuda():
        cross_entropy._add_product(total, left, right)
    assert error(total, wanted) < 1e-6


def test_only_what_is_asked_for(ranks):
    hidden, weight, labels, loss_weights = make(20, 4, 10)

    def run(group):
        wanted = fused(group, hidden, weight, labels, loss_weights, 6)
        with torch.no_grad():
            total, losses = linear_cross_entropy(hidden, weight.requires_grad_(), labels, loss_weights, group, 10, 6)
        assert not total.requires_grad
        assert torch.equal(losses, wanted[1])
        frozen, states = weight.detach(), hidden.clone().requires_grad_()
        total, _ = linear_cross_entropy(states, frozen, labels, loss_weights, group, 10, 6)
        total.backward(retain_graph=True)
        torch.testing.assert_close(states.grad, wanted[2])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()  # the gradients were scaled in place: rather none than wrong ones

    ranks(1, run)


class Largest(TorchDispatchMode):
    """The most numbers that a tensor made under it has."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_of_one_chunk_at_most(ranks, dtype):
    n, h, vocabulary, chunk = 300, 8, 500, 16
    given = make(n, h, vocabulary, dtype)

    def run(group):
        with Largest() as largest:
            fused(group, *given, chunk)
        return largest.numel

    assert ranks(1, run) == [chunk * vocabulary]


@pytest.mark.slow
def test_a_step_and_an_evaluation_make_no_logits(monkeypatch):
    """Of the whole model, with a vocabulary that dwarfs everything else; and the numbers do not depend on the chunk."""
    vocabulary = 4096
    config = variant_config("packed", 1, model={"vocab_size": vocabulary, "num_layers": 1})
    group = initialize(config.parallel, 0)
    model = wrap_model(build_model(config, vocabulary, group), config)
    batches = Documents(config, 30).batches(0, config, group, doubled=True)
    tokens = batches[0].tokens.numel()
    seen, numbers = {}, {}
    for chunk in (tokens, 8):
        monkeypatch.setattr("tidar_megatron.models.cross_entropy.chunk_tokens", lambda hidden_size, chunk=chunk: chunk)
        monkeypatch.setattr("tidar_megatron.models.draft_metrics.chunk_tokens", lambda hidden_size, chunk=chunk: chunk)
        with Largest() as step:
            sums, _ = forward_backward(model, list(batches), 0.8, group)
        with Largest() as evaluation:
            figures = evaluate(model, list(batches), config.tidar.block_size, group)
        seen[chunk] = step.numel, evaluation.numel
        grads = {name: p.main_grad.clone() for name, p in model[0].named_parameters()}
        numbers[chunk] = {**grads, "sums": sums}, figures
    shut_down()
    assert seen[tokens] == (tokens * vocabulary, tokens * vocabulary)  # so the watch sees logits
    assert max(seen[8]) <= sum(p.numel() for p in model[0].parameters())  # DDP's buffer of gradients
    (ours, figures), (wanted, wanted_figures) = numbers[8], numbers[tokens]
    for name, tensor in wanted.items():
        assert error(ours[name], tensor.double()) < 1e-5, name
    for name, value in wanted_figures.items():
        assert figures[name] == pytest.approx(value, rel=1e-5), name


def test_chunks_grow_with_the_model():
    assert [cross_entropy.chunk_tokens(h) for h in (64, 256, 1536, 8192)] == [128, 128, 768, 1024]
