"""Run a half-precision model in float32 one layer at a time, so that memory never holds all weights twice."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tidar_megatron.attention_kernels import HALF


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Replace each layer's half-precision weights by float32 copies while the layer runs, then restore them.

    A layer is an item of an outermost ``ModuleList`` or, outside of these, a module without children. Other modules
    that own tensors keep float32 copies for all of the context.
    """
    layers = dict.fromkeys(item for module in _outermost_lists(model) for item in module)
    inside = {part for layer in layers for part in layer.modules()}
    outside = [part for part in model.modules() if part not in inside]
    leaves = [part for part in outside if not any(part.children())]
    kept: list[_Swap] = []
    handles = []
    room: dict[Any, Tensor] = {}  # one layer runs at a time, so all layers share one buffer
    for module in (*layers, *leaves):
        swap = _Swap(module.modules(), room)
        kept.append(swap)
        handles.append(module.register_forward_pre_hook(lambda *_, swap=swap: swap.to_float32()))
        handles.append(module.register_forward_hook(lambda *_, swap=swap: swap.restore(), always_call=True))
    others = _Swap((part for part in outside if part not in set(leaves)), {})
    kept.append(others)
    try:
        others.to_float32()
        yield
    finally:
        for handle in handles:
            handle.remove()
        for swap in kept:
            swap.restore()


class _Swap:
    """A swap of some modules' half-precision parameters and buffers for float32 copies, and back.

    Args:
        modules: The modules that own the tensors.
        room: Memory for the copies, which other swaps may use after :meth:`restore`.
    """

    def __init__(self, modules: Iterable[nn.Module], room: dict[Any, Tensor]) -> None:
        self._modules, self._room = list(modules), room
        self._own: list[tuple[dict[str, Any], str, Tensor]] = []

    def to_float32(self) -> None:
        """Replace the tensors by float32 copies; this is a no-op if they are already replaced."""
        if self._own:
            return
        for module in self._modules:
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.dtype in HALF:
                        self._own.append((tensors, name, tensor))
        for place, (tensors, name, tensor) in enumerate(self._own):
            key = place, tensor.shape, tensor.device
            if key not in self._room:
                self._room[key] = torch.empty_like(tensor, dtype=torch.float32, requires_grad=False)
            copy = self._room[key].copy_(tensor)
            tensors[name] = nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy

    def restore(self) -> None:
        """Restore the modules' own tensors; this is a no-op if they are in place."""
        for tensors, name, tensor in self._own:
            tensors[name] = tensor
        self._own = []


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost_lists(child)
