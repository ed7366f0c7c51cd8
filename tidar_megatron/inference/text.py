"""Conversion between text and tokens: the encoding of prompts, and the streams of ``text_stream.py``."""

from tidar_megatron.errors import UserError
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.text_stream import StopStrings, TextStream, continuation

__all__ = ["NO_TOKENIZER", "StopStrings", "TextStream", "continuation", "encode_prompt"]

NO_TOKENIZER = "the model's folder has no tokenizer: copy tokenizer.json and tokenizer_config.json into that folder"


def encode_prompt(model: DecodeModel, text: str) -> list[int]:
    """Return the prompt's token ids, without special tokens for a TiDAR model, else with the tokenizer's default ones.

    A TiDAR model was trained on documents without special tokens (``data/tokenizer.py``). Other models get their usual
    prompt, even if they draft with a mask token that they were not trained on, or with an adapter.

    Raises:
        UserError: the model has no tokenizer, or the text is empty (even if the tokenizer adds a special token).
    """
    if model.tokenizer is None:
        raise UserError(NO_TOKENIZER)
    if not text:
        raise UserError("the prompt is empty: give at least one character to continue")
    return list(model.tokenizer(text, add_special_tokens=not model.is_tidar or model.drafts is not None)["input_ids"])
