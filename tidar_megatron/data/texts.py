"""Documents of text from files and folders: one per text file, one per line of a ``.jsonl`` file.

Read lazily and as often as asked, so a corpus need not fit in memory. What is wrong with a file the user named, or in
a JSON line, is an error; what a walk through a folder finds beside the text (pictures, archives) is skipped, counted
and named. Hidden files and folders of a walk are left out; links to folders are followed, into each folder once.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from tidar_megatron.errors import UserError


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
        empty: documents left out by the last full pass because they hold no text.
        undecodable: names of the files left out by the last full pass because they are not UTF-8.
    """

    files: list[TextFile]
    text_key: str = "text"
    empty: int = 0
    undecodable: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[str]:
        """The texts.

        Raises:
            UserError: a file or line that cannot be read, named.
        """
        self.empty, self.undecodable = 0, []
        for file in self.files:
            for text in _lines(file, self.text_key) if file.path.suffix.lower() == ".jsonl" else self._whole(file):
                if text.strip():
                    yield text
                else:
                    self.empty += 1

    def _whole(self, file: TextFile) -> Iterator[str]:
        try:
            with _open(file) as stream:
                text = stream.read().decode("utf-8-sig")  # a byte order mark is no text
        except UnicodeDecodeError as error:
            if file.named:
                raise UserError(f"{file.path}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
            self.undecodable.append(file.name)
        else:
            yield text


def find_texts(inputs: Sequence[str | Path], text_key: str = "text") -> Texts:
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
    return Texts(files, text_key)


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


def _lines(file: TextFile, text_key: str) -> Iterator[str]:
    # Bytes, cut at line feeds alone: a JSON string may hold characters that str.splitlines would cut at.
    with _open(file) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield _text_of(line, text_key, f"{file.path}, line {number}")


def _text_of(line: bytes, text_key: str, where: str) -> str:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: is not UTF-8 ({error.reason} at byte {error.start} of the line)") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON ({error}); one object or string a line is expected") from error
    if isinstance(value, dict):
        if text_key not in value:
            raise UserError(f"{where}: has no key {text_key!r}; name the key of the text with --text-key")
        value = value[text_key]
    if not isinstance(value, str):
        raise UserError(f"{where}: the text is of type {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of an escaped surrogate pair
        raise UserError(f"{where}: the text is not valid Unicode ({error.reason})") from error
    return value


def _open(file: TextFile) -> BinaryIO:
    try:
        return file.path.open("rb")
    except OSError as error:
        raise UserError(f"{file.path}: cannot be read ({error.strerror})") from error
