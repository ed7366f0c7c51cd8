"""Save and load Adam's state, so that a checkpoint of either megatron-core optimizer loads into the other.

The plain optimizer and the distributed one (``--use-distributed-optimizer``) save the same tensors under the same
names, ``optimizer.state.exp_avg.WEIGHT`` and ``exp_avg_sq``, in the shape of the weights. They differ in three ways,
which this module reconciles: the name of the float32 copy of a bfloat16 weight (``param`` or ``fp32_param``; a float32
run of the plain optimizer has none, because its weights are that copy), where the number of steps is stored, and the
frame, the nested dict around the tensors. The frame, with its learning rates and betas, comes from the run's own
configuration, not from the checkpoint.
"""

from collections.abc import Collection
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge, nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer

from tidar_megatron.checkpoint.own_parts import keep_own_parts
from tidar_megatron.checkpoint.torch_adam import begin, prepare_to_load, separate_steps

FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}  # independent of the layout; see own_parts.py

# prefixes of a weight's float32 copy in a checkpoint, by the optimizer that saved it
COPIES = ("optimizer.state.param.", "optimizer.state.fp32_param.")


def state_to_save(optimizer: MegatronOptimizer, weights: dict[str, Any]) -> dict[str, Any]:
    """Return the optimizer's part of a state dict for ``dist_checkpointing.save``.

    Args:
        optimizer: The optimizer of the run.
        weights: The model's sharded state dict.
    """
    keep_own_parts(optimizer)
    begin(optimizer)  # so that a run whose steps were all skipped can be saved too
    return optimizer.sharded_state_dict(weights, is_loading=False, metadata=FORMAT)


def state_to_fill(
    optimizer: MegatronOptimizer, weights: dict[str, Any], saved: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what to request from ``dist_checkpointing.load``, and the frame around it.

    Args:
        optimizer: The optimizer of the run.
        weights: The model's sharded state dict.
        saved: The names in the checkpoint; each requested tensor is renamed to one of them.
    """
    keep_own_parts(optimizer)
    prepare_to_load(optimizer)
    state = optimizer.sharded_state_dict(weights, is_loading=True, metadata=FORMAT)
    for entry in nested_values(state):
        if isinstance(entry, ShardedBase | ShardedTensorFactory) and entry.key not in saved:
            entry.key = _name_among(saved, entry.key)
    later = (ShardedBase, ShardedTensorFactory, LocalNonpersistentObject)
    frame, asked = extract_matching_values(state, lambda value: not isinstance(value, later))
    return asked, frame


def _name_among(saved: Collection[str], key: str) -> str:
    for prefix in COPIES:
        number, found, weight = key.partition(prefix)  # "chained_0." or "chained_1." of a model with experts
        if found:
            names = (*(number + other + weight for other in COPIES), weight)
            return next((name for name in names if name in saved), key)
    return key


def fill(optimizer: MegatronOptimizer, frame: dict[str, Any], loaded: dict[str, Any], saved_state: Any) -> None:
    """Load the checkpoint's state into the optimizer.

    Args:
        optimizer: The optimizer of the run.
        frame: The frame from :func:`state_to_fill`.
        loaded: The request from :func:`state_to_fill`, filled with the checkpoint's tensors.
        saved_state: The optimizer's state in the checkpoint without its tensors; it holds the number of steps.
    """
    state = merge(frame, loaded)
    optimizers = getattr(optimizer, "chained_optimizers", [optimizer])
    for number, part in enumerate(optimizers):
        _set_steps(state if len(optimizers) == 1 else state[number], part, _steps(saved_state))
    with torch.no_grad():
        optimizer.load_state_dict(state)
    separate_steps(optimizer)


def _steps(state: Any) -> float:
    """Return Adam's number of steps from any place in a saved state; it is the same for all parameters."""
    if isinstance(state, dict):
        for name in ("common_step", "step"):
            if name in state:
                return float(state[name])
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return max((_steps(value) for value in inner), default=0.0)


def _set_steps(state: dict[str, Any], optimizer: MegatronOptimizer, steps: float) -> None:
    adam = state.get("optimizer", state)
    counts_per_parameter = isinstance(optimizer.optimizer, torch.optim.Adam | torch.optim.AdamW)
    if counts_per_parameter and "param_state" not in state:
        adam["state"]["common_step"] = torch.tensor(steps)
    else:
        for group in adam["param_groups"]:
            group["step"] = steps if counts_per_parameter else int(steps)
