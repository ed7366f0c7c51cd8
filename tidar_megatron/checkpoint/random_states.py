"""The random states of one rank as plain JSON: Python's, numpy's, torch's, the GPU's and megatron-core's streams.

They are restored when a run resumes in the layout in which it was saved. In another layout a rank has no predecessor
and keeps the states that the seed gives. TiDAR's training does not draw from these generators (there is no dropout, and
the order of the data and the choice of blocks are pure functions of the seed), so the results do not depend on them.
"""

import random
from typing import Any, cast

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker


def random_states() -> dict[str, Any]:
    """Return the current states of all random generators as JSON values."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    states = {
        "python": [version, list(words), gauss],
        "numpy": [keys.tolist(), position, has_gauss, cached],
        "torch": _hex(torch.get_rng_state()),
        "streams": {name: _hex(state) for name, state in get_cuda_rng_tracker().get_states().items()},
    }
    if torch.cuda.is_initialized():
        states["cuda"] = _hex(torch.cuda.get_rng_state())
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Restore the states that :func:`random_states` returned."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    keys, *rest = states["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_tensor(states["torch"]))
    get_cuda_rng_tracker().set_states({name: _tensor(state) for name, state in states["streams"].items()})
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(_tensor(states["cuda"]))


def _hex(state: torch.Tensor) -> str:
    return state.cpu().numpy().tobytes().hex()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8).clone()
