"""Sample from a model during training: a separate process exports each checkpoint and continues held-out prompts.

The process works from the checkpoint, independently of the layout, on the CPU of rank 0's machine, so it can neither
disturb nor end the training. While it samples from one checkpoint, newer ones are skipped, except the last of the run.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from tidar_megatron.data.loader import TrainingData

PROMPT_TOKENS, NEW_TOKENS = 64, 64
LAST = 300.0  # seconds to wait at the end of a run for samples in progress, and again for those of its last checkpoint


class Said(NamedTuple):
    """The samples from one checkpoint, or why there are none."""

    iteration: int
    rows: list[dict[str, Any]]  # keys: ``dashboards.SAMPLE_COLUMNS``
    problem: str | None = None  # why there are no rows


class Samples:
    """The sampling process of a run; only the main rank has one.

    Args:
        run: The run's folder.
        data: The held-out data; the first tokens of its documents are the prompts.
        count: The number of prompts.
    """

    def __init__(self, run: Path, data: TrainingData, count: int) -> None:
        documents = data.sources[0]
        self._run = run
        self._prompts = [documents[n][:PROMPT_TOKENS].tolist() for n in range(min(count, len(documents)))]
        # drop a document's last token, the end-of-document token, behind which there is nothing to generate
        self._prompts = [prompt[: max(1, len(prompt) - 1)] for prompt in self._prompts]
        self._process: subprocess.Popen[bytes] | None = None
        self._iteration = 0
        self._passed_over: int | None = None  # the newest checkpoint, if it was skipped
        self._said: list[Said] = []

    def start(self, iteration: int) -> None:
        """Start to sample from the checkpoint of ``iteration``, unless another one is still in progress."""
        self._take()
        if self._process is not None:
            self._passed_over = iteration
            return
        self._passed_over = None
        command = [sys.executable, "-m", "tidar_megatron.training.generations", str(self._run), str(iteration)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)  # the process is not a rank
        self._iteration = iteration
        try:
            # this process owns the folder, because the other may be killed; a full pipe would block, files do not
            self._folder = Path(tempfile.mkdtemp(prefix="tidar-samples-"))
            (self._folder / "prompts").write_text(json.dumps(self._prompts))
            with (self._folder / "out").open("wb") as out, (self._folder / "errors").open("wb") as errors:
                self._process = subprocess.Popen(
                    [*command, str(self._folder)],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=errors,
                    env=environment,
                    start_new_session=True,  # signals to the run's process group must not reach this process
                )
        except OSError as error:
            self._said.append(Said(iteration, [], f"the sampling process did not start: {error}"))

    def poll(self, wait: bool = False) -> list[Said]:
        """Return the samples that are finished since the last call.

        Args:
            wait: Whether to wait for the checkpoint in progress and then for the newest one, up to :data:`LAST` seconds
                each.
        """
        self._take(LAST if wait else 0.0)
        if wait and self._process is None and self._passed_over is not None:
            self.start(self._passed_over)
            self._take(LAST)
        if wait and self._process is not None:
            self.close()
            self._said.append(Said(self._iteration, [], f"not finished within {LAST:.0f} seconds"))
        said, self._said = self._said, []
        return said

    def close(self) -> None:
        """Kill the sampling process, if one is running."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            shutil.rmtree(self._folder, ignore_errors=True)

    def _take(self, seconds: float = 0.0) -> None:
        """Collect the result of the process if it ends within ``seconds``."""
        if self._process is None:
            return
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return
        self._process = None
        try:
            out, errors = (self._last_line(name) for name in ("out", "errors"))
            if status:
                said = Said(self._iteration, [], errors or f"the sampling process ended with status {status}")
            else:
                said = Said(self._iteration, json.loads(out))
        except (OSError, ValueError) as error:
            said = Said(self._iteration, [], f"the output of the sampling process cannot be read: {error}")
        self._said.append(said)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _last_line(self, name: str) -> str:
        return (self._folder / name).read_text(encoding="utf-8", errors="replace").strip().split("\n")[-1]


def main(run: str, iteration: int, folder: Path) -> list[dict[str, Any]]:
    """Return the sample rows of a run's checkpoint; the entry point of the sampling process.

    Args:
        run: The run's folder.
        iteration: The iteration of the checkpoint.
        folder: The working folder, which holds the prompts.
    """
    from tidar_megatron.huggingface.convert import export_run
    from tidar_megatron.inference.engine import generate
    from tidar_megatron.inference.loading import load_model
    from tidar_megatron.inference.request import DecodeOptions
    from tidar_megatron.inference.text import continuation

    export_run(run, folder / "hf", iteration)
    model = load_model(folder / "hf", device="cpu")
    rows = []
    for prompt in json.loads((folder / "prompts").read_text()):
        made = generate(model, prompt, DecodeOptions("tidar", max_new_tokens=NEW_TOKENS))
        rows.append(
            {
                "prompt": model.tokenizer.decode(prompt, skip_special_tokens=True),
                "text": continuation(model.tokenizer, prompt, made.token_ids),
                "tokens_per_forward": made.tokens_per_forward,
                "distinct_4grams": made.distinct_4grams,
            }
        )
    return rows


if __name__ == "__main__":
    print("\n" + json.dumps(main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))))
