"""Tokens to text and back, as a stream that never shows half a character."""

from collections.abc import Sequence
from typing import Any

from tidar_megatron.errors import UserError
from tidar_megatron.inference.model import DecodeModel

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no character (yet)

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


def continuation(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of ``tokens`` behind a prompt."""
    stream = TextStream(tokenizer, prompt)
    return stream.push(tokens) + stream.flush()


class TextStream:
    """Incremental detokenisation.

    A byte-level token may end inside a UTF-8 character and a sentencepiece token may mean another text at the start
    than within, so tokens cannot be decoded one by one. Each :meth:`push` decodes a short window that begins at a
    place known to be whole, and returns what is new and settled; an unfinished character waits. The pieces together
    are ``tokenizer.decode`` of all tokens, special ones left out unless ``skip_special_tokens`` is False; behind a
    ``prompt``, what they add to its text.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip_special_tokens = tokenizer, skip_special_tokens
        self._window = list(prompt)
        self._read = len(self._window)  # tokens of the window whose text is out
        # characters of the window's text that are out; one that the prompt only begins is not
        self._shown = len(self._decode().rstrip(REPLACEMENT))

    def push(self, tokens: Sequence[int]) -> str:
        """New tokens; returns the text that became settled, perhaps none."""
        self._window += tokens
        text = self._decode()
        settled = len(text.rstrip(REPLACEMENT))
        if settled < len(text):
            piece = text[self._shown : settled]
            self._shown = max(self._shown, settled)
            return piece
        piece = text[self._shown :]
        # What was just read stays as the context of what comes next.
        self._window = self._window[self._read :]
        self._read = len(self._window)
        self._shown = len(self._decode())
        return piece

    def flush(self) -> str:
        """The end: whatever is still held back, as the replacement characters it decodes to."""
        text = self._decode()
        piece, self._shown = text[self._shown :], len(text)
        return piece

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=self._skip_special_tokens)
