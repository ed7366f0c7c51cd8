"""The benchmark program measures what it says: small runs of each kind, and its instruments on known functions."""

import json
import time
import types

import pytest
import torch

from tests.conftest import THOROUGH
from tests.programs import call, own_lines
from tidar_megatron.benchmark import attention as attention_benchmark
from tidar_megatron.benchmark import loss as loss_benchmark
from tidar_megatron.benchmark import measuring
from tidar_megatron.benchmark import training as training_benchmark
from tidar_megatron.benchmark.measuring import Spread, Timings, peak_bytes
from tidar_megatron.benchmark.report import plot, show
from tidar_megatron.distributed.groups import initialize, shut_down

LONG = pytest.mark.skipif(not THOROUGH, reason="takes 10 s: make test-slow runs it, and .ci/run the program itself")


def run(*arguments):
    return call("tools/benchmark.py", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "keys"),
    [
        ("attention", {"seq_length", "backend", "over_causal", "peak_extra_bytes"}),
        pytest.param("training", {"seq_length", "parameters", "diffusion_block_fraction", "tidar_over_ar"}, marks=LONG),
        pytest.param(
            "loader", {"seq_length", "building_seconds", "waiting_over_building"}, marks=[pytest.mark.process, LONG]
        ),
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
    show(result)
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


@pytest.mark.slow
def test_sizes_are_given_by_flags(tmp_path):
    sizes = ["--hidden-size", 32, "--vocab-size", 512, "--tokens", 256]
    layers = ["--num-layers", 1, "--ffn-hidden-size", 64, "--num-attention-heads", 2, "--num-query-groups", 1]
    common = ["--repeats", 1, "--threads", 1, "--output", tmp_path, "--json"]
    dtypes = ["--dtypes", "float32", "bfloat16"]
    done = run("training", *sizes, *layers, "--seq-lengths", 256, "--diffusion-block-fractions", 1, *common, *dtypes)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["settings"]["tokens"] == 256 and result["settings"]["num_layers"] == 1
    assert [row["dtype"] for row in result["rows"]] == ["float32", "bfloat16"]
    seconds = [row["tidar_seconds"]["median"] for row in result["rows"]]
    speedups = [row["speedup"]["median"] for row in result["rows"]]
    assert speedups == pytest.approx([1.0, seconds[0] / seconds[1]], rel=0.02)
    assert result["rows"][0]["parameters"] == 32 * 512 + 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 3 * 32 + 2 * 16
    result = json.loads(run("loss", *sizes, *common).stdout.splitlines()[-1])
    assert [result["settings"][name] for name in ("hidden_size", "vocabulary", "tokens")] == [32, 512, 256]
    heads = ["--num-attention-heads", 2, "--kv-channels", 16]
    result = json.loads(run("attention", *heads, "--seq-lengths", 256, *common).stdout.splitlines()[-1])
    assert [result["settings"][name] for name in ("heads", "channels")] == [2, 16]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "--hidden-size", 64], "error: --hidden-size: is for training and loss, not for attention"),
        (["training", "--dtypes", "int8"], "error: --dtypes int8: training is in float32 or bfloat16"),
        (["training", "--num-layers", 0], "error: --num-layers 0: must be at least 1"),
    ],
)
def test_a_size_that_is_wrong_is_one_line(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2 and done.stderr.startswith(message)


@pytest.mark.slow
def test_batches_are_built_before_the_steps(monkeypatch):
    """And each step has metadata of its own, so that it makes attention's schedule as in training."""
    config = training_benchmark.step_config(
        256, model={"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 32, "num_attention_heads": 2}, tokens=256
    )
    shut_down()
    seen = []
    monkeypatch.setattr(training_benchmark, "train_step", lambda *arguments: seen.append(arguments[3][0]))
    try:
        ranks = initialize(config.parallel, config.training.seed)
        steps, *_ = training_benchmark._steps(config, [1.0], ranks)
        monkeypatch.setattr(training_benchmark, "make_batch", None)
        for _ in range(2):
            steps["TiDAR 1"]()
    finally:
        shut_down()
    assert seen[0].tokens is seen[1].tokens
    assert seen[0].visibility.data_ptr() != seen[1].visibility.data_ptr()


def test_short_functions_are_called_several_times_on_a_gpu(monkeypatch):
    """The first call compiles, so the second one says how many fit into a sample."""
    asked = []

    def seconds_of(function, where, calls=1):
        asked.append(calls)
        return 9.0 if len(asked) == 1 else 1e-3

    monkeypatch.setattr(measuring, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(measuring, "seconds_of", seconds_of)
    timings = Timings({"short": lambda: None}, 2)
    assert asked == [1, 1, 5, 5]
    assert timings.seconds == {"short": [1e-3, 1e-3]}


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
        (["loss", "--plot", "loss.png"], "--plot: is for training and slots, not for loss"),
    ):
        done = run(*arguments)
        (line,) = own_lines(done.stderr)
        assert done.returncode == 2 and word in line


@pytest.mark.parametrize(("skipped", "shown"), [([], None), ([4096, 8192], "skipped: 4096, 8192")])
def test_tables_of_results_with_and_without_skipped_contexts(skipped, shown, capsys):
    row = {"mode": "ar", "batch": 1, "same_tokens": None, "peak_bytes": 7}
    show({"benchmark": "decode", "rows": [row], "skipped": skipped, "left_out": ["install '.[llama]'"]})
    printed = capsys.readouterr().out
    assert "None" not in printed and "peak" not in printed and "left_out: install '.[llama]'" in printed
    assert "mode" in printed and "ar" in printed and (shown or "mode") in printed
    assert ("skipped" in printed) is bool(skipped)
