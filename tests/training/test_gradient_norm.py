"""One norm of the gradient a step, without a wait for each parameter; test_parity.py has it in every layout."""

import pytest
import torch
from megatron.core.optimizer import clip_grads
from megatron.core.utils import local_multi_tensor_l2_norm

from tests.layouts import Waits
from tests.training.small_runs import small
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.distributed.platform import make_cpu_first_class
from tidar_megatron.training.optimizer import foreach_l2_norm, gradient_norm, update_weights, use_foreach_norm
from tidar_megatron.training.step import forward_backward
from tidar_megatron.training.trainer import Trainer


def test_bitwise_megatron_cores_on_a_cpu():
    """So a run that was resumed under another version has the norms that it had."""
    make_cpu_first_class()
    generator = torch.Generator().manual_seed(0)
    shapes = [(7,), (64, 33), (1,), (3, 5, 7), (4096, 17)]
    tensors = [torch.randn(shape, generator=generator) * 10**n for n, shape in enumerate(shapes)]
    reference = torch.cat([tensor.double().flatten() for tensor in tensors]).norm()
    with Waits() as waits:
        ours, none = foreach_l2_norm(65536, torch.zeros(1), [tensors], False)
    assert (waits.count, none, ours.shape, ours.dtype) == (0, None, (1,), torch.float32)
    assert ours.item() == pytest.approx(reference.item(), rel=1e-6)
    assert torch.equal(ours, local_multi_tensor_l2_norm(65536, torch.zeros(1), [tensors], False)[0])


def test_only_the_fallback_is_replaced(monkeypatch):
    kernel = object()
    for installed, then in ((local_multi_tensor_l2_norm, foreach_l2_norm), (kernel, kernel)):
        monkeypatch.setattr(clip_grads, "l2_norm_impl", installed)
        use_foreach_norm()
        assert clip_grads.l2_norm_impl is then


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_update_is_megatron_cores_with_one_norm(shards, sharded, bf16, monkeypatch):
    """Bitwise the weights that the optimizer's own ``step`` gives, clipped."""
    weights = []
    for update in (lambda optimizer, norm: optimizer.step(), update_weights):
        changes = {"optimizer": {"clip_grad": 0.01, "lr": 1e-2}, "training": {"bf16": bf16}}
        trainer = Trainer.build(small(shards, **changes, parallel={"use_distributed_optimizer": sharded}))
        forward_backward(trainer.ddp, trainer.step_batches(), 1.0, trainer.ranks)
        norm = gradient_norm(trainer.optimizer, trainer.ddp)
        assert norm > 0.01
        if update is update_weights:
            with monkeypatch.context() as patch, Waits() as waits:
                patch.setattr(type(trainer.optimizer), "step_with_ready_grads", lambda self: None)
                update(trainer.optimizer, norm)
            assert waits.count == 0
            trainer.optimizer.step_with_ready_grads()
        else:
            update(trainer.optimizer, norm)
        weights.append([p.detach().clone() for chunk in trainer.model for p in chunk.parameters()])
        trainer.close()
        shut_down()
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
