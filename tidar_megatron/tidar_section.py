"""The ``tidar`` section of a ``config.json``, which records how a model was trained to draft."""

import math
from typing import Any

from tidar_megatron.errors import UserError
from tidar_megatron.json_files import is_count, is_number


def check_tidar(section: Any, vocab_size: Any, where: str) -> None:
    """Refuse a ``tidar`` section with invalid values; missing keys are accepted.

    Args:
        section: The section of ``config.json``.
        vocab_size: The model's vocabulary size, an upper bound for the mask token's id.
        where: The file to name at the beginning of an error message.

    Raises:
        UserError: a value is invalid; the message names its key.
    """
    if not isinstance(section, dict):
        raise UserError(f"{where}: tidar {section!r} is not a section; correct it")
    mask, alpha = section.get("mask_token_id"), section.get("ar_loss_weight")
    most = vocab_size if is_count(vocab_size) else math.inf  # an invalid vocab_size is refused elsewhere
    if mask is not None and not (type(mask) is int and 0 <= mask < most):
        raise UserError(f"{where}: tidar.mask_token_id {mask!r} is not an id below {vocab_size}; correct it")
    for name in ("block_size", "seq_length"):
        if section.get(name) is not None and not is_count(section[name]):
            raise UserError(f"{where}: tidar.{name} {section[name]!r} is not a positive integer; correct it")
    if alpha is not None and not (is_number(alpha) and alpha >= 0):
        raise UserError(f"{where}: tidar.ar_loss_weight {alpha!r} is not a number of 0 or more; correct it")
    if not isinstance(section.get("trained", True), bool):
        raise UserError(f"{where}: tidar.trained {section['trained']!r} is not true or false; correct it")
