"""Check a run's inputs, and resolve its configuration and data, before any process group exists."""

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
from tidar_megatron.data.sources import DataTokenizer, tokenizer_of
from tidar_megatron.data.tokenizer import free_id
from tidar_megatron.distributed import startup
from tidar_megatron.distributed.groups import world_size_from_environment
from tidar_megatron.distributed.platform import check_backend
from tidar_megatron.errors import UserError
from tidar_megatron.huggingface.folders import check_exportable
from tidar_megatron.huggingface.origin import Origin, open_origin


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run, checked as far as possible without reading its data.

    Attributes:
        config: The configuration as the user gave it.
        tokenizer: The tokenizer of the training data.
        origin: The model that ``--init-from`` names.
    """

    config: Config
    tokenizer: DataTokenizer
    origin: Origin | None


@dataclass(frozen=True)
class ResolvedRun:
    """The resolved configuration and data of a run: everything that its start needs besides process groups."""

    config: ResolvedConfig
    tokenizer_folder: Path
    origin: Origin | None
    train_data: TrainingData
    valid_data: TrainingData | None
    fingerprint: Fingerprint


def check_inputs(config: Config) -> Inputs:
    """Check a run's flags against each other and against the machine, and open the tokenizer and ``--init-from``.

    Raises:
        UserError: A flag is missing or invalid; the message names it.
    """
    if not config.data.train_data:
        raise UserError("--train-data is missing: give a folder made by tidar prepare-data")
    check_world_size(config, world_size_from_environment())
    check_backend(config)
    for name in ("save_interval", "async_save", "keep_last"):
        if getattr(config.checkpoint, name) and not config.checkpoint.save:
            raise UserError(f"{flag(name)}: needs --save, the folder to save to; or leave it out")
    tokenizer = tokenizer_of(config.data.train_data, config.data.valid_data, config.data.tokenizer)
    origin = open_origin(config.training.init_from) if config.training.init_from else None
    return Inputs(config, tokenizer, origin)


def resolve_run(inputs: Inputs) -> ResolvedRun:
    """Resolve the configuration, and open the data with it.

    Raises:
        UserError: :func:`resolve` refuses the configuration, the data is damaged, or training and held-out data have
            different tokenizers.
    """
    startup.current.phase = "reading the data"
    config = resolve(inputs.config, inputs.tokenizer.entry, inputs.origin, inputs.tokenizer.reserved)
    settings = SequenceSettings(
        config.data.seq_length,
        config.tidar.block_size,
        config.mask_token_id,
        config.training.seed,
        reserved=inputs.tokenizer.reserved,
        random_masks=config.tidar.masking == "random",
        chosen_blocks=config.chosen_blocks,
        starts_anywhere=config.tidar.block_starts == "anywhere",
        reset_positions=config.data.reset_positions,
        cross_document_attention=config.data.cross_document_attention,
    )

    def data(given: tuple[str, ...], name: str) -> TrainingData:
        return TrainingData(given, settings, tokenizer=config.data.tokenizer, verify=config.data.verify_data, flag=name)

    train_data = data(config.data.train_data, "--train-data")
    train_data.sources[0].load_tokenizer()  # the run saves a copy, so the tokenizer must be complete
    valid_data = data(config.data.valid_data, "--valid-data") if config.data.valid_data else None
    if valid_data is not None:
        train_data.check_same_tokenizer(valid_data)
    fingerprint = run_fingerprint(config, train_data)
    if config.trains_drafts and inputs.origin is not None:
        fingerprint["base_sha256"] = inputs.origin.weights_hash()
    return ResolvedRun(config, inputs.tokenizer.folder, inputs.origin, train_data, valid_data, fingerprint)


def resolve(
    config: Config, tokenizer: TokenizerEntry, origin: Origin | None = None, reserved: Sequence[int] = ()
) -> ResolvedConfig:
    """Fill in the settings that the tokenizer and ``--init-from`` decide: the model, its vocabulary, the mask token.

    Args:
        config: The configuration as the user gave it.
        tokenizer: The tokenizer of the training data.
        origin: The model that ``--init-from`` names.
        reserved: Token ids that the tokenizer never produces from text.

    Raises:
        UserError: The mask token has another meaning, flags contradict ``--init-from``, the vocabulary is too small for
            the data, or the model could not be exported.
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
            "prepare the data with the model's own tokenizer (tidar prepare-data --tokenizer FOLDER)"
        )
    if config.trains_drafts:
        return _resolve_drafts(config, model, origin)
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
    check_exportable(resolved, tokenizer.eos_token_id, origin.huggingface_files() if origin is not None else None)
    return ResolvedConfig.of(resolved)


def _resolve_drafts(config: Config, model: ModelConfig, origin: Origin | None) -> ResolvedConfig:
    """Fill in the settings of a run that trains draft weights: its masks have a row of their own, and no token id."""
    if origin is None:
        raise UserError("--train drafts: needs --init-from, the model that the drafts are for")
    if origin.mask_token_id is not None:
        raise UserError(
            f"--train drafts: --init-from {config.training.init_from} drafts already (its mask token is "
            f"{origin.mask_token_id}); leave out --train to train it further, or name the AR model that it came from"
        )
    if config.tidar.mask_token_id is not None or config.tidar.init_mask_token is not None:
        name = "--mask-token-id" if config.tidar.mask_token_id is not None else "--init-mask-token"
        raise UserError(f"{name}: the masks of --train drafts have a row of their own, and no id; leave it out")
    # the id after the last one: no token of the data has it, and no row of the model
    tidar = dataclasses.replace(config.tidar, mask_token_id=model.vocab_size)
    resolved = dataclasses.replace(config, model=model, tidar=tidar)
    check_config(resolved, resolved=True)
    return ResolvedConfig.of(resolved)


MAY_CHANGE = ("max_position_embeddings",)  # only an export uses it


def run_fingerprint(config: Config, data: TrainingData) -> Fingerprint:
    """Return the fingerprint of a run: its model, and everything that decides the tokens of packed sequence n."""
    model = {name: value for name, value in dataclasses.asdict(config.model).items() if name not in MAY_CHANGE}
    drafts = dataclasses.asdict(config.drafts) if config.trains_drafts else {}
    return {
        **model,
        **drafts,
        "bf16": config.training.bf16,
        "mask_token_id": config.tidar.mask_token_id,
        **data.fingerprint(),
    }


def starting_point(config: Config, fingerprint: Fingerprint) -> int | None:
    """Return the iteration from which the run will probably resume; None to start from scratch.

    All checks that need no process groups are made here. Damage to a checkpoint's tensors is found only when it is
    loaded; the run then resumes from an older one.

    Raises:
        UserError: ``--load`` names a folder without an intact checkpoint or of another run, or ``--save`` names a
            folder that holds another run.
    """
    load, save = config.checkpoint.load, config.checkpoint.save
    same = bool(load and save and Path(load).resolve() == Path(save).resolve())
    if save and not same and saved_iterations(save):
        raise UserError(f"--save {save}: already holds a run; resume it with --load {save}, or choose another folder")
    if not load:
        return None
    points, _ = restart_points(load)
    if not points and not same:
        raise UserError(
            f"--load {load}: holds no checkpoint; leave the flag out to start a run, or give it the folder of --save"
        )
    for iteration in points:
        try:
            state = read_state(checkpoint_folder(load, iteration), config.checkpoint.verify_checkpoint)
        except Damaged:
            continue  # loading prints the damage
        if state.weights_only:
            raise UserError(
                f"--load {load}: holds only a model's weights, not a run; start from them with --init-from {load}"
            )
        check_fingerprint(load, state.fingerprint, fingerprint, config.checkpoint.override_fingerprint)
        return iteration
    return points[0] if points else None
