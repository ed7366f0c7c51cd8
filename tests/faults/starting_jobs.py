"""Jobs of a few ranks that meet trouble as they start: the real program on forked ranks (tests/ranks.py)."""

import os
import signal
import time
from functools import partial

from megatron.core import parallel_state

from tests.faults.data_runs import SMALL
from tests.launch.launching import CONFIG, TINY, steps, wait_for
from tests.ranks import start_ranks
from tidar_megatron.checkpoint.checkpoints import Checkpoints
from tidar_megatron.distributed import startup
from tidar_megatron.errors import UserError
from tidar_megatron.training import resolve


def flags(data, run, until):
    given = ["--config", CONFIG, *TINY, *SMALL, "--train-data", data, "--train-iters", until, "--save", run]
    return [*given, "--load", run, "--distributed-timeout-minutes", 0.2]


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise RuntimeError("a defect")


def refuse():
    raise UserError("--train-data /node/disk: there is no such folder")


def hang():
    os.kill(os.getpid(), signal.SIGSTOP)


# name -> (ranks that meet the trouble, where, what)
TROUBLES = {
    "killed before it joins": ([2], (startup, "join"), kill),
    "killed while it waits": ([1], (startup.Startup, "meet"), kill),
    "killed while groups are made": ([1], (parallel_state, "initialize_model_parallel"), kill),
    "rank 0 killed while groups are made": ([0], (parallel_state, "initialize_model_parallel"), kill),
    "stopped while groups are made": ([2], (parallel_state, "initialize_model_parallel"), hang),
    "killed while loading": ([1], (Checkpoints, "load"), kill),
    "fails while loading": ([2], (Checkpoints, "load"), fail),
    "fails as it reads the data": ([1], (resolve, "tokenizer_of"), fail),
    "refuses alone": ([2], (resolve, "tokenizer_of"), refuse),
    "all refuse": ([0, 1, 2], (resolve, "tokenizer_of"), refuse),
}


def trouble(name, rank):
    """Prepare rank ``rank``, in it, before it begins."""
    whose, (place, function), what = TROUBLES[name]
    startup.BEAT, startup.SILENT, startup.GRACE, startup.ALIKE = 0.2, 20.0, 3.0, 3.0
    if rank in whose:
        getattr(place, function)  # a renamed function fails here; setattr would do no harm to anybody
        setattr(place, function, lambda *arguments, **named: what())


def ends(processes, stopped=()):
    """The exit statuses; None for ranks that are killed here: stopped ones, and such as do not end within a minute."""
    statuses, end = {}, time.monotonic() + 60
    while len(statuses) < len(processes) - len(stopped) and time.monotonic() < end:
        for rank, process in enumerate(processes):
            if rank not in statuses:
                status = process.poll()
                if status is not None:
                    statuses[rank] = status
        time.sleep(0.02)
    for rank, process in enumerate(processes):
        if rank not in statuses:
            process.kill()
            process.wait()
    return [statuses.get(rank) for rank in range(len(processes))]


def all_jobs(data, folder):
    """{job: [the ranks' exit statuses, negative for signals; their logs]}."""
    found = {}

    def logs(name):
        (folder / name).mkdir(parents=True, exist_ok=True)
        return folder / name

    def said(name):
        return [path.read_text() for path in sorted((folder / name).glob("rank-*.log"))]

    def start(name, run, until, *extra, count=2, prepare=None):
        files = [logs(name) / f"rank-{rank}.log" for rank in range(count)]
        program = ["tools/pretrain.py", *flags(data, run, until), *extra]
        return start_ranks(count, program, files, prepare, TORCH_CPP_LOG_LEVEL="ERROR")

    # two runs into one folder
    run = folder / "run"
    living = start("living", run, 1_000_000)
    wait_for(lambda: len(steps(run)) >= 2, 60, "steps", folder / "living" / "rank-0.log", every=0.05)
    found["second"] = [ends(start("second", run, 10)), said("second")]
    after = len(steps(run))
    wait_for(lambda: len(steps(run)) > after, 60, "the first goes on", folder / "living" / "rank-0.log", every=0.05)
    for process in living:
        process.send_signal(signal.SIGTERM)
    found["living"] = [ends(living), said("living")]
    killed = start("killed", run, 1_000_000)
    before = len(steps(run))
    wait_for(lambda: len(steps(run)) > before, 60, "steps", folder / "killed" / "rank-0.log", every=0.05)
    for process in killed:
        process.kill()
    found["killed"] = [ends(killed), said("killed")]
    until = before + 20
    both = [start(name, run, until) for name in ("one", "other")]
    found["one"], found["other"] = (
        [ends(processes), said(name)] for name, processes in zip(("one", "other"), both, strict=True)
    )
    # ranks that go missing
    for name in TROUBLES:
        processes = start(name, run, until + 1, "--global-batch-size", 6, count=3, prepare=partial(trouble, name))
        statuses = ends(processes, TROUBLES[name][0] if TROUBLES[name][2] is hang else ())
        found[name] = [statuses, said(name)]
    return found
