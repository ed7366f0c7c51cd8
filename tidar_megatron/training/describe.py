"""Describe a run in a few lines: layout, data, length."""

from collections.abc import Iterator

from megatron.core.models.gpt import GPTModel

from tidar_megatron.config import Config
from tidar_megatron.data.loader import TrainingData
from tidar_megatron.distributed.groups import Ranks


def describe(
    config: Config, ranks: Ranks, model: list[GPTModel], data: TrainingData, iteration: int, new_rows: int = 0
) -> Iterator[str]:
    """Yield lines that describe a run.

    Args:
        config: The resolved configuration.
        ranks: The process groups and device of this process.
        model: This rank's model chunks.
        data: The training data.
        iteration: The iteration after which the run starts; 0 if it starts from scratch.
        new_rows: The number of rows that the vocabulary has beyond that of ``--init-from``.
    """
    tidar, groups = config.tidar, ranks.groups
    parameters = sum(p.numel() for chunk in model for p in chunk.parameters())
    sizes = {"TP": groups.tp, "PP": groups.pp, "CP": groups.cp, "EP": groups.ep, "DP": groups.dp}
    shown = [
        f"{name} {group.size()}" for name, group in sizes.items() if group.size() > 1 or name in ("TP", "PP", "DP")
    ]
    layout = " x ".join(shown) + (f", {len(model)} chunks per stage" if len(model) > 1 else "")
    with_what = [
        name.replace("_", " ")
        for name in ("sequence_parallel", "use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
        if getattr(config.parallel, name)
    ]
    if config.parallel.recompute_granularity:
        with_what.append(f"{config.parallel.recompute_granularity} recompute")
    layout += f" ({', '.join(with_what)})" if with_what else ""
    yield f"{layout} on {ranks.device.type}, {parameters:,} parameters on this rank"
    for source, weight, sequences in zip(data.sources, data.weights, data.sequences, strict=True):
        share = f"{float(weight / sum(data.weights)):.4g} of the sequences from {source.name}: "
        yield (
            f"{share if len(data.sources) > 1 else ''}{len(source):,} documents, {source.tokens:,} tokens; "
            f"{len(sequences):,} packed sequences of {config.data.seq_length} tokens per epoch, "
            f"{config.training.global_batch_size} per step"
        )
    if config.trains_drafts:
        trained = sum(p.numel() for chunk in model for p in chunk.parameters() if p.requires_grad)
        yield (
            f"drafts alone to {config.training.train_iters}: pairs of rank {config.drafts.draft_rank}, {trained:,} "
            f"trained weights on this rank; block size {tidar.block_size}"
        )
    else:
        yield (
            f"{config.ar_warmup_iters} steps of AR warm-up, then the joint objective to {config.training.train_iters}; "
            f"block size {tidar.block_size}, alpha {tidar.ar_loss_weight}, mask token {tidar.mask_token_id}"
        )
    if tidar.masking == "random":
        yield "random masking: a random share of each block's positions is masked, the others show their tokens"
    if config.chosen_blocks < config.blocks:
        yield f"masks for {config.chosen_blocks} of the {config.blocks} blocks of each sequence, chosen at random"
    if iteration:
        done = "; all iterations are done" if iteration >= config.training.train_iters else ""
        yield f"resuming {config.checkpoint.load} from iteration {iteration}{done}"
    elif config.training.init_from:
        rows = "1 new row" if new_rows == 1 else f"{new_rows} new rows"
        grown = f", with {rows} in a vocabulary of {config.model.vocab_size} ids" if new_rows else ""
        yield f"starting from the weights of {config.training.init_from}{grown}"
