"""Where each document lies: an index of offsets, built once, so that opening data costs nothing and holds nothing.

One file: a record for each document, in groups of ``GROUP`` documents; a table of the groups; what it is an index of
(JSON); and a trailer of fixed size with the SHA-256 of table and JSON. The table holds a checksum of each group's
records, compared whenever a group is read, and the places that its documents take in blocks of common sizes, so that
seeking is a search over groups. Whatever does not fit, is cut or belongs to data as they were before is built again.

It is written under another name and renamed when it is on the disk: two processes that build it at once leave one that
is whole. Where the data's folder cannot be written it is kept in ``TIDAR_CACHE`` (``~/.cache/tidar-megatron``).
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
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)  # of others the sums are made when they are asked for
# where the document's tokens begin in its file, in bytes; how many they are; how many of them are in the file, the
# others being an EOS that it does not have
RECORD = np.dtype([("offset", "<u8"), ("length", "<u4"), ("stored", "<u4")])
_TABLE = np.dtype([("crc32", "<u4"), ("filled", "<i8", (len(BLOCK_SIZES),))])
_TRAILER = struct.Struct("<QQ32s8s")  # bytes of the table, bytes of the JSON, their SHA-256, magic
_MAGIC = b"TIDARIX1"
_CACHED_GROUPS = 64

Add = Callable[[NDArray], None]
Facts = dict[str, Any]


class DocumentIndex:
    """A whole index, open for reading; memory does not grow with the documents, and threads may share it.

    Attributes:
        path: the file.
        facts: what its builder found out about the data.
        group_size: documents in each group but the last.

    Raises:
        _Damaged: it is no index, or not whole.
        OSError: it cannot be read.
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
        """Places that each group's documents take, each filled up to whole blocks: int64 ``[groups]``."""
        if block_size in BLOCK_SIZES:
            return self._table["filled"][:, BLOCK_SIZES.index(block_size)]
        sums = [filled_lengths(self.lengths(group), block_size).sum() for group in range(len(self._table))]
        return np.array(sums, dtype=np.int64)

    def lengths(self, group: int) -> NDArray[np.int64]:
        """Tokens in each document of a group: int64 ``[<= group_size]``."""
        return self.group(group)["length"].astype(np.int64)

    def record(self, document: int) -> tuple[int, int, int]:
        """Offset, length and stored tokens of a document."""
        if not 0 <= document < self._documents:
            raise IndexError(document)
        offset, length, stored = self.group(document // GROUP)[document % GROUP].tolist()
        return offset, length, stored

    def check(self) -> None:
        """Read every group, holding none.

        Raises:
            UserError: the first damaged one.
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
    """Not a whole index."""


class OpenFile:
    """A file that many threads read at once, each where it likes; closed when nobody holds it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.path, self.descriptor = path, os.open(path, os.O_RDONLY)

    def read(self, count: int, offset: int) -> bytes:
        """``count`` bytes from ``offset`` on.

        Raises:
            UserError: there are fewer.
        """
        parts = []
        while count:
            try:
                part = os.pread(self.descriptor, count, offset)
            except OSError as error:
                raise UserError(f"{self.path}: cannot be read at byte {offset} ({error.strerror})") from error
            if not part:
                raise UserError(f"{self.path}: ends at byte {offset}, was it cut? copy it again")
            parts.append(part)
            count, offset = count - len(part), offset + len(part)
        return b"".join(parts)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def filled_lengths(lengths: NDArray[np.int64], block_size: int) -> NDArray[np.int64]:
    """``lengths`` rounded up to multiples of ``block_size``."""
    return -(-lengths // block_size) * block_size


def open_index(path: Path, of: Facts, build: Callable[[Add], Facts], verify: bool = False) -> DocumentIndex:
    """The index at ``path``, built first where there is none of exactly these data.

    Args:
        path: beside the data; a folder of caches stands in where it cannot be written.
        of: what tells these data from others and from themselves as they were before; plain JSON values.
        build: hands the records of all documents to the function that it is given, as arrays of ``RECORD`` of any
            length; returns what else it has found out, plain JSON values.
        verify: build it again in any case, which reads and checks all of the data.

    Raises:
        UserError: whatever is wrong with the data, or no folder can be written.
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
                    return index  # somebody else has built it meanwhile
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
    """Tells a file from the one that is put in its place."""
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
                if error.filename is None:  # it is this file that cannot be written
                    raise
                raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
            table = body.end()
            head = table.tobytes() + json.dumps({"of": of, "facts": facts, "documents": body.documents}).encode()
            stream.write(head)
            sha256 = hashlib.sha256(head).digest()
            stream.write(_TRAILER.pack(table.nbytes, len(head) - table.nbytes, sha256, _MAGIC))
            stream.flush()
            os.fchmod(stream.fileno(), 0o644)  # mkstemp's is for the owner alone
            os.fsync(stream.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


class _Body:
    """Cuts records into groups, whatever pieces they come in."""

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
    """Spare the others the work; where a file system knows no locks, they all do it, and the last one's stays."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _cached(path: Path) -> Path:
    return cache_folder() / "index" / hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16] / path.name
