"""The benchmark program measures what it says: small runs of each kind, and its instruments on known functions."""

import json
import time
import types

import pytest
import torch

from tests.programs import call, own_lines
from tidar_megatron.benchmark import attention as attention_benchmark
from tidar_megatron.benchmark import loss as loss_benchmark
from tidar_megatron.benchmark import training as training_benchmark
from tidar_megatron.benchmark.measuring import Spread, Timings, peak_bytes
from tidar_megatron.benchmark.report import plot, show
from tidar_megatron.distributed.groups import shut_down


def run(*arguments):
    return call("tools/benchmark.py", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "keys"),
    [
        ("attention", {"seq_length", "backend", "over_causal", "peak_extra_bytes"}),
        ("training", {"seq_length", "parameters", "diffusion_block_fraction", "tidar_over_ar"}),
        pytest.param("loader", {"seq_length", "building_seconds", "waiting_over_building"}, marks=pytest.mark.process),
    ],
)
def test_rows(what, keys, tmp_path, monkeypatch):
    monkeypatch.setattr(training_benchmark, "TOKENS", 512)  # as the program has it: .ci/run
    done = run(what, "--seq-lengths", 256, "--repeats", 1, "--threads", 1, "--output", tmp_path, "--json")
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((tmp_path / f"{what}.json").read_text()) == result
    assert result["command"].startswith(f"python tools/benchmark.py {what} --seq-lengths 256")
    assert result["machine"]["threads"] == 1 and result["machine"]["torch"] == torch.__version__
    assert all(keys <= row.keys() for row in result["rows"])
    if what == "attention":
        assert {row["backend"] for row in result["rows"]} == {"chunked", "dense"}
    if what == "loader":  # what is read of ten million documents does not add up in memory
        (opening,) = result["opening"]
        assert opening["documents"] == 10_000_000
        assert opening["mib_after_1000"] - opening["mib_after_200"] < 4
        assert opening["mib_after_1000"] < 100
    if what == "training":
        assert {row["diffusion_block_fraction"] for row in result["rows"]} == {1.0, 0.25}
        assert all(row["parameters"] >= 11e6 for row in result["rows"])
        plot(result, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 5000


@pytest.mark.slow
def test_loss(monkeypatch):
    """On sizes where it takes no time."""
    monkeypatch.setattr(loss_benchmark, "VOCABULARY", 4096)
    monkeypatch.setattr(loss_benchmark, "TOKENS", 1024)
    shut_down()
    result = loss_benchmark.loss(repeats=1)
    assert result["largest_gradient_error"] < 1e-5
    assert result["peak_bytes"]["unfused"] >= 4 * 4096 * 1024  # the logits at least
    peaks = result["peak_bytes"]
    assert result["peak_ratio"] == pytest.approx(peaks["chunked"] / peaks["unfused"], abs=1e-4)


def test_peak_is_of_what_lives_at_one_time():
    kept = torch.ones(1000)

    def one_after_the_other():
        for _ in range(5):
            kept.mul(2)

    def all_together():
        return [kept.mul(2) for _ in range(5)], kept.add_(1), kept.view(10, 100)

    assert peak_bytes(one_after_the_other) == 4000
    assert peak_bytes(all_together) == 20000


class Copies(torch.autograd.Function):
    """As little as any backend must make: an output, and a gradient of each input."""

    @staticmethod
    def forward(ctx, query, key, value):
        return query.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clone(), grad.clone(), grad.clone()


def test_extra_bytes_are_beyond_what_any_backend_makes(monkeypatch):
    wasted = []
    schedule = types.SimpleNamespace(
        attend=lambda q, k, v, scale: wasted.append(q.new_empty(100)) or Copies.apply(q, k, v)
    )
    monkeypatch.setattr(attention_benchmark, "make_schedule", lambda *arguments, **more: schedule)
    tensors = [torch.ones(1, 8, 32, 64) for _ in range(3)]
    assert attention_benchmark._extra(tensors, None, "chunked", 256) == 400


def test_ratios_are_of_pairs(monkeypatch):
    """A clock that only the functions move on: each is measured by itself, in turns, after a run to warm up."""
    clock, calls = [0.0], []

    def function(name, seconds):
        def run():
            calls.append(name)
            clock[0] += seconds

        return run

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    timings = Timings({"long": function("long", 8.0), "short": function("short", 2.0)}, 3)
    assert calls == ["short", "long", "long", "short", "short", "long", "long", "short"]
    assert timings.seconds == {"long": [8.0] * 3, "short": [2.0] * 3}
    timings.seconds = {"a": [2.0, 20.0, 6.0], "b": [1.0, 10.0, 1.0]}  # the machine was busy in the second round
    assert timings.ratio("a", "b") == Spread(2.0, 2.0, 4.0)


def test_bad_input():
    for arguments, word in (
        (["attention", "--seq-lengths", 100], "multiple of 256"),
        (["loss", "--repeats", 0], "--repeats 0"),
        (["training", "--diffusion-block-fractions", 2], "--diffusion-block-fractions 2"),
        (["loss", "--plot", "loss.png"], "--plot: is for training, not for loss"),
    ):
        done = run(*arguments)
        (line,) = own_lines(done.stderr)
        assert done.returncode == 2 and word in line


@pytest.mark.parametrize(("skipped", "shown"), [([], None), ([4096, 8192], "skipped: 4096, 8192")])
def test_tables_of_results_with_and_without_skipped_contexts(skipped, shown, capsys):
    show({"benchmark": "decode", "rows": [{"mode": "ar", "batch": 1}], "skipped": skipped})
    printed = capsys.readouterr().out
    assert "mode" in printed and "ar" in printed and (shown or "mode") in printed
    assert ("skipped" in printed) is bool(skipped)
