"""The loader's benchmark: the wait for a step's batches, throughput against training's, and opening large data."""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tidar_megatron.benchmark.measuring import Spread, rounded
from tidar_megatron.config import Config, build_config
from tidar_megatron.data.index import RECORD, Add, Facts, open_index
from tidar_megatron.data.loader import SequenceSettings, TrainingData
from tidar_megatron.data.manifest import Manifest, ShardEntry, read_manifest, write_manifest
from tidar_megatron.data.prefetch import Prefetcher
from tidar_megatron.data.prepare import prepare
from tidar_megatron.data.shards import INDEX_FILE, built_from
from tidar_megatron.distributed.groups import initialize, shut_down
from tidar_megatron.models.gpt import build_model
from tidar_megatron.models.initialize import initialize_weights
from tidar_megatron.training.optimizer import build_optimizer, wrap_model
from tidar_megatron.training.step import train_step

BLOCK, SEQUENCES = 16, 8
TEXTS, CHARACTERS = 400, 4000
DOCUMENTS = 10_000_000
READ = (1, 200, 1000)  # numbers of packed sequences after which memory is measured
# the quickstart's model and step (examples/quickstart/config.yaml)
QUICKSTART: dict[str, Any] = {
    "tidar": {"block_size": 8, "mask_token_id": 257},
    "model": {"num_layers": 3, "hidden_size": 128, "ffn_hidden_size": 384, "num_attention_heads": 2}
    | {"num_query_groups": 1, "kv_channels": 64, "vocab_size": 258},
    "data": {"seq_length": 256},
    "training": {"micro_batch_size": 4, "global_batch_size": 8},
}


def loader(seq_lengths: list[int], repeats: int, documents: int = DOCUMENTS) -> dict[str, Any]:
    """Measure the wait for a step's batches, the quickstart's loader against its training, and opening large data.

    Args:
        seq_lengths: the sequence lengths of the first table, in tokens.
        repeats: steps per measurement.
        documents: the number of documents of the large data.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "data"
        _write(folder, Path(scratch))
        rows = [_waiting(TrainingData(folder, SequenceSettings(S, BLOCK, 257, seed=0)), repeats) for S in seq_lengths]
        quickstart = _quickstart(folder, repeats)
        opening = _opening(Path(scratch) / "large", read_manifest(folder), documents)
    settings = {"block_size": BLOCK, "sequences": SEQUENCES}
    return {"settings": settings, "rows": rows, "quickstart": [quickstart], "opening": [opening]}


def _waiting(data: TrainingData, repeats: int) -> dict[str, Any]:
    """Measure the seconds to build the batches of 8 sequences, and to wait for them if a step takes twice as long.

    The step is a pause, as a step on a GPU is for the CPU. A step on the CPU would compete with the thread for cores.
    """

    def build(step: int) -> list:
        return data.step_batches(step * SEQUENCES, SEQUENCES, 1, 0, 1)

    build(0)
    building = [_seconds(partial(build, step)) for step in range(1, repeats + 1)]
    pause = Spread.of(building).median
    ahead = Prefetcher(build, torch.device("cpu"))
    waiting = []
    for step in range(1, repeats + 1):
        ahead.expect([(step,)])
        time.sleep(2 * pause)
        waiting.append(_seconds(partial(ahead.get, step)))
    ahead.close()
    S = data.settings.seq_length
    return (
        {"seq_length": S, "clean_tokens_per_second": round(SEQUENCES * S / pause)}
        | {"building_seconds": rounded(Spread.of(building)), "waiting_seconds": rounded(Spread.of(waiting))}
        | {"waiting_over_building": round(Spread.of(waiting).median / pause, 3)}
    )


def _quickstart(folder: Path, repeats: int) -> dict[str, Any]:
    """Measure the clean tokens per second of the quickstart's loader and of its training in one process."""
    config: Config = build_config(QUICKSTART)
    S, sequences = config.data.seq_length, config.training.global_batch_size
    data = TrainingData(folder, SequenceSettings(S, config.tidar.block_size, 257, seed=0))
    ranks = initialize(config.parallel, 0)
    try:
        chunks = build_model(config, 258, ranks)
        initialize_weights(chunks, 0)
        model = wrap_model(chunks, config)
        optimizer, scheduler = build_optimizer(model, config)

        def build(step: int) -> list:
            return data.step_batches(step * sequences, sequences, config.training.micro_batch_size, 0, 1)

        building, training = [], []
        for step in range(repeats + 1):
            building.append(_seconds(partial(build, step)))
            batches = build(step)
            training.append(_seconds(partial(train_step, model, optimizer, scheduler, batches, 1.0, ranks)))
    finally:
        shut_down()
    delivered, consumed = (sequences * S / Spread.of(seconds[1:]).median for seconds in (building, training))
    return {"delivered": round(delivered), "consumed": round(consumed), "ratio": round(delivered / consumed, 1)}


def _opening(folder: Path, like: Manifest, documents: int) -> dict[str, Any]:
    """Measure opening large data in a separate process: a sparse file as the shard, with a real index of documents."""
    draw = np.random.Generator(np.random.Philox(1))
    lengths = draw.integers(1, 2 * 512, documents)
    folder.mkdir()
    tokens = int(lengths.sum())
    size = 2 * tokens + 512 * documents
    entry = ShardEntry(name="hole.tar", bytes=size, sha256="0" * 64, documents=documents, tokens=tokens)
    manifest = like.model_copy(update={"documents": documents, "tokens": tokens, "shards": [entry]})
    with (folder / entry.name).open("wb") as stream:
        stream.truncate(size)
    write_manifest(folder, manifest)

    def build(add: Add) -> Facts:
        records = np.empty(documents, RECORD)
        records["length"] = records["stored"] = lengths
        records["offset"] = 2 * (np.cumsum(lengths) - lengths)
        add(records)
        return {}

    open_index(folder / INDEX_FILE, built_from(folder, manifest), build)
    program = f"from {__name__} import open_and_seek; open_and_seek({str(folder)!r})"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    return {"documents": documents, **json.loads(done.stdout.splitlines()[-1])}


def open_and_seek(folder: str) -> None:
    """Open the data, read packed sequences from the middle of an epoch on, and print time and memory as JSON.

    This runs in the process that :func:`loader` starts.
    """
    start, before = time.perf_counter(), _resident_mib()
    data = TrainingData(folder, SequenceSettings(4096, BLOCK, 257, seed=0))
    opened = time.perf_counter()
    middle = len(data.sequences[0]) // 2
    data.sequence(middle)
    result = {"opening_seconds": opened - start, "seeking_seconds": time.perf_counter() - opened}
    read = 1
    for target in READ:
        while read < target:
            data.sequence(middle + read)
            read += 1
        result[f"mib_after_{target}"] = _resident_mib() - before
    print(json.dumps({name: round(value, 4) for name, value in result.items()}))


def _resident_mib() -> float:
    """Return this process's resident memory in MiB, including mapped files."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


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
