"""tools/check_layout.py: every layout that four ranks can fill equals one rank, and a layout that does not is found."""

import dataclasses
import json

import pytest
import torch

from tests.conftest import torchrun
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.training import layout_check
from tidar_megatron.training.layout_check import ALL_LAYOUTS, VARIANTS, compare, layouts_for, measure, variant_config

PROMISED = """TP4 | TP2xPP2+SP | PP4 | PP2xVPP2 | PP2xTP2xVPP2+SP | CP2 | CP4 | CP2xTP2+SP
| CP2xPP2, distributed optimizer | DP2xTP2 | DP4, distributed optimizer, both overlaps
| full recompute | selective recompute | bf16 | CP2, packed documents"""

pytestmark = pytest.mark.timeout(1000)  # two minutes, but more on a machine that has other work


@pytest.fixture(scope="module")
def report():
    """The tool's one object, of the same launch that a user makes."""
    return json.loads(torchrun(4, "tools/check_layout.py", "--json", timeout=900).stdout.splitlines()[-1])


def test_every_layout_equals_one_rank(report):
    assert report["ok"] is True
    assert len(report["layouts"]) == len(layouts_for(4)) >= 35
    variants = {layout.name: VARIANTS[layout.variant] for layout in layouts_for(4)}
    for line in report["layouts"]:
        assert set(line) == {"name", "loss_rel_err", "grad_rel_err", "ok"}
        allowed = variants[line["name"]]
        assert line["loss_rel_err"] <= allowed.loss_tolerance and line["grad_rel_err"] <= allowed.grad_tolerance, line
        if "bf16" not in line["name"]:
            assert line["loss_rel_err"] <= 1e-5 and line["grad_rel_err"] <= 1e-4


def test_the_promised_layouts_are_there(report):
    names = {line["name"] for line in report["layouts"]}
    assert names >= {" ".join(name.split()) for name in PROMISED.split("|")}


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
    layout = layout_check.Layout("x", {})
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
