"""Random SIGKILLs over one run of two ranks, by ``make test-kill``."""

import os

import pytest

from tests.ranks import run

KILLS = int(os.environ.get("TIDAR_KILLS", "5"))


@pytest.mark.timeout(120 + 60 * KILLS)
def test_killed_again_and_again(shards, tmp_path):
    """Kills: random SIGKILLs over a run of two ranks: always resumed, no sample lost, nothing unreadable published"""
    done = run("-m", "tests.faults.killed_runs", shards[0], tmp_path, KILLS, timeout=120 + 60 * KILLS)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.count("kill ") == KILLS
    assert f"held: {KILLS} kills" in done.stdout
