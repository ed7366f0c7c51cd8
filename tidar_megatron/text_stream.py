"""Token ids to text, piece by piece.

A token's text depends on its neighbours: a byte-level token may end within a UTF-8 character, the first token of a text
loses its leading space, clean-up removes spaces before punctuation. So a piece is never the decoded text of its own
tokens. Each step decodes a window of the last tokens and returns what the step adds to the window's text.

Two rules make the pieces together equal to the text of all tokens:

- Text is returned once no later token can change it (:class:`TextStream`).
- Old tokens leave the window only where the text of the others is seen not to depend on them (:meth:`_Window.shrink`),
  so the work per step does not grow with the text.
"""

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no character (yet)

_LONG = 128  # tokens; a longer window shrinks
_AGREED = 64  # characters that must be the same with and without the old tokens
# How far from the end of a text a later token can act. An unfinished UTF-8 character has at most 3 bytes;
# `clean_up_tokenization` of transformers replaces 10 patterns in turn, whose lengths less 1 sum to 19.
_UNFINISHED, _CLEAN_UP = 3, 19


def continuation(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
    """Return what ``tokens`` add to the text of ``prompt``.

    That is the text of both less the text of the prompt. Where the tokens change the prompt's last characters (they
    complete a UTF-8 character that it begins, say), what they add begins at the first character that differs.
    """
    before = tokenizer.decode(list(prompt), skip_special_tokens=skip_special_tokens)
    text = tokenizer.decode([*prompt, *tokens], skip_special_tokens=skip_special_tokens)
    return text[_same(before, text) :]


class _Window:
    """The last tokens of a text, enough of them that more tokens add to their text what they add to the whole text."""

    def __init__(self, tokenizer: Any, skip_special_tokens: bool) -> None:
        self.tokens: list[int] = []
        self._tokenizer, self._skip_special_tokens = tokenizer, skip_special_tokens
        self.falls_back_to_bytes = b'"ByteFallback"' in _decoder(tokenizer)

    def decode(self, more: Sequence[int] = ()) -> str:
        """Return the text of the window and ``more`` tokens."""
        return self._tokenizer.decode([*self.tokens, *more], skip_special_tokens=self._skip_special_tokens)

    def shrink(self, text: str, kept: int) -> str:
        """Drop the older half of a long window's tokens, and again, while that changes nothing in what follows.

        Args:
            text: of the window.
            kept: characters at the end that the caller still needs.

        Returns:
            The text of what is left: its last ``kept`` characters, at least, are those of ``text``.
        """
        while len(self.tokens) > _LONG:
            # In a run of byte tokens one byte decides about the text of all.
            if self.falls_back_to_bytes and text.endswith(REPLACEMENT):
                break
            later = self.tokens[len(self.tokens) // 2 :]
            its = self._tokenizer.decode(later, skip_special_tokens=self._skip_special_tokens)
            least = kept + _AGREED
            # Being first changes the text of one token at most; clean-up reaches less far than the agreed characters.
            if len(its) < least or its[-least:] != text[-least:]:
                break
            self.tokens, text = later, its
        return text


class TextStream:
    """Incremental detokenisation.

    The pieces that :meth:`push` and :meth:`flush` return, put together, are :func:`continuation` of all tokens behind
    the prompt, however the tokens are divided into steps. A piece never shows half a character.

    This holds for tokenizers of the ``tokenizers`` library whose decoder is byte-level, byte fallback, Metaspace,
    WordPiece, BPE with a suffix, or none. With byte fallback a run of byte tokens is returned once it has ended, for
    one invalid byte makes replacement characters of the whole run. Where transformers cleans up spaces the last
    characters wait.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._is_fast = tokenizer, getattr(tokenizer, "is_fast", False)
        self._skipped = _special_ids(tokenizer) if skip_special_tokens else frozenset()
        self._held = _CLEAN_UP if _cleans_up(tokenizer) else 0  # characters that always wait
        self._window = _Window(tokenizer, skip_special_tokens)
        self._bytes: list[int] = []  # a run of byte tokens that may go on
        self._shown = 0  # characters of the window's text that are out
        self._known = ""  # what the prompt alone has for the text that follows
        self.push(prompt)
        self._known = self._window.decode(self._bytes)[self._shown :]

    def push(self, tokens: Sequence[int]) -> str:
        """Add tokens; return the text that can no longer change, perhaps none."""
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
        """End the text; return whatever still waits, an unfinished character as the replacement for it."""
        text = self._window.decode(self._bytes)
        return self._take(text, len(text))

    def _take(self, text: str, end: int) -> str:
        end = max(end, self._shown)
        piece, self._shown = text[self._shown : end], end
        same = _same(piece, self._known)
        self._known = self._known[same:] if same == len(piece) else ""
        return piece[same:]

    def _is_silent(self, token: int) -> bool:
        """Return whether ``decode`` leaves this token out, wherever it stands: a special one, or no token at all."""
        unknown = self._is_fast and self._tokenizer.convert_ids_to_tokens(int(token)) is None
        return unknown or token in self._skipped

    def _is_byte(self, token: int) -> bool:
        """Return whether the decoder takes this token for a byte, as ``<0x0A>`` is."""
        if not self._window.falls_back_to_bytes:
            return False
        name = self._tokenizer.convert_ids_to_tokens(int(token)) or ""
        return len(name) == 6 and name.startswith("<0x") and name.endswith(">")


class StopStrings:
    """Watches the text of a sequence for strings that end it, special tokens such as ``<|im_end|>`` among them.

    The text is that of prompt and output as it stands after each token; a string counts if it lies in the output.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], strings: Sequence[str]) -> None:
        self._strings, self._longest = tuple(strings), max(map(len, strings))
        self._window = _Window(tokenizer, skip_special_tokens=False)
        self._window.tokens += prompt
        self._text = self._window.decode()
        self._start = len(self._text)  # of the output
        self._shrink()

    def ends_with(self, token: int) -> bool:
        """Add a token; return whether it completes a string."""
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
    """Return how many characters two texts have in common at their beginnings."""
    if other.startswith(one):
        return len(one)
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))


def _decoder(tokenizer: Any) -> bytes:
    """Return the decoder of the ``tokenizers`` library as JSON, empty where there is none."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    return b"" if decoder is None else decoder.__getstate__()


def _special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the tokens that ``skip_special_tokens`` leaves out before it decodes."""
    if getattr(tokenizer, "is_fast", False):
        return frozenset(token for token, about in tokenizer.added_tokens_decoder.items() if about.special)
    return frozenset(tokenizer.all_special_ids)


def _cleans_up(tokenizer: Any) -> bool:
    """Return whether ``decode`` may remove spaces from its text, as transformers decides it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return True  # Python code of its own, which may look back as well
    if not tokenizer.clean_up_tokenization_spaces:
        return False
    forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return forced or type(backend.model).__name__ != "BPE"
