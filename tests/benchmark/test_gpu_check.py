"""The check of a GPU: all its sections on a CPU in tiny sizes, and that none of them stops the next."""

import json
import math
import os
import subprocess
import sys
import time
import types

import pytest
import torch

from tests.conftest import ROOT, THOROUGH
from tests.programs import call
from tidar_megatron.benchmark.timing import calls_per_sample, median_seconds
from tidar_megatron.errors import UserError
from tidar_megatron.gpu_check import speed, supervisor, worker
from tidar_megatron.gpu_check.lines import append, read
from tidar_megatron.gpu_check.models import random_model
from tidar_megatron.gpu_check.sections import SECTIONS, Section, limit
from tidar_megatron.gpu_check.setting import NOT_ON_A_CPU, Setting
from tidar_megatron.gpu_check.summary import summary

CPU = torch.device("cpu")


def strict(line):
    def refuse(constant):
        raise AssertionError(f"not JSON: {constant}")

    return json.loads(line, parse_constant=refuse)


def run(output, sections, seconds=600.0):
    worker.run_sections(sections, time.monotonic() + seconds, str(output), "cpu", tiny=True)
    return [strict(line) for line in output.read_text().splitlines()]


@pytest.mark.skipif(not THOROUGH, reason="takes 10 s: make test-slow runs it, and .ci/run the program itself")
@pytest.mark.process
def test_all_sections_on_a_cpu(tmp_path, monkeypatch):
    """A line names what only a GPU can do."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    lines = run(tmp_path / "lines.jsonl", range(len(SECTIONS)))
    assert [line["section"] for line in lines] == list(range(10))
    assert [line["error"] for line in lines if not line["ok"]] == []
    by_name = {line["name"]: line for line in lines}
    assert all(NOT_ON_A_CPU in json.dumps(line) for name, line in by_name.items() if name != "certificate")
    assert {row["backend"] for row in by_name["attention"]["errors"]} == {"chunked", "flex", "transformer_engine"}
    assert by_name["runs"]["async_save"]["identical"]
    assert {row["tokens"] for row in by_name["decode"]["rows"]} == {"equal"}
    assert {(row["model"], row["tokens"]) for row in by_name["slots"]["rows"]} >= {("1.5B", 1), ("8B", 1)}
    assert {row["plan"] for row in by_name["speed"]["rows"]} == {"ar", "linear:8", "1:8", "2:8", "all:8"}
    assert {row["diffusion_block_fraction"] for row in by_name["step"]["rows"]} == {1.0, 0.25}
    assert by_name["training"]["rows"][0]["mfu"] > 0
    assert by_name["certificate"]["float32"]["holds"]
    shown = summary(lines)
    assert all(f"{line['section']} {line['name']}: ok" in shown for line in lines)
    assert shown.endswith("10 of 10 sections are ok")


@pytest.fixture
def sections(monkeypatch):
    """A function that replaces the sections by functions of their setting; text is the name of a missing module."""

    def replace(**checks):
        made = []
        for name, check in checks.items():
            module = check if isinstance(check, str) else f"fake_section_{name}"
            if not isinstance(check, str):
                monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(check=check))
            made.append(Section(name, module, 1, name))
        monkeypatch.setattr(worker, "SECTIONS", tuple(made))
        return range(len(made))

    return replace


def test_a_section_that_raises_does_not_stop_the_next(sections, tmp_path):
    def raises(setting):
        setting.rows("rows").append({"kept": 1})
        raise ValueError("first line\nlast line")

    def out_of_memory(setting):
        with setting.guard("a row"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB")
        setting.found["after"] = math.nan

    def exits(setting):
        sys.exit(5)

    numbers = sections(
        raises=raises, missing="no_such_package.module", memory=out_of_memory, exits=exits, good=lambda setting: None
    )
    lines = run(tmp_path / "lines.jsonl", numbers)
    assert [line["ok"] for line in lines] == [False, False, False, False, True]
    assert lines[0]["error"] == "ValueError: first line last line" and lines[0]["rows"] == [{"kept": 1}]
    assert lines[1]["error"] == "ModuleNotFoundError: No module named 'no_such_package'"
    assert lines[2]["error"].startswith("a row: torch.OutOfMemoryError: CUDA out of memory")
    assert lines[2]["after"] is None
    assert lines[3]["error"] == "SystemExit: 5"
    assert "0 raises: FAILED" in summary(lines) and "error: ValueError: first line last line" in summary(lines)


def test_the_deadline_is_kept(sections, tmp_path):
    """A section ends between its rows when its share is used; those that would begin after the end are skipped."""

    def rows(setting):
        made = setting.rows("rows")
        while setting.in_time():
            made.append({})
            time.sleep(0.01)

    lines = run(tmp_path / "lines.jsonl", sections(one=rows, two=rows), 2.0)
    assert [line["stopped_early"] for line in lines] == [True, True]
    assert 0.9 < lines[0]["seconds"] < 1.9  # its share is a half
    (skipped,) = run(tmp_path / "skipped.jsonl", sections(one=rows), 0.0)
    assert skipped["skipped"] and not skipped["ok"] and skipped["error"] == "skipped: the time is up"
    assert limit(SECTIONS[-1:], 7.0) == 7.0 and limit(SECTIONS, -1.0) == 0.0


def test_results_are_kept_between_rows(sections, tmp_path):
    """Until the section's line is written."""
    output, seen = tmp_path / "lines.jsonl", []

    def rows(setting):
        setting.rows("rows").append(math.inf)
        assert setting.in_time()
        seen.append(json.loads((tmp_path / "lines.jsonl.part").read_text()))

    assert run(output, sections(one=rows))[0]["ok"]
    assert seen == [{"rows": [None]}]
    assert list(tmp_path.iterdir()) == [output]


def test_a_part_of_the_time(tmp_path):
    setting = Setting(CPU, True, tmp_path, time.monotonic() + 100)
    whole = setting.deadline
    with setting.part(0.25):
        assert setting.deadline == pytest.approx(time.monotonic() + 25, abs=1)
    assert setting.deadline == whole and not setting.stopped_early


WORKER = """
import json, os, signal, sys, time
from tidar_megatron.gpu_check.lines import append, keep
from pathlib import Path
asked = json.loads(sys.argv[1])
for number in asked["sections"]:
    if number == 1:
        keep(Path(asked["output"]), {"rows": [1, 2]})
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 3:
        time.sleep(600)
    append(Path(asked["output"]), {"section": number, "name": str(number), "ok": True, "seconds": 0.0})
    if number == 4:
        sys.exit(3)
"""


@pytest.mark.process
def test_a_process_that_dies_or_hangs_does_not_stop_the_rest(tmp_path, monkeypatch):
    program = tmp_path / "worker.py"
    program.write_text(WORKER)
    monkeypatch.setattr(supervisor, "WORKER", (sys.executable, str(program)))
    monkeypatch.setattr(supervisor, "GRACE", 0.5)
    monkeypatch.setattr(supervisor, "limit", lambda remaining, seconds: 0.5)
    lines = supervisor.supervise(range(6), 60, tmp_path / "lines.jsonl", "cpu", tiny=True)
    assert [line["section"] for line in lines] == list(range(6))
    assert [line["ok"] for line in lines] == [True, False, True, False, True, True]
    assert lines[1]["error"] == "the process ended with signal SIGKILL"
    assert lines[1]["rows"] == [1, 2]  # what it had found
    assert not any("rows" in line for line in lines if line["section"] != 1)
    assert "did not stop by itself" in lines[3]["error"]
    assert all(line["skipped"] for line in supervisor.supervise([0], 0, tmp_path / "none.jsonl", "cpu", tiny=True))


@pytest.mark.process
def test_results_are_not_lost_to_a_device_that_cannot_be_used(tmp_path, monkeypatch):
    (tmp_path / "lines.jsonl").write_text('{"of": "before"}\n')
    monkeypatch.setattr(supervisor, "WORKER", (sys.executable, "-c", "import sys; sys.exit(2)"))
    with pytest.raises(SystemExit, match="2"):
        supervisor.supervise([0], 60, tmp_path / "lines.jsonl", "cpu", tiny=True)
    assert read(tmp_path / "lines.jsonl") == [{"of": "before"}]


@pytest.mark.process
def test_it_starts_where_nothing_is_installed(tmp_path):
    """Without any package, and from another folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", str(ROOT / "tools/gpu_check.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: gpu_check.py" in done.stdout and "9 every plan's output" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "0"], "error: --seconds 0: must be above 0"),
        (["--sections", "0", "10"], "error: --sections 10: use numbers from 0 to 9"),
        (["--output", "/proc/no/lines.jsonl"], "error: --output /proc/no/lines.jsonl: cannot be written"),
    ],
)
def test_bad_arguments(arguments, message):
    done = call("tools/gpu_check.py", *arguments)
    assert done.returncode == 2 and done.stderr.startswith(message)


def test_a_missing_device_is_one_line(tmp_path):
    with pytest.raises(UserError, match="torch sees no CUDA device"):
        worker.run_sections([0], time.monotonic() + 9, str(tmp_path / "lines.jsonl"))


def test_lines_are_standard_json(tmp_path):
    path = tmp_path / "lines.jsonl"
    append(path, {"a": [math.nan, -math.inf, {"b": (1.5, None)}], 3: True})
    with open(path, "a") as file:
        file.write('{"unfinished": ')
    assert read(path) == [{"a": [None, None, {"b": [1.5, None]}], "3": True}]


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "tokens"), [(0.0, 1.0), (1.0, 8.0)])
def test_acceptance_is_scripted(rate, tokens, tmp_path):
    setting = Setting(CPU, True, tmp_path, time.monotonic() + 100)
    model = random_model("tiny", setting, torch.float32)
    made = speed._decode(model, "all:8", rate, setting)
    assert made.tokens_per_forward == pytest.approx(tokens, rel=0.1)  # the last forward may have no room for all


def test_short_calls_are_repeated_within_a_sample(monkeypatch):
    clock, calls = [0.0], []

    def call():
        calls.append(clock[0])
        clock[0] += 1e-3

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert median_seconds(call, CPU, samples=3, warm_up=2) == pytest.approx(1e-3)
    assert len(calls) == 2 + 1 + 3 * 5
    assert calls_per_sample(1.0) == 1 and calls_per_sample(0.0) == 1000
