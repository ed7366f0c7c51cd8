"""On a CUDA device: training and decoding give what the CPU gives. `make test-gpu`; elsewhere these skip themselves."""

import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from tests.models.test_attention import documents
from tests.training.small_runs import losses, small
from tidar_megatron.attention_mask import training_layout
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.inference.engine import generate
from tidar_megatron.inference.loading import load_model
from tidar_megatron.inference.request import DecodeOptions
from tidar_megatron.models.attention import choose_backend, hybrid_attention, make_schedule
from tidar_megatron.training.loop import pretrain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.process,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and make test-gpu"),
]


@pytest.mark.parametrize("backend", ["dense", "chunked", "flex", "auto"])
def test_attention_equals_the_cpus(backend):
    """Outputs and gradients of packed documents."""
    visibility = training_layout(*documents([100, 60], 256), 16)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, heads, 512, 64, generator=generator) for heads in (4, 2, 2, 4)]
    seen = []
    for device, chosen in (("cpu", "dense"), ("cuda", choose_backend(backend, "cuda", 64, False))):
        schedule = make_schedule(visibility, backend=chosen, chunk_size=32, device=device)
        *inputs, upstream = (t.to(device) for t in tensors)
        inputs = [t.requires_grad_() for t in inputs]
        out = hybrid_attention(*inputs, schedule, 0.125)
        seen.append([t.cpu() for t in (out, *torch.autograd.grad((out * upstream).sum(), inputs))])
    for cpu, gpu in zip(*seen, strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("bf16", [False, True])
def test_train_export_and_decode(shards, tmp_path, bf16):
    run = tmp_path / "run"
    pretrain(small(shards, checkpoint={"save": str(run)}, training={"bf16": bf16}))
    history = losses(run)
    assert history[8][0] < history[1][0]
    shut_down()
    exported = subprocess.run(  # converting plays ranks on the CPU: a process that sees no GPU
        [sys.executable, "tools/convert_checkpoint.py", "export", "--checkpoint", run, "--hf", tmp_path / "hf"],
        cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert exported.returncode == 0, exported.stderr
    model = load_model(tmp_path / "hf", device="cuda", dtype="float32")
    prompt = list(b"alpha beta")
    ar = generate(model, prompt, DecodeOptions(mode="ar", max_new_tokens=32, ignore_eos=True))
    tidar = generate(model, prompt, DecodeOptions("tidar", max_new_tokens=32, ignore_eos=True))
    assert tidar.token_ids == ar.token_ids
