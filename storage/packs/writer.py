"""Append records to packs, and make them durable by the sync policy."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from crc32c import crc32c

from storage.kernel.errors import DependencyDown, ImagingError, StorageFull
from storage.kernel.limits import KIB, MIB
from storage.kernel.settings import SyncPolicy
from storage.packs.format import (
    FILE_HEADER_LENGTH,
    Buffer,
    Encoded,
    Kind,
    Location,
    Record,
    RecordHeader,
    encode_file_header,
    encode_header,
    encode_prefix,
    encode_record,
    encode_trailer,
    padding,
)

#: How long and for how many bytes one look at the free space serves.
SPACE_CHECK_SECONDS = 1.0
SPACE_CHECK_BYTES = 64 * MIB
#: Buffers of one gathered write; the kernel's limit is 1024.
MAX_GATHER = 512
#: Records from this size on get their trailer in a write of its own.
SPLIT_BYTES = 64 * KIB
PAGE = 4096
SYNC_FILE_RANGE_WRITE = 2
#: Blocks of an open pack that are set aside at a time.
RESERVE_BYTES = 16 * MIB
#: Zero bytes that small records find before them, so that a sync of theirs writes
#: data only: a file that grows has its inode written each time, too.
FILL_BYTES = 256 * KIB
FALLOC_FL_KEEP_SIZE = 1
#: Suffix of packs that are being received; recovery removes them.
PARTIAL = ".partial"


def pack_path(folder: Path, key: str) -> Path:
    """Return where the pack `key` lies below `folder`."""
    return folder / key[:2] / f"{key}.pack"


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@dataclass(slots=True)
class _Open:
    """A pack this process appends to."""

    key: str
    path: Path
    fd: int
    size: int
    reserved: int = 0
    filled: int = 0
    fresh: bool = True
    unsynced: bool = False


@dataclass(slots=True)
class SpaceGuard:
    """Say no before the disk is full.

    Attributes
    ----------
    min_free_bytes : int
        What must stay free after a write.
    """

    folder: Path
    min_free_bytes: int
    _checked_at: float = field(default=0.0)
    _room: int = field(default=0)

    def require(self, size_bytes: int) -> None:
        """Raise StorageFull when `size_bytes` more would leave too little."""
        now = time.monotonic()
        stale = now - self._checked_at > SPACE_CHECK_SECONDS
        if stale or self._room < size_bytes + SPACE_CHECK_BYTES:
            try:
                free = shutil.disk_usage(self.folder).free
            except OSError as error:
                raise _translated(error) from error
            self._room = free - self.min_free_bytes
            self._checked_at = now
        if self._room < size_bytes:
            raise StorageFull("less free space than the guard keeps back")
        self._room -= size_bytes


class PackWriter:
    """The packs one process appends to: one open pack for each tenant.

    A single leader calls `append`; `open_large` and `check_space` may be called
    from any thread.

    Parameters
    ----------
    folder : Path
        Created when missing.
    roll_bytes : int
        A pack is closed once it is this long.
    sync : SyncPolicy
    min_free_bytes : int
    on_closed : callable, optional
        Gets the key and length of each pack that no longer grows.
    """

    def __init__(
        self,
        folder: Path,
        *,
        roll_bytes: int,
        sync: SyncPolicy = SyncPolicy.INSTANCE,
        min_free_bytes: int = 0,
        on_closed: Callable[[str, int], None] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
        self._folder = folder
        self._roll_bytes = roll_bytes
        self._policy = sync
        self._guard = SpaceGuard(folder, min_free_bytes)
        self._on_closed = on_closed
        self._open: dict[str, _Open] = {}
        self._failure: ImagingError | None = None
        self._lock = threading.Lock()

    @property
    def folder(self) -> Path:
        """Where the packs lie."""
        return self._folder

    def check_space(self) -> None:
        """Raise StorageFull while the free-space guard says no."""
        self._guard.require(0)

    def append(self, records: Sequence[Record]) -> list[Location]:
        """Write `records` in order and sync once; return where they lie.

        After return they survive a power cut (policy ``instance``). On an error
        none of them is in a pack.

        Raises
        ------
        StorageFull, DependencyDown
        """
        with self._lock:
            return self._append(records)

    def _append(self, records: Sequence[Record]) -> list[Location]:
        placed: dict[int, Location] = {}
        touched: list[tuple[str, _Open, int]] = []
        syncing = False
        try:
            for tenant, indices in _by_tenant(records):
                pack = self._pack(tenant)
                touched.append((tenant, pack, pack.size))
                written = self._write(pack, [records[i] for i in indices])
                placed.update(zip(indices, written, strict=True))
            syncing = self._policy is SyncPolicy.INSTANCE
            for _, pack, _ in touched:
                if syncing:
                    self._sync(pack)
                else:
                    pack.unsynced = True
        except (OSError, ImagingError) as error:
            for tenant, pack, size in touched:
                # After a failed sync the kernel may have dropped what it could not
                # write: such a pack takes no more.
                self._cut(tenant, pack, size, keep=not syncing)
            if isinstance(error, OSError):
                raise _translated(error) from error
            raise
        for tenant, pack, _ in touched:
            if pack.size >= self._roll_bytes:
                self._close(tenant)
        return [placed[i] for i in range(len(records))]

    def append_tombstones(self, headers: Iterable[RecordHeader]) -> None:
        """Record deletions; synced under every policy."""
        records = [Record(header, (), bytes(32), Kind.TOMBSTONE) for header in headers]
        self.append(records)
        self.sync()

    def sync(self) -> None:
        """Make everything appended so far durable, whatever the policy.

        Raises
        ------
        StorageFull, DependencyDown
            Also when a pack could not be synced as it was closed.
        """
        with self._lock:
            failure, self._failure = self._failure, None
            for tenant, pack in list(self._open.items()):
                if pack.unsynced:
                    try:
                        self._sync(pack)
                    except OSError as error:
                        failure = _translated(error)
                        self._open.pop(tenant)
                        os.close(pack.fd)
            if failure is not None:
                raise failure

    def open_large(self, header: RecordHeader) -> LargeRecord:
        """Start a pack of its own for an object too large for memory."""
        self.check_space()
        try:
            return LargeRecord(self._folder, header, self._guard)
        except OSError as error:
            raise _translated(error) from error

    def open_keys(self) -> list[str]:
        """Return the packs that grow now."""
        with self._lock:
            return [pack.key for pack in self._open.values()]

    def roll(self, keys: Collection[str]) -> int:
        """Close those of `keys` that are open here; return how many were."""
        with self._lock:
            tenants = [t for t, pack in self._open.items() if pack.key in keys]
            for tenant in tenants:
                self._close(tenant)
            return len(tenants)

    def close(self) -> None:
        """Sync and close all packs; a later append opens new ones."""
        with self._lock:
            for tenant in list(self._open):
                self._close(tenant)

    def _pack(self, tenant: str) -> _Open:
        pack = self._open.get(tenant)
        if pack is None:
            pack = self._open[tenant] = self._create()
        return pack

    def _create(self) -> _Open:
        key, path, fd = _begin(self._folder)
        try:
            _write_all(fd, [encode_file_header(key)], 0)
            path.with_suffix(PARTIAL).rename(path)
        except BaseException:
            os.close(fd)
            path.with_suffix(PARTIAL).unlink(missing_ok=True)
            raise
        return _Open(key, path, fd, FILE_HEADER_LENGTH)

    def _write(self, pack: _Open, records: Sequence[Record]) -> list[Location]:
        buffers: list[Buffer] = []
        locations = []
        later: list[tuple[int, Encoded]] = []
        position = pack.size
        for record in records:
            made = encode_record(record)
            first, size = position + len(made.start), made.object_length
            locations.append(Location(pack.key, position, first, size))
            buffers += (made.start, *record.parts)
            if size < SPLIT_BYTES:
                buffers.append(made.trailer())
            else:
                later.append((position + made.trailer_offset, made))
                buffers.append(bytes(made.length - made.trailer_offset))
            position += made.length
        self._guard.require(position - pack.size)
        if position > pack.reserved:
            self._reserve(pack, position)
        _write_all(pack.fd, buffers, pack.size)
        if position > pack.filled:
            pack.filled = position
            small = position - pack.size < SPLIT_BYTES
            if small and self._policy is SyncPolicy.INSTANCE:
                self._fill(pack)
        if later:
            # The disk works while the digests are finished. Until its trailer is
            # there, a record is a torn tail.
            if self._policy is SyncPolicy.INSTANCE:
                _begin_writing(pack.fd, pack.size, later[-1][0])
            for offset, made in later:
                _write_all(pack.fd, [made.trailer()], offset)
        pack.size = position
        return locations

    def _reserve(self, pack: _Open, position: int) -> None:
        """Have the file system set blocks aside for what comes after `position`.

        It saves looking for a block with each page. Without it, or without room for
        it, nothing else changes: what the file holds and its length are the same.
        """
        ahead = min(RESERVE_BYTES, max(0, self._roll_bytes - position))
        pack.reserved = position + ahead
        if ahead and _FALLOCATE is not None:
            _FALLOCATE(
                pack.fd, FALLOC_FL_KEEP_SIZE, pack.size, pack.reserved - pack.size
            )

    def _fill(self, pack: _Open) -> None:
        """Write zero bytes where the next small records will lie.

        Nothing is lost without them, so that a disk that is full is no error here.
        """
        ahead = min(FILL_BYTES, max(0, self._roll_bytes - pack.filled))
        with suppress(OSError, ImagingError):
            self._guard.require(ahead)
            _write_all(pack.fd, [bytes(ahead)], pack.filled)
            pack.filled += ahead

    @staticmethod
    def _free_reserved(pack: _Open) -> None:
        """Give back what lies behind the end of a pack that no longer grows."""
        with suppress(OSError):
            os.ftruncate(pack.fd, pack.size)

    def _sync(self, pack: _Open) -> None:
        os.fdatasync(pack.fd)
        if pack.fresh:
            sync_folder(pack.path.parent)
            sync_folder(self._folder)
            pack.fresh = False
        pack.unsynced = False

    def _cut(self, tenant: str, pack: _Open, size: int, *, keep: bool) -> None:
        """Take back what a failed append wrote; give the pack up if even that fails."""
        try:
            os.ftruncate(pack.fd, size)
        except OSError:
            keep = False
        pack.size = pack.reserved = pack.filled = size
        if not keep:
            self._open.pop(tenant, None)
            os.close(pack.fd)

    def _close(self, tenant: str) -> None:
        """Close a pack; when it cannot be synced, the next `sync` says so."""
        pack = self._open.pop(tenant)
        self._free_reserved(pack)
        try:
            if pack.unsynced or pack.fresh:
                self._sync(pack)
        except OSError as error:
            self._failure = _translated(error)
        finally:
            os.close(pack.fd)
        if self._on_closed is not None:
            self._on_closed(pack.key, pack.size)


class LargeRecord:
    """One object on its way into a pack of its own.

    Until `finish` the file carries the suffix ``.partial``; a crash leaves nothing
    that recovery would take for an object. Until `release` recovery in another
    process leaves the pack alone.
    """

    def __init__(self, folder: Path, header: RecordHeader, guard: SpaceGuard) -> None:
        self._guard = guard
        self._header = encode_header(header)
        self._crc = 0
        self._finished = False
        self.object_length = 0
        self._fd: int | None
        self.key, self._path, self._fd = _begin(folder)
        self._partial = self._path.with_suffix(PARTIAL)
        prefix = encode_prefix(Kind.OBJECT, self._header, 0)
        start = [encode_file_header(self.key), prefix, self._header]
        self.object_offset = sum(map(len, start))
        try:
            _write_all(self._fd, start, 0)
        except BaseException:
            self.abort()
            raise

    def write(self, data: Buffer) -> None:
        """Append object bytes.

        Raises
        ------
        StorageFull, DependencyDown
        """
        if self._fd is None:
            raise DependencyDown("the record is closed")
        self._guard.require(len(data))
        start = self.object_offset + self.object_length
        try:
            _write_all(self._fd, [data], start)
        except OSError as error:
            raise _translated(error) from error
        # The disk works while the rest is received, so that `finish` waits less.
        _begin_writing(self._fd, start, start + len(data))
        self._crc = crc32c(data, self._crc)
        self.object_length += len(data)

    def mmap(self) -> mmap.mmap:
        """Map the file as written so far, read-only."""
        if self._fd is None:
            raise DependencyDown("the record is closed")
        length = self.object_offset + self.object_length
        return mmap.mmap(self._fd, length, access=mmap.ACCESS_READ)

    def finish(self, digest: bytes) -> Location:
        """Complete, sync and name the pack; return where the object lies."""
        fd = self._fd
        if fd is None:
            raise DependencyDown("the record is closed")
        end = encode_trailer(self._crc, self.object_length, digest)
        position = self.object_offset + self.object_length
        pad = bytes(padding(position + len(end) - FILE_HEADER_LENGTH))
        prefix = encode_prefix(Kind.OBJECT, self._header, self.object_length)
        try:
            _write_all(fd, [end, pad], position)
            _write_all(fd, [prefix], FILE_HEADER_LENGTH)
            os.fdatasync(fd)
            self._partial.rename(self._path)
            sync_folder(self._path.parent)
            sync_folder(self._path.parent.parent)
        except OSError as error:
            raise _translated(error) from error
        self._finished = True
        return Location(
            self.key, FILE_HEADER_LENGTH, self.object_offset, self.object_length
        )

    def release(self) -> None:
        """Let go of a finished pack: its row is committed."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def discard(self) -> None:
        """Unlink a finished pack that nothing refers to."""
        self._path.unlink(missing_ok=True)
        self.release()

    def abort(self) -> None:
        """Leave nothing behind; a finished pack is left to recovery."""
        if not self._finished:
            self._partial.unlink(missing_ok=True)
            self._path.unlink(missing_ok=True)
        self.release()


def _begin(folder: Path) -> tuple[str, Path, int]:
    """Make the file of a new pack under its partial name, locked.

    The lock tells recovery in another process that this pack is alive; the pack gets
    its name only once it is held.
    """
    key = uuid.uuid4().hex
    path = pack_path(folder, key)
    path.parent.mkdir(exist_ok=True)
    fd = os.open(
        path.with_suffix(PARTIAL),
        os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC,
        0o640,
    )
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    except BaseException:
        os.close(fd)
        raise
    return key, path, fd


def _by_tenant(records: Sequence[Record]) -> list[tuple[str, list[int]]]:
    """Return the indices of `records`, grouped by tenant."""
    groups: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(record.header.tenant, []).append(index)
    return list(groups.items())


def _write_all(fd: int, buffers: Sequence[Buffer], offset: int) -> None:
    """Write all of `buffers` at `offset`, however the kernel cuts it."""
    pending = [memoryview(buffer) for buffer in buffers if len(buffer)]
    while pending:
        written = os.pwritev(fd, pending[:MAX_GATHER], offset)
        offset += written
        while pending and written >= len(pending[0]):
            written -= len(pending.pop(0))
        if written:
            pending[0] = pending[0][written:]


def _begin_writing(fd: int, start: int, stop: int) -> None:
    """Have the kernel start on whole pages of a range; only a later sync promises."""
    start, stop = start & ~(PAGE - 1), stop & ~(PAGE - 1)
    if _SYNC_FILE_RANGE is not None and stop > start:
        _SYNC_FILE_RANGE(fd, start, stop - start, SYNC_FILE_RANGE_WRITE)


def _linux_call(
    name: str, *arguments: type
) -> Callable[[int, int, int, int], int] | None:
    """Return one of Linux' calls that Python does not wrap; elsewhere there is none."""
    try:
        function = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError):
        return None
    function.argtypes = arguments
    return cast("Callable[[int, int, int, int], int]", function)


_SYNC_FILE_RANGE = _linux_call(
    "sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint
)
_FALLOCATE = _linux_call(
    "fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64
)


def _translated(error: OSError) -> ImagingError:
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return StorageFull("no space left for packs")
    return DependencyDown(f"pack storage: {error.strerror}")
