"""What the study trains: the paper's ablations at a size that two CPU cores can train, on two corpora of real text."""

from dataclasses import dataclass, field
from typing import Any

CORPORA = ("cities", "stdlib")
WARMUP = 0.4  # of the steps are plain AR


@dataclass(frozen=True)
class Variant:
    """One training run's difference from the base.

    Attributes:
        question: what it is there to answer.
        flags: of ``tools/pretrain.py``, over the base's.
        steps: factor on the base's number of steps.
        block_size: B, also the draft length it is decoded with.
    """

    question: str
    flags: dict[str, Any] = field(default_factory=dict)
    steps: float = 1.0
    block_size: int = 8


BASE = "base"
VARIANTS = {
    BASE: Variant("total masking, B = 8, alpha = 1, 40% AR warm-up"),
    "random masking": Variant("total against random masking", {"masking": "random"}),
    "B = 4": Variant("block size", block_size=4),
    "B = 16": Variant("block size", block_size=16),
    "B = 32": Variant("block size", block_size=32),
    "alpha = 0.5": Variant("weight of the AR loss", {"ar_loss_weight": 0.5}),
    "alpha = 2": Variant("weight of the AR loss", {"ar_loss_weight": 2.0}),
    "no warm-up": Variant("AR warm-up", {"ar_warmup_fraction": 0.0}),
    "80% warm-up": Variant("AR warm-up", {"ar_warmup_fraction": 0.8}),
    "AR only, equal steps": Variant("what drafting costs the AR loss", {"ar_warmup_fraction": 1.0}),
    # a joint step computes twice the tokens of an AR step
    "AR only, equal compute": Variant(
        "what drafting costs the AR loss", {"ar_warmup_fraction": 1.0}, steps=WARMUP + 2 * (1 - WARMUP)
    ),
}
TRUST = (1.0, 0.5, 0.0)  # beta of the verifying logits, decoded with the base models

MODEL = {
    "num_layers": 3,
    "hidden_size": 128,
    "ffn_hidden_size": 384,
    "num_attention_heads": 2,
    "num_query_groups": 1,
    "kv_channels": 64,
    "init_method_std": 0.05,
    "max_position_embeddings": 8192,
    "seq_length": 256,
    "micro_batch_size": 4,
    "global_batch_size": 8,
    "lr": 3e-3,
    "min_lr": 1.5e-4,
    "lr_decay_style": "cosine",
    "lr_warmup_iters": 20,
    "eval_sequences": 96,
    "log_interval": 20,
}


def pretrain_flags(variant: Variant, steps: int, seed: int) -> list[str]:
    """The command line of ``tools/pretrain.py``, without folders."""
    values = {**MODEL, "ar_warmup_fraction": WARMUP, **variant.flags}
    values |= {"block_size": variant.block_size, "train_iters": round(steps * variant.steps), "seed": seed}
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
