"""What the model says as it learns: a process beside training exports each checkpoint and continues held-out prompts.

It works from the checkpoint, so it knows no layout, runs on the CPU of rank 0's machine, and can neither disturb the
training nor end it. While one checkpoint is still being sampled from, newer ones are passed over, but for a run's last.
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
LAST = 300.0  # seconds that the end of a run waits for samples under way, then for those of its last checkpoint


class Said(NamedTuple):
    """What came of one checkpoint."""

    iteration: int
    rows: list[dict[str, Any]]  # of ``dashboards.SAMPLE_COLUMNS``
    problem: str | None = None  # why there are none


class Samples:
    """Samples of a run, on its main rank.

    Args:
        run: its folder.
        data: held-out documents, whose beginnings are the prompts.
        count: of prompts.
    """

    def __init__(self, run: Path, data: TrainingData, count: int) -> None:
        documents = data.sources[0]
        self._run = run
        self._prompts = [documents[n][:PROMPT_TOKENS].tolist() for n in range(min(count, len(documents)))]
        # a document's last token is its end: nothing would be left to continue
        self._prompts = [prompt[: max(1, len(prompt) - 1)] for prompt in self._prompts]
        self._process: subprocess.Popen[bytes] | None = None
        self._iteration = 0
        self._passed_over: int | None = None  # the newest checkpoint, if nothing says anything from it
        self._said: list[Said] = []

    def start(self, iteration: int) -> None:
        """Begin with the checkpoint of ``iteration``, unless another is still under way."""
        self._take()
        if self._process is not None:
            self._passed_over = iteration
            return
        self._passed_over = None
        command = [sys.executable, "-m", "tidar_megatron.training.generations", str(self._run), str(iteration)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)  # it is no rank
        self._iteration = iteration
        try:
            # of ours and not of the process, which may be killed; files, for a pipe that is full makes both sides wait
            self._folder = Path(tempfile.mkdtemp(prefix="tidar-samples-"))
            (self._folder / "prompts").write_text(json.dumps(self._prompts))
            with (self._folder / "out").open("wb") as out, (self._folder / "errors").open("wb") as errors:
                self._process = subprocess.Popen(
                    [*command, str(self._folder)],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=errors,
                    env=environment,
                    start_new_session=True,  # what stops the run by a signal to its group is not for this one
                )
        except OSError as error:
            self._said.append(Said(iteration, [], f"their process did not start: {error}"))

    def poll(self, wait: bool = False) -> list[Said]:
        """What has come since the last time; with ``wait`` also of the checkpoint under way, and of the newest."""
        self._take(LAST if wait else 0.0)
        if wait and self._process is None and self._passed_over is not None:
            self.start(self._passed_over)
            self._take(LAST)
        if wait and self._process is not None:
            self.close()
            self._said.append(Said(self._iteration, [], f"not made within {LAST:.0f} seconds"))
        said, self._said = self._said, []
        return said

    def close(self) -> None:
        """Give up what is under way."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            shutil.rmtree(self._folder, ignore_errors=True)

    def _take(self, seconds: float = 0.0) -> None:
        """Keep what came of the process if it ends within so many seconds."""
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
                said = Said(self._iteration, [], errors or f"their process ended with status {status}")
            else:
                said = Said(self._iteration, json.loads(out))
        except (OSError, ValueError) as error:
            said = Said(self._iteration, [], f"what their process said cannot be read: {error}")
        self._said.append(said)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _last_line(self, name: str) -> str:
        return (self._folder / name).read_text(encoding="utf-8", errors="replace").strip().split("\n")[-1]


def main(run: str, iteration: int, folder: Path) -> list[dict[str, Any]]:
    """In the process beside, which has a folder to work in: its rows."""
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
