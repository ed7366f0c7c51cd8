"""The first two steps of a start: check what a run is given, then resolve what it is. No process group exists yet."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tidar_megatron.checkpoint.contents import read_state
from tidar_megatron.checkpoint.fingerprint import Fingerprint, check_fingerprint
from tidar_megatron.checkpoint.folder import checkpoint_folder, restart_points, saved_iterations
from tidar_megatron.checkpoint.integrity import Damaged
from tidar_megatron.config import Config, ModelConfig, ResolvedConfig, check_config, check_world_size, flag
from tidar_megatron.data.loader import SequenceSettings, TrainingData
from tidar_megatron.data.manifest import TokenizerEntry
from tidar_megatron.data.sources import any_pair, tokenizer_of
from tidar_megatron.data.tokenizer import free_id, load_tokenizer, reserved_ids
from tidar_megatron.distributed import startup
from tidar_megatron.distributed.groups import world_size_from_environment
from tidar_megatron.distributed.platform import check_backend
from tidar_megatron.errors import UserError
from tidar_megatron.huggingface.families import huggingface_config, read_json
from tidar_megatron.huggingface.folders import CONFIG
from tidar_megatron.huggingface.origin import Origin, open_origin
from tidar_megatron.huggingface.token_ids import check_mask_token


@dataclass(frozen=True)
class Inputs:
    """What a run is given, checked as far as that goes without reading its data.

    Attributes:
        config: as given.
        tokenizer, tokenizer_folder: the training data's.
        reserved: ids of the tokenizer that no text has.
        origin: what ``--init-from`` names.
    """

    config: Config
    tokenizer: TokenizerEntry
    tokenizer_folder: Path
    reserved: Sequence[int]
    origin: Origin | None


@dataclass(frozen=True)
class ResolvedRun:
    """What a run is: everything that its start needs beside process groups."""

    config: ResolvedConfig
    tokenizer_folder: Path
    origin: Origin | None
    train_data: TrainingData
    valid_data: TrainingData | None
    fingerprint: Fingerprint


def check_inputs(config: Config) -> Inputs:
    """Check a run's flags against each other and against the machine, and open what they name.

    Raises:
        UserError: names the flag.
    """
    if not config.data.train_data:
        raise UserError("--train-data is missing: give a folder made by tools/prepare_data.py")
    check_world_size(config, world_size_from_environment())
    check_backend(config)
    for name in ("save_interval", "async_save", "keep_last"):
        if getattr(config.checkpoint, name) and not config.checkpoint.save:
            raise UserError(f"{flag(name)}: needs --save, the folder to save to; or leave it out")
    sources = {"--train-data": config.data.train_data, "--valid-data": config.data.valid_data}
    if config.data.tokenizer and not any_pair(sources):
        raise UserError(f"--tokenizer {config.data.tokenizer}: is for .bin/.idx pairs; shards carry their own")
    tokenizer, folder = tokenizer_of(config.data.train_data, config.data.tokenizer)
    origin = open_origin(config.training.init_from) if config.training.init_from else None
    return Inputs(config, tokenizer, folder, reserved_ids(load_tokenizer(folder)), origin)


def resolve_run(inputs: Inputs) -> ResolvedRun:
    """Resolve the configuration, and open the data with it.

    Raises:
        UserError: as :func:`resolve`; or the data are damaged, or of two tokenizers.
    """
    startup.current.phase = "reading the data"
    config = resolve(inputs.config, inputs.tokenizer, inputs.origin, inputs.reserved)
    settings = SequenceSettings(
        config.data.seq_length,
        config.tidar.block_size,
        config.mask_token_id,
        config.training.seed,
        reserved=inputs.reserved,
        random_masks=config.tidar.masking == "random",
        chosen_blocks=config.chosen_blocks,
        reset_positions=config.data.reset_positions,
        cross_document_attention=config.data.cross_document_attention,
    )

    def data(given: tuple[str, ...], name: str) -> TrainingData:
        return TrainingData(given, settings, tokenizer=config.data.tokenizer, verify=config.data.verify_data, flag=name)

    train_data = data(config.data.train_data, "--train-data")
    train_data.sources[0].load_tokenizer()  # the run keeps a copy, so nothing of it may be missing
    valid_data = data(config.data.valid_data, "--valid-data") if config.data.valid_data else None
    if valid_data is not None:
        train_data.check_same_tokenizer(valid_data)
    fingerprint = run_fingerprint(config, train_data)
    return ResolvedRun(config, inputs.tokenizer_folder, inputs.origin, train_data, valid_data, fingerprint)


def resolve(
    config: Config, tokenizer: TokenizerEntry, origin: Origin | None = None, reserved: Sequence[int] = ()
) -> ResolvedConfig:
    """Fill in what the tokenizer and ``--init-from`` decide: the model, its vocabulary, the mask token.

    Args:
        config: as given.
        tokenizer: the data's.
        origin: what ``--init-from`` names.
        reserved: ids of the tokenizer that no text has.

    Raises:
        UserError: a mask token that has another meaning, flags that contradict ``--init-from``, a vocabulary too
            small for the data, or a model that could not be exported.
    """
    given, model, mask = config.model, config.model, config.tidar.mask_token_id
    if origin is not None:
        model = origin.model(given)
        for field in dataclasses.fields(ModelConfig):
            theirs, ours = getattr(model, field.name), getattr(given, field.name)
            if ours not in (theirs, field.default):
                what = f"{flag(field.name)} {ours}: --init-from {config.training.init_from} has {theirs}"
                raise UserError(f"{what}; leave the flag out, the folder sets the model")
        mask = mask if mask is not None else origin.mask_token_id
        model = dataclasses.replace(model, vocab_size=origin.rows_needed())
    if model.vocab_size is not None and tokenizer.vocab_size > model.vocab_size:
        where = f"--init-from {config.training.init_from}" if config.training.init_from else "--vocab-size"
        raise UserError(
            f"{where}: {model.vocab_size} ids are fewer than the {tokenizer.vocab_size} of the data's tokenizer; "
            "prepare the data with the model's own tokenizer (tools/prepare_data.py --tokenizer FOLDER)"
        )
    first_free = tokenizer.vocab_size
    if mask is None:
        mask = first_free if origin is None else free_id(first_free, reserved, model.vocab_size or 0)
    if mask < first_free and mask not in reserved:
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
    check_config(resolved, resolved=True)
    files = origin.huggingface_files() if origin is not None else None
    huggingface_config(resolved, tokenizer.eos_token_id, read_json(files / CONFIG) if files is not None else None)
    if files is not None:
        check_mask_token(files, mask)  # as the export will
    return ResolvedConfig.of(resolved)


MAY_CHANGE = ("max_position_embeddings",)  # a number that an export writes


def run_fingerprint(config: Config, data: TrainingData) -> Fingerprint:
    """What a run is: its model, and what decides the tokens of packed sequence n."""
    model = {name: value for name, value in dataclasses.asdict(config.model).items() if name not in MAY_CHANGE}
    return {
        **model,
        "bf16": config.training.bf16,
        "mask_token_id": config.tidar.mask_token_id,
        **data.fingerprint(),
    }


def starting_point(config: Config, fingerprint: Fingerprint) -> int | None:
    """The iteration that the run will probably continue from; None to start anew.

    Whatever can be refused is refused here, before there are process groups; that a checkpoint is damaged may still
    turn out while it is loaded.

    Raises:
        UserError: ``--load`` names a folder without a whole checkpoint, or of another run; ``--save`` one that holds
            another run.
    """
    load, save = config.checkpoint.load, config.checkpoint.save
    same = bool(load and save and Path(load).resolve() == Path(save).resolve())
    if save and not same and saved_iterations(save):
        raise UserError(f"--save {save}: holds a run already; continue it with --load {save}, or choose another folder")
    if not load:
        return None
    points, _ = restart_points(load)
    if not points and not same:
        raise UserError(f"--load {load}: holds no checkpoint; leave the flag out to start anew")
    for iteration in points:
        try:
            state = read_state(checkpoint_folder(load, iteration), config.checkpoint.verify_checkpoint)
        except Damaged:
            continue  # loading says so
        if state.weights_only:
            raise UserError(f"--load {load}: holds a model's weights, no run; start from them with --init-from {load}")
        check_fingerprint(load, state.fingerprint, fingerprint, config.checkpoint.override_fingerprint)
        return iteration
    return points[0] if points else None
