"""Rows of text in JSON: one object or string per line, or the items of one array.

A row without text is yielded as a :class:`BadRow`; the caller decides whether that is an error. Only the current row is
kept in memory.
"""

import io
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

_CHUNK, _LONGEST = 1 << 20, 1 << 28  # characters: per read; in an item of an array
_SPACE = re.compile(r"[ \t\r\n]*")
_KEYS_SHOWN, _KEY_SHOWN = 5, 40  # keys of an object, and characters of a key, in a message


class BadRow(NamedTuple):
    """A row without text, with the reason."""

    reason: str


class ArrayError(ValueError):
    """The stream is not a valid JSON array; the message names the item and the reason."""


Row = tuple[str, str | BadRow]  # its place in the file, its text


def line_rows(stream: BinaryIO, text_key: str) -> Iterator[Row]:
    """Yield a row for each line that is not blank.

    Args:
        stream: JSON lines in UTF-8.
        text_key: The key of the text in an object.
    """
    # Lines of bytes end only at line feeds; str.splitlines would also split at characters that a JSON string may hold.
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield f"line {number}", _row_of_line(line, text_key)


def array_rows(stream: BinaryIO, text_key: str) -> Iterator[Row]:
    """Yield a row for each item of a JSON array.

    Args:
        stream: One JSON array in UTF-8.
        text_key: The key of the text in an object.

    Raises:
        ArrayError: The stream is not a JSON array.
    """
    for number, item in enumerate(_array_items(stream), start=1):
        yield f"item {number}", _text_in(item, text_key)


def value_of_line(line: bytes) -> Any:
    """Return the JSON value of a line.

    Raises:
        ValueError: The line is not JSON, or not UTF-8; the message says why.
    """
    try:
        return json.loads(line.decode("utf-8-sig"))  # strips a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 ({error.reason} at byte {error.start} of the line)") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from error


def is_row(value: Any, text_key: str) -> bool:
    """Return whether a value is an object with the text key."""
    return isinstance(value, dict) and text_key in value


def first_item(stream: BinaryIO) -> Any:
    """Return the first item of a JSON array; None if it has none or is invalid."""
    try:
        return next(_array_items(stream), None)
    except ArrayError:
        return None


def all_rows(stream: BinaryIO, text_key: str) -> bool:
    """Return whether the stream holds only objects with the text key, one per line or in one array."""
    found = False
    try:
        if starts_array(stream):
            values = _array_items(stream)
        else:
            values = (value_of_line(line) for line in stream if line.strip())
        for value in values:
            if not is_row(value, text_key):
                return False
            found = True
    except ValueError:
        return False
    return found


def starts_array(stream: BinaryIO) -> bool:
    """Return whether the stream begins with ``[``; it must be at its start, and is rewound to it."""
    begin = next((line for line in stream if line.strip()), b"")
    stream.seek(0)
    return begin.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _row_of_line(line: bytes, text_key: str) -> str | BadRow:
    try:
        return _text_in(value_of_line(line), text_key)
    except ValueError as error:
        return BadRow(f"{error}; one object or string a line is expected")


def _text_in(value: Any, text_key: str) -> str | BadRow:
    if isinstance(value, dict):
        if text_key not in value:
            keys = [repr(key[:_KEY_SHOWN]) for key in list(value)[:_KEYS_SHOWN]] + ["..."] * (len(value) > _KEYS_SHOWN)
            there = f"it has {', '.join(keys)}" if keys else "it has none"
            return BadRow(f"has no key {text_key!r}; {there}; name the key of the text with --text-key")
        value = value[text_key]
    elif isinstance(value, list):
        return BadRow("is an array, not an object or a string; a file that is one array of them is named .json")
    if not isinstance(value, str):
        return BadRow(f"the text is of type {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, written as an escape
        return BadRow(f"the text is not valid Unicode ({error.reason})")
    return value


def _array_items(stream: BinaryIO) -> Iterator[Any]:
    reader, number = _Reader(stream), 1
    try:
        if reader.next() != "[":
            raise ValueError("it does not begin with [")
        if reader.peek() == "]":
            reader.next()
        else:
            while True:
                yield reader.value()
                following = reader.next()
                if following == "]":
                    break
                if following != ",":
                    raise ValueError("a comma or ] is expected after it" if following else "the file ends after it")
                number += 1
        if reader.peek():
            number += 1
            raise ValueError("something follows the array")
    except (ValueError, RecursionError) as error:
        # the decoder's line and column count from the start of a chunk, not of the file
        why = re.sub(r": line \d+ column \d+ \(char \d+\)", "", str(error))
        raise ArrayError(f"item {number}: is not part of a JSON array ({why})") from error


class _Reader:
    """A reader of JSON values and punctuation from a stream, chunk by chunk."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        self._decoder = json.JSONDecoder()
        self._buffer, self._at = "", 0

    def _more(self) -> bool:
        rest = self._buffer[self._at :]
        # Double the buffer each time, so that a long item is parsed only a few times.
        chunk = self._stream.read(max(_CHUNK, len(rest)))
        self._buffer, self._at = rest + chunk, 0
        return bool(chunk)

    def peek(self) -> str:
        """Return the next character that is not whitespace, without consuming it; empty at the end of the stream."""
        while True:
            match = _SPACE.match(self._buffer, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._more():
                return ""

    def next(self) -> str:
        """Return and consume the next character that is not whitespace; empty at the end of the stream."""
        character = self.peek()
        self._at += 1
        return character

    def value(self) -> Any:
        """Return and consume the next JSON value.

        Raises:
            ValueError: The text is not valid JSON, or the value is too long.
        """
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
            except ValueError:
                if len(self._buffer) - self._at > _LONGEST:
                    raise ValueError(f"it is broken, or longer than {_LONGEST:,} characters") from None
                if not self._more():
                    raise
            else:
                length = end - self._at
                # a number at the end of the chunk may continue in the next chunk
                complete = end < len(self._buffer) and self._buffer[end] not in ".eE"
                if complete or not self._more():
                    self._at += length
                    return value
