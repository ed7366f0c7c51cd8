"""What the model says as it learns: a process beside training exports each checkpoint and continues held-out prompts.

It works from the checkpoint, so it knows no layout, runs on the CPU of rank 0's machine, and can neither disturb the
training nor end it. While one checkpoint is still being sampled from, newer ones are passed over.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any, NamedTuple

from tidar_megatron.data.loader import TrainingData

PROMPT_TOKENS, NEW_TOKENS = 64, 64
LAST = 300.0  # seconds that the end of a run waits for its last samples


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

    def start(self, iteration: int) -> None:
        """Begin with the checkpoint of ``iteration``, unless another is still under way."""
        if self._process is not None:
            return
        command = [sys.executable, "-m", "tidar_megatron.training.samples", str(self._run), str(iteration)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)  # it is no rank
        # files, for a pipe that is full makes one side wait for the other
        self._out, self._errors = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115 - until poll or close
        with tempfile.TemporaryFile() as prompts:
            prompts.write(json.dumps(self._prompts).encode())
            prompts.seek(0)
            self._process = subprocess.Popen(
                command,
                stdin=prompts,
                stdout=self._out,
                stderr=self._errors,
                env=environment,
                start_new_session=True,  # what stops the run by a signal to its group is not for this one
            )
        self._iteration = iteration

    def poll(self, wait: bool = False) -> Said | None:
        """What came of the checkpoint that was begun with, once it is there."""
        if self._process is None:
            return None
        try:
            status = self._process.wait(LAST) if wait else self._process.poll()
        except subprocess.TimeoutExpired:
            self.close()
            return Said(self._iteration, [], f"not made within {LAST:.0f} seconds")
        if status is None:
            return None
        self._process = None
        out, errors = (self._read(file) for file in (self._out, self._errors))
        if status != 0:
            return Said(self._iteration, [], errors[-1] or f"their process ended with status {status}")
        return Said(self._iteration, json.loads(out[-1]))

    def close(self) -> None:
        """Give up what is under way."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self._out.close()
            self._errors.close()

    @staticmethod
    def _read(file: IO[bytes]) -> list[str]:
        with file:
            file.seek(0)
            return file.read().decode(errors="replace").strip().split("\n")


def main(run: str, iteration: int, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """In the process beside: its rows."""
    from tidar_megatron.checkpoint.convert import export_run
    from tidar_megatron.inference.engine import generate
    from tidar_megatron.inference.model import load_model
    from tidar_megatron.inference.request import DecodeOptions

    with tempfile.TemporaryDirectory() as folder:
        export_run(run, Path(folder) / "hf", iteration)
        model = load_model(Path(folder) / "hf", device="cpu")
    rows = []
    for prompt in prompts:
        made = generate(model, prompt, DecodeOptions("tidar", max_new_tokens=NEW_TOKENS))
        texts = [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, made.token_ids)]
        rows.append(
            {
                "prompt": texts[0],
                "text": texts[1],
                "tokens_per_forward": made.tokens_per_forward,
                "distinct_4grams": made.distinct_4grams,
            }
        )
    return rows


if __name__ == "__main__":
    print("\n" + json.dumps(main(sys.argv[1], int(sys.argv[2]), json.load(sys.stdin))))
