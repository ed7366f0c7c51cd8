"""Build megatron-core's DDP, Adam and learning-rate schedule from the configuration; norm and update of a step."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, clip_grads, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import local_multi_tensor_l2_norm
from torch import Tensor

from tidar_megatron.config import Config
from tidar_megatron.distributed.groups import is_played


def wrap_model(chunks: list[GPTModel], config: Config) -> list[DistributedDataParallel]:
    """Wrap the chunks in megatron-core's DDP, which sums gradients over the data-parallel ranks in float32."""
    transformer, parallel = chunks[0].config, config.parallel
    # check_for_nan_in_grad would end one rank in mid-step; training/health.py makes all ranks skip the step
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    wrapped = [
        DistributedDataParallel(
            transformer,
            settings,
            Float16Module(transformer, chunk) if config.training.bf16 else chunk,
            disable_bucketing=number > 0,  # the pipeline's other work overlaps the reduction of later chunks
        )
        for number, chunk in enumerate(chunks)
    ]
    transformer.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        one = len(wrapped) == 1
        transformer.no_sync_func = wrapped[0].no_sync if one else [chunk.no_sync for chunk in wrapped]
        transformer.grad_sync_func = None if one else [chunk.start_grad_sync for chunk in wrapped]
    return wrapped


@contextmanager
def full_weights(model: list[DistributedDataParallel]) -> Iterator[None]:
    """Complete the all-gather of the weights, and suspend gathering in the forward, for work outside training steps."""
    overlapping = [chunk for chunk in model if chunk.ddp_config.overlap_param_gather]
    for chunk in overlapping:
        chunk.disable_forward_pre_hook()
    try:
        yield
    finally:
        for chunk in overlapping:
            chunk.enable_forward_pre_hook()


@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer, model: list[DistributedDataParallel]) -> float:
    """Return the norm of the full gradient before clipping and before the update. Collective.

    It is NaN or infinite on every rank whose own gradient is. megatron-core's norm counts a weight that is replicated
    over tensor-parallel ranks on one of them only, and would miss a NaN on the others. The host waits for the device
    twice, however many parameters there are.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    own = [p.main_grad for chunk in model for p in chunk.parameters() if p.requires_grad]
    largest = torch.stack(torch._foreach_norm(own)).max().item()  # max propagates NaN
    return norm if math.isfinite(largest) else largest


@torch.no_grad()
def update_weights(optimizer: MegatronOptimizer, norm: float) -> None:
    """Clip the gradient, whose norm :func:`gradient_norm` has returned, and update the weights.

    The optimizer's own ``step`` would compute the norm a second time.
    """
    if optimizer.config.clip_grad > 0:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        clip_grads.clip_grad_by_total_norm_fp32(parameters, optimizer.config.clip_grad, norm)
    optimizer.step_with_ready_grads()


def use_foreach_norm() -> None:
    """Replace megatron-core's fallback for gradient norms, which waits for the device once per parameter.

    It is in use without transformer-engine and apex, whose kernels do not wait.
    """
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = foreach_l2_norm


def foreach_l2_norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool, *unused: Any
) -> tuple[Tensor, None]:
    """Return the L2 norm of all tensors together, float32 ``[1]`` on their device, with apex's signature."""
    norms = torch._foreach_norm([tensor for tensors in tensor_lists for tensor in tensors], 2, torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms)).unsqueeze(0), None


def build_optimizer(
    model: list[DistributedDataParallel], config: Config
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Return Adam with decoupled weight decay (none on biases and norms), and its schedule in units of steps."""
    use_foreach_norm()
    opt = config.optimizer
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=opt.lr,
            min_lr=opt.min_lr,
            weight_decay=opt.weight_decay,
            adam_beta1=opt.adam_beta1,
            adam_beta2=opt.adam_beta2,
            adam_eps=opt.adam_eps,
            clip_grad=opt.clip_grad,
            bf16=config.training.bf16,
            params_dtype=torch.bfloat16 if config.training.bf16 else torch.float32,
            use_distributed_optimizer=config.parallel.use_distributed_optimizer,
            overlap_param_gather=config.parallel.overlap_param_gather,
        ),
        model,
        use_gloo_process_groups=not is_played(),
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=opt.lr,
        min_lr=opt.min_lr,
        lr_warmup_steps=config.lr_warmup_steps,
        lr_decay_steps=config.lr_decay_steps,
        lr_decay_style=opt.lr_decay_style,
        start_wd=opt.weight_decay,
        end_wd=opt.weight_decay,
        wd_incr_steps=config.lr_decay_steps,
        wd_incr_style="constant",
        wsd_decay_steps=opt.lr_wsd_decay_iters,
        lr_wsd_decay_style=opt.lr_wsd_decay_style,
        # a resumed run follows its present configuration: more --train-iters stretch the decay
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler
