"""How long a step waits for its batches: built when they are asked for, and built ahead by a thread."""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tidar_megatron.benchmark.measuring import Spread, rounded
from tidar_megatron.data.loader import TrainingData
from tidar_megatron.data.prefetch import Prefetcher
from tidar_megatron.data.prepare import prepare

BLOCK, SEQUENCES = 16, 8
TEXTS, CHARACTERS = 400, 4000


def loader(seq_lengths: list[int], repeats: int) -> dict[str, Any]:
    """One row for each S: seconds to build a step of 8 sequences, and to wait for it while a step takes as long.

    The step is a pause, as one on a GPU is for the CPU; a step on the same cores would share them with the thread.
    """
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "data"
        _write(folder, Path(scratch))
        for S in seq_lengths:
            data = TrainingData(folder, S, BLOCK, mask_token_id=257, seed=0)

            def build(step: int, data: TrainingData = data) -> list:
                return data.step_batches(step * SEQUENCES, SEQUENCES, 1, 0, 1)

            build(0)
            building = [_seconds(partial(build, step)) for step in range(1, repeats + 1)]
            pause = Spread.of(building).median
            ahead = Prefetcher(build, torch.device("cpu"))
            ahead.get(0)
            waiting = []
            for step in range(1, repeats + 1):
                ahead.start(step)
                time.sleep(2 * pause)
                waiting.append(_seconds(partial(ahead.get, step)))
            ahead.close()
            rows.append(
                {"seq_length": S, "clean_tokens_per_second": round(SEQUENCES * S / pause)}
                | {"building_seconds": rounded(Spread.of(building)), "waiting_seconds": rounded(Spread.of(waiting))}
                | {"waiting_over_building": round(Spread.of(waiting).median / pause, 3)}
            )
    return {"settings": {"block_size": BLOCK, "sequences": SEQUENCES}, "rows": rows}


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _write(folder: Path, scratch: Path) -> None:
    draw = np.random.Generator(np.random.Philox(0))
    texts = scratch / "texts"
    texts.mkdir()
    for number in range(TEXTS):
        letters = draw.integers(97, 123, draw.integers(1, CHARACTERS)).astype(np.uint8)
        (texts / f"{number}.txt").write_bytes(letters.tobytes())
    prepare([texts], folder, "byte")
