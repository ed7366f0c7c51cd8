"""Token ids with a meaning in a Hugging Face folder: the export's ``generation_config.json`` and the mask token."""

from pathlib import Path
from typing import Any

from tidar_megatron.errors import UserError
from tidar_megatron.hf_folder.config import read_generation_config
from tidar_megatron.huggingface.families import read_config
from tidar_megatron.mask_token import other_meaning


def exported_generation_config(
    eos_token_id: Any, mask_token_id: int | None, source: str | Path | None
) -> dict[str, Any]:
    """Return the ``generation_config.json`` of an export, which suppresses the mask token.

    Args:
        eos_token_id: The EOS of the exported ``config.json``, used if ``source`` has none.
        mask_token_id: The id of the model's mask token, or None.
        source: The folder that the model was imported from, or None.

    Raises:
        UserError: The file in ``source`` is invalid (:func:`~tidar_megatron.hf_folder.config.read_generation_config`).
    """
    known: dict[str, Any] = read_generation_config(source) if source is not None else {"do_sample": False}
    known.setdefault("eos_token_id", eos_token_id)
    if mask_token_id is not None:
        known["suppress_tokens"] = sorted({*(known.get("suppress_tokens") or []), mask_token_id})
    return known


def check_mask_token(folder: str | Path, mask_token_id: int | None, tokenizer: Any = None, shown: Any = None) -> None:
    """Refuse a mask token that the folder gives another meaning.

    Args:
        folder: A folder with ``config.json`` and optionally ``generation_config.json``.
        mask_token_id: The id of the model's mask token; None: only these two files are checked.
        tokenizer: The folder's tokenizer, or None.
        shown: The folder's name in messages; by default its path.

    Raises:
        UserError: The id has another meaning, which the message names; or one of the files is invalid.
    """
    settings = [read_config(folder).to_dict(), read_generation_config(folder)]
    if mask_token_id is not None and (meaning := other_meaning(mask_token_id, tokenizer, *settings)):
        raise UserError(
            f"{shown or folder}: tidar.mask_token_id {mask_token_id} is {meaning}; it must not mean anything else; "
            "choose another id (--mask-token-id), or correct that setting"
        )
