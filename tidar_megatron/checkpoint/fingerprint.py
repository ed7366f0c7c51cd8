"""The fingerprint of a run: its model, tokenizer and data, part by part. A resume that changes a part is refused.

Where the change is intended (more data, another rotary base), ``--override-fingerprint PART`` allows that one part to
differ.
"""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tidar_megatron.config import CONFIG_FILE, FIELDS, ModelConfig, flag
from tidar_megatron.errors import UserError

SHAPES = (  # settings that decide a model's tensors and their shapes, except for the padding of the vocabulary
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
Fingerprint = dict[str, Any]  # part -> a JSON value; a part that a flag sets has the name of its field


def plain(fingerprint: Fingerprint) -> Fingerprint:
    """Return a fingerprint after a round trip through JSON, so that it compares equal to a saved one."""
    return json.loads(json.dumps(fingerprint))


def check_fingerprint(run: str | Path, before: Fingerprint, now: Fingerprint, override: Collection[str]) -> None:
    """Refuse to resume a run whose fingerprint has changed.

    Args:
        run: The folder of the run.
        before: The fingerprint in its checkpoint.
        now: The fingerprint of this start.
        override: The parts that may differ.

    Raises:
        UserError: Parts differ, or ``override`` names a part that does not exist; the message names them.
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
        f"{said}; resume it with its own settings (--config {Path(run) / CONFIG_FILE}), export it and start a new "
        f"run with --init-from, or if the change is intended add --override-fingerprint {' '.join(differing)}"
    )


def _difference(part: str, before: Any, now: Any, run: str | Path) -> str:
    if part in FIELDS and part != "tokenizer":  # --tokenizer names a folder, but its contents are compared
        return f"{flag(part)} {now}: the run in {run} has {before}"
    return f"{part} {_short(now)}: the run in {run} was started with another {part}, {_short(before)}"


def _short(value: Any) -> str:
    is_plain = value is None or isinstance(value, str | int | float)
    text = str(value) if is_plain else hashlib.sha256(json.dumps(value).encode()).hexdigest()
    return text if len(text) <= 16 else text[:12] + ".."


def check_shapes(path: Path, saved: dict[str, Any], model: ModelConfig) -> None:
    """Refuse a run's configuration that describes another model than its checkpoint, before that model is built.

    Args:
        path: The file of the configuration.
        saved: The model's settings in the checkpoint's ``state.json``.
        model: The model's settings in the configuration.

    Raises:
        UserError: A setting differs; the message names it.
    """
    for name in SHAPES:
        now, before = getattr(model, name), saved.get(name)
        if now != before:
            raise UserError(f"{path}: model.{name} is {now}, in the checkpoint {before}; copy the run's folder again")
