"""The operations of a layer in a decode step, kernel launches on a GPU: counted on a CPU that takes the GPU's path."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.inference.conftest import make_causal_lm
from tidar_megatron import attention_kernels as kernels
from tidar_megatron.inference import forward, lean, products
from tidar_megatron.inference.forward import ForwardLayout, Part
from tidar_megatron.inference.lean import use_lean_forward
from tidar_megatron.inference.static import Forwards
from tidar_megatron.inference.wrapping import wrap_model

NO_KERNEL = ("detach", "alias", "empty", "empty_like", "new_empty", "empty_strided", "_unsafe_view", "lift_fresh")


class Launches(TorchDispatchMode):
    """Count the operations that would launch a kernel, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        made = func(*args, **(kwargs or {}))
        # under inference_mode a reshape that copies is one operation, and one that does not has the same name
        copies = name in ("reshape", "contiguous") and made.data_ptr() != args[0].data_ptr()
        if copies or (not func.is_view and name not in (*NO_KERNEL, "reshape", "contiguous")):
            self.counts["rms_norm" if name == "_fused_rms_norm" else name] += 1
        return made


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The GPU's path, with a plain stand-in for each kernel that only a GPU has; gives the counts of the stand-ins."""
    calls = Counter()

    rms_norm = torch.nn.functional.rms_norm

    def norm(*arguments, **named):
        calls["norm"] += 1
        # a trainer's function mode in this process would count the call again
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return rms_norm(*arguments, **named)

    def one_kernel(function, device):
        def run(*arguments):
            norms = calls["norm"]
            with _disable_current_modes():
                made = function(*arguments)
            calls["norm"] = norms  # those inside are part of the kernel
            calls[function.__name__] += 1
            return made

        return run

    def efficient(query, key, value, bias, wants_lse, *, scale):
        calls["efficient"] += 1
        with _disable_current_modes():
            assert wants_lse and (bias is None or bias.shape == (*query.shape[:3], key.shape[2]))
            assert bias is None or bias.stride(2) % 16 == 0
            scores = query.float() @ key.float().transpose(-1, -2) * scale
            scores = scores if bias is None else scores + bias
            rounded = torch.nn.functional.pad(scores.logsumexp(-1), (0, -query.shape[2] % 32))
            return (scores.softmax(-1) @ value.float()).to(query.dtype), rounded, None, None

    monkeypatch.setattr(kernels, "has_flash", lambda device: False)
    monkeypatch.setattr(kernels, "has_efficient", lambda query: True)
    monkeypatch.setattr(kernels, "_efficient", efficient)
    monkeypatch.setattr(torch.nn.functional, "rms_norm", norm)
    for module in (lean, products):
        monkeypatch.setattr(module, "rounds_once", lambda device: True)
        monkeypatch.setattr(module, "can_pack", lambda weight: False)
    monkeypatch.setattr(forward, "has_flash", lambda device: False)
    monkeypatch.setattr(lean, "one_kernel", one_kernel)
    return calls


def hidden_and_launches(layers, layout, calls):
    model = wrap_model(make_causal_lm("qwen3", torch.bfloat16, num_hidden_layers=layers))
    use_lean_forward(model, take=True)
    forwards = Forwards(model, 1, 100, static=True)
    with torch.inference_mode():
        forwards.run([Part(0, 0, [5] * 20, ForwardLayout(20))], reads_prompt=True)
        part = Part(0, 20, list(range(layout.num_drafts)), layout)
        forwards.run([part])
        calls.clear()
        with Launches() as launches:
            hidden, _ = forwards.run([part])
    return hidden, launches.counts + calls


@pytest.mark.parametrize(
    ("layout", "most"), [(ForwardLayout(1), 11), (ForwardLayout(8, tuple(range(8)), 8), 12)], ids=["ar", "all:8"]
)
def test_a_layer_launches_few_kernels(layout, most, as_on_a_gpu, monkeypatch):
    (_, one), (hidden, two) = (hidden_and_launches(layers, layout, as_on_a_gpu) for layers in (1, 2))
    layer = two - one
    assert sum(layer.values()) <= most, layer
    assert layer["efficient"] == 1 and layer["norm"] == 2, layer
    monkeypatch.undo()
    expected, _ = hidden_and_launches(2, layout, as_on_a_gpu)
    torch.testing.assert_close(hidden, expected, rtol=0.05, atol=0.05)
