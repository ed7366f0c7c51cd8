"""``tidar``: which program it starts, what it refuses, what a shell completes; files in ``tools/`` start the same."""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tidar_megatron.cli import main as command
from tidar_megatron.errors import UserError

TOOLS = sorted((ROOT / "tools").glob("*.py"))


def call(monkeypatch, *arguments, program="tidar"):
    """Call the command in this process and return its exit status."""
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as leaving:
        command.main()
    return leaving.value.code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generat"], "unknown command generat (did you mean generate?)"),
        (["prepare_data"], "unknown command prepare_data (did you mean prepare-data?)"),
        (["xyz"], "unknown command xyz; tidar --help lists them all"),
        ([], "a command is missing; tidar --help lists them all"),
        (["--versoin"], "unknown flag --versoin (did you mean --version?)"),
        (["plan", "--config", "x.yaml", "--gpus", "8", "--hardwear", "h100"], "unknown flag --hardwear (did you mean"),
        (["caf\udce9"], "argument 'caf\\udce9': is not UTF-8"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, message, monkeypatch, capsys):
    assert call(monkeypatch, *arguments) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith(f"error: {message}") and error.count("\n") == 1


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--model", "x", "--prompt", "y", "--plan", "fast"], "plan 'fast': use auto, ar, linear:8"),
        (["generate", "--model", "x", "--prompt", "y", "--plan", "2:8", "--mode", "ar"], "--plan 2:8: names it all"),
        (["evaluate", "--model", "x", "--tasks", "y", "--plan", "all"], "plan 'all': use auto, ar, linear:8"),
    ],
)
def test_a_wrong_plan_is_refused_before_torch_is_imported(arguments, message):
    program = "import sys; sys.modules['torch'] = None; from tidar_megatron.cli.main import main; main()"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", command.COMMANDS)
def test_every_command_has_its_help(name, monkeypatch, capsys):
    monkeypatch.setattr("tidar_megatron.training.signals.install", lambda: None)  # pytest keeps its own
    assert call(monkeypatch, name, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: tidar {name} [-h]")
    assert call(monkeypatch, name, "--help", program="/x/tidar_megatron/__main__.py") == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m tidar_megatron {name} [-h]")


def test_every_command_has_its_file_in_tools():
    """Which holds nothing of its own."""
    launched = [re.findall(r'launch\("([\w-]+)"\)', path.read_text()) for path in TOOLS]
    assert sorted(launched) == sorted([name] for name in command.COMMANDS)
    lines = {path.stem: len(path.read_text().splitlines()) for path in TOOLS}
    assert lines.pop("gpu_check") <= 12  # it runs where the package is not installed
    assert max(lines.values()) <= 7


@pytest.mark.parametrize(("name", "speaks"), [("pretrain", False), ("generate", True)])
def test_under_torchrun_one_rank_speaks(name, speaks, monkeypatch, capsys):
    """Of a program that is started on several ranks; ``RANK`` says nothing about the others."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def main():
        raise UserError("what all ranks say")

    monkeypatch.setattr(f"tidar_megatron.cli.{name}.main", main)
    assert call(monkeypatch, name) == 2
    assert ("what all ranks say" in capsys.readouterr().err) == speaks


@pytest.mark.process
@pytest.mark.parametrize(
    ("line", "words", "completions"),
    [
        ("tidar in", 1, {"inspect-data", "inspect-checkpoint"}),
        ("tidar generate", 1, {"generate", "generate-data"}),
        ("tidar generate --draft", 1, {"--draft-length"}),
        ("tidar generate --mode ", 1, {"auto", "tidar", "linear", "ar", "lookup"}),
        ("tidar convert ex", 1, {"export"}),
        ("tidar convert export --max", 1, {"--max-shard-size-gb"}),
        ("tidar pretrain --train-i", 1, {"--train-iters"}),
        ("tidar plan --hard", 1, {"--hardware"}),
        ("python -m tidar_megatron certify --dr", 3, {"--draft-lengths"}),
    ],
)
def test_a_shell_completes(line, words, completions, tmp_path):
    pytest.importorskip("argcomplete")
    asked = {
        "_ARGCOMPLETE": str(words),
        "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "completions"),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    program = "import sys; sys.argv = ['tidar']; from tidar_megatron.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | asked, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = (tmp_path / "completions").read_text().split("\013")
    assert {one.strip() for one in found} == completions


def test_without_argcomplete_a_shell_starts_nothing(monkeypatch):
    for name, value in {"_ARGCOMPLETE": "1", "COMP_LINE": "tidar check-layout ", "COMP_POINT": "19"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    assert call(monkeypatch) == 1
