"""Conversion of a Hugging Face folder to a run's folder and back, tensor by tensor in one process, and verification.

Checkpoints do not depend on the layout, so an imported one can be loaded in any layout. ``import`` writes a run's
folder whose checkpoint has only weights; ``tidar pretrain --init-from`` starts from it.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import __version__ as megatron_version
from numpy.typing import NDArray
from torch import Tensor

from tidar_megatron.adapter import CONFIG as ADAPTER_CONFIG
from tidar_megatron.adapter import MODULES, Adapter, AdapterConfig, weights_hash
from tidar_megatron.checkpoint import folder
from tidar_megatron.checkpoint.contents import STATE_FILE, State, load_weights, read_state
from tidar_megatron.checkpoint.fingerprint import check_shapes
from tidar_megatron.checkpoint.integrity import Damaged, check_hashes, seal
from tidar_megatron.config import (
    CONFIG_FILE,
    Config,
    ModelConfig,
    ParallelConfig,
    ResolvedConfig,
    check_config,
    load_resolved_config,
)
from tidar_megatron.data.doubled import make_batch
from tidar_megatron.data.manifest import TOKENIZER_FOLDER
from tidar_megatron.data.packing import PackedSequence
from tidar_megatron.data.tokenizer import (
    free_id,
    load_tokenizer,
    reserved_ids,
    rows_needed,
    save_tokenizer,
    vocabulary_size,
)
from tidar_megatron.distributed.groups import initialize, shut_down
from tidar_megatron.errors import UserError
from tidar_megatron.hf_folder.model import check_folder, load_causal_lm
from tidar_megatron.huggingface.exported_engine import write_custom_generate
from tidar_megatron.huggingface.families import model_from_huggingface, settled, tidar_section
from tidar_megatron.huggingface.folders import (
    CONFIG,
    SHARD_BYTES,
    Safetensors,
    export_huggingface,
    has_tokenizer,
)
from tidar_megatron.huggingface.mapping import split
from tidar_megatron.huggingface.origin import keep_huggingface_files, kept_huggingface_files
from tidar_megatron.huggingface.output_row import mask_output_row
from tidar_megatron.huggingface.streaming import UnshardedModel, WeightReader, unsharded_model, write_weights
from tidar_megatron.huggingface.token_ids import check_mask_token
from tidar_megatron.models.gpt import build_model, run_model
from tidar_megatron.models.initialize import MaskRow
from tidar_megatron.models.output_layer import output_weight
from tidar_megatron.models.parameters import VOCABULARY, kind_of
from tidar_megatron.new_folder import check_free, new_folder
from tidar_megatron.precision import full_float32

TOLERANCE = 1e-4  # largest difference of logits in float32
# files that are not copied from a folder: opening one could run code
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"}
# None: the dtype of the tensors; float16 becomes float32, which represents all of its values
DTYPES = (None, torch.bfloat16, torch.float32, torch.float16)


# --- in ----------------------------------------------------------------------------------------------------------
def import_run(
    source: str | Path,
    target: str | Path,
    parallel: ParallelConfig | None = None,
    init_mask_token: str | None = None,
    mask_token_id: int | None = None,
) -> Config:
    """Write the Hugging Face folder ``source`` as the run's folder ``target``, atomically.

    Args:
        source: A folder with config.json and safetensors, with or without a tokenizer.
        target: The folder to write; it must not exist, or must be empty.
        parallel: A layout that the model must fit; it is only checked and written to the run's configuration.
        init_mask_token: Gives the model a mask token and says how its row starts (:class:`MaskRow`); None changes no
            row.
        mask_token_id: The id of the mask token; by default a row that no text uses, or a new one.

    Returns:
        The run's configuration.

    Raises:
        UserError: The model is not supported, not complete, or does not fit the layout; nothing is written then.
    """
    source, target = Path(source), Path(target)
    check_free("--output", target)
    model = model_from_huggingface(source, ModelConfig())
    dtype = check_folder(source, other_names=True).dtype
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        raise UserError(f"{source / CONFIG}: dtype {name} is not supported; save the model in bfloat16 or float32")
    tensors = Safetensors(source)
    tensors.check(model)
    tokenizer = load_tokenizer(source) if has_tokenizer(source) else None
    assert model.vocab_size is not None
    rows = model.vocab_size if tokenizer is None else rows_needed(source, model.vocab_size)
    config = Config(model=dataclasses.replace(model, vocab_size=rows), parallel=parallel or ParallelConfig())
    config = dataclasses.replace(
        config,
        # tensors with a higher precision than the folder's dtype keep it
        training=dataclasses.replace(config.training, bf16=dtype != torch.float32 and tensors.dtypes() == {"BF16"}),
    )
    config = _with_tidar_section(config, tidar_section(source))
    if init_mask_token is not None:
        config = _with_mask_token(config, tokenizer, mask_token_id)
    check_mask_token(source, config.tidar.mask_token_id, tokenizer)
    check_config(config)
    resolved = ResolvedConfig.of(config)
    unsharded = unsharded_model(resolved)
    tensors.check_shapes(unsharded, model)
    mask = config.tidar.mask_token_id if init_mask_token is not None else None
    row = MaskRow(init_mask_token or "keep", mask, model.vocab_size, resolved.vocab_size)
    with new_folder("--output", target, CONFIG_FILE) as run:
        _write_checkpoint(config, unsharded, run, tensors, model, row)
        if tokenizer is not None:
            save_tokenizer(tokenizer, run / TOKENIZER_FOLDER)
        keep_huggingface_files(source, run)
        (run / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
    return config


def _with_tidar_section(config: Config, section: dict[str, Any]) -> Config:
    """Return ``config`` with the values of the folder's ``tidar`` section, so that an export writes them back."""
    tidar = {name: section[name] for name in ("mask_token_id", "block_size", "ar_loss_weight") if name in section}
    config = dataclasses.replace(config, tidar=dataclasses.replace(config.tidar, **tidar))
    block_size, length = config.tidar.block_size, config.data.seq_length
    whole_blocks = max(1, length // block_size) * block_size
    length = section.get("seq_length", whole_blocks)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, seq_length=length))


def _with_mask_token(config: Config, tokenizer: Any, mask_token_id: int | None) -> Config:
    size = config.model.vocab_size or 0
    mask = mask_token_id
    if mask is None:
        mask = config.tidar.mask_token_id
    if mask is None and tokenizer is None:
        raise UserError(
            "--init-mask-token: the folder has no tokenizer to tell which ids are free; add --mask-token-id"
        )
    if mask is None:
        mask = free_id(vocabulary_size(tokenizer), reserved_ids(tokenizer), size)
    used = {*tokenizer.get_vocab().values()} - {*reserved_ids(tokenizer)} if tokenizer is not None else {}
    if mask != config.tidar.mask_token_id and mask in used:
        raise UserError(f"--mask-token-id {mask}: the tokenizer uses it; leave it out to take one that no text uses")
    if not 0 <= mask <= size:
        raise UserError(f"--mask-token-id {mask}: the model has ids 0 to {size - 1}, and {size} would be a new one")
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=max(size, mask + 1)),
        tidar=dataclasses.replace(config.tidar, mask_token_id=mask),
    )


def _write_checkpoint(
    config: Config, unsharded: UnshardedModel, run: Path, tensors: Safetensors, model: ModelConfig, row: MaskRow
) -> None:
    partial = folder.new_partial(run, 0)
    dtype = torch.bfloat16 if config.training.bf16 else torch.float32

    def read(name: str) -> Tensor:
        tensor = tensors.parameter(name, model, unsharded.shapes[name]).to(dtype)
        if name in VOCABULARY:
            row.fill(tensor, name)
        return tensor

    write_weights(partial, unsharded, read)
    state = State(
        iteration=0,
        consumed_sequences=0,
        states={},
        fingerprint={},
        layout={},
        config=dataclasses.asdict(config),
        megatron_core=megatron_version,
        weights_only=True,
    )
    (partial / STATE_FILE).write_text(state.model_dump_json(indent=1), encoding="utf-8")
    folder.publish(partial, 0, {path.name: seal(path) for path in partial.iterdir()}, keep_last=None)


# --- out ---------------------------------------------------------------------------------------------------------
def _intact_checkpoint(run: Path, iteration: int | None) -> tuple[ResolvedConfig, int, Path]:
    """Return a run's configuration with the default layout, and an iteration with its verified checkpoint folder.

    Args:
        run: The run's folder.
        iteration: The iteration of the checkpoint; None: the newest.

    Raises:
        UserError: The run or the checkpoint is missing, damaged, or does not match the run's configuration.
    """
    if not (run / CONFIG_FILE).exists():
        raise UserError(f"--checkpoint {run}: holds no {CONFIG_FILE}; give the --save folder of a training run")
    iteration = iteration if iteration is not None else folder.latest_iteration(run)
    if iteration is None:
        raise UserError(f"--checkpoint {run}: holds no checkpoint yet")
    checkpoint = folder.checkpoint_folder(run, iteration)
    if not checkpoint.is_dir():
        there = ", ".join(str(i) for i in folder.saved_iterations(run)) or "none"
        raise UserError(f"--iteration {iteration}: is not in {run}; there are: {there}")
    try:
        check_hashes(checkpoint)
        saved = read_state(checkpoint).config.get("model", {})
    except Damaged as damage:
        raise UserError(f"--checkpoint {run}: {damage}; choose another one with --iteration") from None
    config = dataclasses.replace(load_resolved_config(run / CONFIG_FILE), parallel=ParallelConfig())
    check_shapes(run / CONFIG_FILE, saved, config.model)
    return config, iteration, checkpoint


def export_run(
    run: str | Path,
    target: str | Path,
    iteration: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    base: str | Path | None = None,
    draft_rank: int | None = None,
) -> int:
    """Write a checkpoint of a run as a Hugging Face folder; of a run that trained draft weights, as an adapter's.

    Args:
        run: The run's folder.
        target: The folder to write; it must not exist, or must be empty.
        iteration: The iteration of the checkpoint; by default the newest.
        shard_bytes: The approximate size of a file of weights.
        base: The folder of the model that draft weights were trained for, to copy beside them: the folder then holds
            both, and transformers loads the model from it.
        draft_rank: The rank of the exported pairs, below that in training: a smaller adapter with worse drafts.

    Returns:
        The iteration that was exported.

    Raises:
        UserError: ``run`` is not a run's folder, its checkpoint is missing or damaged, ``target`` is not empty,
            ``base`` is not the model of the draft weights, or ``draft_rank`` does not fit.
    """
    run = Path(run)
    config, iteration, checkpoint = _intact_checkpoint(run, iteration)
    unsharded = unsharded_model(config)
    if config.trains_drafts:
        _export_adapter(run, config, checkpoint, unsharded, Path(target), base, draft_rank)
        return iteration
    for option, given in (("--base", base), ("--draft-rank", draft_rank)):
        if given is not None:
            raise UserError(f"{option} {given}: is for draft weights, and {run} trained the whole model; leave it out")
    try:
        # an imported model may have no tokenizer; a trained run always has one
        has_none = read_state(checkpoint).weights_only and not (run / TOKENIZER_FOLDER).exists()
        tokenizer = None if has_none else load_tokenizer(run / TOKENIZER_FOLDER)
        reader, source = WeightReader(checkpoint, unsharded), kept_huggingface_files(run)
        # a model that was imported with its mask token and not trained is exported unchanged, bit for bit
        section = tidar_section(source) if source is not None and read_state(checkpoint).weights_only else {}
        keep_mask_row = section.get("mask_token_id") == config.tidar.mask_token_id
        export_huggingface(unsharded, reader.read, config, tokenizer, target, source, shard_bytes, keep_mask_row)
    except Damaged as damage:
        raise UserError(f"--checkpoint {run}: {damage}") from None
    return iteration


def _export_adapter(
    run: Path,
    config: ResolvedConfig,
    checkpoint: Path,
    unsharded: UnshardedModel,
    target: Path,
    base: str | Path | None,
    draft_rank: int | None,
) -> None:
    try:
        read, fingerprint = WeightReader(checkpoint, unsharded).read, read_state(checkpoint).fingerprint
        tensors = {}
        for name in unsharded.shapes:
            kind, numbers = kind_of(name)
            tensor = read(name)
            if kind.fused == "qkv":
                tensor = torch.cat(split(kind, tensor, unsharded.num_query_groups, unsharded.num_attention_heads))
            tensors[_adapter_name(name, numbers)] = tensor
    except Damaged as damage:
        raise UserError(f"--checkpoint {run}: {damage}") from None
    drafts, model = config.drafts, config.model
    modules = {name.split(".")[-2] for name in tensors if name.startswith("layers.")}
    about = AdapterConfig(
        base_sha256=fingerprint["base_sha256"],
        block_size=config.tidar.block_size,
        rank=drafts.draft_rank,
        alpha=drafts.draft_alpha,
        modules=[name for name in MODULES.values() if name in modules],
        selector_rank=drafts.draft_selector,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        vocab_size=config.vocab_size,
    )
    adapter = Adapter(about, tensors) if draft_rank is None else Adapter(about, tensors).truncated(draft_rank)
    if base is not None and weights_hash(base) != about.base_sha256:
        raise UserError(f"--base {base}: is not the model that {run} trained draft weights for; name that folder")
    with new_folder("--hf", target, ADAPTER_CONFIG) as folder:
        if base is not None:
            for file in Path(base).iterdir():
                if file.is_file() and file.suffix not in PICKLES:
                    shutil.copyfile(file, folder / file.name)
            write_custom_generate(folder)
        adapter.save(folder)


def _adapter_name(name: str, numbers: list[str]) -> str:
    """Return the name of a draft weight in an adapter's file."""
    if not numbers:
        return name.removesuffix(".weight")
    module, _, weight = name.split(".", 3)[3].partition(".draft.")
    return f"layers.{numbers[0]}.{MODULES[module]}.{weight}"


# --- both --------------------------------------------------------------------------------------------------------
@full_float32()
@torch.no_grad()
def verify(hf: str | Path, run: str | Path, iteration: int | None = None, length: int = 64, rows: int = 4) -> dict:
    """Compare the logits of a Hugging Face folder and of a run's checkpoint in float32, for random token ids.

    A mask token that only the run has is excluded, and so are the rows by which the run's vocabulary has grown. If the
    output layer is untied, the folder's row of the mask token may be the run's, or the one that an export writes.

    Args:
        hf: The Hugging Face folder.
        run: The run's folder.
        iteration: The iteration of the checkpoint; by default the newest.
        length: Tokens per sequence.
        rows: The number of sequences.

    Returns:
        ``hf``, ``checkpoint``, ``iteration``, ``max_logit_difference``, ``largest_logit``, ``same_choice`` (fraction of
        positions at which both have their largest logit at the same id), ``positions``, ``vocabulary``, ``left_out``
        (the mask token, or None), ``new_rows`` (rows that only the run has).

    Raises:
        UserError: One of the two cannot be read, or the models have different shapes.
    """
    ours, iteration, checkpoint = _intact_checkpoint(Path(run), iteration)
    if ours.trains_drafts:
        raise UserError(f"--checkpoint {run}: holds draft weights alone; tidar certify --adapter shows what they do")
    hf_config = check_folder(hf)
    theirs = model_from_huggingface(hf, ours.model)
    assert theirs.vocab_size is not None
    mask = ours.tidar.mask_token_id
    needed = rows_needed(hf, theirs.vocab_size) if has_tokenizer(hf) else theirs.vocab_size
    grown = {needed, needed + 1} if mask == needed else {needed}  # by added tokens, and by the mask token
    fits = ours.vocab_size in grown
    shape = dataclasses.replace(ours.model, vocab_size=theirs.vocab_size) if fits else ours.model
    one, other = (dataclasses.asdict(settled(model)) for model in (theirs, shape))
    if differing := [name for name in one if one[name] != other[name]]:
        raise UserError(f"--checkpoint {run}: is not the model of --hf {hf}: {', '.join(differing)} differ")
    Safetensors(hf).check(theirs)
    tokens = torch.randint(theirs.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    own_row = mask is not None and tidar_section(hf).get("mask_token_id") != mask
    if own_row:
        tokens[tokens == mask] = 0 if mask else 1
    reference = load_causal_lm(hf, hf_config, torch.float32)
    expected = reference(tokens).logits
    del reference
    dtype = torch.bfloat16 if ours.training.bf16 else torch.float32  # the dtype of an export
    ours = dataclasses.replace(ours, training=dataclasses.replace(ours.training, bf16=False))
    ranks = initialize(ours.parallel, 0)
    try:
        (model,) = build_model(ours, ours.vocab_size, ranks)
        load_weights(checkpoint, [model])
        batch = make_batch([_one_document(row.numpy()) for row in tokens], 1, 0, doubled=False)
        states = run_model(model, batch)
        head = output_weight(model)[: ours.model.vocab_size]
        found = (states @ head.t()).transpose(0, 1)[..., : theirs.vocab_size]
        if mask is None or mask >= theirs.vocab_size:
            pass  # the folder has no such row
        elif own_row:
            found[..., mask] = expected[..., mask]
        elif ours.model.untie_embeddings_and_output_weights:
            exported = (states @ mask_output_row(head.to(dtype), mask).to(head)).t()
            either = torch.stack([found[..., mask], exported])
            found[..., mask] = either[(either - expected[..., mask]).abs().amax((1, 2)).argmin()]
    except Damaged as damage:
        raise UserError(f"--checkpoint {run}: {damage}") from None
    finally:
        shut_down()
    return {
        "hf": str(hf),
        "checkpoint": str(run),
        "iteration": iteration,
        "max_logit_difference": (found - expected).abs().max().item(),
        "largest_logit": expected.abs().max().item(),
        "same_choice": (found.argmax(-1) == expected.argmax(-1)).float().mean().item(),
        "positions": tokens.numel(),
        "vocabulary": theirs.vocab_size,
        "left_out": mask if own_row else None,
        "new_rows": ours.vocab_size - theirs.vocab_size,
    }


def _one_document(tokens: NDArray[np.int64]) -> PackedSequence:
    nothing, zeros = np.zeros_like(tokens, dtype=bool), np.zeros_like(tokens)
    return PackedSequence(tokens, zeros, nothing, ~nothing, ~nothing, zeros, np.arange(len(tokens)))
