"""Build megatron-core's DDP, Adam and learning-rate schedule from the configuration."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

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
    over tensor-parallel ranks on one of them only, and would miss a NaN on the others.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    own = [p.main_grad for chunk in model for p in chunk.parameters() if p.requires_grad]
    largest = torch.stack(torch._foreach_norm(own)).max().item()  # max propagates NaN
    return norm if math.isfinite(largest) else largest


def build_optimizer(
    model: list[DistributedDataParallel], config: Config
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Return Adam with decoupled weight decay (none on biases and norms), and its schedule in units of steps."""
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
