"""An index of document offsets, built once, so that opening data takes little time and little memory.

The index is one file: a record for each document, in groups of ``GROUP`` documents; a table of the groups; a JSON
object that says which data it belongs to; and a trailer of fixed size with the SHA-256 of table and JSON. The table
holds a CRC-32 of each group's records, checked whenever a group is read. It also holds the number of places that the
group's documents take when padded to blocks of common sizes, so that seeking is a search over groups. An index that is
damaged, truncated or stale is built again.

The file is written under a temporary name, synced and renamed, so if two processes build it at once, the result is one
complete index. If the data's folder is not writable, the index is kept in ``TIDAR_CACHE`` (by default
``~/.cache/tidar-megatron``).
"""

import contextlib
import fcntl
import hashlib
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tidar_megatron.errors import UserError
from tidar_megatron.files import cache_folder

GROUP = 4096  # documents
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)  # sums for other sizes are computed when needed
# offset: where the document's tokens begin in its file, in bytes; length: its tokens; stored: how many of them are in
# the file, one less than length if the EOS is missing there
RECORD = np.dtype([("offset", "<u8"), ("length", "<u4"), ("stored", "<u4")])
_TABLE = np.dtype([("crc32", "<u4"), ("filled", "<i8", (len(BLOCK_SIZES),))])
_TRAILER = struct.Struct("<QQ32s8s")  # bytes of the table, bytes of the JSON, their SHA-256, magic
_MAGIC = b"TIDARIX1"
_CACHED_GROUPS = 64

Add = Callable[[NDArray], None]
Facts = dict[str, Any]


class DocumentIndex:
    """A complete index, open for reading; threads may share it.

    In memory are the table of groups and a cache of records, not the records of all documents.

    Args:
        path: The index file.

    Attributes:
        path: The index file.
        built_from: The description of the data that the index was built from.
        facts: The facts about the data that its builder returned.
        group_size: The number of documents in each group except the last, which may be smaller.

    Raises:
        _Damaged: The file is not an index, or is not complete.
        OSError: The file cannot be read.
    """

    group_size = GROUP

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = OpenFile(path)
        size = os.fstat(self._file.descriptor).st_size
        if size < _TRAILER.size:
            raise _Damaged
        table_bytes, json_bytes, sha256, magic = _TRAILER.unpack(self._file.read(_TRAILER.size, size - _TRAILER.size))
        begin = size - _TRAILER.size - table_bytes - json_bytes
        if magic != _MAGIC or begin < 0:
            raise _Damaged
        head = self._file.read(table_bytes + json_bytes, begin)
        if hashlib.sha256(head).digest() != sha256:
            raise _Damaged
        self._table = np.frombuffer(head[:table_bytes], _TABLE)
        about = json.loads(head[table_bytes:])
        self.built_from, self.facts, self._documents = about["of"], about["facts"], about["documents"]
        if type(self._documents) is not int or self._documents * RECORD.itemsize != begin:
            raise _Damaged
        if len(self._table) != -(-self._documents // GROUP) or not isinstance(self.facts, dict):
            raise _Damaged
        self.group = lru_cache(maxsize=_CACHED_GROUPS)(self._read_group)

    def __len__(self) -> int:
        return self._documents

    def filled(self, block_size: int) -> NDArray[np.int64]:
        """Return the places that each group's documents take, each padded to whole blocks: int64 ``[groups]``."""
        if block_size in BLOCK_SIZES:
            return self._table["filled"][:, BLOCK_SIZES.index(block_size)]
        sums = [filled_lengths(self.lengths(group), block_size).sum() for group in range(len(self._table))]
        return np.array(sums, dtype=np.int64)

    def lengths(self, group: int) -> NDArray[np.int64]:
        """Return the number of tokens in each document of a group: int64 ``[<= group_size]``."""
        return self.group(group)["length"].astype(np.int64)

    def record(self, document: int) -> tuple[int, int, int]:
        """Return a document's offset in bytes, its length in tokens, and how many of its tokens are stored.

        Raises:
            IndexError: There is no such document.
        """
        if not 0 <= document < self._documents:
            raise IndexError(document)
        offset, length, stored = self.group(document // GROUP)[document % GROUP].tolist()
        return offset, length, stored

    def check(self) -> None:
        """Read every group and compare its checksum, without keeping it in memory.

        Raises:
            UserError: A group is damaged.
        """
        for group in range(len(self._table)):
            self._read_group(group)

    def _read_group(self, group: int) -> NDArray:
        first, last = group * GROUP, min((group + 1) * GROUP, self._documents)
        data = self._file.read((last - first) * RECORD.itemsize, first * RECORD.itemsize)
        if zlib.crc32(data) != self._table["crc32"][group]:
            raise UserError(f"index {self.path}: is damaged; remove it, and the next start builds it again")
        return np.frombuffer(data, RECORD)


class _Damaged(Exception):  # noqa: N818 - caught here, never shown
    """The file is not a complete index."""


class OpenFile:
    """A file for positional reads from several threads; it is closed when the object is garbage-collected."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.path, self.descriptor = path, os.open(path, os.O_RDONLY)

    def read(self, count: int, offset: int) -> bytes:
        """Return ``count`` bytes, starting at ``offset``.

        Raises:
            UserError: The file ends before that, or cannot be read.
        """
        parts = []
        while count:
            try:
                part = os.pread(self.descriptor, count, offset)
            except OSError as error:
                raise UserError(f"{self.path}: cannot be read at byte {offset} ({error.strerror})") from error
            if not part:
                raise UserError(f"{self.path}: ends at byte {offset}, was it truncated? copy it again")
            parts.append(part)
            count, offset = count - len(part), offset + len(part)
        return b"".join(parts)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def filled_lengths(lengths: NDArray[np.int64], block_size: int) -> NDArray[np.int64]:
    """Return ``lengths`` rounded up to multiples of ``block_size``."""
    return -(-lengths // block_size) * block_size


def open_index(path: Path, of: Facts, build: Callable[[Add], Facts], verify: bool = False) -> DocumentIndex:
    """Return the index at ``path``; build it first if there is none of exactly these data.

    Args:
        path: The index file, beside the data; if it cannot be written, a cache folder is used instead.
        of: A description that identifies the data and changes when they change, in plain JSON values.
        build: A function that reads all data. It passes the records of all documents to the function it is given, as
            arrays of ``RECORD`` of any length, and returns other facts about the data, in plain JSON values.
        verify: Whether to build the index even if there is a valid one, which reads and checks all data.

    Raises:
        UserError: The data are invalid, or no folder for the index is writable.
    """
    places = (path, _cached(path))
    if not verify:
        for place in places:
            if (index := _valid(place, of)) is not None:
                return index
    failures = []
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            before = _which(place)
            with _one_at_a_time(place.parent):
                if _which(place) != before and (index := _valid(place, of)) is not None:
                    return index  # another process has built it meanwhile
                _write(place, of, build)
            return DocumentIndex(place)
        except OSError as error:
            failures.append(f"{place.parent} ({error.strerror})")
    raise UserError(f"index {path}: cannot be written to {' nor to '.join(failures)}; set TIDAR_CACHE to a folder")


def _valid(path: Path, of: Facts) -> DocumentIndex | None:
    try:
        index = DocumentIndex(path)
        return index if index.built_from == of else None
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
        _Damaged,
    ):  # a UserError, of a file that was cut, is a ValueError
        return None


def _which(path: Path) -> tuple[int, int] | None:
    """Return a file's inode and time of change, which tell whether it has been replaced; None if it does not exist."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def _write(path: Path, of: Facts, build: Callable[[Add], Facts]) -> None:
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            body = _Body(stream.write)
            try:
                facts = build(body.add)
            except OSError as error:
                if error.filename is None:  # writing the index failed, not reading the data
                    raise
                raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
            table = body.end()
            head = table.tobytes() + json.dumps({"of": of, "facts": facts, "documents": body.documents}).encode()
            stream.write(head)
            sha256 = hashlib.sha256(head).digest()
            stream.write(_TRAILER.pack(table.nbytes, len(head) - table.nbytes, sha256, _MAGIC))
            stream.flush()
            os.fchmod(stream.fileno(), 0o644)  # mkstemp makes it readable by the owner alone
            os.fsync(stream.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


class _Body:
    """A writer that regroups records, which arrive in arrays of any length, into groups of ``GROUP``."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write, self._rest, self._table = write, np.empty(0, RECORD), []  # type: ignore[var-annotated]
        self.documents = 0

    def add(self, records: NDArray) -> None:
        self._rest = np.concatenate([self._rest, records])
        while len(self._rest) >= GROUP:
            self._write_group(self._rest[:GROUP])
            self._rest = self._rest[GROUP:]

    def end(self) -> NDArray:
        if len(self._rest):
            self._write_group(self._rest)
        return np.array(self._table, dtype=_TABLE)

    def _write_group(self, records: NDArray) -> None:
        data, lengths = records.tobytes(), records["length"].astype(np.int64)
        self._write(data)
        self._table.append((zlib.crc32(data), [int(filled_lengths(lengths, size).sum()) for size in BLOCK_SIZES]))
        self.documents += len(records)


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, so that one process builds the index and the others wait for it.

    On a file system without locks every process builds it, and the last one written remains.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _cached(path: Path) -> Path:
    return cache_folder() / "index" / hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16] / path.name
