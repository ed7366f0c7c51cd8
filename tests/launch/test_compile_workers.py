"""Inductor's processes survive the SIGUSR1 that SLURM sends to every process of a job."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT, THOROUGH

PROGRAM = """
import os, signal, time
from pathlib import Path
from tests.launch.launching import descendants
from tidar_megatron.distributed import platform
from tidar_megatron.training import signals
import torch._inductor.async_compile as compiler

os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "2"
compiler.config.compile_threads = 2
compiler.has_triton_package = lambda: True  # a CPU build has no triton, and starts none
signals.install()
platform.start_compile_workers()
assert not descendants(os.getpid())  # without a GPU nothing is compiled
platform.has_gpu = lambda: True
with signals.shielded():
    platform.start_compile_workers()
assert compiler.AsyncCompile.process_pool().submit(os.getpid).result(120) in descendants(os.getpid())
started = descendants(os.getpid())
for process in started:
    os.kill(process, signal.SIGUSR1)
time.sleep(0.5)
states = [Path(f"/proc/{process}/status").read_text().split("State:")[1].split()[0] for process in started]
assert len(started) > 1 and not {"Z", "X"} & set(states), states
os.kill(os.getpid(), signal.SIGUSR1)
assert signals.received()  # this process is not shielded any more
print("alive")
"""


@pytest.mark.process
@pytest.mark.skipif(not THOROUGH, reason="takes 9 s, to start torch's compiler: .ci/run runs it")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
def test_they_are_shielded():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == "alive\n", done.stderr[-4000:]
