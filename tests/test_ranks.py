"""The tests' own ways to run a program: forked (tests/ranks.py), and in this process (tests/programs.py)."""

import os
import signal
import subprocess
import sys

import pytest

from tests.programs import call, own_lines
from tests.ranks import Process, run, run_ranks

SAYS = """
import os, sys
print(os.environ["WORD"], sys.stdin.read(), sys.argv[1:])
print("torch" in sys.modules, file=sys.stderr)
sys.exit(3)
"""


@pytest.mark.process
def test_a_forked_program_is_a_process_of_its_own(tmp_path):
    done = run("-c", SAYS, "a", 1, input=b"given", WORD="word")
    assert (done.returncode, done.stdout, own_lines(done.stderr)) == (3, "word given ['a', '1']\n", ["True"])
    assert "WORD" not in os.environ
    sleeping = Process(["-c", "import time; time.sleep(100)"], tmp_path / "log")
    with pytest.raises(subprocess.TimeoutExpired):
        sleeping.wait(0.01)
    sleeping.send_signal(signal.SIGKILL)
    assert sleeping.wait() == -signal.SIGKILL


@pytest.mark.process
def test_ranks_know_their_places_and_one_that_fails_is_said():
    place = "import os; print(*(os.environ[name] for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')))"
    assert run_ranks(2, "-c", place).stdout == "0 2 0\n"
    with pytest.raises(AssertionError, match=r"statuses: \[0, 1\](.|\n)*rank 1 cannot"):
        run_ranks(2, "-c", "import os, sys; os.environ['RANK'] == '0' or sys.exit('rank 1 cannot')")


def test_a_program_in_this_process_leaves_nothing_behind():
    before = sys.argv, sys.stdout, sys.stderr, os.environ.get("CUDA_VISIBLE_DEVICES"), os.getcwd()
    done = call("tools/plan.py", "--gpus", "few")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = own_lines(done.stderr)
    assert line.startswith("error: argument --gpus")
    assert before == (sys.argv, sys.stdout, sys.stderr, os.environ.get("CUDA_VISIBLE_DEVICES"), os.getcwd())


def test_notices_of_libraries_are_not_a_programs_own_lines():
    text = """/lib/torch/cuda/__init__.py:180: UserWarning: CUDA initialization: no driver (Triggered internally.)
  return torch._C._cuda_getDeviceCount() > 0
W1130 02:31:10.123456 4321 torch/_inductor/utils.py:1436] Not enough SMs to use max_autotune_gemm mode
[W1130 02:31:10.123456789 CUDAFunctions.cpp:108] Warning: CUDA initialization
error: --gpus 0: must be a number above 0
warning: standard output: Broken pipe
"""
    assert own_lines(text) == text.splitlines()[-2:]
