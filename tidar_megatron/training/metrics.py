"""What a run tells: the console, ``metrics.jsonl`` (the record), and what is for looking at (``dashboards.py``).

Only the main process writes. W&B and TensorBoard never stop a run: without a key W&B keeps it offline, and whatever
else goes wrong there costs one line.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from tidar_megatron.config import Config
from tidar_megatron.files import replace_text
from tidar_megatron.training.dashboards import Sink, TensorBoard, Values, WandB


class JsonLines:
    """Such as ``metrics.jsonl``: one object a line, in order of iterations, also over resumes.

    Args:
        path: the file, made or gone on with.
        resume_from: the iteration that a run continues from; what is there of later ones is forgotten.
    """

    def __init__(self, path: Path, resume_from: int | None = None) -> None:
        # what an interrupted run logged after its last checkpoint happens again now
        if resume_from is not None and path.exists():
            kept = [line for line in path.read_text().splitlines() if iteration_of(line) <= resume_from]
            replace_text(path, "".join(line + "\n" for line in kept))
        self.file = path.open("a", encoding="utf-8")

    def write(self, iteration: int, values: Values) -> None:
        self.file.write(json.dumps(_finite({"iteration": iteration, **values}), allow_nan=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _finite(value: Any) -> Any:
    """As JSON can hold it: the loss of a step that was skipped may be no number, which is null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def iteration_of(line: str) -> float:
    """The iteration of a line of ``metrics.jsonl``; infinite for one that a killed run left half-written."""
    try:
        return json.loads(line)["iteration"]
    except ValueError:
        return math.inf


class MetricsLogger:
    """All sinks of a run behind two calls. On other processes than the main one it does nothing."""

    def __init__(self, config: Config, is_main: bool, resume_from: int = 0) -> None:
        self.console = Console(quiet=not is_main, highlight=False, soft_wrap=True)
        self.train_iters = config.training.train_iters
        self.sinks: list[Sink] = []
        self._texts: JsonLines | None = None
        if not is_main:
            return
        folder = Path(config.checkpoint.save) if config.checkpoint.save else None
        if folder is not None and config.logging.log_samples:
            self._texts = JsonLines(folder / "samples.jsonl", resume_from)
        if folder is not None:
            self.sinks.append(JsonLines(folder / "metrics.jsonl", resume_from))
        if config.logging.tensorboard_dir:
            self._try("TensorBoard", lambda: TensorBoard(config.logging.tensorboard_dir or "", config))
        if config.logging.wandb_project:
            self._try("W&B", lambda: WandB(config, folder or Path("."), self.console))

    def _try(self, name: str, make: Any) -> None:
        try:
            self.sinks.append(make())
        except Exception as error:  # a dashboard is never worth a run
            self.console.print(f"{name} is left out: {type(error).__name__}: {' '.join(str(error).split())}")

    def say(self, text: str) -> None:
        """A line on the console."""
        self.console.print(text, markup=False)

    def training(self, iteration: int, values: Values) -> None:
        """One logged step."""
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
        """One evaluation on held-out data."""
        offsets = " ".join(f"{a:.2f}" for a in values["acceptance_by_offset"])
        self.say(
            f"evaluation at {iteration} | AR {values['ar_loss']:.4f} | diffusion {values['diffusion_loss']:.4f}"
            f" | expected tokens/forward {values['tokens_per_forward']:.2f}"
            f" (greedy {values['greedy_tokens_per_forward']:.2f}) | acceptance by offset {offsets}"
        )
        self._write(iteration, {"eval": values})

    def samples(self, iteration: int, rows: list[Values]) -> None:
        """What the model of ``iteration`` says; it may be behind the step that is logged."""
        for row in rows:
            self.say(f"sample at {iteration} | {row['tokens_per_forward']:.2f} tokens/forward | {row['text']!r}")
            if self._texts is not None:
                self._texts.write(iteration, row)
        for sink in [sink for sink in self.sinks if not isinstance(sink, JsonLines)]:
            self._guard(sink, lambda sink=sink: sink.samples(iteration, rows))  # type: ignore[misc]

    def published(self, iteration: int, checkpoint: Path) -> None:
        """A checkpoint is whole."""
        self.say(f"saved iteration {iteration} in {checkpoint.parent}")
        for sink in [sink for sink in self.sinks if not isinstance(sink, JsonLines)]:
            self._guard(sink, lambda sink=sink: sink.published(iteration, checkpoint))  # type: ignore[misc]

    def _write(self, iteration: int, values: Values) -> None:
        for sink in list(self.sinks):
            self._guard(sink, lambda sink=sink: sink.write(iteration, values))  # type: ignore[misc]

    def close(self) -> None:
        """Flush every sink."""
        if self._texts is not None:
            self._texts.close()
        for sink in list(self.sinks):
            self._guard(sink, sink.close)

    def _guard(self, sink: Sink, action: Callable[[], None]) -> None:
        """The record must be written; a dashboard that fails is left out from then on."""
        try:
            action()
        except Exception as error:
            if isinstance(sink, JsonLines):
                raise
            self.sinks.remove(sink)
            self.say(f"{type(sink).__name__} is left out from here on: {type(error).__name__}: {error}")
