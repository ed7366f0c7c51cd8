"""The loop: step, evaluate, save; first plain AR (the warm-up), then the joint objective; how a run ends."""

import contextlib
import time
from collections.abc import Callable, Iterator

import torch.distributed as dist

from tidar_megatron.checkpoint.folder import checkpoint_folder
from tidar_megatron.config import Config
from tidar_megatron.distributed import startup
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.distributed.platform import peak_memory
from tidar_megatron.errors import Diverged, Interrupted, UserError
from tidar_megatron.streams import outliving_output
from tidar_megatron.training import signals
from tidar_megatron.training.describe import describe
from tidar_megatron.training.generations import Samples
from tidar_megatron.training.metrics import MetricsLogger
from tidar_megatron.training.trainer import Trainer

LOST = 1 + max(signals.REASONS)  # the lock on the run's folder is another run's: leave, and save nothing


def pretrain(config: Config, build: Callable[[Config], Trainer] = Trainer.build) -> None:
    """Train to ``train_iters``, or to the first iteration that ``exit_interval`` divides.

    Args:
        config: the run's.
        build: of the trainer; an experiment gives its own.

    Raises:
        UserError: what can be mended; also that another run holds ``--save``.
        Interrupted: a signal asked a rank to leave, or its time was over; all ranks have saved.
        Diverged: too many steps in a row had to be skipped; what was saved before stays.
        Stalled: another rank, or the data, does not answer.
    """
    with contextlib.ExitStack() as ending:
        ending.enter_context(outliving_output())  # a run is worth more than what it prints
        ending.push(lambda kind, error, trace: shut_down(orderly=kind in (None, Interrupted, Diverged)))
        with signals.mortal():
            start = startup.join(config.parallel.distributed_timeout_minutes)
        with start:
            trainer = build(config)
            ending.callback(trainer.close)
            start.phase = "making the run's folder"
            trainer.write_run_folder()
            dist.barrier()  # the run's folder exists before anyone writes into it
        trainer.log_sample_ids()
        with signals.shielded():  # W&B has a process of its own
            logger = MetricsLogger(trainer.config, trainer.ranks.is_main, trainer.iteration)
        samples = None
        try:
            for line in describe(
                trainer.config, trainer.ranks, trainer.model, trainer.train_data, trainer.iteration, trainer.new_rows
            ):
                logger.say(line)
            trainer.health.on_trouble = logger.say
            samples = trainer.samples()

            def published(iteration: int) -> None:
                logger.published(iteration, checkpoint_folder(config.checkpoint.save or "", iteration))
                if samples is not None:
                    samples.start(iteration)

            trainer.checkpoints.on_published = published
            with _explained(trainer):
                state = _loop(trainer, logger, samples)
            if state and trainer.config.checkpoint.save and trainer.ranks.is_main:
                signals.write_run_state(trainer.config.checkpoint.save, state)
            for said in samples.poll(wait=True) if samples is not None and state != signals.INTERRUPTED else ():
                logger.samples(said)
        finally:
            if samples is not None:
                samples.close()
            logger.close()
        if state == signals.INTERRUPTED:
            dist.barrier()  # torchrun ends all ranks once one has left with a failure: leave together
            signals.ignore()
            raise Interrupted


@contextlib.contextmanager
def _explained(trainer: Trainer) -> Iterator[None]:
    """Whoever does not answer is named."""
    try:
        yield
    except Diverged:
        trainer.checkpoints.wait()  # of a sound step
        raise
    except (RuntimeError, UserError) as error:  # the latter where it broke a save
        if stalled := trainer.heartbeat.blame(error):
            raise stalled from error
        raise


def _loop(trainer: Trainer, logger: MetricsLogger, samples: Samples | None) -> str | None:
    """Train; how it ended, for the launcher (training/signals.py)."""
    config, training = trainer.config, trainer.config.training

    def due(interval: int | None) -> bool:
        return interval is not None and trainer.iteration % interval == 0

    seconds, steps = 0.0, 0
    while trainer.iteration < training.train_iters:
        start = time.perf_counter()
        trainer.heartbeat.beat(trainer.iteration + 1)
        values = trainer.step()
        seconds, steps = seconds + time.perf_counter() - start, steps + 1
        iteration, last = trainer.iteration, trainer.iteration == training.train_iters
        if last or due(config.logging.log_interval):
            clean_tokens = steps * training.global_batch_size * config.data.seq_length
            values |= {"step_seconds": seconds / steps, "clean_tokens_per_second": clean_tokens / seconds}
            values |= {**trainer.own_time.report(), "memory_gib": peak_memory() / 2**30}
            logger.training(iteration, values)
            for said in samples.poll() if samples is not None else ():
                logger.samples(said)
            seconds, steps = 0.0, 0
        if (last or due(training.eval_interval)) and (evaluation := trainer.evaluate()) is not None:
            logger.evaluation(iteration, evaluation)
        trainer.checkpoints.maybe_finalize()
        leaving = due(training.exit_interval)
        reason = LOST if trainer.lock_lost else signals.reason_to_leave(training.exit_duration_in_mins)
        asked = trainer.ranks.largest(reason)
        if asked == LOST:
            raise UserError(
                f"--save {config.checkpoint.save}: another run has taken this folder over, or its lock was removed, "
                f"so iteration {iteration} is not saved; look which run to go on with"
            )
        if last or leaving or asked or due(config.checkpoint.save_interval):
            trainer.save()
        if last or leaving or asked:
            trainer.checkpoints.wait()
        if leaving and not last:
            logger.say(f"leaving after iteration {iteration} (--exit-interval {training.exit_interval})")
            return None
        if asked and not last:
            kept = "--load continues it" if config.checkpoint.save else "nothing is kept: there is no --save"
            logger.say(f"leaving after iteration {iteration}: {signals.REASONS[asked]}; {kept}")
            return signals.INTERRUPTED
    return signals.FINISHED
