"""SIGKILL at every phase of a save, and at random moments: what the tracker names is whole, and a resume goes on."""

import pytest

from tests.ranks import run


@pytest.mark.parametrize("what", ["phases", "random"])
@pytest.mark.parametrize("how", ["sync", "async"])
def test_a_killed_save(shards, tmp_path, how, what):
    """Fault 5: SIGKILL at every phase of a save and at random: the tracker's checkpoint is whole, the run goes on"""
    done = run("-m", "tests.faults.killed_saves", *shards, tmp_path, how, what)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    held = done.stdout.count("held:")
    assert held == (17 if what == "phases" else 1), done.stdout[-3000:]
