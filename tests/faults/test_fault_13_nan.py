"""NaN or Inf in one rank's loss or gradient: no rank makes an update, and a run of nothing else ends."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.faults.poisoned_steps import LAYOUTS, POISONS
from tests.training.small_runs import metrics
from tidar_megatron.checkpoint.folder import latest_iteration
from tidar_megatron.program import DIVERGED_STATUS


@pytest.mark.parametrize("ranks", [1, 2])
def test_all_ranks_skip_together(shards, tmp_path, ranks):
    """Fault 13: NaN or Inf in one rank's loss or gradient (DP, TP, PP, CP): all skip together, bitwise unchanged;
    counted in the log; after four in a row the run ends with a status of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    program = [*launcher, "tests/faults/poisoned_steps.py", *map(str, shards), str(tmp_path), str(ranks - 1)]
    done = subprocess.run([sys.executable, *program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    said = done.stdout[-4000:] + done.stderr[-6000:]
    assert done.stdout.count("held:") == len(LAYOUTS[ranks]) * len(POISONS), said
    if ranks == 1:
        assert done.returncode == DIVERGED_STATUS, said
    else:
        assert done.returncode == 1 and f"exitcode  : {DIVERGED_STATUS}" in done.stderr, said
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert "error: step 6: " in line and "4 steps in a row were skipped" in line
    assert "step 3: loss nan" in done.stdout and "skipped, 1 in a row" in done.stdout
    logged = [row["skipped_iterations"] for row in metrics(tmp_path) if "skipped_iterations" in row]
    assert logged == [0, 0, 1, 2, 3]
    assert latest_iteration(tmp_path) == 4  # what was sound is kept
