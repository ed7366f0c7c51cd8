"""An asynchronous save that is cut off was never published, and the checkpoint before was not pruned for it."""

from tests.ranks import run


def test_killed_midway(shards, tmp_path):
    """Fault 6: killed mid async save: not published early, the older one not pruned, no writer left behind"""
    done = run("-m", "tests.faults.killed_saves", *shards, tmp_path, "async", "midway")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert done.stdout.count("held:") == 2
