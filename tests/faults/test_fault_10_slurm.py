"""A real SLURM signals a job before its time limit, and requeues it."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.timeout(2000)
def test_slurm():
    """Fault 10: real SLURM --signal and requeue: the job goes on where it saved (tests/launch/test_slurm.py)"""
    if not os.environ.get("TIDAR_TEST_SLURM"):
        pytest.skip("make test-slurm runs it")
    command = [sys.executable, "-m", "pytest", "tests/launch/test_slurm.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-4000:]
