"""Map a run to the contents of a checkpoint and back, with megatron-core's distributed checkpoints (``torch_dist``).

===========================  ==========================================================================================
``*.distcp``, ``.metadata``  the weights and Adam's moments by their global names, independent of the layout: they can
                             be loaded under another one (TP, PP, VPP, CP, EP, DP, distributed optimizer on or off)
``state.json``               the run's progress (iteration, consumed sequences, states of parts of the loop by name) and
                             its identity (configuration, fingerprint, layout)
``random_00000.json``, ..    the states of the random generators, by rank
``manifest.json``            the sizes and hashes of all these files
===========================  ==========================================================================================

The data has no state beyond the number of consumed packed sequences, because packed sequence n is a pure function of
(seed, epoch, n).
"""

import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from pydantic import BaseModel, ConfigDict, ValidationError
from torch.distributed.checkpoint.api import CheckpointException

from tidar_megatron.checkpoint.folder import checkpoint_folder, no_intact_checkpoint, restart_points
from tidar_megatron.checkpoint.integrity import Count, Damaged, check_hash, check_hashes
from tidar_megatron.checkpoint.optimizer_state import fill, state_to_fill, state_to_save
from tidar_megatron.checkpoint.pickles import read_metadata, weights_only
from tidar_megatron.checkpoint.random_states import random_states, restore_random_states
from tidar_megatron.errors import UserError
from tidar_megatron.models.parameters import is_draft_weight

STATE_FILE = "state.json"


class State(BaseModel):
    """The schema of ``state.json``."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    iteration: Count
    consumed_sequences: Count
    states: dict[str, Any]  # the states of parts of the loop, by name
    fingerprint: dict[str, Any]
    layout: dict[str, int | None]
    config: dict[str, dict[str, Any]]
    megatron_core: str
    weights_only: bool = False  # true for an imported model, which has no run to resume


@dataclass
class Trained:
    """The objects whose tensors a checkpoint saves and loads."""

    model: list[GPTModel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    @property
    def trains_drafts(self) -> bool:
        """Return whether only draft weights are trained, so that a checkpoint holds them alone."""
        return self.model[0].draft_passes is not None


def tensors_to_save(run: Trained) -> dict[str, Any]:
    """Return the state dict for ``dist_checkpointing.save``, with this rank's part of the optimizer."""
    weights = _weights(run.model, run.trains_drafts)
    return {
        **weights,
        "optimizer": state_to_save(run.optimizer, weights),
        "opt_param_scheduler": run.scheduler.state_dict(),
    }


def texts_to_save(state: State) -> dict[str, str]:
    """Return the texts of this rank's JSON files, by file name."""
    texts = {_random_file(dist.get_rank()): json.dumps(random_states())}
    if dist.get_rank() == 0:
        texts[STATE_FILE] = state.model_dump_json(indent=1)
    return texts


def read_state(checkpoint: Path, verify: bool = True) -> State:
    """Return the ``state.json`` of a checkpoint; with ``verify`` compare its hash first.

    Raises:
        Damaged: The file is missing or garbled, or differs from its hash.
    """
    if verify:
        check_hash(checkpoint, STATE_FILE)
    try:
        return State.model_validate(_read_json(checkpoint / STATE_FILE))
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise Damaged(f"{checkpoint / STATE_FILE} is not a run's state: {where}") from None


def damage(checkpoint: Path, verify: bool = True) -> str | None:
    """Return, on every rank, what is damaged in a checkpoint, or None. Collective.

    With ``verify`` each rank hashes its share of the files. No file is parsed before all hashes have been compared.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def hashes() -> None:
        if verify:
            check_hashes(checkpoint, rank, world_size)

    def contents() -> None:
        if rank == 0:
            read_metadata(checkpoint)
            read_state(checkpoint, verify=False)

    return _first_damage(hashes) or _first_damage(contents)


def _first_damage(check: Callable[[], None]) -> str | None:
    """Return, on every rank, the damage that the lowest such rank finds, or None. Collective."""
    problems: list[str | None] = [None] * dist.get_world_size()
    try:
        check()
    except Damaged as error:
        dist.all_gather_object(problems, str(error))
    else:
        dist.all_gather_object(problems, None)
    return next((said for said in problems if said), None)


def intact_checkpoint(folder: str | Path, verify: bool = True) -> Path:
    """Return the best intact checkpoint in a run's folder, and print which checkpoints were skipped. Collective.

    Args:
        folder: The run's folder.
        verify: Whether to compare hashes; otherwise only file sizes are compared.

    Raises:
        UserError: There is no checkpoint, or none is intact.
    """
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [restart_points(folder)]
        except UserError as error:  # the other ranks wait in the broadcast
            found = [error]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], UserError):
        raise found[0]
    points, passed_over = found[0]
    for iteration in points:
        checkpoint = checkpoint_folder(folder, iteration)
        if (problem := damage(checkpoint, verify)) is None:
            if passed_over and dist.get_rank() == 0:
                said = "; ".join(passed_over)
                print(f"warning: {said}; resuming from iteration {iteration}", file=sys.stderr, flush=True)
            return checkpoint
        passed_over.append(problem)
    raise no_intact_checkpoint(folder, passed_over)


def load(checkpoint: Path, run: Trained, same_layout: bool) -> None:
    """Load a run's tensors, its learning-rate schedule, and in the same layout its random generators. Collective.

    Raises:
        Damaged: The checkpoint contains something that this package does not write.
    """
    saved = read_metadata(checkpoint).state_dict_metadata
    load_weights(checkpoint, run.model, run.trains_drafts)
    weights = _weights(run.model, run.trains_drafts)
    asked, frame = state_to_fill(run.optimizer, weights, saved)
    # a separate key, so that the tensors are not merged into the checkpoint's own optimizer dict
    loaded = _read(checkpoint, {"asked": asked})
    fill(run.optimizer, frame, loaded["asked"], loaded["optimizer"])
    run.scheduler.load_state_dict(loaded["opt_param_scheduler"])
    if same_layout:
        restore_random_states(_read_json(checkpoint / _random_file(dist.get_rank())))


def load_weights(checkpoint: Path, model: list[GPTModel], drafts: bool = False) -> None:
    """Load the weights of a model that was trained in any layout, without the optimizer's state. Collective.

    Args:
        checkpoint: The checkpoint's folder.
        model: This rank's chunks.
        drafts: Whether to load the draft weights; otherwise the base model's are loaded.

    Raises:
        Damaged: The checkpoint contains something that this package does not write.
    """
    read_metadata(checkpoint)
    loaded = _read(checkpoint, _weights(model, drafts))
    for name, chunk in zip(_names(model), model, strict=True):
        others = {key: value for key, value in chunk.state_dict().items() if is_draft_weight(key) != drafts}
        chunk.load_state_dict({**others, **loaded[name]})


def _read(checkpoint: Path, asked: dict[str, Any]) -> dict[str, Any]:
    try:
        with weights_only():
            return dist_checkpointing.load(asked, str(checkpoint))
    except (CheckpointException, CheckpointingException, pickle.UnpicklingError, ValueError) as error:
        first = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise Damaged(f"{checkpoint} is refused: {' '.join(str(first).split())[:200]}") from error


def _weights(model: list[GPTModel], drafts: bool) -> dict[str, Any]:
    def of(chunk: GPTModel) -> dict[str, Any]:
        return {key: entry for key, entry in chunk.sharded_state_dict().items() if is_draft_weight(key) == drafts}

    return {name: of(chunk) for name, chunk in zip(_names(model), model, strict=True)}


def _names(model: list[GPTModel]) -> list[str]:
    """Return Megatron-LM's keys: "model", or "model0", "model1", .. for the chunks of an interleaved pipeline."""
    return ["model"] if len(model) == 1 else [f"model{number}" for number in range(len(model))]


def _random_file(rank: int) -> str:
    return f"random_{rank:05d}.json"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError):
        raise Damaged(f"{path} cannot be read") from None
    if not isinstance(value, dict):
        raise Damaged(f"{path} cannot be read")
    return value
