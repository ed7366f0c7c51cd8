"""Every program with closed standard streams, an output that nobody reads, a small encoding, and bad arguments."""

import os
import runpy
import subprocess
import sys
from contextlib import contextmanager

import pytest

from tests.conftest import ROOT
from tests.training.small_runs import STEPS, metrics, small
from tidar_megatron.program import run_tool
from tidar_megatron.streams import standard_streams
from tidar_megatron.training import signals

PROGRAMS = [f"tools/{path.name}" for path in sorted((ROOT / "tools").glob("*.py"))]
PROGRAMS.append("tidar_megatron/evaluation/__main__.py")  # python -m tidar_megatron.evaluation
QUICK = [program for program in PROGRAMS if program.startswith("tools/")]  # lm-eval takes seconds to import


def run(monkeypatch, program, *arguments):
    """Run a program in this process and return its exit status."""
    monkeypatch.setattr(signals, "install", lambda: None)  # pytest keeps its own
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(str(ROOT / program), run_name="__main__")
    return leaving.value.code


@pytest.fixture
def unread():
    """A file descriptor of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@contextmanager
def output(stream):
    """``stream`` as the standard output of this process, in a block: pytest sets its own before each test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "__stdout__", stream)
        yield


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_argument_that_is_not_utf8_is_one_line(program, monkeypatch, capsys):
    assert run(monkeypatch, program, "--model", os.fsdecode(b"caf\xe9")) == 2
    error = "error: argument 'caf\\udce9': is not UTF-8; give it in UTF-8, or rename the file\n"
    assert capsys.readouterr() == ("", error)


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_output_that_nobody_reads_ends_the_program_without_a_word(program, monkeypatch, capsys, unread):
    with output(open(unread, "w", closefd=False)):
        assert run(monkeypatch, program, "--help") == 141
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("program", PROGRAMS)
def test_closed_streams_raise_nothing(program, monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert run(monkeypatch, program, "--help") == 0
    assert sys.stdin.read() == ""
    for stream in (sys.stdout, sys.stderr):
        stream.write("into nothing")


@pytest.mark.process
@pytest.mark.parametrize("program", QUICK)
def test_a_real_process(program, unread):
    """Its end too, where the interpreter flushes what is left; no file that it opens is taken for a closed stream."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    piped = subprocess.Popen(
        [sys.executable, program, "--help"], stdout=unread, stderr=subprocess.PIPE, cwd=ROOT, env=environment
    )
    shell = f"{sys.executable} {program} --help <&- >&- 2>&-"
    assert subprocess.run(shell, shell=True, cwd=ROOT, timeout=120).returncode == 0
    assert (piped.communicate(timeout=120)[1], piped.returncode) == (b"", 141)


@pytest.mark.process
def test_closed_descriptors_are_not_given_to_files():
    program = "from tidar_megatron.program import run_tool; run_tool(lambda: exit(40 + open('README.md').fileno()))"
    shell = f'{sys.executable} -c "{program}" <&- >&- 2>&-'
    assert subprocess.run(shell, shell=True, cwd=ROOT, timeout=120).returncode > 42


@pytest.mark.parametrize(("status", "seen"), [(0, 141), (1, 1)])
def test_a_failure_keeps_its_status_where_nobody_reads_the_output(status, seen, capsys, unread):
    def main():
        print("so far")
        sys.exit(status)

    with output(open(unread, "w", closefd=False)), pytest.raises(SystemExit) as leaving:
        run_tool(main)
    assert leaving.value.code == seen
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_text_that_the_encoding_cannot_hold_is_escaped(encoding, tmp_path):
    text = "né 日本 \udce9"
    with (tmp_path / "out").open("w", encoding=encoding) as stream, output(stream), standard_streams():
        print(text)
    assert (tmp_path / "out").read_bytes() == text.encode(encoding, "backslashreplace") + b"\n"


def test_a_full_disk_under_the_output_is_one_line(capsys):
    with open("/dev/full", "w") as stream, output(stream), pytest.raises(SystemExit) as leaving:
        run_tool(lambda: print("a line"))
    assert leaving.value.code == 2
    assert capsys.readouterr().err == "error: No space left on device; free space, or choose another folder\n"


def test_a_run_that_trains_goes_on_without_its_output(shards, tmp_path, capsys, unread):
    """Its steps, its record and its checkpoint are those of any run."""
    from tidar_megatron.checkpoint.folder import saved_iterations
    from tidar_megatron.training.loop import pretrain

    with output(open(unread, "w", closefd=False)):
        run_tool(lambda: pretrain(small(shards, checkpoint={"save": str(tmp_path / "run")})))
    assert [row["iteration"] for row in metrics(tmp_path / "run") if "loss" in row] == [*range(1, STEPS + 1)]
    assert saved_iterations(tmp_path / "run") == [STEPS]
    assert capsys.readouterr().err.count("warning: standard output: Broken pipe; the run continues without it\n") == 1
