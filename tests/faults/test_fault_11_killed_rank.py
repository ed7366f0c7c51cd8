"""SIGKILL of one rank ends the whole job, at once and not with success."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.faults.data_runs import begin
from tests.launch.launching import children, steps, wait_for


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank(shards, tmp_path, rank):
    """Fault 11: SIGKILL of one rank: the job ends non-zero in seconds, the other says who is gone, nobody is left"""
    run, log = tmp_path / "run", tmp_path / "log"
    with begin(run, shards[0], log, 2, "--train-iters", 100000) as job:
        wait_for(lambda: len(steps(run)) >= 3, 170, "three steps", log)
        ranks = children(job.pid)
        assert len(ranks) == 2
        killed = time.monotonic()
        os.kill(ranks[rank], signal.SIGKILL)
        assert job.wait(100) == 1, log.read_text()[-4000:]
        assert time.monotonic() - killed < 60  # and not the ten minutes of a time-out
    said = log.read_text()
    assert f"a collective failed: rank {rank} does not answer, it hangs or has died in step " in said, said[-4000:]
    assert not [process for process in ranks if Path(f"/proc/{process}").exists()]
    assert not (run / "run_state").exists()
