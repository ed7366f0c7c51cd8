"""The trainer: everything that a run holds on one rank, with its steps, evaluations and saves."""

import contextlib
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from tidar_megatron.checkpoint.checkpoints import Checkpoints
from tidar_megatron.checkpoint.contents import Trained
from tidar_megatron.config import CONFIG_FILE, Config, ModelConfig, ResolvedConfig
from tidar_megatron.data.doubled import Batch
from tidar_megatron.data.loader import TrainingData
from tidar_megatron.data.manifest import TOKENIZER_FOLDER
from tidar_megatron.data.prefetch import Overdue, Prefetcher
from tidar_megatron.data.tokenizer import save_tokenizer
from tidar_megatron.distributed import startup
from tidar_megatron.distributed.groups import Ranks, initialize, rank_from_environment
from tidar_megatron.distributed.heartbeat import Heartbeat
from tidar_megatron.errors import Stalled, UserError
from tidar_megatron.huggingface.origin import Origin, keep_huggingface_files, kept_huggingface_files
from tidar_megatron.models.gpt import build_model
from tidar_megatron.models.initialize import MaskRow, initialize_drafts, initialize_weights, start_mask_row
from tidar_megatron.training import sample_ids, signals
from tidar_megatron.training.generations import Samples
from tidar_megatron.training.health import Health
from tidar_megatron.training.optimizer import build_optimizer, full_weights, wrap_model
from tidar_megatron.training.resolve import ResolvedRun, check_inputs, resolve_run, starting_point
from tidar_megatron.training.run_lock import RunLock, take_lock
from tidar_megatron.training.step import evaluate, train_step
from tidar_megatron.training.straggler import OwnTime


class HasState(Protocol):
    """A part of the loop whose state is a JSON value."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


@dataclass
class Trainer:
    """The objects of a run on this rank, and the operations on them: step, evaluate, save, load."""

    config: ResolvedConfig
    ranks: Ranks
    train_data: TrainingData
    valid_data: TrainingData | None
    model: list[GPTModel]
    ddp: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    checkpoints: Checkpoints
    origin: Origin | None = None
    lock: RunLock | None = None  # the lock on --save; only the main rank has it
    iteration: int = 0
    consumed_sequences: int = 0

    def __post_init__(self) -> None:
        data = self.config.data
        self.prefetcher = Prefetcher(
            self._build_batches, self.ranks.device, data.num_workers, timeout=60 * data.data_timeout_minutes
        )
        self.heartbeat = Heartbeat()
        self.own_time = OwnTime(self.ranks, self.model[0].config)
        self.health = Health(self.config.health, self.ranks)
        self.parts: dict[str, HasState] = {"health": self.health}  # further parts that checkpoints save, by name
        self.sample_ids: sample_ids.SampleIds | None = None  # set by log_sample_ids

    @classmethod
    def build(cls, config: Config) -> "Trainer":
        """Build everything up to the first step: check the inputs, resolve the run, assemble the trainer. Collective.

        Bad input is refused before there are process groups, as far as possible.

        Raises:
            UserError: The input is bad; the message names the flag or the file.
        """
        run = resolve_run(check_inputs(config))
        with contextlib.ExitStack() as failing:
            with signals.mortal():
                lock = _take_lock(run.config)
            failing.callback(lock.release if lock is not None else lambda: None)
            with signals.mortal():
                startup.current.meet()  # from here on the folder belongs to this run, and no other run changes it
            trainer = cls._assemble(run, starting_point(run.config, run.fingerprint), lock)
            failing.pop_all()
        return trainer

    @classmethod
    def _assemble(cls, run: ResolvedRun, start: int | None, lock: RunLock | None) -> "Trainer":
        """Make process groups, model and optimizer, and load the weights or the checkpoint that the run starts from.

        Args:
            run: The resolved run.
            start: The iteration to resume from, as this rank sees it; None to start from scratch.
            lock: The lock on ``--save``; only the main rank has it.
        """
        config, origin = run.config, run.origin
        if start is None and origin is not None:
            origin.check_tokenizer(run.tokenizer_folder)
        startup.current.phase = "making the process groups"
        with signals.mortal():
            ranks = initialize(config.parallel, config.training.seed)
        start = ranks.from_main(start)  # another node may see an older state of a shared folder
        startup.current.phase = "building the model"
        model = build_model(config, config.vocab_size, ranks)
        if origin is not None and (start is None or config.trains_drafts):
            startup.current.phase = f"loading --init-from {config.training.init_from}"
            origin.load(model)
        if start is None and config.trains_drafts:
            initialize_drafts(model, config.training.seed)
        elif start is None and origin is not None:
            start_mask_row(model, _mask_row(config, origin))
        elif start is None:
            initialize_weights(model, config.training.seed)
        ddp = wrap_model(model, config)
        optimizer, scheduler = build_optimizer(ddp, config)
        checkpoints = Checkpoints(config, ranks, run.fingerprint, lock.check if lock is not None else lambda: None)
        data = run.train_data, run.valid_data
        trainer = cls(config, ranks, *data, model, ddp, optimizer, scheduler, checkpoints, origin, lock)
        if start is not None:
            startup.current.phase = f"loading --load {config.checkpoint.load}"
            trainer.load()
        return trainer

    @property
    def lock_lost(self) -> bool:
        """Return whether this rank knows that the lock on the run's folder is lost."""
        return self.lock is not None and self.lock.lost

    @property
    def doubled(self) -> bool:
        """Return whether the next step trains the joint objective, not plain AR."""
        return self.iteration >= self.config.ar_warmup_iters

    def _own(self, batches: list[Batch]) -> list[Batch]:
        """Return this context-parallel rank's shards of its data-parallel rank's micro-batches."""
        cp = self.ranks.groups.cp
        return [batch.shard(cp.rank(), cp.size()) for batch in batches]

    def step_batches(self) -> list[Batch]:
        """Return this rank's micro-batches of the next step, prefetched if possible.

        Raises:
            Stalled: They are not ready within ``--data-timeout-minutes``.
        """
        with self._data_in_time():
            return self.prefetcher.get(self.consumed_sequences, self.doubled)

    @contextlib.contextmanager
    def _data_in_time(self) -> Iterator[None]:
        try:
            yield
        except Overdue:
            data = self.config.data
            sources = " ".join(data.train_data)
            raise Stalled(
                f"rank {self.ranks.rank}, step {self.iteration + 1}: no batch from {sources} within "
                f"{data.data_timeout_minutes:g} minutes (--data-timeout-minutes); check its file system"
            ) from None

    def _build_batches(self, consumed_sequences: int, doubled: bool) -> list[Batch]:
        """Build a step's batches in the background, reading no attribute that a step changes."""
        training, groups = self.config.training, self.ranks.groups
        batches = self._own(
            self.train_data.step_batches(
                consumed_sequences,
                training.global_batch_size,
                training.micro_batch_size,
                groups.dp.rank(),
                groups.dp.size(),
                doubled,
            )
        )
        plan, masks_alone = self.model[0].attention_schedules.plan, self.config.trains_drafts
        for batch in batches:
            queries = batch.mask_length if masks_alone else batch.tokens.shape[1]
            batch.attention_plan = plan(batch.visibility_on_host, queries, masks_alone)
        return batches

    def _prefetch(self) -> None:
        """Start to build the batches of the steps that follow this one, up to the last step of the run."""
        training, following = self.config.training, []
        last = min(self.iteration + self.prefetcher.workers, training.train_iters - 1)
        for step in range(self.iteration + 1, last + 1):
            consumed = self.consumed_sequences + (step - self.iteration) * training.global_batch_size
            following.append((consumed, step >= self.config.ar_warmup_iters))
        self.prefetcher.expect(following)

    def step(self) -> dict:
        """Run an optimizer step, and return the values to log. Collective."""
        phase = "drafts" if self.config.trains_drafts else "joint" if self.doubled else "AR"
        start = time.perf_counter()
        batches = self.step_batches()
        self._prefetch()
        self.own_time.add(time.perf_counter() - start)
        ids = [sample for batch in batches for sample in batch.sample_ids]
        alpha = self.config.ar_loss_weight
        learning_rate = self.optimizer.param_groups[0]["lr"]
        approve = functools.partial(self.health.approve, self.iteration + 1, phase)
        result = train_step(
            self.ddp, self.optimizer, self.scheduler, batches, alpha, self.ranks, approve, self.own_time.start
        )
        self.iteration += 1
        if self.sample_ids is not None:
            self.sample_ids.write(self.iteration, ids)
        self.consumed_sequences += self.config.training.global_batch_size
        return {
            "phase": phase,
            "loss": result.loss,
            "ar_loss": result.ar_loss,
            "diffusion_loss": result.diffusion_loss,
            "learning_rate": learning_rate,
            "grad_norm": result.grad_norm,
            **({} if result.balancing_loss is None else {"balancing_loss": result.balancing_loss}),
            "consumed_sequences": self.consumed_sequences,
            **self.health.log_values(),
        }

    def evaluate(self) -> dict | None:
        """Return losses and draft metrics on the held-out data; None if there is none. Collective."""
        if self.valid_data is None:
            return None
        training, groups = self.config.training, self.ranks.groups
        batches = self._own(
            self.valid_data.evaluation_batches(
                training.eval_sequences,
                training.micro_batch_size,
                groups.dp.rank(),
                groups.dp.size(),
                multiple=groups.pp.size() if len(self.model) > 1 else 1,
            )
        )
        return evaluate(self.ddp, batches, self.config.tidar.block_size, self.ranks)

    def save(self) -> None:
        """Save a checkpoint if the run has a folder; with ``--async-save`` only start it. Collective."""
        if self.config.checkpoint.save:
            with self._data_in_time():
                self.prefetcher.settle()  # a forked writer must not inherit a lock that is held
            states = {name: part.state_dict() for name, part in self.parts.items()}
            with full_weights(self.ddp):
                run = Trained(self.model, self.optimizer, self.scheduler)
                self.checkpoints.save(run, self.iteration, self.consumed_sequences, states)

    def load(self) -> None:
        """Resume from the checkpoint in ``--load``. Collective."""
        resumed = self.checkpoints.load(Trained(self.model, self.optimizer, self.scheduler))
        self.iteration, self.consumed_sequences = resumed.iteration, resumed.consumed_sequences
        for name, part in self.parts.items():
            if name in resumed.states:
                part.load_state_dict(resumed.states[name])

    def close(self) -> None:
        """Stop background work, close the log of sample ids, and release the lock."""
        self.prefetcher.close()
        self.checkpoints.close()
        if self.sample_ids is not None:
            self.sample_ids.close()
        if self.lock is not None:
            self.lock.release()

    def write_run_folder(self) -> None:
        """Write the resolved configuration and the tokenizer into the run's folder, so that it is self-contained.

        Raises:
            UserError: The folder cannot be written.
        """
        if self.config.checkpoint.save and self.ranks.is_main:
            folder = Path(self.config.checkpoint.save)
            tokenizer = self.train_data.sources[0].load_tokenizer()  # its folder may hold weights too
            try:
                folder.mkdir(parents=True, exist_ok=True)
                signals.clear_run_state(folder)
                (folder / CONFIG_FILE).write_text(self.config.to_yaml(), encoding="utf-8")
                save_tokenizer(tokenizer, folder / TOKENIZER_FOLDER)
                if (files := self._huggingface_files()) is not None and files.parent.resolve() != folder.resolve():
                    keep_huggingface_files(files, folder)
                sample_ids.cut(folder, self.iteration)
            except OSError as error:
                raise UserError(
                    f"--save {folder}: {error.strerror or error}; choose a folder that can be written"
                ) from None

    def _huggingface_files(self) -> Path | None:
        """Return the folder of Hugging Face files on which an export is based, from ``--init-from`` or ``--load``."""
        if self.origin is not None:
            return self.origin.huggingface_files()
        load = self.config.checkpoint.load
        return kept_huggingface_files(Path(load)) if load else None

    @property
    def new_rows(self) -> int:
        """The number of rows that the vocabulary has beyond that of ``--init-from``."""
        if self.origin is None:
            return 0
        return self.config.vocab_size - (self.origin.model(ModelConfig()).vocab_size or 0)

    def samples(self) -> Samples | None:
        """Return the sampling process, on the main rank of a run with ``--log-samples``; otherwise None."""
        count, save = self.config.logging.log_samples, self.config.checkpoint.save
        if not count or not self.ranks.is_main:
            return None
        assert save and self.valid_data is not None
        return Samples(Path(save), self.valid_data, count)

    def log_sample_ids(self) -> None:
        """Open the log of sample ids, if ``--log-sample-ids`` is set."""
        config, groups = self.config, self.ranks.groups
        first_of_its_data = groups.tp.rank() == groups.pp.rank() == groups.cp.rank() == 0
        if config.logging.log_sample_ids and config.checkpoint.save and first_of_its_data:
            self.sample_ids = sample_ids.SampleIds(config.checkpoint.save, groups.dp.rank())


def _take_lock(config: Config) -> RunLock | None:
    """Take and return the lock on ``--save``; None on other ranks than the main one, and without ``--save``."""
    if not config.checkpoint.save or rank_from_environment() != 0:
        return None
    startup.current.phase = "taking the lock on --save"
    lock = take_lock(config.checkpoint.save)
    startup.current.at_end = lock.release
    return lock


def _mask_row(config: ResolvedConfig, origin: Origin) -> MaskRow:
    mask, before = config.mask_token_id, origin.model(ModelConfig()).vocab_size
    assert before is not None
    learned = origin.mask_token_id == mask
    return MaskRow(config.tidar.init_mask_token or ("keep" if learned else "normal"), mask, before, config.vocab_size)
