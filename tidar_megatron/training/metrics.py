"""Log a run to the console, to ``metrics.jsonl`` (the record) and to the dashboards (``dashboards.py``).

Only the main process writes. W&B and TensorBoard never stop a run: without an API key W&B works offline, and any other
error of a dashboard prints one line and removes it.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from tidar_megatron.config import Config
from tidar_megatron.errors import UserError
from tidar_megatron.files import replace_text
from tidar_megatron.json_files import not_a_file
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
        self.file.write(json.dumps(_finite({"iteration": iteration, **values}), allow_nan=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self.file.close()


def _finite(value: Any) -> Any:
    """Replace NaN and infinite numbers, such as the loss of a skipped step, by None, because JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def iteration_of(line: str) -> float:
    """Return the iteration of a line of ``metrics.jsonl``; infinity for a line that a killed run left half-written."""
    try:
        iteration = json.loads(line)["iteration"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf
    return iteration if type(iteration) is int else math.inf


class MetricsLogger:
    """The console, the record and the dashboards of a run; a no-op on all processes but the main one."""

    def __init__(self, config: Config, is_main: bool, resume_from: int = 0) -> None:
        self.console = Console(quiet=not is_main, highlight=False, soft_wrap=True)
        self.train_iters = config.training.train_iters
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
        diffusion, several = values["diffusion_loss"], "slowest_rank" in values
        self.say(
            f"step {iteration:>{len(str(self.train_iters))}}/{self.train_iters}"
            f" | {values['phase']:<5} | AR {values['ar_loss']:.4f}"
            + (f" | diffusion {diffusion:.4f}" if diffusion is not None else "")
            + f" | lr {values['learning_rate']:.2e} | grad norm {values['grad_norm']:.3f}"
            f" | {values['clean_tokens_per_second']:,.0f} clean tokens/s | {values['step_seconds'] * 1e3:.0f} ms/step"
            + (f" | slowest rank {values['slowest_rank']} ({values['slowest_over_median']:.2f}x)" if several else "")
            + f" | {values['memory_gib']:.2f} GiB"
            + (f" | {values['skipped_iterations']} skipped" if values["skipped_iterations"] else "")
        )
        self._write(iteration, values)

    def evaluation(self, iteration: int, values: Values) -> None:
        """Log an evaluation on held-out data."""
        offsets = " ".join(f"{a:.2f}" for a in values["acceptance_by_offset"])
        self.say(
            f"evaluation at {iteration} | AR {values['ar_loss']:.4f} | diffusion {values['diffusion_loss']:.4f}"
            f" | expected tokens/forward {values['tokens_per_forward']:.2f}"
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
        """Flush and close the files and dashboards."""
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
