"""Documents of text from files and folders: one per text file, or one per row of a JSON file.

Files are read lazily, and again in each pass, so a corpus need not fit in memory. An unreadable file that the user
named, or an invalid row of JSON, is an error. Files in a folder that are not text (pictures, archives) are skipped,
counted and named. Hidden files and folders are ignored; links to folders are followed, but each folder is read once.

The kind of a file follows from its suffix, and from its content if the suffix does not decide it:

========================  =========================================================================================
``.jsonl``, ``.ndjson``   JSON lines: an object with the text key, or a string, on each line
``.json``                 JSON lines, or one JSON array of objects or strings. Other JSON is refused if the user named
                          the file; in a folder such a file (``package.json``), or an array without the text key, is
                          read as a text file like other source files, counted and named
any other                 a text file; refused if it holds only JSON objects with the text key
========================  =========================================================================================

All of them may be compressed (:mod:`~tidar_megatron.data.text_streams`).
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
_NAMES_KEPT = 20  # names of bad rows that are kept


class Document(NamedTuple):
    """A text and its place: the file's path, followed by the line or item if the file holds several documents."""

    text: str
    place: str


@dataclass(frozen=True)
class TextFile:
    """A file, its name in messages and manifests, and whether the user named it (otherwise a folder did)."""

    path: Path
    name: str
    named: bool


@dataclass
class Texts:
    """The documents of ``files``, in order; each iteration reads the files again.

    Attributes:
        files: The files.
        text_key: The key of the text in a JSON object.
        skip_bad_rows: The number of JSON rows without text that may be skipped, in all files together.
        empty: The number of documents that the last full pass skipped because they are empty.
        undecodable: The names of the files that the last full pass skipped because they are not UTF-8.
        json_as_text: The names of the ``.json`` files that the last full pass read as plain text.
        bad_rows: The number of rows that the last full pass skipped.
        bad_row_names: The first skipped rows, each with its file, its place and the reason.
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
            UserError: A file or row cannot be read; the message names it.
        """
        return (document.text for document in self.documents())

    def documents(self) -> Iterator[Document]:
        """Yield the texts with their places, and reset the counts and names of skipped documents.

        Raises:
            UserError: A file or row cannot be read; the message names it.
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
            raise UserError(f"{file.path}, {error}; correct it, or write JSON lines") from error
        else:
            if suffix == _JSON and read is _whole:
                self.json_as_text.append(file.name)

    def _json(self, file: TextFile, stream: BinaryIO) -> "_Reader":
        """Return the function that reads a ``.json`` file."""
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
                f"write one object or string per line, for example with jq -c"
            ) from error
        # a single object without the text key is probably a program's settings, not rows
        rows = is_row(value, self.text_key) or (isinstance(value, dict | str) and next(lines, None) is not None)
        return line_rows if file.named or rows else _whole

    def _no_json(self, file: TextFile, stream: BinaryIO) -> "_Reader":
        """Return the function that reads a file whose suffix is not one of JSON."""
        if not all_rows(stream, self.text_key):
            return _whole
        raise UserError(
            f"{file.path}: holds only JSON objects with the key {self.text_key!r}, but its name does not say so; "
            "name it .json (or .jsonl, one object per line) to read a document from each"
        )


_Reader = Callable[[BinaryIO, str], Iterator[Row]]


def _whole(stream: BinaryIO, text_key: str) -> Iterator[Row]:
    yield "", stream.read().decode("utf-8-sig")  # strips a byte order mark


def find_texts(inputs: Sequence[str | Path], text_key: str = "text", skip_bad_rows: int = 0) -> Texts:
    """Return the documents of files and folders; folders are read recursively and sorted by name.

    Args:
        inputs: Files and folders.
        text_key: The key of the text in a JSON object.
        skip_bad_rows: The number of JSON rows without text that may be skipped.

    Raises:
        UserError: An input does not exist, or is neither a file nor a folder.
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
            raise UserError(f"input {given}: is not a file or folder, but must be read more than once; save it first")
        else:
            raise UserError(f"input {given}: no such file or folder")
    return Texts(files, text_key, skip_bad_rows)


def printable(name: str) -> str:
    """Return a file name as valid text; names on Linux are bytes, which need not be UTF-8."""
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
