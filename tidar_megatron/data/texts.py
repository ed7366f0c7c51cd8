"""Documents of text from files and folders: one per text file, or one per row of a file of JSON.

Files are read lazily and as often as asked, so a corpus need not fit in memory. What is wrong with a file the user
named, or with a row of JSON, is an error; what a walk through a folder finds beside the text (pictures, archives) is
skipped, counted and named. Hidden files and folders of a walk are left out; links to folders are followed, into each
folder once.

A file's suffix, and where that is not enough its content, says what it is:

========================  =========================================================================================
``.jsonl``, ``.ndjson``   JSON lines: an object with the text key, or a string, a line
``.json``                 JSON lines, or one JSON array of the same. Other JSON is refused; in a folder such a file
                          (``package.json``), or an array without the text key, is a text file like other source
                          files, counted and named
any other                 a text file; refused where it holds only JSON objects with the text key
========================  =========================================================================================

Each of them may be compressed (:mod:`~tidar_megatron.data.text_streams`).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tidar_megatron.data.json_rows import (
    ArrayError,
    BadRow,
    Row,
    all_rows,
    array_rows,
    first_item,
    is_row,
    line_rows,
    starts_array,
    value_of_line,
)
from tidar_megatron.data.text_streams import NotTextError, open_text, suffix_of
from tidar_megatron.errors import UserError

_LINES, _JSON = (".jsonl", ".ndjson"), ".json"
_NAMES_KEPT = 20  # of the bad rows


class Document(NamedTuple):
    """A text, and where it comes from: the file's path, with the line or item of one that holds many."""

    text: str
    place: str


@dataclass(frozen=True)
class TextFile:
    """A file, the name it goes by in messages and manifests, and whether the user named it (or a walk found it)."""

    path: Path
    name: str
    named: bool


@dataclass
class Texts:
    """The documents of ``files``, in order; iterating again reads again.

    Attributes:
        files: where they come from.
        text_key: the key of a JSON object's text.
        skip_bad_rows: rows of JSON without a text that may be skipped, in all files together.
        empty: documents left out by the last full pass because they hold no text.
        undecodable: names of the files left out by the last full pass because they are not UTF-8.
        json_as_text: names of the ``.json`` files that the last full pass read as plain text.
        bad_rows: rows skipped by the last full pass.
        bad_row_names: the first of them, each with its file, its place and what is wrong.
    """

    files: list[TextFile]
    text_key: str = "text"
    skip_bad_rows: int = 0
    empty: int = 0
    undecodable: list[str] = field(default_factory=list)
    json_as_text: list[str] = field(default_factory=list)
    bad_rows: int = 0
    bad_row_names: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[str]:
        """Yield the texts.

        Raises:
            UserError: a file or row that cannot be read, named.
        """
        return (document.text for document in self.documents())

    def documents(self) -> Iterator[Document]:
        """Yield the texts and where they come from.

        Raises:
            UserError: a file or row that cannot be read, named.
        """
        self.empty, self.bad_rows = 0, 0
        self.undecodable, self.json_as_text, self.bad_row_names = [], [], []
        for file in self.files:
            for place, text in self._rows(file):
                if isinstance(text, BadRow):
                    self._skip(file, place, text.reason)
                elif text.strip():
                    yield Document(text, f"{file.path}, {place}" if place else str(file.path))
                else:
                    self.empty += 1

    def _skip(self, file: TextFile, place: str, reason: str) -> None:
        self.bad_rows += 1
        if self.bad_rows > self.skip_bad_rows:
            limit = f"more bad rows than --skip-bad-rows {self.skip_bad_rows}"
            remedy = limit if self.skip_bad_rows else "--skip-bad-rows N skips up to N bad rows"
            raise UserError(f"{file.path}, {place}: {reason} ({remedy})")
        if len(self.bad_row_names) < _NAMES_KEPT:
            self.bad_row_names.append(f"{file.name}, {place}: {reason}")

    def _rows(self, file: TextFile) -> Iterator[Row]:
        suffix = suffix_of(file.path)
        try:
            if suffix in _LINES:
                read: _Reader = line_rows
            else:
                with open_text(file.path) as stream:
                    read = self._json(file, stream) if suffix == _JSON else self._no_json(file, stream)
            with open_text(file.path) as stream:
                yield from read(stream, self.text_key)
        except NotTextError:
            if file.named or suffix in (*_LINES, _JSON):
                raise
            self.undecodable.append(file.name)
        except UnicodeDecodeError as error:
            if file.named:
                raise UserError(f"{file.path}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
            self.undecodable.append(file.name)
        except ArrayError as error:
            raise UserError(f"{file.path}, {error}; mend it, or write JSON lines") from error
        else:
            if suffix == _JSON and read is _whole:
                self.json_as_text.append(file.name)

    def _json(self, file: TextFile, stream: BinaryIO) -> "_Reader":
        """How to read a ``.json`` file."""
        if starts_array(stream):
            return array_rows if file.named or is_row(first_item(stream), self.text_key) else _whole
        lines = (line for line in stream if line.strip())
        first = next(lines, None)
        if first is None:
            return line_rows
        try:
            value = value_of_line(first)
        except ValueError as error:
            if not file.named:
                return _whole
            raise UserError(
                f"{file.path}: holds neither JSON lines nor one JSON array (its first line {error}); "
                f"write one object or string a line, for example with jq -c"
            ) from error
        # one line without a text is how programs write their settings
        rows = is_row(value, self.text_key) or (isinstance(value, dict | str) and next(lines, None) is not None)
        return line_rows if file.named or rows else _whole

    def _no_json(self, file: TextFile, stream: BinaryIO) -> "_Reader":
        """How to read a file whose suffix promises no JSON."""
        if not all_rows(stream, self.text_key):
            return _whole
        raise UserError(
            f"{file.path}: holds only JSON objects with the key {self.text_key!r}, but its name does not say so; "
            "name it .json (or .jsonl, an object a line) to read a document from each"
        )


_Reader = Callable[[BinaryIO, str], Iterator[Row]]


def _whole(stream: BinaryIO, text_key: str) -> Iterator[Row]:
    yield "", stream.read().decode("utf-8-sig")  # a byte order mark is no text


def find_texts(inputs: Sequence[str | Path], text_key: str = "text", skip_bad_rows: int = 0) -> Texts:
    """The documents of files and folders (walked, sorted by name).

    Raises:
        UserError: an input that does not exist.
    """
    files: list[TextFile] = []
    for given in map(Path, inputs):
        if given.is_file():
            files.append(TextFile(given, printable(given.name), named=True))
        elif given.is_dir():
            files += [
                TextFile(path, printable(path.relative_to(given).as_posix()), named=False) for path in _walk(given)
            ]
        elif given.exists():
            raise UserError(f"input {given}: is no file or folder, and is to be read more than once; save it first")
        else:
            raise UserError(f"input {given}: no such file or folder")
    return Texts(files, text_key, skip_bad_rows)


def printable(name: str) -> str:
    """A file's name as text: names on Linux are bytes, and need not be UTF-8."""
    return name.encode("utf-8", errors="replace").decode()


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"input {error.filename}: cannot be read ({error.strerror})")

    seen = set()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(root, name) for name in sorted(names) if not name.startswith("."))
        yield from (path for path in paths if path.is_file())
