"""tools/check_layout.py: every layout that four ranks can fill equals one rank, and a layout that does not is found.

The quick profile runs one layout of each kind, the thorough profile all of them, and .ci/run all of them by torchrun.
"""

import dataclasses
import json

import pytest
import torch

from tests.conftest import THOROUGH
from tests.ranks import run_ranks
from tests.training.quick_check import quickly
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.training.layout_check import compare, measure
from tidar_megatron.training.layout_variants import ALL_LAYOUTS, VARIANTS, Layout, layouts_for, variant_config

PROMISED = """TP4 | TP2xPP2+SP | PP4 | PP2xVPP2 | PP2xTP2xVPP2+SP | CP2 | CP4 | CP2xTP2+SP
| CP2xPP2, distributed optimizer | DP2xTP2 | DP4, distributed optimizer, both overlaps
| full recompute | selective recompute | bf16 | CP2, packed documents"""

# each way to divide the work, and each pair of ways that share code, once; test_parity.py has data parallelism alone
QUICK = """CP4, packed documents | PP2xTP2xVPP2+SP | CP2xPP2xVPP2, distributed optimizer, overlaps
| CP2, distributed optimizer, both overlaps, full recompute | TP2xPP2+SP, bf16, distributed optimizer
| half of the blocks, experts, EP2xCP2
| experts, EP4, all-to-all, distributed optimizer | experts, EP2xTP2xPP2+SP"""

pytestmark = pytest.mark.timeout(1000)  # much more than it takes on a quiet machine


def names(text):
    return [" ".join(name.split()) for name in text.split("|")]


@pytest.fixture(scope="module")
def report():
    """The tool's one object, and the layouts that were asked for."""
    if THOROUGH:
        asked = [layout.name for layout in layouts_for(4)]
        done = run_ranks(4, "tools/check_layout.py", "--json", timeout=900)
    else:
        asked = names(QUICK)
        flags = [flag for name in asked for flag in ("--layout", name)]
        done = run_ranks(4, "tools/check_layout.py", "--json", *flags, timeout=900, prepare=quickly)
    return json.loads(done.stdout.splitlines()[-1]), asked


@pytest.mark.process
def test_every_layout_equals_one_rank(report):
    report, asked = report
    assert report["ok"] is True
    assert sorted(line["name"] for line in report["layouts"]) == sorted(asked)
    variants = {layout.name: VARIANTS[layout.variant] for layout in layouts_for(4)}
    for line in report["layouts"]:
        assert set(line) == {"name", "loss_rel_err", "grad_rel_err", "ok"}
        allowed = variants[line["name"]]
        assert line["loss_rel_err"] <= allowed.loss_tolerance and line["grad_rel_err"] <= allowed.grad_tolerance, line
        if "bf16" not in line["name"]:
            assert line["loss_rel_err"] <= 1e-5 and line["grad_rel_err"] <= 1e-4


def test_the_promised_layouts_are_there():
    there = [layout.name for layout in layouts_for(4)]
    assert len(there) >= 35 and {*there} >= {*names(PROMISED), *names(QUICK)}


@pytest.mark.slow
def test_layouts_of_other_worlds():
    assert {layout.name for layout in layouts_for(1)} >= {"one", "full recompute", "bf16"}
    assert "PP2xVPP2" in {layout.name for layout in layouts_for(2)}
    assert "CP2xTP2xPP2xVPP2+SP, distributed optimizer" in {layout.name for layout in layouts_for(8)}
    assert len({layout.name for layout in ALL_LAYOUTS}) == len(ALL_LAYOUTS)


@pytest.fixture(scope="module")
def one():
    yield measure(variant_config("long", 1), VARIANTS["long"])
    shut_down()


@pytest.mark.parametrize("wrong", ["loss", "gradient", "one rank's copy", "missing", "not a number"])
def test_a_wrong_layout_is_found(one, wrong):
    """A relative error of one in a thousand, in one number, is not overlooked."""
    layout = Layout("x", {})
    assert compare(layout, [one], one).ok
    other = dataclasses.replace(one, losses=[list(step) for step in one.losses], grads=dict(one.grads))
    name = "decoder.layers.3.self_attention.k_layernorm.weight"
    rank, size, grad = other.grads[name]
    if wrong == "loss":
        other.losses[2][1] *= 1.001
    elif wrong == "missing":
        del other.grads[name]
    elif wrong == "not a number":
        other.grads[name] = (rank, size, torch.full_like(grad, float("nan")))
    else:
        other.grads[name] = (rank, size, grad * 1.001)
    ranks = [one, other] if wrong == "one rank's copy" else [other]
    assert not compare(layout, ranks, one).ok
