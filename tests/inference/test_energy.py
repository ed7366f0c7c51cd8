"""The energy of ``tools/benchmark.py decode``: counters, or what forwards read and compute."""

from dataclasses import replace

import pytest
import torch

from tests.inference.conftest import make_causal_lm
from tidar_megatron.benchmark.decode import Request, figures
from tidar_megatron.benchmark.energy import Rapl, Sizes, Work
from tidar_megatron.benchmark.ways import Run, ours
from tidar_megatron.inference.request import parse_plan
from tidar_megatron.inference.wrapping import wrap_model


def zone(folder, number, name, microjoules, largest=1_000_000):
    place = folder / f"intel-rapl:{number}"
    place.mkdir(exist_ok=True)
    for file, text in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", largest)):
        (place / file).write_text(f"{text}\n")


def test_packages_and_memory_are_counted_once(tmp_path):
    """The cores are a part of their package, and psys counts all again; a counter wraps around."""
    before = {"0": ("package-0", 999_000), "0:0": ("core", 5), "0:1": ("dram", 100), "1": ("psys", 7)}
    for number, (name, microjoules) in before.items():
        zone(tmp_path, number, name, microjoules)
    rapl = Rapl.find(tmp_path)
    assert rapl.names == ["package-0", "dram"]
    start = rapl.read()
    zone(tmp_path, "0", "package-0", 499_000)
    zone(tmp_path, "0:0", "core", 400_000)
    zone(tmp_path, "0:1", "dram", 200_100)
    assert rapl.joules_since(start) == pytest.approx(0.500001 + 0.2)


def test_without_counters_there_are_none(tmp_path):
    assert Rapl.find(tmp_path) is None and Rapl.find(tmp_path / "nowhere") is None
    zone(tmp_path, "0", "package-0", "not a number")
    assert Rapl.find(tmp_path) is None


def test_what_a_forward_reads_and_computes():
    lm = make_causal_lm("qwen3", torch.float32)  # 2 layers, 4 heads and 2 K/V heads of 16
    sizes = Sizes.of(wrap_model(lm))
    layer = 2 * 32 * 64 + 2 * 32 * 32 + 3 * 32 * 48
    assert (sizes.weights, sizes.output_weights) == (2 * layer, 48 * 32)
    assert sizes.weight_bytes == 4 * (2 * layer + 48 * 32) and sizes.kv_bytes == 2 * 2 * 2 * 16 * 4
    assert sizes.flops_per_pair == 2 * 4 * 4 * 16
    work = Work(sizes)
    work.add([(10, 1), (20, 5)], 3)
    assert work.bytes_read == sizes.weight_bytes + (11 + 25) * sizes.kv_bytes
    assert work.flops == 2 * 2 * layer * 6 + 2 * 48 * 32 * 3 + sizes.flops_per_pair * (11 + 5 * 25)


@pytest.mark.parametrize("plan", ["ar", "linear:4", "1:4", "all:4"])
def test_work_of_the_engine(plan):
    model = wrap_model(make_causal_lm("qwen3", torch.float32))
    run = ours(model, replace(parse_plan(plan), max_new_tokens=6), [[1, 2, 3, 4, 5]])
    sizes = Sizes.of(model)
    least = Work(sizes)
    for before, tokens in ((0, 5), *((length, 1) for length in range(5, 10))):
        least.add([(before, tokens)], 1)
    assert (run.work.bytes_read, run.work.flops) == (least.bytes_read, least.flops) or plan != "ar"
    assert plan == "ar" or run.work.flops > least.flops
    assert run.forwards <= 6


def test_figures_are_of_pairs_of_requests():
    """A text twice as long takes twice as long, and one request was disturbed; energy is per new token."""

    def request(seconds, joules, tokens=8):
        return Request(seconds, joules, Run([list(range(tokens))], 4, seconds / 8, None))

    ar = [request(seconds, 8.0) for seconds in (2.0, 4.0, 2.0, 4.0)]
    fast = [request(seconds, joules) for seconds, joules in ((1.0, 4.0), (2.0, 4.0), (1.0, 4.0), (200.0, 800.0))]
    found = figures(fast, ar)
    assert found["over_ar"] == found["spread"]["median"] == 2.0 and found["spread"]["high"] == 2.0
    assert found["tokens_per_second"] == found["tokens_per_second_spread"]["median"] == 6.0
    assert found["decode_tokens_per_second"] == 6.0  # 7 tokens in 7/8 of the time
    assert found["tokens_per_forward"] == 2.0 and found["joules_per_token"] == 0.5
    assert found["first_token_seconds"] == 0.1875
