"""On a CUDA device: training and decoding give what the CPU gives. `make test-gpu`; elsewhere these skip themselves."""

import pytest
import torch

from tests.training.test_pretrain import losses, small
from tidar_megatron.attention_mask import training_layout
from tidar_megatron.checkpoint.export import export_run
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.inference.decoding import generate
from tidar_megatron.inference.model import load_model
from tidar_megatron.inference.request import DecodeOptions
from tidar_megatron.models.attention import hybrid_attention
from tidar_megatron.training.loop import pretrain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and make test-gpu"),
]


@pytest.mark.parametrize("backend", ["dense", "chunked"])
def test_attention_equals_the_cpus(backend):
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 64, 16, generator=draw)
    key = torch.randn(1, 2, 64, 16, generator=draw)
    visibility = training_layout(torch.zeros(1, 32, dtype=torch.long), torch.arange(32)[None], 4)
    cpu, gpu = (
        hybrid_attention(
            query.to(d), key.to(d), key.to(d), visibility.to(d), backend=backend, chunk_size=8, scale=0.25
        ).cpu()
        for d in ("cpu", "cuda")
    )
    torch.testing.assert_close(gpu, cpu, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bf16", [False, True])
def test_train_export_and_decode(shards, tmp_path, bf16):
    run = tmp_path / "run"
    pretrain(small(shards, checkpoint={"save": str(run)}, training={"bf16": bf16}))
    history = losses(run)
    assert history[8][0] < history[1][0]
    export_run(run, tmp_path / "hf")
    shut_down()
    model = load_model(tmp_path / "hf", device="cuda", dtype="float32")
    prompt = list(b"alpha beta")
    ar = generate(model, prompt, DecodeOptions(mode="ar", max_new_tokens=32, ignore_eos=True))
    tidar = generate(model, prompt, DecodeOptions(max_new_tokens=32, ignore_eos=True))
    assert tidar.token_ids == ar.token_ids
