"""An asynchronous save that is cut off was never published, and the checkpoint before was not pruned for it."""

import subprocess
import sys

from tests.conftest import ROOT


def test_killed_midway(shards, tmp_path):
    """Fault 6: killed mid async save: not published early, the older one not pruned, no writer left behind"""
    command = [sys.executable, "-m", "tests.faults.killed_saves", *map(str, shards), str(tmp_path), "async", "midway"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert done.stdout.count("held:") == 2
