"""Adam's state, out of a checkpoint into whichever of megatron-core's optimizers a run has.

The plain optimizer and the distributed one (``--use-distributed-optimizer``) save the same tensors under the same
names, ``optimizer.state.exp_avg.WEIGHT`` and ``exp_avg_sq``, in the shape of the weights, so either can be filled
from the other's checkpoint. They differ in three things, which are settled here: the name of the float32 copy of a
bfloat16 weight (``param`` or ``fp32_param``; a float32 run of the plain optimizer has none, its weights are that copy),
where the number of steps is kept, and the frame that the tensors hang in. The frame, with the learning rates and betas
in it, is the run's own: its configuration rules, not the checkpoint's.
"""

from collections.abc import Collection
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge, nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer

from tidar_megatron.checkpoint.torch_adam import begin, prepare_to_load, separate_steps

# of the distributed optimizer's formats the one that knows no layout, gathered on one rank of each group alone
FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": True}

COPIES = ("optimizer.state.param.", "optimizer.state.fp32_param.", "")  # of a weight, by whose checkpoint it is


def state_to_save(optimizer: MegatronOptimizer, weights: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's part of a state dict for ``dist_checkpointing.save``; ``weights`` is the model's."""
    begin(optimizer)  # a run whose steps were all skipped can be saved too
    return optimizer.sharded_state_dict(weights, is_loading=False, metadata=FORMAT)


def state_to_fill(
    optimizer: MegatronOptimizer, weights: dict[str, Any], saved: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What to ask ``dist_checkpointing.load`` for, by names that are among those ``saved``, and the frame around it."""
    prepare_to_load(optimizer)
    state = optimizer.sharded_state_dict(weights, is_loading=True, metadata=FORMAT)
    for entry in nested_values(state):
        if isinstance(entry, ShardedBase | ShardedTensorFactory) and entry.key not in saved:
            entry.key = _name_among(saved, entry.key)
    later = (ShardedBase, ShardedTensorFactory, LocalNonpersistentObject)
    frame, asked = extract_matching_values(state, lambda value: not isinstance(value, later))
    return asked, frame


def _name_among(saved: Collection[str], key: str) -> str:
    for prefix in COPIES[:2]:
        if key.startswith(prefix):
            weight = key.removeprefix(prefix)
            return next((other + weight for other in COPIES if other + weight in saved), key)
    return key


def fill(optimizer: MegatronOptimizer, frame: dict[str, Any], loaded: dict[str, Any], saved_state: Any) -> None:
    """Put what was loaded into the optimizer.

    Args:
        optimizer: of this run.
        frame: of :func:`state_to_fill`.
        loaded: what it asked for, with the tensors of the checkpoint in their places.
        saved_state: the optimizer's state in the checkpoint but for its tensors; the number of steps is taken from it.
    """
    state = merge(frame, loaded)
    optimizers = getattr(optimizer, "chained_optimizers", [optimizer])
    for number, part in enumerate(optimizers):
        _set_steps(state if len(optimizers) == 1 else state[number], part, _steps(saved_state))
    with torch.no_grad():
        optimizer.load_state_dict(state)
    separate_steps(optimizer)


def _steps(state: Any) -> float:
    """Adam's count in a saved state, wherever it is; all parameters have the same."""
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
