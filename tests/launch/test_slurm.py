"""SLURM really runs: examples/slurm/pretrain.sbatch is signalled before its time limit, saves, requeues, and finishes.

The test brings its own munged, slurmctld and slurmd, in a scratch folder and on free ports: one node, this machine.
`make test-slurm` installs them where it can; elsewhere the test skips itself, and says so.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.launch.launching import CONFIG, TINY, environment, losses, started, steps, wait_for
from tidar_megatron.checkpoint.folder import latest_iteration, saved_iterations
from tidar_megatron.training.signals import RUN_STATE

pytestmark = [pytest.mark.process, pytest.mark.timeout(1800)]  # minutes, but more on a machine that has other work
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
REFERENCE_SECONDS = 45  # of steps; SLURM signals the job 2 to 32 seconds after its start
SIGNAL = ("--time=2", "--signal=B:USR1@88")  # SLURM looks every 30 seconds, and may be 60 seconds early

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=15
SchedulerParameters=sched_interval=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
OverTimeLimit=10
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def program(name):
    return shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")


def free_ports(count):
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def say(*command):
    """Run one of SLURM's commands; what it printed, or None where it failed."""
    done = subprocess.run([str(c) for c in command], cwd=ROOT, env=environment(), capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


@pytest.fixture(scope="module")
def slurm():
    """A cluster of this one machine; its scratch folder."""
    missing = [name for name in DAEMONS if program(name) is None]
    if missing or os.geteuid() != 0:
        why = f"{', '.join(missing)} not found" if missing else "not root"
        why = f"SLURM IS NOT TESTED: {why}; as root: apt-get install slurm-wlm munge (or make test-slurm)"
        (pytest.fail if os.environ.get("TIDAR_TEST_SLURM") else pytest.skip)(why)
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: a socket's path has 107 characters at most
    folder.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    conf = folder / "slurm.conf"
    controller_port, node_port = free_ports(2)
    host = socket.gethostname().split(".")[0]
    conf.write_text(
        SLURM_CONF.format(
            host=host, folder=folder, controller_port=controller_port, node_port=node_port, cpus=os.cpu_count()
        )
    )
    names = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munge = [f"--{option}={folder}/munge.{ending}" for option, ending in names.items()]
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(conf)
    try:
        with ExitStack() as stack:
            start = [
                [program("munged"), "--foreground", *munge],
                [program("slurmctld"), "-D", "-f", conf],
                [program("slurmd"), "-D", "-f", conf, "-N", host],
            ]
            for command in start:
                stack.enter_context(started(command, folder / f"{Path(command[0]).name}.out"))
                time.sleep(1)
            wait_for(
                lambda: "idle" in (say("sinfo", "-h", "-o", "%T") or ""), 60, "an idle node", folder / "slurmd.out"
            )
            yield folder
            for name in ("slurmctld.log", "slurmd.log"):  # pytest shows them if a test failed
                print(f"{name}:\n{(folder / name).read_text()[-6000:]}")
            print(say("scontrol", "show", "job"), say("scontrol", "show", "node"))
            for job in (say("squeue", "-h", "-o", "%A") or "").split():  # of a test that failed
                say("scancel", "--full", "--signal=KILL", job)
                say("scancel", job)
            wait_for(lambda: not say("squeue", "-h"), 90, "no job is left")
    finally:
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def uninterrupted(slurm, shards, tmp_path_factory):
    """A run of this long, so that SLURM's signal falls into the second one, however fast the machine is."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    log = folder / "log"
    command = ["examples/launch.sh", "--config", CONFIG, *TINY, "--train-iters", 1_000_000, "--save", folder]
    with started([*command, "--train-data", shards[0]], log, GPUS_PER_NODE=2) as run:
        wait_for(lambda: steps(folder), 400, "the first step", log)
        time.sleep(REFERENCE_SECONDS)
        run.send_signal(signal.SIGUSR1)
        run.wait(120)
    assert (folder / RUN_STATE).read_text() == "interrupted\n", log.read_text()[-4000:]
    return folder


def test_signalled_saved_requeued_and_finished(slurm, uninterrupted, shards, tmp_path):
    last = len(steps(uninterrupted))
    assert last > 10
    run, log = tmp_path / "run", tmp_path / "slurm.out"
    variables = {"CONFIG": CONFIG, "SAVE": run, "DATA": shards[0].parent, "GPUS_PER_NODE": 2}
    variables["STAGE_DATA"] = tmp_path / "staged"
    command = ["sbatch", "--parsable", *SIGNAL, f"--output={log}", "examples/slurm/pretrain.sbatch", *TINY]
    command += ["--train-iters", last]
    command = [str(part) for part in command]
    env = environment(**variables)
    submitted = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()

    def said(text):
        return log.exists() and text in log.read_text()

    def field(name):
        found = re.search(rf"\b{name}=(\S+)", say("scontrol", "-o", "show", "job", job) or "")
        return found and found[1]

    wait_for(lambda: said("attempt 1 ended"), 400, "the end of the first attempt", log, every=1)
    assert said("attempt 1 ended: interrupted"), log.read_text()[-6000:]
    between = latest_iteration(run)
    assert between is not None and 1 <= between < last
    wait_for(lambda: field("JobState") == "PENDING", 60, "requeued", log)
    # A requeued job waits for cred_expire: started before, the node may take it for the one it has just ended, and
    # SLURM holds it for good. The second attempt has the time it needs
    assert say("scontrol", "update", f"jobid={job}", "TimeLimit=10") is not None
    wait_for(lambda: said("attempt 2 ended"), 400, "the end of the second attempt", log, every=1)
    wait_for(lambda: field("JobState") not in ("RUNNING", "COMPLETING"), 60, "the end of the job", log, every=1)
    text = log.read_text()
    assert field("JobState") == "COMPLETED", text[-6000:]
    assert field("Restarts") == "1"

    # two attempts, a save in between, every step once
    assert re.findall(r"^== .*attempt (\d)", text, re.M) == ["1", "1", "2", "2"]
    assert f"saved iteration {between} in" in text and f"resuming {run} from iteration {between}" in text
    assert "attempt 2 ended: finished" in text
    assert saved_iterations(run) == [between, last]
    printed = [int(step) for step in re.findall(r"step +(\d+)/", text)]  # one line every `console_interval` steps
    assert printed == sorted(set(printed)) and printed[-1] == last
    assert [row["iteration"] for row in steps(run)] == list(range(1, last + 1))
    assert [row["consumed_sequences"] for row in steps(run)] == list(range(4, 4 * last + 4, 4))
    # the same numbers as without all that
    assert losses(run) == losses(uninterrupted)
    # one log a rank
    assert len(list((run / "logs").glob(f"{job}.*/node0/*/attempt_0/*/stdout.log"))) == 4
