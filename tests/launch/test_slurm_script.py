"""examples/slurm/ without a SLURM: `scontrol`, `srun` and `torchrun` are stubs; a real one is in test_slurm.py."""

import os
import re
import shutil
import signal
import subprocess
import time

import pytest

from tests.conftest import ROOT
from tests.launch.launching import wait_for

pytestmark = pytest.mark.process

SCRIPT = ROOT / "examples" / "slurm" / "pretrain.sbatch"
STAGE = ROOT / "examples" / "slurm" / "stage.sh"

# a hundred thousand names: more than a pipe holds
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$STUBS/calls"
case "$1 $2" in
  "show hostnames") seq -f "node%06.0f" 1 "${HOSTS:-1}" ;;
  "show job") echo "JobId=7 PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=${PREEMPT_TIME:-None}" ;;
  requeue*) kill "$PPID" ;;
esac
"""
# one node; its options go to the log; what it passes on of the environment is what SLURM says it is
SRUN = """#!/bin/bash
echo "srun $*" >> "$STUBS/calls"
[[ ${SLURM_EXPORT_ENV:-ALL} == ALL ]] || unset NNODES MASTER_ADDR MASTER_PORT LOG_DIR GPUS_PER_NODE
while [[ $1 == --* && $1 != --pwd ]]; do shift; done
[[ $1 != apptainer ]] || while [[ $1 != bash ]]; do shift; done
trap 'kill -USR1 "$task"' USR1
SLURM_NODEID=0 "$@" &
task=$!
wait "$task" && status=0 || status=$?
while kill -0 "$task" 2>/dev/null; do wait "$task" && status=0 || status=$?; done # a signal had ended the wait
exit "$status"
"""
# a run: ends as it is told to, or when its ranks (itself) are asked to leave
TORCHRUN = """#!/bin/bash
echo "torchrun $*" >> "$STUBS/calls"
echo "master $MASTER_ADDR" >> "$STUBS/calls"
case $END in
  crash) exit 1 ;;
  wait) python3 "$STUBS/rank.py"; exit 1 ;;
  *) echo "$END" > "$SAVE/run_state"; [[ $END == finished ]] ;;
esac
"""
RANK = """
import os, signal, time
def leave(*_):
    with open(os.environ["SAVE"] + "/run_state", "w") as file:
        file.write("interrupted")
    os._exit(75)
signal.signal(signal.SIGUSR1, leave)
open(os.environ["STUBS"] + "/listening", "w").close()
time.sleep(60)
"""
SLEEP = """#!/bin/bash
exec /bin/sleep 0.1
"""


@pytest.fixture
def job(tmp_path):
    """Starts the script as SLURM would."""
    for name, text in {
        "scontrol": SCONTROL,
        "srun": SRUN,
        "torchrun": TORCHRUN,
        "sleep": SLEEP,
        "rank.py": RANK,
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "data" / "train").mkdir(parents=True)
    processes = []

    def start(**variables):
        given = {"SLURM_JOB_ID": 7, "SLURM_JOB_NUM_NODES": 1, "SLURM_JOB_NODELIST": "x", "SLURM_CPUS_ON_NODE": 2}
        given |= {"CONFIG": "c.yaml", "SAVE": tmp_path / "run", "DATA": tmp_path / "data", "STUBS": tmp_path}
        given |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "END": "finished", **variables}
        env = {name: str(value) for name, value in given.items()}
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(
                ["bash", SCRIPT], cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True
            )
        processes.append(process)
        return process

    def run(**variables):
        status = start(**variables).wait(60)
        return status, (tmp_path / "calls").read_text(), (tmp_path / "log").read_text()

    run.start = start
    yield run
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_plain_job(job, tmp_path):
    status, calls, log = job()
    assert status == 0, log
    assert "attempt 1 ended: finished" in log
    assert f"torchrun --standalone --nproc-per-node gpu --log-dir {tmp_path}/run/logs/7.0/node0 --tee 3 " in calls
    assert f"--config c.yaml --save {tmp_path}/run --load {tmp_path}/run --train-data {tmp_path}/data/train\n" in calls
    assert "#SBATCH --mem=0\n" in SCRIPT.read_text()


def test_a_large_job(job):
    """The first of so many names that scontrol is still writing when they have been read."""
    status, calls, log = job(HOSTS=100_000)
    assert status == 0, log
    assert "master node000001\n" in calls


@pytest.mark.parametrize(("preempted", "requeued"), [("2026-11-29T12:00:00", True), ("None", False)])
def test_preemption_is_requeued_and_scancel_is_not(job, preempted, requeued):
    """Both send SIGTERM to the ranks, which save and leave."""
    status, calls, log = job(END="interrupted", PREEMPT_TIME=preempted)
    assert "ended: interrupted" in log
    assert ("scontrol requeue 7" in calls) == requeued
    assert status != 0


def test_a_crash_is_not_requeued(job):
    status, calls, _ = job(END="crash", PREEMPT_TIME="2026-11-29T12:00:00")
    assert status == 1
    assert "scontrol requeue" not in calls


def test_the_time_limit_and_a_sigterm_before_it(job, tmp_path):
    process = job.start(END="wait")
    wait_for((tmp_path / "listening").exists, 30, "the run")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None  # it waits for the ranks, which may be saving
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) != 0
    assert "ended: interrupted" in (tmp_path / "log").read_text()
    assert "scontrol requeue 7" in (tmp_path / "calls").read_text()


@pytest.mark.parametrize("image", ["x.sif", "docker://x"])
def test_what_a_container_mounts(job, tmp_path, image):
    logs, cache = tmp_path / "logs", tmp_path / "cache"
    status, calls, log = job(CONTAINER=image, LOG_DIR=logs, TIDAR_CACHE=cache)
    assert status == 0, log
    assert logs.is_dir() and cache.is_dir()
    mounts = ",".join(f"{path}:{path}" for path in (ROOT, tmp_path / "run", tmp_path / "data", logs, cache))
    option = f"--bind {mounts} --pwd {ROOT}" if image.endswith(".sif") else f"--container-mounts={mounts} "
    assert option in calls
    status, calls, log = job(CONTAINER=image)
    assert status == 0, log


def test_a_job_submitted_without_an_environment(job):
    """As with SBATCH_EXPORT=NONE: srun would pass on what SLURM_EXPORT_ENV says, which is nothing."""
    status, calls, log = job(SLURM_EXPORT_ENV="NONE", SLURM_JOB_NUM_NODES=2)
    assert status == 0, log
    assert "torchrun --nnodes 2 --node-rank 0 --master-addr node000001 --master-port 20007 " in calls


@pytest.mark.parametrize("script", sorted(ROOT.glob("examples/**/*.s[hb]*")), ids=lambda path: path.name)
def test_empty_arrays(script):
    """`"${a[@]}"` of an empty array is an unset variable for bash < 4.4 under `set -u`."""
    text = script.read_text()
    maybe_empty = set(re.findall(r"\b(\w+)=\(\)", text))
    for name in maybe_empty:
        bare = text.replace(f'${{{name}[@]+"${{{name}[@]}}"}}', "")
        assert f"{{{name}[@]}}" not in bare, name
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0


def stage(source, target):
    subprocess.run([STAGE, source, target], check=True)


def test_staging_heals_what_was_cut(tmp_path):
    source, target = tmp_path / "data", tmp_path / "staged"
    (source / "train").mkdir(parents=True)
    for name in ("a", "b c", "d"):
        (source / "train" / name).write_text(name * 1000)
    (source / "linked").symlink_to(source / "train" / "a")
    stage(source, target)
    staged = {path.name: path for path in target.rglob("*") if path.is_file()}
    assert sorted(staged) == [".staging", "a", "b c", "d", "linked"]
    assert all(staged[name].read_text() == name * 1000 for name in ("a", "b c", "d"))
    inode = staged["d"].stat().st_ino
    staged["a"].write_text("a")  # a killed cp's: short, and newer than its source
    staged["b c"].write_text("x" * 3000)  # as long as it should be
    (target / "train" / "d.staging-partial").write_text("d")
    shutil.rmtree(target / "linked", ignore_errors=True)
    stage(source, target)
    assert all(staged[name].read_text() == name * 1000 for name in ("a", "b c", "d"))
    assert staged["d"].stat().st_ino == inode  # whole: left
    assert not list(target.rglob("*partial*"))


def test_staging_fails_where_a_copy_does(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x").write_text("x")
    (tmp_path / "staged" / "x" / "y").mkdir(parents=True)  # in the way
    (tmp_path / "cp").write_text("#!/bin/bash\nexit 1\n")
    (tmp_path / "cp").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([STAGE, tmp_path / "data", tmp_path / "staged"], env=env, capture_output=True)
    assert done.returncode != 0
