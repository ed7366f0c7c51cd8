"""megatron-core's distributed optimizer around torch's AdamW: what its loading forgets.

With transformer-engine's or apex's Adam nothing here applies. torch's AdamW, which stands in where neither is
installed (also on a GPU host), counts its steps per parameter. megatron-core's loading (0.16.1 to 0.19.x) asks for
that count before there is one, leaves it out where it copies the state, and then lets all parameters share one tensor,
so that AdamW counts one step per *parameter*: the second step after a resume would be wrong without a word.
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
    """Give parameters without a state, those before the first step, the one that a step begins with."""
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
    """Give every parameter the state that loading will fill, and its copying the count it leaves out."""
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
    """After loading: every parameter counts for itself."""
    for part in _torch_adams(optimizer):
        for state in part.optimizer.state.values():
            state["step"] = state["step"].detach().clone()
