"""Text to tokens and back: how a prompt is encoded, and the streams of ``text_stream.py``."""

from tidar_megatron.errors import UserError
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.text_stream import StopStrings, TextStream, continuation

__all__ = ["NO_TOKENIZER", "StopStrings", "TextStream", "continuation", "encode_prompt"]

NO_TOKENIZER = "the model's folder has no tokenizer: copy its tokenizer.json and tokenizer_config.json there"


def encode_prompt(model: DecodeModel, text: str) -> list[int]:
    """The prompt's token ids, with the special tokens that the tokenizer adds by default, or without.

    A TiDAR model was trained on documents without them (``data/tokenizer.py``); another model is prompted as usual,
    also where it drafts with a mask token that it has not learned.

    Raises:
        UserError: no tokenizer, or an empty prompt (also where the tokenizer would add a special token).
    """
    if model.tokenizer is None:
        raise UserError(NO_TOKENIZER)
    if not text:
        raise UserError("the prompt is empty: give at least one character to continue")
    return list(model.tokenizer(text, add_special_tokens=not model.is_tidar)["input_ids"])
