"""Check that an id can be the mask token: it must have no other meaning, neither in text nor during generation."""

import re
from collections.abc import Mapping
from typing import Any

MASK_TOKEN = "<|mask|>"  # the mask token's name in an exported folder, which no text contains, like the reserved names
# names that tokenizers reserve for future use: Llama 3, Gemma, Mistral, BERT and others
RESERVED = re.compile(
    rf"{re.escape(MASK_TOKEN)}|"
    r"<\|?(reserved_special_token|reserved|unused|extra|dummy|SPECIAL|control)_?\d+\|?>|\[(unused|control_)\d+\]"
)
ROLES = ("eos_token_id", "bos_token_id", "pad_token_id", "unk_token_id")


def roles(settings: Mapping[str, Any], tokenizer: Any = None) -> dict[int, str]:
    """Return the role ("EOS", "BOS", "PAD" or "UNK") of each id that a configuration or tokenizer gives one."""
    found: dict[int, str] = {}
    for name in ROLES:
        for ids in (settings.get(name), getattr(tokenizer, name, None)):
            several = ids if isinstance(ids, list | tuple) else [ids]
            found |= {number: name[:3].upper() for number in several if number is not None}
    return found


def other_meaning(mask_token_id: int, tokenizer: Any, *settings: Mapping[str, Any]) -> str | None:
    """Return the other meaning of an id, as words for an error message; None if it can be the mask token.

    Args:
        mask_token_id: The id to check.
        tokenizer: A transformers tokenizer, or None.
        settings: The contents of ``config.json`` or ``generation_config.json``.
    """
    for holder in (*settings, {}):
        if (role := roles(holder, tokenizer).get(mask_token_id)) is not None:
            return f"the {role} token"
    if tokenizer is None:
        return None
    added = tokenizer.added_tokens_decoder.get(mask_token_id)
    name = tokenizer.convert_ids_to_tokens(mask_token_id) if mask_token_id < len(tokenizer) else None
    if name is None or RESERVED.fullmatch(name) or (added is not None and added.special):
        return None
    return f"{name!r}, which occurs in texts"
