"""The studies: the paper's ablations at a size that two CPU cores can train, and a real AR model's continuation."""

from dataclasses import dataclass, field
from typing import Any

WARMUP = 0.4  # the fraction of the small models' steps that are plain AR


@dataclass(frozen=True)
class Variant:
    """One training run's difference from the base.

    Attributes:
        question: the question that the variant answers.
        flags: flags of ``tools/pretrain.py`` that override the base's.
        steps: the factor on the base's number of steps.
        trainer: the program that trains the variant, and its arguments besides those flags.
    """

    question: str
    flags: dict[str, Any] = field(default_factory=dict)
    steps: float = 1.0
    trainer: tuple[str, ...] = ("tools/pretrain.py",)


BASE = "base"


@dataclass(frozen=True)
class Study:
    """A set of runs that are compared.

    Attributes:
        corpora: the corpora; every variant is trained on each of them.
        flags: the base's flags of ``tools/pretrain.py``.
        variants: the variants by name; the first is the base.
        steps, full_steps: the base's number of steps, by default and with ``--full``.
        seeds, full_seeds: the number of seeds, by default and with ``--full``.
        prompts, prompt_tokens, new_tokens: the prompts to decode, and the tokens of each prompt and of its output.
        trust: the weights (beta) of AR's logits in verification to decode with.
    """

    corpora: tuple[str, ...]
    flags: dict[str, Any]
    variants: dict[str, Variant]
    steps: int
    full_steps: int
    seeds: int
    full_seeds: int
    prompts: int
    prompt_tokens: int
    new_tokens: int
    trust: tuple[float, ...]

    def command(self, name: str, steps: int, seed: int) -> list[str]:
        """Return the command line that trains a variant, without folders."""
        variant = self.variants[name]
        values = {**self.flags, **variant.flags, "train_iters": max(1, round(steps * variant.steps)), "seed": seed}
        flags = [(f"--{key.replace('_', '-')}", value) for key, value in values.items()]
        words = [word for flag, value in flags for word in ([flag] if value is True else [flag, str(value)])]
        return [*variant.trainer, *words]

    def block_size(self, name: str) -> int:
        """Return the block size B of a variant, which is also the draft length in decoding."""
        return int((self.flags | self.variants[name].flags)["block_size"])


PAPER = Study(
    corpora=("cities", "stdlib"),
    flags={
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
        "ar_warmup_fraction": WARMUP,
        "block_size": 8,
    },
    variants={
        BASE: Variant("total masking, B = 8, alpha = 1, 40% AR warm-up"),
        "random masking": Variant("total against random masking", {"masking": "random"}),
        "B = 4": Variant("block size", {"block_size": 4}),
        "B = 16": Variant("block size", {"block_size": 16}),
        "B = 32": Variant("block size", {"block_size": 32}),
        "alpha = 0.5": Variant("weight of the AR loss", {"ar_loss_weight": 0.5}),
        "alpha = 2": Variant("weight of the AR loss", {"ar_loss_weight": 2.0}),
        "no warm-up": Variant("AR warm-up", {"ar_warmup_fraction": 0.0}),
        "80% warm-up": Variant("AR warm-up", {"ar_warmup_fraction": 0.8}),
        "AR only, equal steps": Variant("what drafting costs the AR loss", {"ar_warmup_fraction": 1.0}),
        # a joint step computes twice the tokens of an AR step
        "AR only, equal compute": Variant(
            "what drafting costs the AR loss", {"ar_warmup_fraction": 1.0}, steps=WARMUP + 2 * (1 - WARMUP)
        ),
    },
    steps=300,
    full_steps=1200,
    seeds=3,
    full_seeds=5,
    prompts=48,
    prompt_tokens=96,
    new_tokens=96,
    trust=(1.0, 0.5, 0.0),
)

SMOLLM2 = Study(
    corpora=("smollm2",),
    flags={
        "init_from": "runs/smollm2/hf",
        "bf16": True,
        "seq_length": 256,
        "micro_batch_size": 4,
        "global_batch_size": 4,
        "lr": 3e-4,
        "min_lr": 3e-5,
        "lr_decay_style": "cosine",
        "lr_warmup_iters": 5,
        "weight_decay": 0.0,
        "eval_sequences": 32,
        "log_interval": 5,
        "block_size": 8,
        "init_mask_token": "mean",
    },
    variants={
        BASE: Variant("mask row = mean, learning rate 3e-4, alpha = 1, B = 8"),
        "before": Variant(
            "what it was: one step, of nothing", {"lr": 0.0, "min_lr": 0.0, "lr_warmup_iters": 0}, steps=0.0
        ),
        "mask row normal": Variant("how the mask token's row starts", {"init_mask_token": "normal"}),
        "lr = 1e-4": Variant("learning rate", {"lr": 1e-4, "min_lr": 1e-5}),
        "lr = 1e-3": Variant("learning rate", {"lr": 1e-3, "min_lr": 1e-4}),
        "alpha = 0.5": Variant("weight of the AR loss", {"ar_loss_weight": 0.5}),
        "alpha = 2": Variant("weight of the AR loss", {"ar_loss_weight": 2.0}),
        "B = 4": Variant("block size", {"block_size": 4}),
        "B = 16": Variant("block size", {"block_size": 16}),
        "first 20 layers frozen": Variant(
            "what is trained", trainer=("examples/smollm2/partial.py", "--freeze-layers", "20")
        ),
        "low rank, 16": Variant(
            "what is trained",
            {"lr": 1e-3, "min_lr": 1e-4},  # the base's learning rate changes little
            trainer=("examples/smollm2/partial.py", "--low-rank", "16"),
        ),
    },
    steps=40,
    full_steps=200,
    seeds=1,
    full_seeds=3,
    prompts=12,
    prompt_tokens=96,
    new_tokens=48,
    trust=(1.0,),
)

STUDIES = {"study": PAPER, "smollm2_study": SMOLLM2}
