"""tools/generate.py as a user runs it: as a program where the process matters, else in this process (it is quicker)."""

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests import ranks
from tests.conftest import ROOT
from tests.programs import call, own_lines

PROGRAM = ROOT / "tools" / "generate.py"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}


def run(*args: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, PROGRAM, *map(str, args)], capture_output=True, env=ENVIRONMENT, timeout=300)


@pytest.fixture
def tool() -> Callable[..., tuple[int, str, str]]:
    """Calls the program in this process: (exit status, standard output, standard error)."""

    def run(*arguments):
        done = call("tools/generate.py", *arguments)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.mark.process
def test_json_is_one_object_on_standard_output(checkpoint):
    done = run("--model", checkpoint, "--prompt", "hello", "--max-new-tokens", 8, "--ignore-eos", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"\n") == 1
    assert json.loads(done.stdout)["mode"] == "auto"


def test_modes_agree_and_the_figures_are_there(checkpoint, tool):
    texts = set()
    for more in (
        ["--mode", "ar"],
        ["--plan", "lookup:8"],
        ["--mode", "auto"],
        ["--branches", "2", "--draft-length", "6"],
    ):
        status, out, _ = tool(
            "--model", checkpoint, "--prompt", "hello", "--max-new-tokens", 20, "--ignore-eos", "--json", *more
        )
        assert status == 0
        result = json.loads(out)
        texts.add((result["text"], *result["token_ids"]))
        assert len(result["token_ids"]) == 20
        assert result["mode"] == {"--plan": "lookup", "--mode": more[1]}.get(more[0], "tidar")
        for name in ("tokens_per_forward", "tokens_per_second", "distinct_4grams"):
            assert result[name] > 0
    assert (result["draft_length"], result["branches"]) == (6, 2)
    assert result["forwards"] <= 19
    assert len(texts) == 1


def test_streams_text_then_the_figures(checkpoint, tool):
    arguments = ["--model", checkpoint, "--prompt", "hello", "--max-new-tokens", 20]
    text = json.loads(tool(*arguments, "--json")[1])["text"]
    status, out, _ = tool(*arguments)
    assert status == 0
    assert out.startswith(text)
    assert re.fullmatch(
        r"\n\n\d+\.\d\d tokens per forward, \d+\.\d tokens/s, distinct 4-grams [01]\.\d\d\n", out[len(text) :]
    )
    assert "\x1b[" not in out


@pytest.mark.process
def test_colours_in_a_terminal(checkpoint):
    ours, theirs = pty.openpty()
    arguments = ["--model", str(checkpoint), "--prompt", "hello", "--max-new-tokens", "12"]
    variables = {"TERM": "xterm-256color", "NO_COLOR": "", "PYTHONIOENCODING": "utf-8"}
    process = ranks.Process(["tools/generate.py", *arguments], os.ttyname(theirs), "/dev/null", variables=variables)
    out = b""
    while (ready := select.select([ours], [], [], 0.1)[0]) or process.poll() is None:
        out += os.read(ours, 4096) if ready else b""
    os.close(ours)
    os.close(theirs)
    assert process.wait() == 0
    assert len(set(re.findall(rb"\x1b\[3[236]m", out))) >= 2
    assert b"tokens per forward" in out


def test_more_drafts_than_were_learned_are_remarked_upon(checkpoint, tool):
    arguments = ["--model", checkpoint, "--prompt", "a", "--max-new-tokens", 2, "--plan"]
    status, _, err = tool(*arguments, "2:6")
    assert status == 0 and "note: 6 drafts at once; the model has learned blocks of 4" in err
    assert "drafts at once" not in tool(*arguments, "2:4")[2]


def test_the_prompt_of_standard_input(checkpoint, tool):
    arguments = ["--model", checkpoint, "--max-new-tokens", 8, "--json", "--prompt"]
    piped = call("tools/generate.py", *arguments, "-", stdin=b"he\xc3\xa9\n")
    assert json.loads(piped.stdout)["token_ids"] == json.loads(tool(*arguments, "heé\n")[1])["token_ids"]
    bad = call("tools/generate.py", *arguments, "-", stdin=b"\xff")
    (line,) = own_lines(bad.stderr)
    assert bad.returncode == 2 and line.startswith("error: --prompt -: standard input is not UTF-8")


def test_what_only_a_draw_knows_is_said_to_be_idle(checkpoint, tool):
    arguments = ["--model", checkpoint, "--prompt", "a", "--max-new-tokens", 2, "--top-p", 0.5, "--seed", 3]
    status, _, err = tool(*arguments)
    assert status == 0 and "note: --top-p, --seed: of no effect at temperature 0" in err
    assert "of no effect" not in tool(*arguments, "--temperature", 1)[2]
    assert "note: --logprobs: printed with --json alone" in tool(*arguments, "--logprobs")[2]
    assert "--logprobs" not in tool(*arguments, "--logprobs", "--json")[2]


def test_stops_where_the_context_ends_and_says_so(checkpoint, tool):
    status, _, err = tool("--model", checkpoint, "--prompt", "x" * 120, "--max-new-tokens", 50, "--ignore-eos")
    assert status == 0
    assert "prompt and output fill the model's context of 128 tokens" in err


BAD_INPUT = [
    (["--prompt", "a<|mask|>b"], "contains the mask token (id 257)"),
    (["--prompt", ""], "the prompt is empty"),
    (["--prompt", "x" * 128], "the prompt has 128 tokens and the model's context holds 128"),
    (["--prompt", "a", "--branches", "few"], "branches 'few': use all or a positive integer"),
    (["--prompt", "a", "--branches", "0"], "branches 0: use all or a positive integer"),
    (["--prompt", "a", "--draft-length", "0"], "draft length 0: use a positive integer"),
    (["--prompt", "a", "--max-new-tokens", "0"], "max new tokens 0: use a positive integer"),
    (["--prompt", "a", "--model", "nowhere"], "nowhere: has no config.json"),
    (["--prompt", "a", "--dtype", "int4"], "dtype 'int4': use float32"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT)
def test_bad_input_is_one_line_and_status_2(checkpoint, tool, arguments, message):
    status, out, err = tool("--model", checkpoint, *arguments)
    assert status == 2
    assert out == ""
    (line,) = own_lines(err)
    assert line.startswith("error: ") and message in line


@pytest.mark.process
@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT[:1])
def test_bad_input_of_the_program_itself(checkpoint, arguments, message):
    done = ranks.run("tools/generate.py", "--model", checkpoint, *arguments, "--json")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = own_lines(done.stderr)
    assert line.startswith("error: ") and message in line


def test_a_folder_without_a_tidar_section(checkpoint, tool, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tidar"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    status, _, err = tool("--model", tmp_path, "--prompt", "a", "--mode", "tidar")
    assert status == 2
    assert "use mode ar (--plan ar), or export a TiDAR checkpoint with tidar convert export" in err
    status, out, err = tool("--model", tmp_path, "--prompt", "a")
    assert status == 0 and "no tidar section: plain autoregression" in err and "1.00 tokens per forward" in out


@pytest.mark.slow
def test_the_plan_is_named_or_explained(checkpoint, tool):
    arguments = ["--model", checkpoint, "--prompt", "a", "--max-new-tokens", 12, "--ignore-eos"]
    status, out, _ = tool(*arguments, "--explain-plan")
    assert status == 0 and "tokens/forward" in out and "gain from 1, 2, ... drafts" in out and "%" in out
    for plan, (mode, length, branches) in {
        "ar": ("ar", None, None),
        "linear:4": ("linear", 4, None),
        "all:3": ("tidar", 3, "all"),
        "2:8": ("tidar", 8, 2),
    }.items():
        result = json.loads(tool(*arguments, "--plan", plan, "--json")[1])
        assert (result["mode"], result["draft_length"], result["branches"]) == (mode, length, branches)
    for wrong, message in (
        (["--plan", "fast"], "plan 'fast': use auto, ar, linear:8"),
        (["--plan", "2:8", "--mode", "ar"], "--plan 2:8: names it all"),
        (["--mode", "linear", "--branches", "all"], "--mode linear: takes no --branches"),
        (["--mode", "ar", "--draft-length", 4], "mode ar: takes no draft length"),
        (["--mode", "ar", "--explain-plan"], "--explain-plan: needs --plan auto"),
        (["--temperature", "nan"], "temperature nan: must be"),
        (["--stop", "x", ""], "--stop '': give strings of at least one character"),
    ):
        status, _, err = tool(*arguments, *wrong)
        assert status == 2 and message in err and err.count("\n") == 1


def test_a_folder_without_a_tokenizer(checkpoint, tool, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    status, _, err = tool("--model", tmp_path, "--prompt", "a")
    assert status == 2
    assert "has no tokenizer" in err


@pytest.mark.process
def test_help_does_not_wait_for_torch():
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{str(PROGRAM)!r}, '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=ENVIRONMENT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert b"--draft-length" in done.stdout
