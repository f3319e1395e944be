"""Build a pack out of records of others: for sealing, and for erasing what was deleted.

Records are copied whole and unchanged, so that a sealed pack can be read back by the
same code as any other. Until it is named, a pack being built has the suffix
``.partial`` and a lock; a crash leaves nothing that recovery would take for an object.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from crc32c import crc32c

from storage.kernel.errors import CorruptData, DependencyDown, StorageFull
from storage.kernel.limits import MIB
from storage.objects.protocol import ObjectStore
from storage.packs.format import (
    FILE_HEADER_LENGTH,
    PREFIX_LENGTH,
    TRAILER_LENGTH,
    Location,
    decode_header,
    decode_prefix,
    decode_trailer,
    encode_file_header,
    padding,
)
from storage.packs.reader import object_key
from storage.packs.writer import PARTIAL, SpaceGuard, pack_path, sync_folder

CHUNK = 4 * MIB
_NO_SPACE = {28, 122, 27}  # ENOSPC, EDQUOT, EFBIG

#: Returns exactly `length` bytes of a pack at `offset`: (key, offset, length).
Read = Callable[[str, int, int], bytes]


def whole_length(location: Location) -> int:
    """Return the bytes of the record at `location`, padding included."""
    before = location.object_offset - location.record_offset
    bare = before + location.object_length + TRAILER_LENGTH
    return bare + padding(bare)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A record to be copied, and what its object must hash to."""

    location: Location
    dataset_offset: int
    digest: bytes


class PackBuilder:
    """A pack on its way; use it as a context manager, which removes what is left.

    Parameters
    ----------
    folder : Path
        Of the local packs.
    key : str
    min_free_bytes : int
        What must stay free.
    """

    def __init__(self, folder: Path, key: str, *, min_free_bytes: int = 0) -> None:
        self.key = key
        self.size = FILE_HEADER_LENGTH
        self._path = pack_path(folder, key)
        self._partial = self._path.with_suffix(PARTIAL)
        self._guard = SpaceGuard(folder, min_free_bytes)
        self._hash = hashlib.sha256()
        with _translated():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(
                self._partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640
            )
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._write(encode_file_header(key), 0)
        self._open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            os.close(self._fd)
            self._open = False
        self._partial.unlink(missing_ok=True)

    @property
    def path(self) -> Path:
        """Where the bytes lie until they are named."""
        return self._partial

    def copy(self, wanted: Wanted, read: Read, *, checked: bool = True) -> Location:
        """Append one record; return where it lies now.

        Parameters
        ----------
        checked : bool
            False copies what there is.

        Raises
        ------
        CorruptData
            The record is not what was stored; nothing was appended.
        StorageFull, DependencyDown
        """
        source = wanted.location
        length = whole_length(source)
        self._guard.require(length)
        kept = self._hash.copy()
        check = _Check(wanted)
        position = self.size
        for data in _pieces(read, source.pack_key, source.record_offset, length):
            check.add(data)
            self._write(data, position)
            position += len(data)
        if checked and not check.passed():
            self._hash = kept
            with _translated():
                os.ftruncate(self._fd, self.size)
            raise CorruptData("a record fails its checksum")
        start = self.size
        self.size = position
        return Location(
            self.key,
            start,
            start + source.object_offset - source.record_offset,
            source.object_length,
        )

    def digest(self) -> bytes:
        """Return SHA-256 of the whole pack as written so far."""
        return self._hash.digest()

    def put(self, objects: ObjectStore) -> None:
        """Store the pack as an object, and read it back.

        Raises
        ------
        CorruptData
            The store does not hold what was written; the object is removed.
        DependencyDown, StorageFull
        """
        with _translated():
            os.fsync(self._fd)
        name = object_key(self.key)
        objects.put_file(name, self._partial, self.digest().hex())
        found = hashlib.sha256()
        for offset in range(0, self.size, CHUNK):
            found.update(objects.read(name, offset, min(CHUNK, self.size - offset)))
        info = objects.stat(name)
        if info is None or info.size != self.size or found.digest() != self.digest():
            objects.delete(name)
            raise CorruptData("the object store does not hold what was written")

    def keep(self) -> None:
        """Sync the pack and name it: it stays in the local folder."""
        with _translated():
            os.fsync(self._fd)
            self._partial.rename(self._path)
            sync_folder(self._path.parent)
            sync_folder(self._path.parent.parent)

    def _write(self, data: bytes, position: int) -> None:
        self._hash.update(data)
        view = memoryview(data)
        with _translated():
            while view:
                written = os.pwrite(self._fd, view, position)
                position += written
                view = view[written:]


class _Check:
    """Follow a record as it is copied: structure, CRC-32C and SHA-256."""

    def __init__(self, wanted: Wanted) -> None:
        location = wanted.location
        self._wanted = wanted
        self._head = location.object_offset - location.record_offset
        self._dataset = self._head + wanted.dataset_offset
        self._end = self._head + location.object_length
        self._start = b""
        self._tail = b""
        self._seen = 0
        self._crc = 0
        self._hash = hashlib.sha256()

    def add(self, data: bytes) -> None:
        at, self._seen = self._seen, self._seen + len(data)
        view = memoryview(data)

        def cut(start: int, end: int) -> memoryview:
            return view[max(0, start - at) : max(0, end - at)]

        self._start += bytes(cut(0, self._head))
        self._crc = crc32c(cut(self._head, self._end), self._crc)
        self._hash.update(cut(self._dataset, self._end))
        self._tail += bytes(cut(self._end, self._end + TRAILER_LENGTH))

    def passed(self) -> bool:
        prefix = decode_prefix(self._start)
        header = decode_header(self._start[:PREFIX_LENGTH], self._start[PREFIX_LENGTH:])
        trailer = decode_trailer(self._tail)
        length = self._wanted.location.object_length
        return (
            prefix is not None
            and header is not None
            and trailer == (self._crc, length, self._wanted.digest)
            and prefix.object_length == length
            and self._hash.digest() == self._wanted.digest
        )


def new_key() -> str:
    """Return the key of a pack that does not exist yet."""
    return uuid.uuid4().hex


def _pieces(read: Read, key: str, offset: int, length: int) -> Iterator[bytes]:
    while length > 0:
        data = read(key, offset, min(CHUNK, length))
        yield data
        offset += len(data)
        length -= len(data)


@contextmanager
def _translated() -> Iterator[None]:
    """Turn a disk that is full or fails into our own errors."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise StorageFull("no space left for packs") from error
        raise DependencyDown(f"pack storage: {error.strerror}") from error
