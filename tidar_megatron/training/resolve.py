"""What a run is, settled before it starts: the configuration completed, and contradictions refused."""

import dataclasses
from pathlib import Path

from tidar_megatron.checkpoint.distributed import latest_iteration
from tidar_megatron.checkpoint.huggingface import mask_token_of_huggingface, model_from_huggingface
from tidar_megatron.config import CONFIG_FILE, Config, ModelConfig, check_config, flag, load_config
from tidar_megatron.data.manifest import TOKENIZER_FOLDER, TokenizerEntry
from tidar_megatron.data.tokenizer import fingerprint, load_tokenizer
from tidar_megatron.errors import UserError


def resolve(config: Config, tokenizer: TokenizerEntry) -> Config:
    """Fill in what the tokenizer and ``--init-from`` decide: the model, its vocabulary, the mask token.

    Raises:
        UserError: a mask token that the tokenizer uses, flags that contradict ``--init-from``, or a vocabulary too
            small for the data.
    """
    given, model, mask = config.model, config.model, config.tidar.mask_token_id
    if config.training.init_from and given.num_experts is not None:
        raise UserError(
            "--init-from: experts cannot be imported yet; leave it out to start anew, or leave --num-experts out"
        )
    if config.training.init_from:
        model = model_from_huggingface(config.training.init_from, given)
        for field in dataclasses.fields(ModelConfig):
            theirs, ours = getattr(model, field.name), getattr(given, field.name)
            if ours not in (theirs, field.default):
                what = f"{flag(field.name)} {ours}: --init-from {config.training.init_from} has {theirs}"
                raise UserError(f"{what}; leave the flag out, the folder sets the model")
        mask = mask if mask is not None else mask_token_of_huggingface(config.training.init_from)
    if model.vocab_size is not None and tokenizer.vocab_size > model.vocab_size:
        where = f"--init-from {config.training.init_from}" if config.training.init_from else "--vocab-size"
        raise UserError(
            f"{where}: {model.vocab_size} ids are fewer than the {tokenizer.vocab_size} of the data's tokenizer; "
            "prepare the data with the model's own tokenizer (tools/prepare_data.py --tokenizer FOLDER)"
        )
    first_free = tokenizer.vocab_size
    mask = first_free if mask is None else mask
    if mask < first_free:
        raise UserError(
            f"--mask-token-id {mask}: the tokenizer uses 0 to {first_free - 1}; leave it out to take {first_free}"
        )
    if mask > max(first_free, (model.vocab_size or 0) - 1):
        raise UserError(f"--mask-token-id {mask}: lies beyond the vocabulary; leave it out to take {first_free}")
    resolved = dataclasses.replace(
        config,
        model=dataclasses.replace(model, vocab_size=max(model.vocab_size or 0, mask + 1)),
        tidar=dataclasses.replace(config.tidar, mask_token_id=mask),
    )
    check_config(resolved)
    return resolved


# What a checkpoint cannot be continued without: the model, and what decides which tokens packed sequence n holds.
CONTINUED = {
    "model": [field.name for field in dataclasses.fields(ModelConfig) if field.name != "max_position_embeddings"],
    "tidar": ["block_size", "mask_token_id"],
    "data": ["seq_length"],
    "training": ["seed"],
    "parallel": ["use_distributed_optimizer"],  # the two kinds of optimizer state cannot be turned into each other
}


def check_continues(config: Config, tokenizer: TokenizerEntry) -> None:
    """Refuse to continue a run as another one.

    Raises:
        UserError: names the first flag that differs from the run's, or the tokenizer.
    """
    run = Path(config.checkpoint.load or "")
    before = load_config(run / CONFIG_FILE)
    for section, names in CONTINUED.items():
        for name in names:
            was, now = (getattr(getattr(c, section), name) for c in (before, config))
            if was != now:
                raise UserError(
                    f"{flag(name)} {now}: the run in {run} has {was}; continue it with its own settings "
                    f"(--config {run / CONFIG_FILE}), or export it and start a new run with --init-from"
                )
    if fingerprint(load_tokenizer(run / TOKENIZER_FOLDER)) != tokenizer.fingerprint:
        raise UserError(
            f"--train-data {config.data.train_data}: was prepared with another tokenizer than that of the run in {run}"
        )


def starting_point(config: Config) -> int | None:
    """The iteration to continue from; None to start anew.

    Raises:
        UserError: ``--load`` names a folder without a checkpoint, or ``--save`` one that holds another run.
    """
    load, save = config.checkpoint.load, config.checkpoint.save
    iteration = latest_iteration(load) if load else None
    same = bool(load and save and Path(load).resolve() == Path(save).resolve())
    if load and iteration is None and not same:
        raise UserError(f"--load {load}: holds no checkpoint; leave the flag out to start anew")
    if save and not same and latest_iteration(save) is not None:
        raise UserError(f"--save {save}: holds a run already; continue it with --load {save}, or choose another folder")
    return iteration
