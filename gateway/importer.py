"""Import files, folders, ZIP archives and DICOMDIRs through the ingest service.

Works with and without a running server: the node's own packs belong to this process,
and the index takes several writers. Several files are on their way at a time, so that
they share syncs and transactions.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol

from gateway.unpack import (
    MEDIA_STORAGE_DIRECTORY,
    Stream,
    ZipSource,
    is_zip,
    referenced_files,
)
from pacs.domain.study import Accepted, Arrival, Ingest, Outcome, Spool
from pacs.imaging.part10 import MAX_FILE_META, PREAMBLE, FileMeta, read_file_meta
from storage.kernel.errors import ImagingError, MalformedObject, TooLarge, Unavailable
from storage.kernel.limits import MIB, Limits
from storage.kernel.types import (
    DEFAULT_TENANT,
    Actor,
    Digest,
    Door,
    Role,
    Source,
    TenantId,
)

#: Files on their way at a time; as many share a sync.
PARALLEL = 8
#: Rejected files whose reasons are kept.
MAX_LISTED = 1000
#: Enough of a file to hold its File Meta Information.
HEAD = PREAMBLE + 4 + MAX_FILE_META + 16


class ImportProgress(Protocol):
    """Who watches an import; called from several threads."""

    def found(self, n_files: int) -> None:
        """More files are to come than was known."""
        ...

    def finished(self, n_bytes: int) -> None:
        """One file is done, one way or another."""
        ...


@dataclass(frozen=True, slots=True)
class Rejected:
    """A file that was not stored, and why."""

    name: str
    reason: str


@dataclass(slots=True)
class ImportSummary:
    """What an import did.

    Attributes
    ----------
    skipped : int
        Files in folders and archives that do not claim to be DICOM.
    rejected : list of Rejected
        The first `MAX_LISTED` of them.
    stopped : str
        Why the import ended early; empty when it did not.
    """

    stored: int = 0
    duplicate: int = 0
    skipped: int = 0
    n_rejected: int = 0
    n_bytes: int = 0
    rejected: list[Rejected] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    stopped: str = ""

    @property
    def ok(self) -> bool:
        return not self.n_rejected and not self.stopped


class _NotDicom(Exception):
    """The file does not claim to be DICOM."""


def import_paths(
    ingest: Ingest,
    paths: Sequence[Path],
    *,
    limits: Limits,
    tenant: str = DEFAULT_TENANT,
    accept_without_preamble: bool = False,
    progress: ImportProgress | None = None,
    accepted: Callable[[Accepted], None] | None = None,
) -> ImportSummary:
    """Store what `paths` hold.

    Parameters
    ----------
    paths : sequence of Path
        Files, folders, ZIP archives, DICOMDIRs. Folders are walked in the order of
        names; symbolic links below them are not followed.
    accept_without_preamble : bool
        Take bare data sets too.
    accepted : callable, optional
        Called with what became of each object that was stored, or was already; from
        several threads. `Unavailable` ends the import.
    """
    importer = _Importer(
        ingest,
        limits=limits,
        tenant=TenantId(tenant),
        accept_without_preamble=accept_without_preamble,
        progress=progress,
        accepted=accepted,
    )
    return importer.run(paths)


def count_files(paths: Sequence[Path]) -> int:
    """Count the files below `paths`, archives as one, for a progress bar."""
    return sum(sum(1 for _ in _walk(path)) if path.is_dir() else 1 for path in paths)


class _Importer:
    def __init__(
        self,
        ingest: Ingest,
        *,
        limits: Limits,
        tenant: TenantId,
        accept_without_preamble: bool,
        progress: ImportProgress | None,
        accepted: Callable[[Accepted], None] | None,
    ) -> None:
        self._accepted = accepted
        self._ingest = ingest
        self._limits = limits
        self._bare = accept_without_preamble
        self._progress = progress
        self._actor = Actor(tenant, "import", roles=frozenset({Role.SYSTEM}))
        self._summary = ImportSummary()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        # Bound: files that wait, besides those being read.
        self._room = threading.Semaphore(PARALLEL * 4)
        self._pending: set[Future[None]] = set()

    def run(self, paths: Sequence[Path]) -> ImportSummary:
        self._pool = ThreadPoolExecutor(PARALLEL, "import")
        try:
            for path in paths:
                if path.is_dir():
                    for file in _walk(path):
                        self._add(file, named=False)
                else:
                    self._add(path, named=True)
                if self._stop.is_set():
                    break
            self._drain()
            if self._summary.stored:
                self._ingest.flush()
        except Unavailable as error:
            self._summary.stopped = str(error)
        finally:
            self._stop.set()
            self._pool.shutdown(cancel_futures=True)
        self._summary.rejected.sort(key=lambda one: one.name)
        return self._summary

    def _add(self, path: Path, *, named: bool) -> None:
        """Take one file of the file system; `named`: the caller asked for it."""
        if self._stop.is_set():
            return
        if path.exists() and not path.is_file():
            # Opening a pipe or a device could wait for ever.
            self._reject(str(path), "not a regular file")
            return
        try:
            with path.open("rb") as file:
                head = file.read(PREAMBLE + 4)
                if is_zip(head):
                    file.seek(0)
                    self._add_zip(path, file)
                    return
            if named and _is_dicomdir(path):
                self._add_dicomdir(path)
                return
        except OSError as error:
            self._reject(str(path), error.strerror or "cannot be read")
            return
        except ImagingError as error:
            self._reject(str(path), str(error))
            return
        self._submit(str(path), partial(_open, path), named=named)

    def _add_zip(self, path: Path, file: BinaryIO) -> None:
        with ZipSource(file, self._limits) as archive:
            for info, refused in archive.entries():
                name = f"{path}!{_shown(info.filename)}"
                self._note_found()
                if refused:
                    self._reject(name, refused)
                else:
                    self._submit(name, partial(archive.open, info), named=False)
                if self._stop.is_set():
                    break
            # The archive closes when its last entry has been read.
            self._drain()
        self._finish(0)

    def _add_dicomdir(self, path: Path) -> None:
        for file_id, file in referenced_files(path, self._limits):
            self._note_found()
            if file is None:
                self._reject(
                    f"{path}!{_shown(file_id)}",
                    "Referenced File ID (0004,1500) names no file of the file-set",
                )
                continue
            self._submit(str(file), partial(_open, file), named=True)
        self._finish(0)

    def _submit(self, name: str, opener: Callable[[], Stream], *, named: bool) -> None:
        self._room.acquire()
        future = self._pool.submit(self._one, name, opener, named)
        self._pending.add(future)
        future.add_done_callback(lambda _: self._room.release())
        if len(self._pending) > PARALLEL * 16:
            self._collect({one for one in self._pending if one.done()})

    def _drain(self) -> None:
        """Wait for everything submitted; raise what was not foreseen."""
        self._collect(wait(self._pending).done)

    def _collect(self, done: set[Future[None]]) -> None:
        self._pending -= done
        for future in done:
            future.result()

    def _one(self, name: str, opener: Callable[[], Stream], named: bool) -> None:  # noqa: FBT001
        """Import one file; runs in a thread of the pool."""
        if self._stop.is_set():
            return
        try:
            with opener() as stream:
                size, accepted = self._store(name, stream)
            if self._accepted is not None:
                self._accepted(accepted)
        except _NotDicom as error:
            if named:
                self._reject(name, str(error))
            else:
                self._count("skipped")
        except Unavailable as error:
            self._stop.set()
            with self._lock:
                self._summary.stopped = self._summary.stopped or str(error)
        except ImagingError as error:
            self._reject(name, str(error))
        except OSError as error:
            self._reject(name, error.strerror or "cannot be read")
        else:
            is_new = accepted.outcome is Outcome.STORED
            self._count("stored" if is_new else "duplicate", size)

    def _store(self, name: str, stream: Stream) -> tuple[int, Accepted]:
        head = _read(stream, HEAD)
        meta = self._file_meta(head)
        if meta.sop_class_uid == MEDIA_STORAGE_DIRECTORY:
            raise _NotDicom("a DICOMDIR; name it to import what it references")
        source = Source(Door.IMPORT, peer=name[-200:])
        allowed = self._limits.memory_instance_bytes
        # One byte more than fits tells whether it does.
        rest = _read(stream, meta.dataset_offset + allowed + 1 - len(head))
        data = head[meta.dataset_offset :] + rest
        if len(data) <= allowed:
            arrival = self._arrival(
                source, meta, memoryview(data), Digest(hashlib.sha256(data).digest())
            )
            return len(data), self._ingest.accept(arrival)
        return self._store_large(source, meta, data, stream)

    def _store_large(
        self, source: Source, meta: FileMeta, start: bytes, stream: Stream
    ) -> tuple[int, Accepted]:
        uids = {
            "sop_class_uid": meta.sop_class_uid,
            "sop_instance_uid": meta.sop_instance_uid,
            "transfer_syntax_uid": meta.transfer_syntax_uid,
        }
        self._ingest.check(self._actor, source, **uids)
        spool = self._ingest.open_spool(self._actor, source, **uids)
        digest = hashlib.sha256()
        size = 0
        try:
            chunk = start
            while chunk:
                size += len(chunk)
                if size > self._limits.instance_bytes:
                    raise TooLarge("instance_bytes", self._limits.instance_bytes)
                digest.update(chunk)
                spool.write(chunk)
                chunk = stream.read(MIB)
            arrival = self._arrival(source, meta, spool, Digest(digest.digest()))
            return size, self._ingest.accept(arrival)
        except BaseException:
            spool.abort()
            raise

    def _file_meta(self, head: bytes) -> FileMeta:
        try:
            meta = read_file_meta(head, accept_without_preamble=self._bare)
        except MalformedObject as error:
            if head[PREAMBLE : PREAMBLE + 4] == b"DICM":
                raise
            raise _NotDicom(str(error)) from error
        if meta is None:
            raise MalformedObject("File Meta Information is cut off", 0x00020000)
        return meta

    def _arrival(
        self,
        source: Source,
        meta: FileMeta,
        dataset: memoryview | Spool,
        digest: Digest,
    ) -> Arrival:
        return Arrival(
            self._actor,
            source,
            meta.transfer_syntax_uid,
            dataset,
            digest,
            claimed_class_uid=meta.sop_class_uid or None,
            claimed_instance_uid=meta.sop_instance_uid or None,
        )

    def _count(self, outcome: str, size: int = 0) -> None:
        with self._lock:
            setattr(self._summary, outcome, getattr(self._summary, outcome) + 1)
            self._summary.n_bytes += size
        self._finish(size)

    def _reject(self, name: str, reason: str) -> None:
        with self._lock:
            self._summary.n_rejected += 1
            self._summary.reasons[reason] += 1
            if len(self._summary.rejected) < MAX_LISTED:
                self._summary.rejected.append(Rejected(name, reason))
        self._finish(0)

    def _finish(self, size: int) -> None:
        if self._progress is not None:
            self._progress.finished(size)

    def _note_found(self) -> None:
        if self._progress is not None:
            self._progress.found(1)


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the regular files below `folder`, sorted; never through a link."""
    pending = [folder]
    while pending:
        current = pending.pop()
        folders: list[Path] = []
        with suppress(OSError), os.scandir(current) as entries:
            for entry in sorted(entries, key=lambda one: one.name):
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                elif entry.is_file(follow_symlinks=False):
                    yield Path(entry.path)
        pending += reversed(folders)


def _open(path: Path) -> BinaryIO:
    return path.open("rb")


def _read(stream: Stream, size: int) -> bytes:
    """Read `size` bytes, less only at the end of the stream."""
    parts = []
    while size > 0:
        part = stream.read(size)
        if not part:
            break
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _is_dicomdir(path: Path) -> bool:
    if path.name.upper() == "DICOMDIR":
        return True
    with path.open("rb") as file:
        head = file.read(HEAD)
    with suppress(ImagingError):
        meta = read_file_meta(head)
        return meta is not None and meta.sop_class_uid == MEDIA_STORAGE_DIRECTORY
    return False


def _shown(name: str) -> str:
    """Return a name from outside, fit for a line of text."""
    return "".join(c if c.isprintable() else "?" for c in name)[:200]
