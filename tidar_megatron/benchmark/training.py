"""The time of a training step, including the optimizer, against a step of plain AR training on the same tokens.

A step of draft weights alone is measured beside the joint step with the same masks, and so is the memory that training
needs besides the weights: gradients and the optimizer's state.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from tidar_megatron.benchmark.measuring import Timings, rounded
from tidar_megatron.config import Config, DraftConfig, build_config
from tidar_megatron.data.blocks import choose_blocks
from tidar_megatron.data.doubled import Batch, make_batch
from tidar_megatron.data.packing import PackedSequence, Piece, pack
from tidar_megatron.distributed.groups import Ranks, initialize, shut_down
from tidar_megatron.distributed.platform import has_gpu
from tidar_megatron.models.gpt import build_model
from tidar_megatron.models.initialize import initialize_drafts, initialize_weights
from tidar_megatron.training.optimizer import build_optimizer, wrap_model
from tidar_megatron.training.step import train_step

VOCABULARY = 4096
TOKENS = 4096  # clean tokens per step: one micro-batch of sequences with that total, or of one longer sequence
MODEL: dict[str, Any] = {
    "num_layers": 6,
    "hidden_size": 384,
    "ffn_hidden_size": 1024,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "vocab_size": VOCABULARY,
}


def training(
    seq_lengths: list[int],
    fractions: list[float],
    repeats: int,
    chunk_size: int = 256,
    model: Mapping[str, Any] | None = None,
    tokens: int | None = None,
    dtypes: Sequence[str] = (),
) -> dict[str, Any]:
    """Compare training steps with plain AR's, one row for each sequence length and fraction of the blocks with masks.

    A sequence is one document. Batches are built before the steps, as the prefetcher does.

    Args:
        seq_lengths: clean tokens per sequence, S.
        fractions: the fractions of the blocks that have masks.
        repeats: rounds of measurements.
        chunk_size: the chunk size of attention's tiles, in tokens.
        model: the fields of the configuration's section ``model`` that differ from :data:`MODEL`.
        tokens: clean tokens per step; by default :data:`TOKENS`.
        dtypes: ``float32`` and ``bfloat16`` (as with ``--bf16``), or one of them; by default bfloat16 on a GPU and
            float32 on a CPU. ``speedup`` is the time of a step in the first one over the time in that of the row.
    """
    rows = []
    dtypes = dtypes or ["bfloat16" if has_gpu() else "float32"]
    for S in seq_lengths:
        configs = {dtype: step_config(S, chunk_size, model, tokens, dtype == "bfloat16") for dtype in dtypes}
        config = configs[dtypes[0]]
        try:
            ranks = initialize(config.parallel, config.training.seed)
            steps: dict[str, Callable[[], object]] = {}
            trained, of_drafts = {}, {}
            for dtype in dtypes:
                named, parameters, trained[dtype] = _steps(configs[dtype], fractions, ranks)
                steps |= {f"{name}, {dtype}": step for name, step in named.items()}
                drafts = replace(configs[dtype], drafts=DraftConfig(train="drafts"))
                named, _, of_drafts[dtype] = _steps(drafts, [1.0], ranks)
                steps[f"drafts, {dtype}"] = named[_name(1.0)]
            times = Timings(steps, repeats)
        finally:
            shut_down()
        for dtype in dtypes:
            for fraction in fractions:
                ours, ar, first = f"{_name(fraction)}, {dtype}", f"AR, {dtype}", f"{_name(fraction)}, {dtypes[0]}"
                spread = times.ratio(ours, ar)
                rows.append(
                    {"seq_length": S, "parameters": parameters, "dtype": dtype, "diffusion_block_fraction": fraction}
                    | {"tidar_over_ar": round(spread.median, 3), "spread": rounded(spread)}
                    | {"tidar_seconds": rounded(times.of(ours)), "ar_seconds": rounded(times.of(ar))}
                    | {"speedup": rounded(times.ratio(first, ours))}
                )
                if fraction == 1:
                    beside = times.ratio(f"drafts, {dtype}", ours)
                    memory = {"gradients_and_optimizer_bytes": trained[dtype]()}
                    memory["drafts_gradients_and_optimizer_bytes"] = of_drafts[dtype]()
                    rows[-1] |= {"drafts_over_tidar": rounded(beside), **memory}
    settings = {
        **MODEL,
        **(model or {}),
        "block_size": config.tidar.block_size,
        "chunk_size": chunk_size,
        "tokens": tokens or TOKENS,
    }
    return {"settings": settings, "rows": rows}


def _name(fraction: float) -> str:
    return f"TiDAR {fraction:g}"


def step_config(
    seq_length: int,
    chunk_size: int = 256,
    model: Mapping[str, Any] | None = None,
    tokens: int | None = None,
    bf16: bool = False,
) -> Config:
    """Return the configuration of a step with one micro-batch; see :func:`training`."""
    rows, sizes = max(1, (tokens or TOKENS) // seq_length), {**MODEL, **(model or {})}
    mask_token_id = sizes["vocab_size"] - 1
    return build_config(
        {
            "tidar": {"block_size": 16, "mask_token_id": mask_token_id, "attention_chunk_size": chunk_size},
            "model": sizes,
            "data": {"seq_length": seq_length},
            "training": {"global_batch_size": rows, "micro_batch_size": rows, "train_iters": 1000, "bf16": bf16},
        }
    )


def _steps(
    config: Config, fractions: list[float], ranks: Ranks
) -> tuple[dict[str, Callable[[], object]], int, Callable[[], int]]:
    """Return functions that take a step, of AR and of each fraction; the model's number of parameters; and a function.

    That one returns the bytes of gradients and of the optimizer's state, once there have been steps.
    """
    assert config.model.vocab_size is not None
    chunks = build_model(config, config.model.vocab_size, ranks)
    initialize_weights(chunks, config.training.seed)
    if config.trains_drafts:
        initialize_drafts(chunks, config.training.seed)
    model = wrap_model(chunks, config)
    optimizer, scheduler = build_optimizer(model, config)
    S = config.data.seq_length
    document = np.random.Generator(np.random.Philox(0)).integers(0, config.model.vocab_size - 1, S + 1)
    sequence = pack([Piece(0, 0, S)], [document], 0)

    def step(fraction: float | None) -> Callable[[], object]:
        batch = _batch([sequence] * config.training.micro_batch_size, config, fraction)
        queries = batch.mask_length if config.trains_drafts else batch.tokens.shape[1]
        plan = chunks[0].attention_schedules.plan
        batch.attention_plan = plan(batch.visibility_on_host, queries, config.trains_drafts)
        batch = batch.pinned() if has_gpu() else batch

        def take() -> object:
            # attention's schedule is found by the metadata tensor, and belongs to the step: give each its own tensor
            own = batch if has_gpu() else replace(batch, visibility=batch.visibility.clone())
            return train_step(model, optimizer, scheduler, [own], config.ar_loss_weight, ranks)

        return take

    named = {"AR": step(None), **{_name(fraction): step(fraction) for fraction in fractions}}

    def trained_bytes() -> int:
        gradients = [p.main_grad for chunk in chunks for p in chunk.parameters() if p.requires_grad]
        states = [value for state in optimizer.optimizer.state.values() for value in state.values()]
        return sum(tensor.nbytes for tensor in [*gradients, *states] if isinstance(tensor, Tensor))

    return named, sum(p.numel() for chunk in chunks for p in chunk.parameters()), trained_bytes


def _batch(sequences: list[PackedSequence], config: Config, fraction: float | None) -> Batch:
    chosen = None
    assert config.tidar.mask_token_id is not None
    if fraction is not None and fraction < 1:
        m = max(1, round(fraction * config.blocks))
        chosen = np.stack([choose_blocks(config.blocks, m, 0, number) for number in range(len(sequences))])
    return make_batch(sequences, config.tidar.block_size, config.tidar.mask_token_id, fraction is not None, chosen)
