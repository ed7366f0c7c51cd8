"""The bytes that the ranks write when a run saves a checkpoint. Nothing is gathered (``checkpoint/own_parts.py``)."""

from dataclasses import dataclass

from tidar_megatron.planning.memory import parameters_of
from tidar_megatron.planning.sizes import Sizes


@dataclass(frozen=True)
class Written:
    """The bytes of a checkpoint that one rank writes, by purpose."""

    weights: int
    optimizer: int

    @property
    def total(self) -> int:
        """The sum of both."""
        return self.weights + self.optimizer


def written_by(sizes: Sizes, stage: int) -> Written:
    """Return what the first rank of pipeline stage ``stage`` writes; no rank of the stage writes more.

    The first rank of a data-parallel group writes the weights, and the state of the plain optimizer. Each rank writes
    its own part of the distributed optimizer's state.
    """
    parameters = parameters_of(sizes, stage)
    owned = float(parameters.trained)
    if sizes.config.parallel.use_distributed_optimizer:
        owned = parameters.dense / (sizes.dp * sizes.cp) + parameters.expert / sizes.edp
    return Written(sizes.w * parameters.trained, round(state_bytes(sizes) * owned))


def gathered_otherwise(sizes: Sizes, stage: int) -> int:
    """Return the bytes that megatron-core's format ``fully_reshardable`` would gather on one rank of ``stage``.

    It gathers the distributed optimizer's state on the first rank of each data-parallel group, in host memory.
    """
    if not sizes.config.parallel.use_distributed_optimizer:
        return 0
    parameters = parameters_of(sizes, stage)
    shared = parameters.dense * (sizes.dp * sizes.cp > 1) + parameters.expert * (sizes.edp > 1)
    return state_bytes(sizes) * shared


def state_bytes(sizes: Sizes) -> int:
    """Return the bytes of a parameter's state in a checkpoint: two moments, and a float32 copy of the weight.

    In float32 the plain optimizer saves no copy.
    """
    return 12 if sizes.w == 2 or sizes.config.parallel.use_distributed_optimizer else 8


def checkpoint_bytes(sizes: Sizes, parameters: int) -> int:
    """Return the size of a checkpoint of a model with ``parameters`` parameters."""
    return (sizes.w + state_bytes(sizes)) * parameters
