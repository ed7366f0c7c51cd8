"""Opening of text files, plain or compressed; the format is detected from the first bytes, not from the name."""

import bz2
import contextlib
import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, BinaryIO, cast

from tidar_megatron.errors import UserError

_HEAD = 512  # bytes, enough to recognise every format below
_READ: tuple[tuple[re.Pattern[bytes], str, Callable[[BinaryIO], object]], ...] = (
    (re.compile(rb"\x1f\x8b\x08"), "gzip", lambda stream: gzip.GzipFile(fileobj=stream)),
    (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), "bzip2", bz2.BZ2File),
    (re.compile(rb"\xfd7zXZ\x00"), "xz", lzma.LZMAFile),
)
_JSON_LINES = 'convert it to JSON lines, such as {"text": "..."}, in a .jsonl file'
_REFUSED = (  # offset of the magic number, magic number, format, remedy; the first match counts
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard file", "decompress it with zstd -d"),
    (0, b"\x04\x22\x4d\x18", "an LZ4 file", "decompress it with lz4 -d"),
    (0, b"\xff\x06\0\0sNaPpY", "a Snappy file", "decompress it first"),
    (0, b"PK\x03\x04", "a zip archive", "unpack it and name the folder"),
    (0, b"PK\x05\x06", "an empty zip archive", "leave it out"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it and name the folder"),
    (0, b"Rar!\x1a\x07", "a RAR archive", "unpack it and name the folder"),
    (257, b"ustar", "a tar archive", "unpack it and name the folder"),
    (0, b"PAR1\x15", "a Parquet file", _JSON_LINES),
    (0, b"ARROW1\0\0", "an Arrow file", _JSON_LINES),
    (0, b"\xff\xff\xff\xff", "an Arrow stream", _JSON_LINES),
    (0, b"Obj\x01", "an Avro file", _JSON_LINES),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", _JSON_LINES),
    (0, b"SQLite format 3\0", "an SQLite database", _JSON_LINES),
    (0, b"\x93NUMPY", "a NumPy array", "pass text: token ids are not read here"),
    (0, b"MMIDIDX\0\0", "the index of a .bin/.idx pair", "train on the pair as it is: --train-data PREFIX"),
    (0, b"%PDF-", "a PDF", "extract its text first"),
    (0, b"\xff\xfe", "UTF-16 or UTF-32 text", "convert it to UTF-8 with iconv"),
    (0, b"\xfe\xff", "UTF-16 text", "convert it to UTF-8 with iconv -f UTF-16"),
)
_UTF_16 = re.compile(rb"([^\0]\0){4}|(\0[^\0]){4}")  # without a byte order mark: valid UTF-8 too
_SUFFIXES = frozenset((".gz", ".bgz", ".bz2", ".xz", ".zst", ".lz4", ".zip"))


class NotTextError(UserError):
    """The file has a format that cannot be read as text; the message names the file and the format."""


def suffix_of(path: Path) -> str:
    """Return the suffix in lower case, ignoring suffixes of compression: ``.json`` for ``x.json.gz``."""
    while path.suffix.lower() in _SUFFIXES:
        path = path.with_suffix("")
    return path.suffix.lower()


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[BinaryIO]:
    """Open a file of text for reading bytes; gzip, bzip2 and xz are decompressed transparently.

    Errors of reading within the ``with`` block are converted too.

    Raises:
        NotTextError: The file has another compression, or is an archive or another format.
        UserError: The file cannot be read, or its compressed data are damaged.
    """
    compression = None
    try:
        with contextlib.ExitStack() as stack:
            stream: BinaryIO = stack.enter_context(path.open("rb"))
            head = _head(stream)
            for pattern, name, decompress in _READ:
                if pattern.match(head):
                    compression = name
                    stream = cast(BinaryIO, stack.enter_context(cast(IO[bytes], decompress(stream))))
                    head = _head(stream)
                    break
            inside = f"holds, under {compression}," if compression else "is"
            for place, mark, what, remedy in _REFUSED:
                if head.startswith(mark, place):
                    raise NotTextError(f"{path}: {inside} {what}, not UTF-8 text; {remedy}")
            if _UTF_16.match(head):
                raise NotTextError(f"{path}: {inside} UTF-16 text, not UTF-8 text; convert it to UTF-8 with iconv")
            yield stream
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        why = getattr(error, "strerror", None) or str(error)
        if compression is None:
            raise UserError(f"{path}: cannot be read ({why})") from error
        raise UserError(f"{path}: cannot be decompressed as {compression} ({why}); copy it again") from error


def _head(stream: BinaryIO) -> bytes:
    head = stream.read(_HEAD)
    stream.seek(0)
    return head
