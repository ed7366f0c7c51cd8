"""Which layers, optimizer and kernels are chosen where packages that need CUDA are installed; stubs stand in for them.

This shows the choice, not that the layers work: transformer-engine and apex have not been run (README).
"""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.ranks import run
from tidar_megatron.config import build_config
from tidar_megatron.distributed.platform import check_backend
from tidar_megatron.errors import UserError

CHOICES = """
import json
from functools import partial
import tidar_megatron.models.gpt as gpt
from tidar_megatron.distributed.groups import initialize, shut_down
from tidar_megatron.training.layout_variants import variant_config

from megatron.core.optimizer import Adam

def name(part):
    part = getattr(part, "func", part)  # a partial
    part = getattr(part, "module", part)  # a ModuleSpec
    return getattr(part, "__name__", str(part))


def choose(impl, variant, grouped):
    config = variant_config(variant, 1, model={"transformer_impl": impl, "moe_grouped_gemm": grouped})
    ranks = initialize(config.parallel, 0)
    gpt.has_gpu = lambda: True
    transformer = gpt.transformer_config(config)
    gpt.has_gpu = lambda: False
    block = gpt.layer_spec(config, transformer, None, None)
    layer = block.layer_specs[0].submodules
    attention = layer.self_attention.submodules
    mlp = layer.mlp
    parts = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
    names = {"qkv": attention.linear_qkv, "proj": attention.linear_proj, "core": attention.core_attention}
    names |= {"input_norm": layer.input_layernorm, "q_norm": attention.q_layernorm, "final_norm": block.layer_norm}
    names |= {key: getattr(parts, key) for key in ("linear_fc1", "experts", "router") if hasattr(parts, key)}
    seen = {key: name(part) for key, part in names.items()}
    seen["accumulation"] = transformer.gradient_accumulation_fusion
    seen["adam"] = f"{Adam.__module__}.{Adam.__name__}"  # what get_megatron_optimizer builds
    shut_down()
    return seen

print(json.dumps([choose(*asked) for asked in ASKED]))
"""

LOCAL, ENGINE = ("local", "long", False), ("transformer_engine", "long", False)
EXPERTS = ("transformer_engine", "experts", True)


def choices(packages, *asked):
    """Return what an interpreter chooses for each configuration where the stubs of ``packages`` are importable."""
    program = f"ASKED = {asked!r}\n{CHOICES}"
    command = [sys.executable, "-W", "ignore", "-m", "tests.stubs", packages, program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def engine():
    """{what was asked: what is chosen} where transformer-engine is installed."""
    asked = (LOCAL, ENGINE, EXPERTS)
    return dict(zip(asked, choices("transformer_engine,transformer_engine_torch", *asked), strict=True))


@pytest.mark.process
def test_transformer_engines_layers_around_our_attention(engine):
    engine = engine[ENGINE]
    assert engine["core"] == "HybridCoreAttention"
    assert engine["qkv"] == "TELayerNormColumnParallelLinear"  # the norm is in it
    assert engine["input_norm"] == "IdentityOp"
    assert engine["proj"] == "TERowParallelLinear"
    assert engine["linear_fc1"] == "TELayerNormColumnParallelLinear"
    assert (engine["q_norm"], engine["final_norm"]) == ("TENorm", "TENorm")
    assert engine["accumulation"] is False  # megatron-core's output layer refuses it without apex
    assert engine["adam"] == "transformer_engine.pytorch.optimizers.FusedAdam"


@pytest.mark.process
def test_grouped_experts_around_our_router(engine):
    seen = engine[EXPERTS]
    assert seen["experts"].endswith("GroupedMLP") and seen["experts"].startswith("TE")
    assert (seen["router"], seen["core"]) == ("BalancedRouter", "HybridCoreAttention")


@pytest.mark.process
@pytest.mark.parametrize("packages", ["apex,amp_C,fused_weight_gradient_mlp_cuda", "transformer_engine"])
def test_fused_adam_and_accumulation_where_installed(packages, engine):
    (seen,) = choices(packages, LOCAL) if "apex" in packages else [engine[LOCAL]]
    assert (seen["core"], seen["qkv"], seen["final_norm"]) == ("HybridCoreAttention", "ColumnParallelLinear", "RMSNorm")
    assert seen["adam"].startswith(packages.split(",")[0]) and seen["adam"].endswith("optimizers.FusedAdam")
    assert seen["accumulation"] is ("apex" in packages)  # transformer-engine's kernel is for its own layers


@pytest.mark.process
def test_nothing_installed():
    done = run("-c", f"ASKED = {[LOCAL]!r}\n{CHOICES}")
    (seen,) = json.loads(done.stdout.splitlines()[-1])
    assert seen["adam"].startswith("torch.optim")
    assert seen["accumulation"] is False


def test_asking_for_what_cannot_run_here():
    for backend, why in (("flex", "needs a CUDA device"), ("transformer_engine", "not installed")):
        with pytest.raises(UserError, match=rf"--attention-backend {backend}: .*{why}.* use --attention-backend auto"):
            check_backend(build_config({"tidar": {"attention_backend": backend}}))


@pytest.mark.parametrize(
    ("model", "bf16", "why"),
    [
        ({"hidden_size": 64, "num_attention_heads": 8}, True, "at least 16 channels per head, the model has 8"),
        ({}, False, "--bf16"),
    ],
)
def test_asking_for_what_the_kernels_have_not(monkeypatch, model, bf16, why):
    monkeypatch.setattr("tidar_megatron.distributed.platform.has_gpu", lambda: True)
    monkeypatch.setattr("tidar_megatron.distributed.platform.find_spec", lambda name: object())
    tree = {"tidar": {"attention_backend": "transformer_engine"}, "model": model}
    with pytest.raises(UserError, match=why):
        check_backend(build_config({**tree, "training": {"bf16": bf16}}))
    check_backend(build_config({**tree, "model": {}, "training": {"bf16": True}}))


def test_asking_for_what_is_not_installed():
    config = build_config({"model": {"transformer_impl": "transformer_engine", "num_layers": 2}})
    with pytest.raises(UserError, match=r"not installed; on a CUDA machine pip install -e"):
        check_backend(config)
