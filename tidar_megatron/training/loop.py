"""The training loop: steps, evaluations and saves, from the AR warm-up to the end of a run."""

import contextlib
import time
from collections.abc import Callable, Iterator

import torch.distributed as dist

from tidar_megatron.checkpoint.folder import checkpoint_folder
from tidar_megatron.config import Config
from tidar_megatron.distributed import startup
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.distributed.platform import peak_memory, start_compile_workers
from tidar_megatron.errors import Diverged, Interrupted, UserError
from tidar_megatron.streams import outliving_output
from tidar_megatron.training import signals
from tidar_megatron.training.describe import describe
from tidar_megatron.training.generations import Samples
from tidar_megatron.training.metrics import MetricsLogger, seconds_left
from tidar_megatron.training.trainer import Trainer

LOST = 1 + max(signals.REASONS)  # this run has lost the lock on its folder: stop without saving


def pretrain(config: Config, build: Callable[[Config], Trainer] = Trainer.build) -> None:
    """Train to ``train_iters``, or to the next multiple of ``exit_interval``.

    Args:
        config: The configuration of the run.
        build: A function that builds the trainer; an experiment passes its own.

    Raises:
        UserError: The input is bad, or another run holds ``--save``.
        Interrupted: A signal arrived or the time limit was reached; all ranks have saved.
        Diverged: Too many steps in a row were skipped; earlier checkpoints are kept.
        Stalled: Another rank, or the data, does not answer.
    """
    with contextlib.ExitStack() as ending:
        ending.enter_context(outliving_output())  # a closed console must not end a run
        ending.push(lambda kind, error, trace: shut_down(orderly=kind in (None, Interrupted, Diverged)))
        with signals.mortal():
            start = startup.join(config.parallel.distributed_timeout_minutes)
        with start:
            trainer = build(config)
            ending.callback(trainer.close)
            start.phase = "making the run's folder"
            trainer.write_run_folder()
            dist.barrier()  # the run's folder exists before any other rank writes into it
        trainer.log_sample_ids()
        with signals.shielded():  # W&B and the compiler start processes
            start_compile_workers()
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
            dist.barrier()  # torchrun ends all ranks once one exits with a failure: exit together
            signals.ignore()
            raise Interrupted


@contextlib.contextmanager
def _explained(trainer: Trainer) -> Iterator[None]:
    """Turn a collective's failure in this block into a :class:`Stalled` that names the ranks that do not answer."""
    try:
        yield
    except Diverged:
        trainer.checkpoints.wait()  # finish a save that began before the bad steps
        raise
    except (RuntimeError, UserError) as error:  # a collective that fails in a save raises a UserError
        if stalled := trainer.heartbeat.blame(error):
            raise stalled from error
        raise


def _loop(trainer: Trainer, logger: MetricsLogger, samples: Samples | None) -> str | None:
    """Train, and return the run state for the launcher (``signals.py``); None if ``--exit-interval`` ended the run."""
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
            values["seconds_left"] = seconds_left(config, iteration, values["step_seconds"])
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
                f"--save {config.checkpoint.save}: another run has taken over this folder, or its lock was removed, "
                f"so iteration {iteration} is not saved; check which run to continue"
            )
        if last or leaving or asked or due(config.checkpoint.save_interval):
            trainer.save()
        if last or leaving or asked:
            trainer.checkpoints.wait()
        if leaving and not last:
            logger.say(f"stopping after iteration {iteration} (--exit-interval {training.exit_interval})")
            return None
        if asked and not last:
            kept = "--load resumes it" if config.checkpoint.save else "nothing is saved: there is no --save"
            logger.say(f"stopping after iteration {iteration}: {signals.REASONS[asked]}; {kept}")
            return signals.INTERRUPTED
    return signals.FINISHED
