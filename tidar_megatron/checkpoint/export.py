"""A run's checkpoint -> an ordinary Hugging Face folder, in one process, whatever layout it was trained in."""

import dataclasses
from pathlib import Path

from tidar_megatron.checkpoint.distributed import load_weights
from tidar_megatron.checkpoint.folder import checkpoint_folder, latest_iteration, saved_iterations
from tidar_megatron.checkpoint.huggingface import export_huggingface
from tidar_megatron.checkpoint.manifest import Damaged, check_hashes
from tidar_megatron.config import CONFIG_FILE, ParallelConfig, load_config
from tidar_megatron.data.manifest import TOKENIZER_FOLDER
from tidar_megatron.data.tokenizer import load_tokenizer
from tidar_megatron.distributed.groups import initialize
from tidar_megatron.errors import UserError
from tidar_megatron.models.gpt import build_model


def export_run(run: str | Path, target: str | Path, iteration: int | None = None) -> int:
    """Write the checkpoint of ``iteration`` (default: the newest) of the run folder ``run`` to the folder ``target``.

    Returns:
        The iteration exported.

    Raises:
        UserError: ``run`` is no run folder, holds no checkpoint, or a damaged one; ``target`` is not empty.
    """
    run = Path(run)
    if not (run / CONFIG_FILE).exists():
        raise UserError(f"--checkpoint {run}: holds no {CONFIG_FILE}; give the folder that was --save in training")
    iteration = iteration if iteration is not None else latest_iteration(run)
    if iteration is None:
        raise UserError(f"--checkpoint {run}: holds no checkpoint yet")
    if not checkpoint_folder(run, iteration).is_dir():
        there = ", ".join(str(i) for i in saved_iterations(run)) or "none"
        raise UserError(f"--iteration {iteration}: is not in {run}; there are: {there}")
    checkpoint = checkpoint_folder(run, iteration)
    try:
        check_hashes(checkpoint)
    except Damaged as damage:
        raise UserError(f"--checkpoint {run}: {damage}; choose another one with --iteration") from None
    config = dataclasses.replace(load_config(run / CONFIG_FILE), parallel=ParallelConfig())
    assert config.model.vocab_size is not None, "a run's configuration is resolved"
    ranks = initialize(config.parallel, config.training.seed)
    (model,) = build_model(config, config.model.vocab_size, ranks)
    try:
        load_weights(checkpoint, [model])
    except Damaged as damage:
        raise UserError(f"--checkpoint {run}: {damage}") from None
    export_huggingface(model, config, load_tokenizer(run / TOKENIZER_FOLDER), target)
    return iteration
