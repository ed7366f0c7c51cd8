"""Work around defects in how megatron-core's distributed optimizer loads the state of torch's AdamW.

None of this applies to the Adam of transformer-engine or apex. torch's AdamW, the fallback where neither is installed
(also on a GPU host), counts its steps per parameter. When loading, megatron-core (0.16.1 to 0.19.x) reads that count
before it exists, omits it when it copies the state, and then makes all parameters share one tensor, so that AdamW
counts one step per *parameter*: the second step after a resume would be silently wrong.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def _torch_adams(optimizer: MegatronOptimizer) -> Iterator[MegatronOptimizer]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(getattr(part, "optimizer", None), torch.optim.Adam | torch.optim.AdamW):
            yield part


def begin(optimizer: MegatronOptimizer) -> None:
    """Give every parameter that has no state yet the state with which AdamW begins its first step."""
    for part in _torch_adams(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                if not part.optimizer.state[parameter]:
                    part.optimizer.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def prepare_to_load(optimizer: MegatronOptimizer) -> None:
    """Give every parameter a state for loading to fill, and patch the copying of states to include the step count."""
    begin(optimizer)
    for part in _torch_adams(optimizer):
        if isinstance(part, DistributedOptimizer):
            _keep_step(part)


def _keep_step(part: DistributedOptimizer) -> None:
    copy = type(part)._set_main_param_and_optimizer_states

    def with_step(model_param: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
        group, order = part.model_param_group_index_map[model_param]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
        copy(part, model_param, {"step": state["step"], **tensors})

    part._set_main_param_and_optimizer_states = with_step


def separate_steps(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its own step count again after loading."""
    for part in _torch_adams(optimizer):
        for state in part.optimizer.state.values():
            state["step"] = state["step"].detach().clone()
