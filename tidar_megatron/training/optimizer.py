"""megatron-core's DDP, Adam and learning-rate schedule, from our configuration."""

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from tidar_megatron.config import Config
from tidar_megatron.errors import UserError


def wrap_model(model: GPTModel, config: Config) -> DistributedDataParallel:
    """Data-parallel wrapper; gradients are summed in float32 over ranks and divided by the global token count."""
    transformer = model.config
    wrapped = Float16Module(transformer, model) if config.training.bf16 else model
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, check_for_nan_in_grad=True)
    transformer.finalize_model_grads_func = finalize_model_grads
    return DistributedDataParallel(transformer, ddp_config, wrapped)


def build_optimizer(
    model: DistributedDataParallel, config: Config
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Adam with decoupled weight decay (none on biases and norms), and the schedule in units of steps.

    Raises:
        UserError: a schedule that contradicts itself.
    """
    opt = config.optimizer
    decay = opt.lr_decay_iters or config.training.train_iters
    if opt.lr_warmup_iters is not None and opt.lr_warmup_fraction is not None:
        raise UserError("--lr-warmup-iters and --lr-warmup-fraction exclude each other: give one")
    warmup = opt.lr_warmup_iters if opt.lr_warmup_iters is not None else round((opt.lr_warmup_fraction or 0.0) * decay)
    if warmup >= decay:
        raise UserError(f"--lr-warmup-iters {warmup}: must be less than the {decay} steps of the decay")
    if opt.min_lr > opt.lr:
        raise UserError(f"--min-lr {opt.min_lr}: must not exceed --lr {opt.lr}")
    if opt.lr_decay_style == "WSD" and opt.lr_wsd_decay_iters is None:
        raise UserError("--lr-decay-style WSD needs --lr-wsd-decay-iters, the length of the final decay")
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
        ),
        [model],
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=opt.lr,
        min_lr=opt.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=opt.lr_decay_style,
        start_wd=opt.weight_decay,
        end_wd=opt.weight_decay,
        wd_incr_steps=decay,
        wd_incr_style="constant",
        wsd_decay_steps=opt.lr_wsd_decay_iters,
        lr_wsd_decay_style=opt.lr_wsd_decay_style,
        # a resumed run follows the configuration it is given: more --train-iters stretch the decay
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler
