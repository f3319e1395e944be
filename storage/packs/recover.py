"""Read packs back: what start-up, verification and rebuilding see."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from crc32c import crc32c

from storage.kernel.errors import CorruptData
from storage.kernel.limits import MIB
from storage.packs.format import (
    ALIGNMENT,
    FILE_HEADER_LENGTH,
    PREFIX_LENGTH,
    RECORD_MAGIC,
    TRAILER_LENGTH,
    Kind,
    Location,
    RecordInfo,
    decode_file_header,
    decode_header,
    decode_prefix,
    decode_trailer,
    record_length,
)
from storage.packs.writer import PARTIAL

CHUNK = 4 * MIB


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes of a pack that are no whole record.

    `torn` means that nothing whole follows: the tail of a crash.
    """

    start: int
    end: int
    torn: bool


def iter_pack_files(folder: Path) -> Iterator[Path]:
    """Yield every pack below `folder`, sorted."""
    yield from sorted(folder.glob("??/*.pack"))


def remove_partial(folder: Path) -> int:
    """Unlink large objects whose reception was cut off; return how many.

    Those that another process is still receiving hold a lock and stay.
    """
    removed = 0
    for path in sorted(folder.glob(f"??/*{PARTIAL}")):
        if not is_alive(path):
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def is_alive(path: Path) -> bool:
    """Tell whether a process is appending to the pack."""
    with claimed(path) as mine:
        return not mine and path.exists()


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Hold a pack that nobody appends to; yields False when somebody does."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


def pack_key_of(path: Path) -> str:
    """Return the key in the file header.

    Raises
    ------
    CorruptData
    """
    with path.open("rb") as file:
        return decode_file_header(file.read(FILE_HEADER_LENGTH))


def iter_records(
    path: Path, start: int = FILE_HEADER_LENGTH, *, check_objects: bool = True
) -> Iterator[RecordInfo | Damage]:
    """Yield whole records from `start` on, and the damage between them.

    Zero bytes behind the last record are no damage: the writer had filled them in for
    records to come.

    Parameters
    ----------
    check_objects : bool
        Also compare each object's CRC-32C, which reads all of it.
    """
    key = pack_key_of(path)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        position = max(start, FILE_HEADER_LENGTH)
        while position < size:
            record = _record_at(fd, key, position, size, check_objects=check_objects)
            if record is not None:
                yield record
                position = record.end
                continue
            following = _next_record(fd, key, _known_end(fd, position, size), size)
            if following is None:
                if not _is_blank(fd, position, size):
                    yield Damage(position, size, torn=True)
                return
            yield Damage(position, following, torn=False)
            position = following
    finally:
        os.close(fd)


def record_at(path: Path, offset: int) -> RecordInfo | None:
    """Return the whole record at `offset`, its object checked, or None."""
    key = pack_key_of(path)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _record_at(fd, key, offset, os.fstat(fd).st_size, check_objects=True)
    finally:
        os.close(fd)


def read_record(path: Path, offset: int) -> tuple[RecordInfo, memoryview] | None:
    """Return the whole record at `offset` with its object, or None.

    The object is a view of the file, not a copy.
    """
    try:
        info = record_at(path, offset)
    except (FileNotFoundError, CorruptData):
        return None
    return None if info is None else (info, view_object(path, info))


def view_object(path: Path, info: RecordInfo) -> memoryview:
    """Map the object of a whole record, read-only; the last view unmaps it."""
    place = info.location
    start = place.object_offset - place.object_offset % mmap.ALLOCATIONGRANULARITY
    skip = place.object_offset - start
    if not place.object_length:
        return memoryview(b"")
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        mapped = mmap.mmap(
            fd, skip + place.object_length, access=mmap.ACCESS_READ, offset=start
        )
    finally:
        os.close(fd)
    return memoryview(mapped)[skip:]


def cut(path: Path, size: int) -> None:
    """Cut a torn tail off a pack, durably."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        os.fsync(fd)
    finally:
        os.close(fd)


def _record_at(
    fd: int, key: str, position: int, size: int, *, check_objects: bool
) -> RecordInfo | None:
    raw = os.pread(fd, PREFIX_LENGTH, position)
    prefix = decode_prefix(raw)
    if prefix is None:
        return None
    end = position + record_length(prefix.header_length, prefix.object_length)
    if end > size:
        return None
    header = decode_header(
        raw, os.pread(fd, prefix.header_length, position + PREFIX_LENGTH)
    )
    if header is None:
        return None
    object_offset = position + PREFIX_LENGTH + prefix.header_length
    trailer = decode_trailer(
        os.pread(fd, TRAILER_LENGTH, object_offset + prefix.object_length)
    )
    if trailer is None or trailer[1] != prefix.object_length:
        return None
    if check_objects and _crc(fd, object_offset, prefix.object_length) != trailer[0]:
        return None
    return RecordInfo(
        Kind(prefix.kind),
        header,
        Location(key, position, object_offset, prefix.object_length),
        trailer[2],
        end,
    )


def _crc(fd: int, offset: int, length: int) -> int:
    crc = 0
    while length > 0:
        data = os.pread(fd, min(CHUNK, length), offset)
        if not data:
            return -1
        crc = crc32c(data, crc)
        offset += len(data)
        length -= len(data)
    return crc


def _known_end(fd: int, position: int, size: int) -> int:
    """Return from where on a record may follow the damaged one at `position`.

    The extent of a record whose start is whole is known, so that nothing inside a
    received object is ever taken for a record.
    """
    raw = os.pread(fd, PREFIX_LENGTH, position)
    prefix = decode_prefix(raw)
    if prefix is None:
        return position + ALIGNMENT
    raw_header = os.pread(fd, prefix.header_length, position + PREFIX_LENGTH)
    if decode_header(raw, raw_header) is None:
        return position + ALIGNMENT
    end = position + record_length(prefix.header_length, prefix.object_length)
    return min(end, size)


def _next_record(fd: int, key: str, offset: int, size: int) -> int | None:
    """Return where the first whole record begins from `offset` on."""
    while offset < size:
        data = os.pread(fd, CHUNK + PREFIX_LENGTH, offset)
        found = data.find(RECORD_MAGIC)
        while found >= 0:
            place = offset + found
            whole = place % ALIGNMENT == 0 and _record_at(
                fd, key, place, size, check_objects=True
            )
            if whole:
                return place
            found = data.find(RECORD_MAGIC, found + 1)
        offset += CHUNK
    return None


def _is_blank(fd: int, start: int, end: int) -> bool:
    """Tell whether a range holds nothing but zero bytes."""
    while start < end:
        data = os.pread(fd, min(CHUNK, end - start), start)
        if data.count(0) != len(data):
            return False
        if not data:
            break
        start += len(data)
    return True


def check_pack_file(path: Path) -> None:
    """Raise CorruptData unless `path` begins like a pack and is named by its key."""
    if pack_key_of(path) != path.stem:
        raise CorruptData("a pack's name is not its key")
