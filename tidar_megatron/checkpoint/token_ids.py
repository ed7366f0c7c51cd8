"""Token ids that a Hugging Face folder gives a meaning: its ``generation_config.json``, and the mask token's."""

import json
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from tidar_megatron.checkpoint.families import read_config, read_json
from tidar_megatron.errors import UserError
from tidar_megatron.mask_token import other_meaning

GENERATION_CONFIG = "generation_config.json"
IDS = ("eos_token_id", "bos_token_id", "pad_token_id", "suppress_tokens", "begin_suppress_tokens")


def read_generation_config(folder: str | Path) -> dict[str, Any]:
    """Return the content of a folder's ``generation_config.json``; empty where there is none.

    transformers passes over a broken one without a word, and generates by its own defaults.

    Raises:
        UserError: transformers does not accept it, or its token ids are none.
    """
    path = Path(folder) / GENERATION_CONFIG
    if not path.exists():
        return {}
    content = read_json(path)
    for name in IDS:
        value = content.get(name)
        lists = name.endswith("tokens")
        ids = value if isinstance(value, list) and (lists or name == "eos_token_id") else [value]
        if value is not None and not ((not lists or ids is value) and all(type(number) is int for number in ids)):
            what = "a list of token ids" if lists else "a token id"
            raise UserError(f"{path}: {name} {value!r} is not {what}; correct it")
    try:
        GenerationConfig.from_dict(json.loads(json.dumps(content)))  # a copy: it takes sections out
    except Exception as error:  # it raises whatever its code runs into
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: transformers refuses it: {reason}; correct it") from None
    return content


def exported_generation_config(
    eos_token_id: Any, mask_token_id: int | None, source: str | Path | None
) -> dict[str, Any]:
    """Return the ``generation_config.json`` of an export, which lets no token be the mask token.

    Args:
        eos_token_id: of the exported ``config.json``, for where ``source`` does not say.
        mask_token_id: of the model, or None.
        source: a folder with the file that the model was once imported with, or None.

    Raises:
        UserError: as :func:`read_generation_config`.
    """
    known: dict[str, Any] = read_generation_config(source) if source is not None else {"do_sample": False}
    known.setdefault("eos_token_id", eos_token_id)
    if mask_token_id is not None:
        known["suppress_tokens"] = sorted({*(known.get("suppress_tokens") or []), mask_token_id})
    return known


def check_mask_token(folder: str | Path, mask_token_id: int | None, tokenizer: Any = None) -> None:
    """Refuse a mask token that the folder gives another meaning.

    Args:
        folder: with ``config.json`` and perhaps ``generation_config.json``.
        mask_token_id: of the model; None: nothing is checked but that file.
        tokenizer: of the folder, or None.

    Raises:
        UserError: names the meaning; or as :func:`read_generation_config`.
    """
    settings = [read_config(folder).to_dict(), read_generation_config(folder)]
    if mask_token_id is not None and (meaning := other_meaning(mask_token_id, tokenizer, *settings)):
        raise UserError(
            f"{folder}: the mask token {mask_token_id} is {meaning}; the mask token may have no other meaning, "
            "choose another id"
        )
