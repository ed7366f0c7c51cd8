"""A run of seconds, and what it logged."""

import json
from pathlib import Path

from tidar_megatron.config import build_config

STEPS = 8


def small(shards, **changes):
    """A configuration of a run of seconds; ``changes`` are section -> fields."""
    tree = {
        "tidar": {"block_size": 4, "ar_warmup_fraction": 0.25},
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "kv_channels": 16,
            "make_vocab_size_divisible_by": 8,
            "max_position_embeddings": 512,
        },
        "data": {"train_data": str(shards[0]), "valid_data": str(shards[1]), "seq_length": 32},
        "training": {
            "train_iters": STEPS,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "eval_interval": 4,
            "eval_sequences": 5,
        },
        "optimizer": {"lr": 3e-3, "lr_warmup_iters": 2},
        "logging": {"log_interval": 1},
    }
    for section, fields in changes.items():
        tree[section] = {**tree.get(section, {}), **fields}
    return build_config(tree)


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    rows = [m for m in metrics(folder) if "loss" in m]
    return {m["iteration"]: (m["ar_loss"], m["diffusion_loss"] or 0.0, m["grad_norm"]) for m in rows}
