"""The time that a save blocks training: asynchronous against synchronous saves, of a model with Adam's moments."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tidar_megatron.benchmark.measuring import Spread, rounded
from tidar_megatron.benchmark.timing import synchronize
from tidar_megatron.checkpoint.checkpoints import Checkpoints
from tidar_megatron.checkpoint.contents import Trained
from tidar_megatron.checkpoint.folder import checkpoint_folder
from tidar_megatron.config import build_config
from tidar_megatron.data.doubled import make_batch
from tidar_megatron.data.packing import Piece, pack
from tidar_megatron.distributed.groups import initialize, shut_down
from tidar_megatron.distributed.platform import device, has_gpu
from tidar_megatron.models.gpt import build_model
from tidar_megatron.models.initialize import initialize_weights
from tidar_megatron.training.optimizer import build_optimizer, wrap_model
from tidar_megatron.training.step import train_step

VOCABULARY, TOKENS = 32768, 128
MODEL: dict[str, Any] = {
    "num_layers": 12,
    "hidden_size": 768,
    "ffn_hidden_size": 2048,
    "num_attention_heads": 12,
    "num_query_groups": 4,
    "vocab_size": VOCABULARY,
}


def checkpoint(repeats: int, folder: str | Path) -> dict[str, Any]:
    """Measure how long synchronous and asynchronous saves block, and how long a step takes during a save.

    A synchronous save blocks until the checkpoint is published. An asynchronous save blocks while it starts and in each
    :meth:`Checkpoints.maybe_finalize` between steps; the last of these calls publishes the checkpoint.

    Args:
        repeats: saves of each kind.
        folder: the folder to write checkpoints to, on the disk to measure.
    """
    config = build_config(
        {
            "tidar": {"block_size": 16, "mask_token_id": VOCABULARY - 1},
            "model": MODEL,
            "data": {"seq_length": TOKENS},
            "training": {"global_batch_size": 1, "train_iters": 1000, "bf16": has_gpu()},
        }
    )
    where = device()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        ranks = initialize(config.parallel, config.training.seed)
        try:
            chunks = build_model(config, VOCABULARY, ranks)
            initialize_weights(chunks, config.training.seed)
            model = wrap_model(chunks, config)
            optimizer, scheduler = build_optimizer(model, config)
            run = Trained(chunks, optimizer, scheduler)
            document = np.random.Generator(np.random.Philox(0)).integers(0, VOCABULARY - 1, TOKENS + 1)
            sequence = pack([Piece(0, 0, TOKENS)], [document], 0)

            def step() -> None:
                batch = make_batch([sequence], config.tidar.block_size, VOCABULARY - 1, True)
                train_step(model, optimizer, scheduler, [batch], config.tidar.ar_loss_weight, ranks)

            def seconds(work: Callable[[], object]) -> float:
                synchronize(where)
                start = time.perf_counter()
                work()
                synchronize(where)
                return time.perf_counter() - start

            def keeper(asynchronous: bool) -> Checkpoints:
                settings = replace(config.checkpoint, save=scratch, async_save=asynchronous, keep_last=1)
                return Checkpoints(replace(config, checkpoint=settings), ranks, {})

            sync, background = keeper(False), keeper(True)
            step()
            blocked: dict[str, list[float]] = {"sync": [], "async": []}
            alone, beside, until_published = [], [], []
            for number in range(repeats + 1):  # the first round warms up
                alone.append(seconds(step))
                blocked["sync"].append(seconds(partial(sync.save, run, 2 * number, 0, {})))
                start = time.perf_counter()
                spent = seconds(partial(background.save, run, 2 * number + 1, 0, {}))
                while background.saving:
                    beside.append(seconds(step))
                    spent += seconds(background.maybe_finalize)
                until_published.append(time.perf_counter() - start)
                blocked["async"].append(spent)
            written = sum(path.stat().st_size for path in checkpoint_folder(scratch, 2 * repeats + 1).iterdir())
        finally:
            shut_down()
    pairs = zip(blocked["async"][1:], blocked["sync"][1:], strict=True)
    ratio = Spread.of([mine / theirs for mine, theirs in pairs])
    row = {
        "parameters": sum(p.numel() for chunk in chunks for p in chunk.parameters()),
        "bytes": written,
        "sync_seconds": rounded(Spread.of(blocked["sync"][1:])),
        "async_blocked_seconds": rounded(Spread.of(blocked["async"][1:])),
        "async_until_published_seconds": rounded(Spread.of(until_published[1:])),
        "blocked_over_sync": round(ratio.median, 4),
        "spread": rounded(ratio),
        "step_seconds": rounded(Spread.of(alone[1:])),
        "step_beside_a_save_seconds": rounded(Spread.of(beside)),
    }
    return {"settings": {**MODEL, "seq_length": TOKENS, "bf16": config.training.bf16}, "rows": [row]}
