"""Log a run to the console, to ``metrics.jsonl`` (the record) and to the dashboards (``dashboards.py``).

Only the main process writes. W&B and TensorBoard never stop a run: without an API key W&B works offline, and any other
error of a dashboard prints one line and removes it.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from tidar_megatron.config import Config
from tidar_megatron.errors import UserError
from tidar_megatron.files import replace_text
from tidar_megatron.json_files import finite, not_a_file
from tidar_megatron.training.dashboards import Dashboard, TensorBoard, Values, WandB
from tidar_megatron.training.generations import Said


class JsonLines:
    """A JSON-lines file such as ``metrics.jsonl``: one object per line, ordered by iteration, also across resumes.

    Args:
        path: The file to create or append to.
        resume_from: The iteration from which the run resumes; lines of later iterations are removed.

    Raises:
        UserError: The path is not a regular file.
    """

    def __init__(self, path: Path, resume_from: int | None = None) -> None:
        # the iterations that an interrupted run logged after its last checkpoint are repeated
        problem = not_a_file(path)
        if problem and problem != "not found":
            raise UserError(f"{path}: {problem}; move it away, or choose another --save")
        if resume_from is not None and problem is None:
            text = path.read_text(encoding="utf-8", errors="replace")
            kept = [line for line in text.splitlines() if iteration_of(line) <= resume_from]
            replace_text(path, "".join(line + "\n" for line in kept))
        self.file = path.open("a", encoding="utf-8")

    def write(self, iteration: int, values: Values) -> None:
        """Append one object and flush it; NaN and infinite numbers become null."""
        self.file.write(json.dumps(finite({"iteration": iteration, **values}), allow_nan=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self.file.close()


def iteration_of(line: str) -> float:
    """Return the iteration of a line of ``metrics.jsonl``; infinity for a line that a killed run left half-written."""
    try:
        iteration = json.loads(line)["iteration"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf
    return iteration if type(iteration) is int else math.inf


def seconds_left(config: Config, iteration: int, step_seconds: float) -> float:
    """Return the estimated seconds of all steps after ``iteration``, without evaluations and saves.

    A joint step takes longer than a step of the AR warm-up: a step's time is taken as proportional to its tokens.

    Args:
        config: The configuration of the run.
        iteration: The number of steps that are done, at least 1.
        step_seconds: The seconds of a step of the same phase as step ``iteration``.
    """
    warmup, clean = config.ar_warmup_iters, config.data.seq_length
    joint = clean + config.chosen_blocks * config.tidar.block_size
    ar_steps = max(warmup - iteration, 0)
    joint_steps = config.training.train_iters - iteration - ar_steps
    return step_seconds * (ar_steps * clean + joint_steps * joint) / (joint if iteration > warmup else clean)


def clock(seconds: float) -> str:
    """Return ``seconds`` as ``h:mm:ss``, or ``m:ss`` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def _losses(values: Values, between: str, digits: int) -> str:
    """Return the losses of a step that were computed: AR, diffusion or both."""
    named = {"AR": values["ar_loss"], "diffusion": values["diffusion_loss"]}
    return between.join(f"{name} {value:.{digits}f}" for name, value in named.items() if value is not None)


class MetricsLogger:
    """The console, the record and the dashboards of a run; a no-op on all processes but the main one.

    In a terminal, a progress bar below the lines shows the latest step.
    """

    def __init__(self, config: Config, is_main: bool, resume_from: int = 0) -> None:
        self.console = Console(quiet=not is_main, highlight=False, soft_wrap=True)
        self.train_iters = config.training.train_iters
        self.console_interval = config.logging.console_interval or config.logging.log_interval
        self.lines_until = resume_from  # the iteration of the latest line of a step
        self.bar: Progress | None = None
        self.record: JsonLines | None = None
        self.texts: JsonLines | None = None
        self.dashboards: list[Dashboard] = []
        if not is_main:
            return
        folder = Path(config.checkpoint.save) if config.checkpoint.save else None
        if folder is not None:
            self.record = JsonLines(folder / "metrics.jsonl", resume_from)
            self.texts = JsonLines(folder / "samples.jsonl", resume_from) if config.logging.log_samples else None
        if tensorboard := config.logging.tensorboard_dir:
            self._open("TensorBoard", lambda: TensorBoard(tensorboard, config))
        if config.logging.wandb_project:
            self._open("W&B", lambda: WandB(config, folder or Path("."), self.console))
        if self.console.is_interactive:
            self.bar = _bar(self.console, self.train_iters, resume_from)

    def _open(self, name: str, make: Callable[[], Dashboard]) -> None:
        try:
            self.dashboards.append(make())
        except Exception as error:  # a dashboard must never stop a run
            self.say(f"{name} is disabled: {type(error).__name__}: {' '.join(str(error).split())}")

    def say(self, text: str) -> None:
        """Print a line on the console."""
        self.console.print(text, markup=False)

    def training(self, iteration: int, values: Values) -> None:
        """Log the values of a training step."""
        interval, last = self.console_interval, iteration == self.train_iters
        if last or iteration // interval > self.lines_until // interval:
            self.say(self._line(iteration, values))
            self.lines_until = iteration
        if self.bar is not None:
            losses = _losses(values, ", ", 3)
            left = clock(values["seconds_left"])
            self.bar.update(self.bar.task_ids[0], completed=iteration, losses=losses, left=left, refresh=True)
        self._write(iteration, values)

    def _line(self, iteration: int, values: Values) -> str:
        several = "slowest_rank" in values
        return (
            f"step {iteration:>{len(str(self.train_iters))}}/{self.train_iters}"
            f" | {values['phase']:<5} | {_losses(values, ' | ', 4)}"
            f" | lr {values['learning_rate']:.2e} | grad norm {values['grad_norm']:.3f}"
            f" | {values['clean_tokens_per_second']:,.0f} clean tokens/s | {values['step_seconds'] * 1e3:.0f} ms/step"
            + (f" | slowest rank {values['slowest_rank']} ({values['slowest_over_median']:.2f}x)" if several else "")
            + f" | {values['memory_gib']:.2f} GiB"
            + (f" | {values['skipped_iterations']} skipped" if values["skipped_iterations"] else "")
            + (f" | {clock(values['seconds_left'])} left" if iteration < self.train_iters else "")
        )

    def evaluation(self, iteration: int, values: Values) -> None:
        """Log an evaluation on held-out data."""
        offsets = " ".join(f"{a:.2f}" for a in values["acceptance_by_offset"])
        self.say(
            f"evaluation at {iteration} | AR {values['ar_loss']:.4f} | diffusion {values['diffusion_loss']:.4f}"
            f" | teacher-forced tokens/forward {values['tokens_per_forward']:.2f}"
            f" (greedy {values['greedy_tokens_per_forward']:.2f}) | acceptance by offset {offsets}"
        )
        self._write(iteration, {"eval": values})

    def samples(self, said: Said) -> None:
        """Log samples from a checkpoint, which may be older than the current step."""
        iteration, rows, problem = said
        if problem:
            self.say(f"no samples at {iteration}: {problem}")
            return
        for row in rows:
            self.say(f"sample at {iteration} | {row['tokens_per_forward']:.2f} tokens/forward | {row['text']!r}")
            if self.texts is not None:
                self.texts.write(iteration, row)
        self._show(lambda dashboard: dashboard.samples(iteration, rows))

    def published(self, iteration: int, checkpoint: Path) -> None:
        """Log that the checkpoint of ``iteration`` is published."""
        self.say(f"saved iteration {iteration} in {checkpoint.parent}")
        self._show(lambda dashboard: dashboard.published(iteration, checkpoint))

    def close(self) -> None:
        """End the progress bar, and flush and close the files and dashboards."""
        if self.bar is not None:
            self.bar.stop()
        for file in (self.record, self.texts):
            if file is not None:
                file.close()
        self._show(lambda dashboard: dashboard.close())

    def _write(self, iteration: int, values: Values) -> None:
        if self.record is not None:
            self.record.write(iteration, values)
        self._show(lambda dashboard: dashboard.write(iteration, values))

    def _show(self, action: Callable[[Dashboard], None]) -> None:
        """Apply ``action`` to every dashboard; one that fails is disabled."""
        for dashboard in list(self.dashboards):
            try:
                action(dashboard)
            except Exception as error:
                self.dashboards.remove(dashboard)
                self.say(f"{type(dashboard).__name__} is disabled from here on: {type(error).__name__}: {error}")


def _bar(console: Console, train_iters: int, completed: int) -> Progress:
    """Return a running progress bar. It has no thread of its own, because a writer of checkpoints may be forked."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]} | {task.fields[left]} left"),
    )
    bar = Progress(*columns, console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
    bar.add_task("training", total=train_iters, completed=completed, losses="", left="?")
    bar.start()
    console.show_cursor(True)  # a killed run must not leave the terminal without one
    return bar
