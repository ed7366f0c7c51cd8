"""Damage one rank of a run when it reaches a step."""

import os
import signal
import time

from tidar_megatron.data.loader import TrainingData
from tidar_megatron.models import gpt
from tidar_megatron.training.trainer import Trainer


def damage_rank(what, whose, at, rank):
    """Prepare rank ``rank`` to do ``what`` at step ``at`` if it is rank ``whose``."""
    if rank != whose:
        return
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
