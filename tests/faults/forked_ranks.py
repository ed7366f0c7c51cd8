"""Ranks forked from a process that has done the imports: ``forked_ranks.py DAMAGE RANK STEP LOGS FLAGS``.

Every rank is the real program, tools/pretrain.py with FLAGS, as torchrun would start it, joined through gloo; only its
imports (6 to 25 seconds) are its parent's. Nothing that a fork would break exists in the parent: no process group, no
pool of threads. As a program this module starts two ranks, of which RANK is damaged when it comes to STEP.
"""

import os
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

import torch

from tests.conftest import ROOT
from tidar_megatron.checkpoint.writer import _die_with
from tidar_megatron.data.loader import TrainingData
from tidar_megatron.models import gpt
from tidar_megatron.training.trainer import Trainer


def start_ranks(flags, logs, count=2, prepare=lambda rank: None):
    """The ranks' process ids; rank r writes to ``logs``/rank-r.log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sys.stdout.flush()
    processes, parent = [], os.getpid()
    for rank in range(count):
        child = os.fork()
        if child == 0:
            _die_with(parent)
            _be(rank, count, port, [str(flag) for flag in flags], Path(logs) / f"rank-{rank}.log", prepare)
        processes.append(child)
    return processes


def _be(rank, count, port, flags, log, prepare):
    status = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        prepare(rank)
        sys.argv = ["tools/pretrain.py", *flags]
        runpy.run_path(str(ROOT / "tools" / "pretrain.py"), run_name="__main__")
        status = 0
    except SystemExit as leaving:
        threading._shutdown()  # as a program of its own ends: threads that hang hold it up
        status = leaving.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(process):
    """A rank's exit status, negative for a signal; waits for it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def damage(what, at):
    """Do it when this process comes to step ``at``."""
    real_step, real_batches, real_forward = Trainer.step, TrainingData.step_batches, gpt.GPTModel.forward

    def step(self):
        if self.iteration + 1 == at and what == "sleeps":
            time.sleep(600)
        if self.iteration + 1 == at and what == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        return real_step(self)

    def step_batches(self, consumed, global_batch_size, *rest):
        if what == "loader" and consumed == (at - 1) * global_batch_size:
            time.sleep(600)
        return real_batches(self, consumed, global_batch_size, *rest)

    def forward(self, *arguments, **named):
        if what == "slow":
            time.sleep(0.5)
        return real_forward(self, *arguments, **named)

    Trainer.step, TrainingData.step_batches, gpt.GPTModel.forward = step, step_batches, forward


def main():
    what, whose, at, logs, *flags = sys.argv[1:]
    torch.set_num_threads(1)
    processes = start_ranks(flags, logs, prepare=lambda rank: damage(what, int(at)) if rank == int(whose) else None)
    whole = [process for rank, process in enumerate(processes) if what in ("slow", "loader") or rank != int(whose)]
    statuses = [ended(process) for process in whole]
    for process in processes:
        if process not in whole:
            os.kill(process, signal.SIGKILL)
            ended(process)
    print("statuses:", statuses)


if __name__ == "__main__":
    main()
