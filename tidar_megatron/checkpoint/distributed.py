"""megatron-core's distributed checkpoints (``torch_dist``), in Megatron-LM's folder layout.

``FOLDER/iter_0000100/`` holds one checkpoint, ``FOLDER/latest_checkpointed_iteration.txt`` names the newest. A
checkpoint knows no layout: it can be loaded under another tensor- or pipeline-parallel size. The data has no state
beyond the number of packed sequences consumed, because packed sequence n is a pure function of (seed, epoch, n).
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from tidar_megatron.checkpoint.torch_adam import prepare_to_load, separate_steps
from tidar_megatron.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"


def checkpoint_folder(folder: str | Path, iteration: int) -> Path:
    """Where the checkpoint of ``iteration`` lives."""
    return Path(folder) / f"iter_{iteration:07d}"


def saved_iterations(folder: str | Path) -> list[int]:
    """The iterations with a whole checkpoint, ascending."""
    return sorted(int(path.name[5:]) for path in Path(folder).glob("iter_*") if path.name[5:].isdigit())


def latest_iteration(folder: str | Path) -> int | None:
    """The iteration the tracker names; None where nothing was saved yet.

    Raises:
        UserError: the tracker is garbled, or names a checkpoint that is not there.
    """
    tracker = Path(folder) / TRACKER
    if not tracker.exists():
        return None
    text = tracker.read_text(errors="replace").strip()
    if not text.isdigit():
        raise UserError(f"{tracker}: holds {text[:40]!r}, not an iteration; write the newest good iteration into it")
    if not checkpoint_folder(folder, int(text)).is_dir():
        raise UserError(f"{tracker}: names iteration {text}, but {checkpoint_folder(folder, int(text))} is missing")
    return int(text)


def save_checkpoint(
    folder: str | Path,
    iteration: int,
    consumed_sequences: int,
    model: list[GPTModel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
) -> Path:
    """Write a checkpoint; collective over all ranks. The tracker names it only once it is whole."""
    target = checkpoint_folder(folder, iteration)
    partial = target.with_name(target.name + ".partial")
    is_main = dist.get_rank() == 0
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    state = _state(model, optimizer, scheduler, loading=False)
    state |= {"iteration": iteration, "consumed_sequences": consumed_sequences}
    dist_checkpointing.save(state, str(partial))
    dist.barrier()
    if is_main:
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        tracker = Path(folder) / TRACKER
        tracker.with_suffix(".tmp").write_text(str(iteration))
        os.replace(tracker.with_suffix(".tmp"), tracker)
    dist.barrier()
    return target


def load_checkpoint(
    folder: str | Path,
    iteration: int,
    model: list[GPTModel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
) -> int:
    """Fill model, optimizer and schedule from a checkpoint; collective. Returns the sequences consumed so far."""
    prepare_to_load(optimizer)
    state = _state(model, optimizer, scheduler, loading=True)
    loaded = dist_checkpointing.load(state, str(checkpoint_folder(folder, iteration)))
    _fill(model, loaded)
    _follow_schedule(loaded["optimizer"], {key: optimizer.param_groups[0][key] for key in ("max_lr", "min_lr")})
    with torch.no_grad():
        optimizer.load_state_dict(loaded["optimizer"])
    separate_steps(optimizer)
    scheduler.load_state_dict(loaded["opt_param_scheduler"])
    return int(loaded["consumed_sequences"])


def _follow_schedule(state: Any, schedule: dict[str, float]) -> None:
    """megatron-core keeps the ends of the schedule in the parameter groups; the run's configuration rules over them."""
    if isinstance(state, dict):
        for group in state.get("param_groups", []):
            group.update(schedule)
        for inner in state.values():
            _follow_schedule(inner, schedule)


def load_weights(folder: str | Path, iteration: int, model: list[GPTModel]) -> None:
    """Fill the model alone, whatever layout it was trained in."""
    _fill(model, dist_checkpointing.load(_weights(model), str(checkpoint_folder(folder, iteration))))


def _weights(model: list[GPTModel]) -> dict[str, Any]:
    """Megatron-LM's keys: "model", or "model0", "model1", .. of the chunks of an interleaved pipeline."""
    names = ["model"] if len(model) == 1 else [f"model{number}" for number in range(len(model))]
    return {name: chunk.sharded_state_dict() for name, chunk in zip(names, model, strict=True)}


def _fill(model: list[GPTModel], loaded: dict[str, Any]) -> None:
    for number, chunk in enumerate(model):
        chunk.load_state_dict(loaded["model" if len(model) == 1 else f"model{number}"])


def _state(
    model: list[GPTModel], optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler, *, loading: bool
) -> dict[str, Any]:
    weights = _weights(model)
    # of the distributed optimizer's formats the one that knows no layout, gathered on one rank of each group alone
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
    }
    return {
        **weights,
        "optimizer": optimizer.sharded_state_dict(weights, is_loading=loading, metadata=metadata),
        "opt_param_scheduler": scheduler.state_dict(),
    }
