"""Checks of relations between fields: a configuration that cannot work is refused before any process group is created.

Each error is one line that names the flag, its value and the nearest value or layout that works.
"""

import math

from tidar_megatron.config.sections import ModelConfig
from tidar_megatron.config.tree import Config
from tidar_megatron.errors import UserError

TP, PP, VPP, CP, EP = (
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--virtual-pipeline-model-parallel-size",
    "--context-parallel-size",
    "--expert-model-parallel-size",
)
ETP = "--expert-tensor-parallel-size"


def check_config(config: Config, resolved: bool = False) -> None:
    """Refuse a configuration that contradicts itself.

    Args:
        config: The complete configuration.
        resolved: Whether ``config.model`` is final. With ``--init-from`` it is not: the folder named there decides the
            model later, so an unresolved model is not checked.

    Raises:
        UserError: The message names the flag, its value and the nearest value that works.
    """
    if config.tidar.block_size < 1:
        raise UserError(f"--block-size {config.tidar.block_size}: must be at least 1")
    check_lengths(config)
    check_switches(config)
    check_schedule(config)
    if config.training.init_from and not resolved:
        return
    check_model(config.model)
    check_layout(config)


def check_lengths(config: Config) -> None:
    """Refuse a sequence length that does not divide into whole blocks, two zigzag chunks and equal TP shards per rank.

    Raises:
        UserError: The message names the nearest length that works.
    """
    B, S, parallel = config.tidar.block_size, config.data.seq_length, config.parallel
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    step, why = B, f"--block-size {B}"
    if cp > 1:
        step, why = 2 * cp * B, f"2 x {CP} {cp} x {why}"
    if parallel.sequence_parallel and math.lcm(step, cp * tp) != step:
        step, why = math.lcm(step, cp * tp), f"{why}, and {TP} {tp}"
    if S % step:
        raise UserError(f"--seq-length {S}: must be a multiple of {step} ({why}); nearest: {nearest(S, step)}")
    check_fraction(config)


def check_fraction(config: Config) -> None:
    """Refuse a block fraction whose mask tokens do not divide over zigzag chunks and TP shards as clean tokens do.

    Raises:
        UserError: The message names the nearest fraction that works.
    """
    parallel, blocks, chosen = config.parallel, config.blocks, config.chosen_blocks
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    step, why = (2 * cp, f"2 x {CP} {cp}") if cp > 1 else (1, "")
    if parallel.sequence_parallel:
        shards = cp * tp // math.gcd(cp * tp, config.tidar.block_size)  # fewest with a multiple of CP x TP tokens
        if math.lcm(step, shards) != step:
            step, why = math.lcm(step, shards), f"{why}, and {TP} {tp}" if why else f"{TP} {tp}"
    tidar = config.tidar
    given, count = f"--blocks-per-sequence {tidar.blocks_per_sequence}", tidar.blocks_per_sequence
    if count is not None and tidar.diffusion_block_fraction < 1:
        raise UserError(f"{given}: --diffusion-block-fraction says how many, too; leave one of them out")
    anywhere = tidar.block_starts == "anywhere"
    if anywhere and tidar.masking == "random":
        raise UserError("--block-starts anywhere: random masking has aligned blocks; leave out --masking random")
    most = config.data.seq_length if anywhere else blocks
    if count is not None and count > most:
        why = "places to start" if anywhere else "aligned blocks; more of them need --block-starts anywhere"
        raise UserError(f"{given}: a sequence has {most} {why}; nearest: {most}")
    if chosen % step and count is not None:
        raise UserError(f"{given}: must be a multiple of {step} ({why}); nearest: {nearest(count, step)}")
    if chosen % step:
        works = shortest_fraction(nearest(chosen, step), blocks)
        raise UserError(
            f"--diffusion-block-fraction {config.tidar.diffusion_block_fraction:g}: is {chosen} of {blocks} blocks, "
            f"which must be a multiple of {step} ({why}); nearest: {works}"
        )


def check_switches(config: Config) -> None:
    """Refuse a flag whose prerequisites are missing.

    Raises:
        UserError: The message names both flags.
    """
    parallel, model = config.parallel, config.model
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        raise UserError(f"--sequence-parallel shards over tensor-parallel ranks: needs {TP} 2 or more; or leave it out")
    if parallel.overlap_param_gather and not parallel.use_distributed_optimizer:
        raise UserError("--overlap-param-gather: needs --use-distributed-optimizer, whose weights it gathers")
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        raise UserError("--overlap-param-gather: needs --overlap-grad-reduce as well")
    if config.tidar.init_mask_token and not config.training.init_from:
        raise UserError("--init-mask-token: needs --init-from; all rows of a new model are initialized alike")
    if config.trains_drafts:
        check_drafts(config)
    if config.logging.log_sample_ids and not config.checkpoint.save:
        raise UserError("--log-sample-ids: needs --save, the folder that the log is written to")
    if config.logging.log_samples and not (config.checkpoint.save and config.data.valid_data):
        raise UserError("--log-samples: needs --save and --valid-data: its checkpoints continue held-out texts")
    local = model.transformer_impl == "local"
    selective = parallel.recompute_granularity == "selective"
    if local and selective and "layernorm" in parallel.recompute_modules:
        raise UserError("--recompute-modules layernorm: needs --transformer-impl transformer_engine; or leave it out")
    if selective and not parallel.recompute_modules:
        raise UserError("--recompute-granularity selective: needs --recompute-modules; name at least one module")
    is_dense = model.num_experts is None and not config.training.init_from
    if selective and is_dense and "moe" in parallel.recompute_modules:
        raise UserError("--recompute-modules moe: needs --num-experts; nearest: --recompute-modules mlp")
    if selective and "mlp" in parallel.recompute_modules and model.num_experts is not None:
        raise UserError(
            "--recompute-modules mlp: recomputes nothing with --num-experts, because experts belong to the module moe; "
            "nearest: --recompute-modules moe"
        )
    if model.moe_grouped_gemm and local:
        raise UserError("--moe-grouped-gemm: needs --transformer-impl transformer_engine; or leave it out")


def check_drafts(config: Config) -> None:
    """Refuse flags that mean nothing when only draft weights are trained.

    Raises:
        UserError: The message names both flags.
    """
    if config.model.transformer_impl != "local":
        raise UserError("--train drafts: needs --transformer-impl local, whose linear layers take a pair")
    if not config.drafts.draft_modules:
        raise UserError("--draft-modules: name at least one module")
    if config.model.num_experts is not None:
        if not {"linear_qkv", "linear_proj"} & {*config.drafts.draft_modules}:
            raise UserError("--draft-modules: experts have no pairs; name linear_qkv or linear_proj")
        if config.model.moe_aux_loss_coeff > 0:
            raise UserError("--moe-aux-loss-coeff: the router of --train drafts is frozen; give 0")
    for given, name in (
        (config.tidar.ar_warmup_fraction > 0, "--ar-warmup-fraction"),
        (config.tidar.masking == "random", "--masking random"),
        (config.logging.log_samples > 0, "--log-samples"),
    ):
        if given:
            raise UserError(f"{name}: means nothing with --train drafts; leave it out")


def check_schedule(config: Config) -> None:
    """Refuse a contradictory learning-rate schedule.

    Raises:
        UserError: The message names the flag and, where there is one, the nearest value that works.
    """
    opt, warmup, decay = config.optimizer, config.lr_warmup_steps, config.lr_decay_steps
    if opt.lr_warmup_iters is not None and opt.lr_warmup_fraction is not None:
        raise UserError("--lr-warmup-iters and --lr-warmup-fraction exclude each other: give one")
    if warmup >= decay:
        given, is_it = f"--lr-warmup-iters {warmup}", ""
        if opt.lr_warmup_fraction is not None:
            given, is_it = f"--lr-warmup-fraction {opt.lr_warmup_fraction:g}", f"is {warmup} steps, which "
        raise UserError(f"{given}: {is_it}must be less than the {decay} steps of the decay")
    if opt.min_lr > opt.lr:
        raise UserError(f"--min-lr {opt.min_lr}: must not exceed --lr {opt.lr}")
    if opt.lr_decay_style == "WSD" and opt.lr_wsd_decay_iters is None:
        raise UserError("--lr-decay-style WSD needs --lr-wsd-decay-iters, the length of the final decay")
    if opt.lr_decay_style == "WSD" and (opt.lr_wsd_decay_iters or 0) > decay - warmup:
        raise UserError(
            f"--lr-wsd-decay-iters {opt.lr_wsd_decay_iters}: the decay would begin before --lr is reached; "
            f"nearest: {decay - warmup}, all of the {decay} steps except the warm-up"
        )


def check_model(model: ModelConfig) -> None:
    """Refuse a model that cannot be built in any layout.

    Raises:
        UserError: The message names the flag, its value and what to change.
    """
    heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    if heads % groups:
        raise UserError(f"--num-query-groups {groups}: must divide --num-attention-heads {heads}")
    if model.kv_channels is None and model.hidden_size % heads:
        raise UserError(
            f"--hidden-size {model.hidden_size}: must be a multiple of --num-attention-heads {heads}, "
            "or give --kv-channels"
        )
    channels = model.head_channels
    if channels % 2:
        given = "--kv-channels" if model.kv_channels else f"--num-attention-heads {heads}: channels of a head"
        mended = f"give --kv-channels {channels + 1}"
        raise UserError(f"{given} {channels}: must be even, rotary embeddings rotate pairs of channels; {mended}")
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    if model.rope_scaling_type == "llama3" and low >= high:
        raise UserError(f"--rope-low-freq-factor {low:g}: must be less than --rope-high-freq-factor {high:g}")
    if model.num_experts is not None and not 2 <= model.moe_router_topk <= model.num_experts:
        if model.num_experts == 1:
            raise UserError("--num-experts 1: is a dense feed-forward; leave it out, or give 2 or more")
        raise UserError(
            f"--moe-router-topk {model.moe_router_topk}: must be from 2 to {model.num_experts} (--num-experts); "
            f"nearest: {min(max(model.moe_router_topk, 2), model.num_experts)}"
        )


def check_layout(config: Config) -> None:
    """Refuse a parallel layout that does not divide the model evenly over the ranks.

    Raises:
        UserError: The message names the nearest layout that works.
    """
    model, parallel = config.model, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    vpp, ep = parallel.virtual_pipeline_model_parallel_size or 1, parallel.expert_model_parallel_size
    shared = {
        "--num-attention-heads": model.num_attention_heads,
        "--num-query-groups": model.num_query_groups or model.num_attention_heads,
    }
    if model.num_experts is None:
        shared["--ffn-hidden-size"] = model.ffn_hidden_size
    for flag, value in shared.items():
        if value % tp:
            works = nearest_divisor(tp, *shared.values())
            but = " without --sequence-parallel" if works == 1 and parallel.sequence_parallel else ""
            raise UserError(f"{TP} {tp}: must divide {flag} {value}; nearest: {TP} {works}{but}")
    if vpp > 1 and pp == 1:
        raise UserError(
            f"{VPP} {vpp}: interleaves pipeline stages, but there is only one; leave it out, or give {PP} 2"
        )
    if model.num_layers % (pp * vpp):
        works = nearest_divisor(pp * vpp, model.num_layers)
        stages = nearest_divisor(pp, works)
        chunks = works // stages if stages > 1 else 1
        nearest_layout = f"{PP} {stages}" + (f" {VPP} {chunks}" if chunks > 1 else f" without {VPP}" if vpp > 1 else "")
        given = f"{PP} {pp}" + (f" x {VPP} {vpp}" if vpp > 1 else "")
        raise UserError(f"{given}: must divide --num-layers {model.num_layers}; nearest: {nearest_layout}")
    for flag, value in ((EP, ep), (ETP, parallel.expert_tensor_parallel_size)):
        if value > 1 and model.num_experts is None:
            raise UserError(f"{flag} {value}: there are no experts to distribute; leave it out, or give --num-experts")
    if model.num_experts is not None:
        if model.num_experts % ep:
            works = nearest_divisor(ep, model.num_experts)
            raise UserError(f"{EP} {ep}: must divide --num-experts {model.num_experts}; nearest: {EP} {works}")
        width, etp = model.moe_ffn_hidden_size or model.ffn_hidden_size, parallel.expert_tensor_parallel_size
        if width % etp:
            works = nearest_divisor(etp, width)
            flag = "--moe-ffn-hidden-size" if model.moe_ffn_hidden_size else "--ffn-hidden-size"
            raise UserError(f"{ETP} {etp}: must divide {flag} {width}; nearest: {ETP} {works}")
        if tp > 1 and not parallel.sequence_parallel:
            raise UserError(f"{TP} {tp} with --num-experts: megatron-core also needs --sequence-parallel; add it")


def check_world_size(config: Config, world_size: int) -> int:
    """Refuse a layout that does not fit the number of processes, and return the data-parallel size.

    Args:
        config: The configuration.
        world_size: The number of processes.

    Raises:
        UserError: The message names the layout, the number of processes and a number that works.
    """
    parallel, training = config.parallel, config.training
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    sizes = ((TP, tp), (PP, pp), (CP, cp)) if cp > 1 else ((TP, tp), (PP, pp))
    refuse_world_size(" x ".join(f"{flag} {n}" for flag, n in sizes), tp * pp * cp, world_size)
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    experts = " x ".join((f"{EP} {ep}", f"{ETP} {etp}", f"{PP} {pp}"))
    refuse_world_size(experts, math.lcm(ep * etp * pp, tp * pp * cp), world_size)
    dp = world_size // (tp * pp * cp)
    together = training.micro_batch_size * dp
    if (parallel.virtual_pipeline_model_parallel_size or 1) > 1:
        together *= pp  # the interleaved schedule takes micro-batches in groups of PP
        stages = f" x {pp} interleaved pipeline stages"
    else:
        stages = ""
    if training.global_batch_size % together:
        raise UserError(
            f"--global-batch-size {training.global_batch_size}: must be a multiple of "
            f"--micro-batch-size {training.micro_batch_size} x {dp} data-parallel ranks{stages}; "
            f"nearest: {nearest(training.global_batch_size, together)}"
        )
    return dp


def refuse_world_size(layout: str, size: int, world_size: int) -> None:
    """Refuse a ``world_size`` that is not a multiple of ``size``, the number of processes that ``layout`` needs."""
    if world_size % size:
        needed = max(size, world_size // size * size)
        raise UserError(
            f"{layout} needs a multiple of {size} processes, but there are {world_size}; "
            f"try torchrun --nproc-per-node {needed}"
        )


def shortest_fraction(part: int, total: int) -> str:
    """Return the shortest decimal fraction that, multiplied by ``total``, rounds to ``part``."""
    texts = (f"{part / total:.{digits}g}" for digits in range(1, 18))
    return next(text for text in texts if round(float(text) * total) == part)


def nearest(value: int, step: int) -> int:
    """Return the multiple of ``step`` nearest to ``value``, and at least ``step``."""
    return max(step, round(value / step) * step)


def nearest_divisor(value: int, *numbers: int) -> int:
    """Return the common divisor of ``numbers`` that is nearest to ``value``; of two equally near, the smaller."""
    common = math.gcd(*numbers)
    return min((n for n in range(1, common + 1) if common % n == 0), key=lambda n: (abs(n - value), n))
