"""What a run is, part by part: its model, its tokenizer, its data. A resume that changes a part is refused by its name.

A change may be meant (more data, another rotary base): ``--override-fingerprint PART`` lets that one part pass.
"""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tidar_megatron.config import CONFIG_FILE, FIELDS, ModelConfig, flag
from tidar_megatron.errors import UserError

SHAPES = (  # settings that decide which tensors a model has, and their shapes (but for the padding of the vocabulary)
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "num_experts",
    "moe_ffn_hidden_size",
    "vocab_size",
    "qk_layernorm",
    "add_qkv_bias",
    "untie_embeddings_and_output_weights",
)
Fingerprint = dict[str, Any]  # part -> a value of JSON; a flag's name where a flag decides it


def plain(fingerprint: Fingerprint) -> Fingerprint:
    """As JSON gives it back."""
    return json.loads(json.dumps(fingerprint))


def check_fingerprint(run: str | Path, before: Fingerprint, now: Fingerprint, override: Collection[str]) -> None:
    """Refuse to continue a run as another one.

    Args:
        run: the folder that is continued.
        before: the fingerprint in its checkpoint.
        now: that of this start.
        override: the parts that may differ.

    Raises:
        UserError: names the parts that differ, or one to override that does not exist.
    """
    now = plain(now)
    parts = [*now, *(part for part in before if part not in now)]
    for part in override:
        if part not in parts:
            raise UserError(f"--override-fingerprint {part}: there is no such part; there are: {', '.join(parts)}")
    differing = [part for part in parts if before.get(part) != now.get(part) and part not in override]
    if not differing:
        return
    said = "; ".join(_difference(part, before.get(part), now.get(part), run) for part in differing)
    raise UserError(
        f"{said}; continue it with its own settings (--config {Path(run) / CONFIG_FILE}), export it and start a new "
        f"run with --init-from, or if the change is meant add --override-fingerprint {' '.join(differing)}"
    )


def _difference(part: str, before: Any, now: Any, run: str | Path) -> str:
    if part in FIELDS and part != "tokenizer":  # whose flag names a folder; what counts is what is in it
        return f"{flag(part)} {now}: the run in {run} has {before}"
    return f"{part} {_short(now)}: the run in {run} was started with another {part}, {_short(before)}"


def _short(value: Any) -> str:
    is_plain = value is None or isinstance(value, str | int | float)
    text = str(value) if is_plain else hashlib.sha256(json.dumps(value).encode()).hexdigest()
    return text if len(text) <= 16 else text[:12] + ".."


def check_shapes(path: Path, saved: dict[str, Any], model: ModelConfig) -> None:
    """Refuse a run's configuration that is of another model than its checkpoint.

    Args:
        path: of the configuration.
        saved: the model's settings in the checkpoint's ``state.json``.
        model: those of the configuration.

    Raises:
        UserError: names the setting, before a model of its size is built.
    """
    for name in SHAPES:
        now, before = getattr(model, name), saved.get(name)
        if now != before:
            raise UserError(f"{path}: model.{name} is {now}, in the checkpoint {before}; copy the run's folder again")
