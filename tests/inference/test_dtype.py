"""``--dtype auto``: what it chooses, what it says, and that it is timed once. Processor and times are stand-ins."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.programs import call
from tidar_megatron.errors import UserError
from tidar_megatron.hf_folder.model import check_folder, load_causal_lm
from tidar_megatron.inference import dtype as module
from tidar_megatron.inference.dtype import choose_dtype, dtype_note, has_bfloat16, measure_speedup
from tidar_megatron.inference.loading import load_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_model_is_small(monkeypatch):
    monkeypatch.setattr(module, "SMALL_MODEL", 0)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache folder, in which nothing is known of this machine."""
    monkeypatch.setenv("TIDAR_CACHE", str(tmp_path / "cache"))
    module._speedup.cache_clear()
    yield tmp_path / "cache"
    module._speedup.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    """Sets whether the processor has bfloat16 and how much faster it is in it; counts the timings."""
    timings = []

    def set_machine(instructions, speedup):
        def measured():
            timings.append(speedup)
            return speedup

        monkeypatch.setattr(module, "has_bfloat16", lambda: instructions)
        monkeypatch.setattr(module, "measure_speedup", measured)
        module._speedup.cache_clear()
        return timings

    return set_machine


@pytest.mark.parametrize(
    ("instructions", "speedup", "chosen", "note"),
    [
        (True, 1.8, torch.bfloat16, "dtype: bfloat16 (auto: matrix products are 1.8 x as fast as in float32 here)"),
        (True, 1.05, torch.float32, "dtype: float32 (auto: matrix products in bfloat16 are only 1.05 x as fast here)"),
        (True, 0.3, torch.float32, "dtype: float32 (auto: matrix products in bfloat16 are only 0.30 x as fast here)"),
        (False, 9.0, torch.float32, "dtype: float32 (auto: this processor has no instructions for bfloat16)"),
    ],
)
def test_on_a_cpu_the_faster_one_is_chosen(machine, instructions, speedup, chosen, note):
    timings = machine(instructions, speedup)
    assert choose_dtype("auto", CPU) == choose_dtype(None, CPU) == chosen
    assert dtype_note("auto", CPU) == dtype_note(None, CPU) == note
    assert len(timings) == instructions  # timed once, and only where there is a choice


def test_on_a_gpu_it_is_bfloat16(machine):
    timings = machine(False, 0.1)
    assert choose_dtype("auto", torch.device("cuda", 0)) == torch.bfloat16
    assert dtype_note("auto", torch.device("cuda", 0)) == "dtype: bfloat16 (auto: the choice for a GPU)"
    assert not timings


@pytest.mark.parametrize(
    ("name", "dtype"), [("float32", torch.float32), (torch.float16, torch.float16), ("float64", torch.float64)]
)
def test_a_named_dtype_is_taken(machine, name, dtype):
    timings = machine(True, 2.0)
    assert choose_dtype(name, CPU) == dtype
    assert dtype_note(name, CPU) is None
    assert not timings


@pytest.mark.parametrize("name", ["int8", "nonsense", "", torch.int8, "linalg"])
def test_another_name_is_refused_in_one_line(name):
    with pytest.raises(UserError, match="use float32, bfloat16, float16, float64 or auto") as error:
        choose_dtype(name, CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("capabilities", "has"),
    [
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": True}, True),
        ({"architecture": "arm64", "neon": True, "bf16": False}, False),
        ({"architecture": "arm64", "neon": True, "bf16": True}, True),
        ({}, False),
    ],
)
def test_the_processor_is_asked(monkeypatch, capabilities, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert has_bfloat16() == has


def test_the_cache_is_read(machine, folder):
    timings = machine(True, 1.8)
    assert choose_dtype("auto", CPU) == torch.bfloat16
    machine(True, 0.5)  # a later process would find this
    assert choose_dtype("auto", CPU) == torch.bfloat16
    assert timings == [1.8] and len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("name", ["processor", "version", "threads"])
def test_another_machine_is_timed_anew(machine, folder, monkeypatch, name):
    timings = machine(True, 1.8)
    choose_dtype("auto", CPU)
    if name == "processor":
        monkeypatch.setattr(module, "processor", lambda: "another one")
    elif name == "version":
        monkeypatch.setattr(torch, "__version__", "0.0")
    else:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 97)
    machine(True, 0.5)
    assert choose_dtype("auto", CPU) == torch.float32
    assert timings == [1.8, 0.5] and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", "1.8", *(f'{{"bfloat16_speedup": {value}}}' for value in ("NaN", "Infinity", "-1.0", '"x"'))],
)
def test_a_broken_cache_is_ignored_and_replaced(machine, folder, text):
    timings = machine(True, 1.8)
    choose_dtype("auto", CPU)
    (path,) = folder.iterdir()
    path.write_text(text)
    machine(True, 1.9)
    assert choose_dtype("auto", CPU) == torch.bfloat16
    assert timings == [1.8, 1.9]
    assert json.loads(path.read_text()) == {"bfloat16_speedup": 1.9}


def test_a_cache_that_cannot_be_written_is_done_without(machine, folder):
    folder.write_text("a file where the folder should be")
    timings = machine(True, 1.8)
    assert choose_dtype("auto", CPU) == torch.bfloat16
    assert dtype_note("auto", CPU)
    assert timings == [1.8]


def test_the_timing_gives_a_ratio(monkeypatch):
    monkeypatch.setattr(module, "WEIGHT", (64, 32))
    assert 0 < measure_speedup() < float("inf")


@pytest.mark.parametrize(("speedup", "dtype"), [(2.0, torch.bfloat16), (0.5, torch.float32)])
def test_a_float32_folder_runs_in_what_auto_chose(machine, checkpoint, speedup, dtype):
    machine(True, speedup)
    assert load_model(checkpoint).dtype == load_model(checkpoint, dtype="auto").dtype == dtype
    assert load_model(checkpoint, dtype="float64").dtype == torch.float64


def test_bfloat16_weights_are_not_converted(tmp_path, monkeypatch):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes)).bfloat16().save_pretrained(tmp_path)
    config, converted = check_folder(tmp_path), []
    original = torch.Tensor.to

    def to(tensor, *args, **kwargs):
        result = original(tensor, *args, **kwargs)
        if result.dtype != tensor.dtype and result.numel() >= 64 * 64 and result.device.type != "meta":
            converted.append(result.dtype)
        return result

    monkeypatch.setattr(torch.Tensor, "to", to)
    load_causal_lm(tmp_path, config, torch.bfloat16)
    assert not converted
    load_causal_lm(tmp_path, config, torch.float32)
    assert converted  # the stand-in sees how weights are read


def test_the_programs_say_what_auto_chose(machine, checkpoint, tmp_path):
    machine(True, 1.8)
    note = "dtype: bfloat16 (auto: matrix products are 1.8 x as fast as in float32 here)"
    command = ["tools/generate.py", "--model", checkpoint, "--prompt", "a", "--max-new-tokens", 4, "--plan", "ar"]
    for more in ([], ["--dtype", "auto"], ["--json"]):
        done = call(*command, *more)
        assert done.returncode == 0 and done.stderr.count(note) == 1
        assert note not in done.stdout
    json.loads(done.stdout)
    assert "dtype:" not in call(*command, "--dtype", "float32").stderr
    (tmp_path / "prompts.jsonl").write_text('"hello"\n')
    command = ["tools/certify.py", "--model", checkpoint, "--prompts", tmp_path / "prompts.jsonl", "--json"]
    command += ["--max-new-tokens", 2, "--draft-lengths", 2, "--samples", 0]
    for name, dtype, notes in (("auto", "bfloat16", 1), ("float64", "float64", 0)):
        done = call(*command, "--dtype", name)
        assert json.loads(done.stdout)["dtype"] == dtype and done.stderr.count("dtype:") == notes
    assert json.loads(call(*command).stdout)["dtype"] == "float32"  # certify's default


@pytest.mark.slow
@pytest.mark.parametrize("what", ["decode", "planner", "step"])
def test_the_benchmarks_name_the_dtype(machine, checkpoint, tmp_path, what, monkeypatch):
    from tidar_megatron.benchmark import planner

    monkeypatch.setattr(planner, "LENGTHS", (2,))
    machine(True, 1.8)
    (tmp_path / "prompts.jsonl").write_text('"hello"\n"abc"\n')
    command = ["tools/benchmark.py", what, "--model", checkpoint, "--prompts", tmp_path / "prompts.jsonl"]
    command += ["--max-new-tokens", 4, "--repeats", 1, "--output", tmp_path]
    command += [] if what == "planner" else ["--contexts", 16]
    command += ["--batch-sizes", 1, "--assistant", checkpoint] if what == "decode" else []
    done = call(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "dtype: bfloat16" in done.stdout and "dtype: bfloat16 (auto" in done.stderr
    assert json.loads((tmp_path / f"{what}.json").read_text())["dtype"] == "bfloat16"
    refused = call("tools/benchmark.py", "loader", "--dtype", "float32")
    assert refused.returncode == 2 and "--dtype: is for decode and planner and step" in refused.stderr


def test_a_small_model_runs_in_float32_on_a_cpu(monkeypatch):
    monkeypatch.setattr(module, "SMALL_MODEL", 100)
    monkeypatch.setattr(module, "_automatic", lambda device: (torch.bfloat16, "fast"))
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_dtype("auto", cpu, 99) == torch.float32 and choose_dtype("auto", cpu, 100) == torch.bfloat16
    assert choose_dtype(None, gpu, 99) == torch.bfloat16 and choose_dtype("bfloat16", cpu, 99) == torch.bfloat16
    assert "cache" in dtype_note("auto", cpu, torch.float32) and "fast" in dtype_note("auto", cpu)
