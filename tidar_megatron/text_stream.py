"""Incremental detokenization of token ids, and stop strings.

A token's text depends on its neighbors: a byte-level token may end within a UTF-8 character, the first token of a text
loses its leading space, and clean-up removes spaces before punctuation. A piece of text is therefore not the decoded
text of its own tokens. Each step decodes a window of the last tokens and returns what it adds to the window's text.

Two rules ensure that the concatenated pieces equal the text of all tokens:

- Text is returned only when no later token can change it (:class:`TextStream`).
- Old tokens leave the window only if the text of the remaining ones does not depend on them (:meth:`_Window.shrink`),
  so the work per step does not grow with the text.
"""

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # written by decoders for bytes that are not a character (yet)

_LONG = 128  # the window shrinks when it has more tokens
_AGREED = 64  # characters that must be the same with and without the old tokens
# How many characters at the end of a text a later token can change. An unfinished UTF-8 character has at most 3 bytes.
# transformers' `clean_up_tokenization` replaces 10 patterns in turn; their lengths, minus 1 each, sum to 19.
_UNFINISHED, _CLEAN_UP = 3, 19


def continuation(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
    """Return the text that ``tokens`` add to the text of ``prompt``.

    This is the text of both without the text of the prompt. If the tokens change the prompt's last characters (for
    example, by completing a UTF-8 character), it starts at the first character that differs.
    """
    before = tokenizer.decode(list(prompt), skip_special_tokens=skip_special_tokens)
    text = tokenizer.decode([*prompt, *tokens], skip_special_tokens=skip_special_tokens)
    return text[_same(before, text) :]


class _Window:
    """The last tokens of a text, enough for new tokens to add the same text to them as to the complete text."""

    def __init__(self, tokenizer: Any, skip_special_tokens: bool) -> None:
        self.tokens: list[int] = []
        self._tokenizer, self._skip_special_tokens = tokenizer, skip_special_tokens
        self.falls_back_to_bytes = b'"ByteFallback"' in _decoder(tokenizer)

    def decode(self, more: Sequence[int] = ()) -> str:
        """Return the text of the window and ``more`` tokens."""
        return self._tokenizer.decode([*self.tokens, *more], skip_special_tokens=self._skip_special_tokens)

    def shrink(self, text: str, kept: int) -> str:
        """Drop the older half of a long window's tokens, repeatedly, as long as the text at the end is unchanged.

        Args:
            text: The window's text.
            kept: The number of characters at the end that the caller still needs.

        Returns:
            The text of the remaining tokens, whose last ``kept`` characters, at least, are those of ``text``.
        """
        while len(self.tokens) > _LONG:
            # In a run of byte tokens, a single byte affects the text of the entire run.
            if self.falls_back_to_bytes and text.endswith(REPLACEMENT):
                break
            later = self.tokens[len(self.tokens) // 2 :]
            its = self._tokenizer.decode(later, skip_special_tokens=self._skip_special_tokens)
            least = kept + _AGREED
            # Being first changes the text of at most one token; clean-up reaches less far than _AGREED characters.
            if len(its) < least or its[-least:] != text[-least:]:
                break
            self.tokens, text = later, its
        return text


class TextStream:
    """An incremental detokenizer.

    The concatenated pieces that :meth:`push` and :meth:`flush` return equal the :func:`continuation` of the prompt by
    all tokens, however the tokens are divided into steps. A piece never contains half a character.

    This holds for tokenizers of the ``tokenizers`` library whose decoder is byte-level, byte fallback, Metaspace,
    WordPiece, BPE with a suffix, or none. With byte fallback, a run of byte tokens is returned only after it has ended,
    because one invalid byte turns the entire run into replacement characters. If transformers cleans up spaces, the
    last characters are held back.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._is_fast = tokenizer, getattr(tokenizer, "is_fast", False)
        self._skipped = _special_ids(tokenizer) if skip_special_tokens else frozenset()
        self._held = _CLEAN_UP if _cleans_up(tokenizer) else 0  # number of characters that are always held back
        self._window = _Window(tokenizer, skip_special_tokens)
        self._bytes: list[int] = []  # a run of byte tokens that may continue
        self._shown = 0  # number of characters of the window's text that were returned
        self._known = ""  # the prompt's own text after those characters, which is not returned
        self.push(prompt)
        self._known = self._window.decode(self._bytes)[self._shown :]

    def push(self, tokens: Sequence[int]) -> str:
        """Add tokens; return the new text that can no longer change, possibly empty."""
        new = [token for token in tokens if not self._is_silent(token)]
        end = len(new)
        while end and self._is_byte(new[end - 1]):
            end -= 1
        if not end:
            self._bytes += new
            return ""
        self._window.tokens += [*self._bytes, *new[:end]]
        self._bytes = new[end:]
        text = self._window.decode()
        unfinished = len(text) - len(text.rstrip(REPLACEMENT))
        piece = self._take(text, len(text) - self._held - min(unfinished, _UNFINISHED))
        waiting = len(text) - self._shown
        self._shown = len(self._window.shrink(text, waiting)) - waiting
        return piece

    def flush(self) -> str:
        """End the text; return the text held back, with the replacement character for an unfinished character."""
        text = self._window.decode(self._bytes)
        return self._take(text, len(text))

    def _take(self, text: str, end: int) -> str:
        end = max(end, self._shown)
        piece, self._shown = text[self._shown : end], end
        same = _same(piece, self._known)
        self._known = self._known[same:] if same == len(piece) else ""
        return piece[same:]

    def _is_silent(self, token: int) -> bool:
        """Return whether ``decode`` always skips this token: a special token, or an id without a token."""
        unknown = self._is_fast and self._tokenizer.convert_ids_to_tokens(int(token)) is None
        return unknown or token in self._skipped

    def _is_byte(self, token: int) -> bool:
        """Return whether the decoder treats this token as a byte, such as ``<0x0A>``."""
        if not self._window.falls_back_to_bytes:
            return False
        name = self._tokenizer.convert_ids_to_tokens(int(token)) or ""
        return len(name) == 6 and name.startswith("<0x") and name.endswith(">")


class StopStrings:
    """A detector of strings that end a text, including special tokens such as ``<|im_end|>``.

    It matches the text of prompt and output after each token; a match must lie in the output.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], strings: Sequence[str]) -> None:
        self._strings, self._longest = tuple(strings), max(map(len, strings))
        self._window = _Window(tokenizer, skip_special_tokens=False)
        self._window.tokens += prompt
        self._text = self._window.decode()
        self._start = len(self._text)  # where the output starts in the text
        self._shrink()

    def ends_with(self, token: int) -> bool:
        """Add a token; return whether it completes one of the strings."""
        before, self._text = self._text, self._window.decode([token])
        self._window.tokens.append(token)
        same = _same(before, self._text)
        self._start = min(self._start, same)
        new = self._text[max(self._start, same - self._longest + 1) :]
        self._shrink()
        return any(string in new for string in self._strings)

    def _shrink(self) -> None:
        text = self._window.shrink(self._text, self._longest)
        self._start = max(0, self._start - (len(self._text) - len(text)))
        self._text = text


def _same(one: str, other: str) -> int:
    """Return the length of the longest common prefix of two texts."""
    if other.startswith(one):
        return len(one)
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))


def _decoder(tokenizer: Any) -> bytes:
    """Return the tokenizer's decoder (of the ``tokenizers`` library) as JSON; empty if it has none."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    return b"" if decoder is None else decoder.__getstate__()


def _special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of the tokens that ``skip_special_tokens`` drops before decoding."""
    if getattr(tokenizer, "is_fast", False):
        return frozenset(token for token, about in tokenizer.added_tokens_decoder.items() if about.special)
    return frozenset(tokenizer.all_special_ids)


def _cleans_up(tokenizer: Any) -> bool:
    """Return whether ``decode`` may remove spaces from its text, by transformers' own rule."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return True  # a tokenizer in Python, whose code may change earlier text
    if not tokenizer.clean_up_tokenization_spaces:
        return False
    forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return forced or type(backend.model).__name__ != "BPE"
