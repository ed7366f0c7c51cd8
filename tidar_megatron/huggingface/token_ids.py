"""Token ids that a Hugging Face folder gives a meaning: its ``generation_config.json``, and the mask token's."""

from pathlib import Path
from typing import Any

from tidar_megatron.errors import UserError
from tidar_megatron.hf_folder.config import read_generation_config
from tidar_megatron.huggingface.families import read_config
from tidar_megatron.mask_token import other_meaning


def exported_generation_config(
    eos_token_id: Any, mask_token_id: int | None, source: str | Path | None
) -> dict[str, Any]:
    """Return the ``generation_config.json`` of an export, which lets no token be the mask token.

    Args:
        eos_token_id: of the exported ``config.json``, for where ``source`` does not say.
        mask_token_id: of the model, or None.
        source: a folder with the file that the model was once imported with, or None.

    Raises:
        UserError: as :func:`~tidar_megatron.hf_folder.config.read_generation_config`.
    """
    known: dict[str, Any] = read_generation_config(source) if source is not None else {"do_sample": False}
    known.setdefault("eos_token_id", eos_token_id)
    if mask_token_id is not None:
        known["suppress_tokens"] = sorted({*(known.get("suppress_tokens") or []), mask_token_id})
    return known


def check_mask_token(folder: str | Path, mask_token_id: int | None, tokenizer: Any = None, shown: Any = None) -> None:
    """Refuse a mask token that the folder gives another meaning.

    Args:
        folder: with ``config.json`` and perhaps ``generation_config.json``.
        mask_token_id: of the model; None: nothing is checked but that file.
        tokenizer: of the folder, or None.
        shown: what a message calls the folder, if not by its path.

    Raises:
        UserError: names the meaning; or as :func:`~tidar_megatron.hf_folder.config.read_generation_config`.
    """
    settings = [read_config(folder).to_dict(), read_generation_config(folder)]
    if mask_token_id is not None and (meaning := other_meaning(mask_token_id, tokenizer, *settings)):
        raise UserError(
            f"{shown or folder}: tidar.mask_token_id {mask_token_id} is {meaning}; it may mean nothing else; choose "
            "another id (--mask-token-id), or correct that setting"
        )
