"""HTJ2K renditions of settled series, beside the bytes that were received.

What was received stays as it is and is what everything is made from; a rendition is a
copy of the frames in an encoding that viewers like, made in the background where the
site wants it (``packs.htj2k``). It is an object of its own in the store, with the
frames of a series one after another, each with a checksum. When an instance of the
series is deleted or replaced, the whole object goes, at once: nothing of a deleted
image lives on in a copy. The next settling makes another.

A rendition is known to the index before it is written, so that work that is cut off
leaves a row by which `tick` finds what to remove.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import tempfile
from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from crc32c import crc32c

from pacs.domain.study import StoredInstance
from pacs.imaging import syntaxes
from pacs.imaging.codecs import CODECS
from pacs.imaging.encoders import HTJ2K_LOSSLESS, HTJ2K_LOSSLESS_RPCL
from pacs.repository import lifecycle, locate
from pacs.repository import renditions as rows
from pacs.services.frames import FrameForm
from pacs.services.settling import SETTLED
from pacs.services.sources import ByteSource
from storage.db.engine import Database
from storage.kernel.clock import Clock
from storage.kernel.errors import (
    CorruptData,
    DependencyDown,
    Gone,
    ImagingError,
    InvalidInput,
    LostRace,
    NotFound,
    StorageFull,
    Unavailable,
    Unsupported,
)
from storage.kernel.types import Actor, Role, TenantId
from storage.objects.protocol import ObjectStore
from storage.outbox import Event
from storage.packs.seal import new_key

log = logging.getLogger(__name__)

JOB: Final = "htj2k"
KINDS: Final = frozenset({SETTLED})
#: The transfer syntaxes that one rendition answers: each code stream is both.
SYNTAXES: Final = frozenset((HTJ2K_LOSSLESS, HTJ2K_LOSSLESS_RPCL))
#: After which a rendition that was being made counts as abandoned.
ABANDONED_US: Final = 86_400_000_000
PREFIX: Final = ".rendition-"
#: Deletions, and renditions beside them, that one tick looks at.
DELETIONS: Final = 2000
LOOKED_AT: Final = 20
_NO_SPACE: Final = frozenset((28, 122, 27))  # ENOSPC, EDQUOT, EFBIG


class Jobs(Protocol):
    """Where durable jobs are asked for."""

    def enqueue(self, name: str, key: str, payload: Mapping[str, Any]) -> bool:
        """Ask for one job; False when it was asked for before."""
        ...


class Frames(Protocol):
    """Where frames come from: the retrieve service."""

    def frame_count(self, instance: StoredInstance) -> int: ...

    def can_send_as(
        self, instance: StoredInstance, transfer_syntax_uid: str
    ) -> bool: ...

    def frame_forms(
        self,
        instance: StoredInstance,
        numbers: Sequence[int],
        transfer_syntax_uid: str | None = None,
    ) -> list[FrameForm]: ...


def object_key(key: str) -> str:
    """Return the key of a rendition in the object store."""
    return f"renditions/{key[:2]}/{key}.htj2k"


@dataclass(frozen=True, slots=True)
class RenditionReader:
    """Finds frames of an instance in a rendition and reads them."""

    database: Database
    objects: ObjectStore

    def forms(
        self, instance: StoredInstance, numbers: Sequence[int], target: str
    ) -> list[FrameForm] | None:
        """Return frames in `target`; None when there is no rendition of them.

        Opening one raises `Gone` when the rendition is, and `CorruptData` when the
        frame fails its checksum.
        """
        if target not in SYNTAXES:
            return None
        with self.database.read() as connection:
            kept = rows.find(connection, instance.pk)
        if kept is None:
            return None
        table = _unpacked(kept.table_bytes)
        if max(numbers, default=0) * 3 > len(table):
            return None
        forms = []
        for number in numbers:
            offset, length, crc = table[3 * number - 3 : 3 * number]
            read = partial(self._frame, kept.key, offset, length, crc, target)
            forms.append(FrameForm(target, length, read))
        return forms

    def _frame(
        self, key: str, offset: int, length: int, crc: int, target: str
    ) -> ByteSource:
        try:
            data = self.objects.read(object_key(key), offset, length)
        except NotFound as error:
            raise Gone("the rendition has been removed") from error
        if len(data) != length or crc32c(data) != crc:
            raise CorruptData("a frame of a rendition fails its checksum")
        return ByteSource.of(data, target, transcoded=True)


class Renditions:
    """Make and remove renditions.

    Parameters
    ----------
    database : Database
    objects : ObjectStore
    frames : Frames
    clock : Clock
    folder : Path
        Takes a rendition while it is made.
    threads : int
        Frames that are encoded at a time.
    """

    def __init__(
        self,
        *,
        database: Database,
        objects: ObjectStore,
        frames: Frames,
        clock: Clock,
        folder: Path,
        threads: int = 1,
    ) -> None:
        self._database = database
        self._objects = objects
        self._frames = frames
        self._clock = clock
        self._folder = folder
        self._threads = threads
        self._after = 0
        self._after_deletion = 0

    def follow(self, event: Event, jobs: Jobs) -> None:
        """Ask for a job for each series of the study with something to encode."""
        study_uid = str(event.payload["study"])
        version = int(event.payload["version"])
        with self._database.read() as connection:
            study_pk = lifecycle.find_study(connection, event.tenant, study_uid)
            if study_pk is None:
                return
            found = rows.series_of(connection, event.tenant, study_pk)
        for series_uid in found:
            # Versions begin again when the index is rebuilt; the event's time does not.
            key = f"{event.tenant}:{series_uid}:{version}:{event.created_us}"
            jobs.enqueue(
                JOB,
                key,
                {"tenant": event.tenant, "study": study_uid, "series": series_uid},
            )

    def make(self, payload: Mapping[str, Any]) -> dict[str, int]:
        """Encode what of a series has no rendition yet; the job's handler.

        Returns
        -------
        dict
            `instances`, `frames`, `bytes` encoded now.

        Raises
        ------
        DependencyDown, StorageFull, LostRace
            Nothing is lost by doing it again.
        """
        tenant, series_uid = str(payload["tenant"]), str(payload["series"])
        wanted = [
            one
            for one in self._instances(tenant, str(payload["study"]), series_uid)
            if self._is_worth_it(one)
        ]
        if not wanted:
            return {"instances": 0, "frames": 0, "bytes": 0}
        key = new_key()
        # A store that is down is found out before anything is encoded.
        self._objects.stat(object_key(key))
        with self._database.write() as connection:
            pk = rows.begin(
                connection,
                key=key,
                tenant=tenant,
                series_uid=series_uid,
                transfer_syntax_uid=HTJ2K_LOSSLESS_RPCL,
                now_us=self._clock.now_us(),
            )
        try:
            done = self._write(key, pk, wanted)
        except Unavailable:
            self._remove(pk, key)
            raise
        log.info(
            "series encoded",
            extra={
                "event": "rendition.made",
                "tenant": tenant,
                "series": series_uid,
                **done,
            },
        )
        return done

    def tick(self) -> int:
        """Remove a few renditions that nobody may read any more; return how many.

        Looks at the series of new deletions, and at a few more renditions each time:
        work that was killed is found there, and what a deletion left behind.
        """
        before_us = self._clock.now_us() - ABANDONED_US
        with self._database.read() as connection:
            series, deletion = rows.series_deleted_from(
                connection, self._after_deletion, DELETIONS
            )
            found = [
                one
                for tenant, series_uid in series
                for one in rows.of_series(connection, tenant, series_uid)
            ]
            walked = rows.after(connection, self._after, LOOKED_AT)
        broken = {one.pk: one.key for one in found + walked if one.is_broken(before_us)}
        for pk, key in broken.items():
            self._remove(pk, key)
        self._after_deletion = deletion
        # From the last one on it begins again.
        self._after = walked[-1].pk if len(walked) == LOOKED_AT else 0
        return len(broken)

    def _instances(
        self, tenant: str, study_uid: str, series_uid: str
    ) -> list[StoredInstance]:
        actor = Actor(TenantId(tenant), JOB, roles=frozenset({Role.SYSTEM}))
        with self._database.read() as connection:
            lacking = rows.without(connection, tenant, series_uid)
            found = locate.instances(
                connection, actor, study_uid=study_uid, series_uid=series_uid
            )
        return [one for one in found if one.pk in lacking]

    def _is_worth_it(self, instance: StoredInstance) -> bool:
        """Tell whether an instance gets frames beside those it has.

        Lossy frames are sent as they are, and HTJ2K is what this makes.
        """
        uid = instance.transfer_syntax_uid
        if syntaxes.get(uid).lossy or CODECS.get(uid) == "htj2k":
            return False
        try:
            return self._frames.can_send_as(instance, HTJ2K_LOSSLESS_RPCL)
        except ImagingError:
            return False

    def _write(
        self, key: str, pk: int, wanted: Sequence[StoredInstance]
    ) -> dict[str, int]:
        """Encode, store, and tell the index."""
        self._sweep()
        with (
            tempfile.NamedTemporaryFile(
                dir=self._folder, prefix=PREFIX, suffix=".tmp"
            ) as file,
            ThreadPoolExecutor(self._threads, "htj2k") as pool,
        ):
            writer = _Writer(file.fileno())
            for instance in wanted:
                self._encode(writer, pool, instance)
            if not writer.tables:
                self._remove(pk, key)
                return writer.done()
            os.fsync(file.fileno())
            sha256 = writer.digest.hexdigest()
            self._objects.put_file(object_key(key), Path(file.name), sha256)
        self._check(key, writer.size, sha256)
        with self._database.write() as connection:
            if not rows.finish(
                connection,
                pk,
                writer.tables,
                size=writer.size,
                sha256=writer.digest.digest(),
            ):
                raise LostRace("an instance changed while it was being encoded")
        return writer.done()

    def _encode(
        self, writer: _Writer, pool: ThreadPoolExecutor, instance: StoredInstance
    ) -> None:
        """Write the frames of an instance, or nothing when one cannot be encoded.

        An object that is damaged or nonsense keeps what it has: verification, and
        whoever asks for its frames, are told.
        """
        try:
            numbers = range(1, self._frames.frame_count(instance) + 1)
            forms = self._frames.frame_forms(instance, numbers, HTJ2K_LOSSLESS_RPCL)
            with writer.instance(instance):
                for data in _ahead(pool, forms, 2 * self._threads):
                    writer.add(data)
        except NotFound as error:
            raise LostRace("an object moved while it was being encoded") from error
        except (CorruptData, InvalidInput, Unsupported) as error:
            log.warning(
                "not encoded: %s",
                error,
                extra={
                    "event": "rendition.skipped",
                    "pack": instance.pack_key,
                    "offset": instance.object_offset,
                },
            )

    def _sweep(self) -> None:
        """Remove files of work that was killed."""
        before = self._clock.now_us() / 1e6 - ABANDONED_US / 1e6
        for path in self._folder.glob(f"{PREFIX}*"):
            with suppress(OSError):
                if path.stat().st_mtime < before:
                    path.unlink()

    def _check(self, key: str, size: int, sha256: str) -> None:
        info = self._objects.stat(object_key(key))
        if info is None or info.size != size or info.sha256 not in {"", sha256}:
            raise DependencyDown("the object store does not hold what was written")

    def _remove(self, pk: int, key: str) -> None:
        """Remove a rendition: from the index first, so that nobody reads it."""
        try:
            with self._database.write() as connection:
                rows.detach(connection, pk)
            self._objects.delete(object_key(key))
            with self._database.write() as connection:
                rows.forget(connection, pk)
        except Unavailable as error:
            log.warning(
                "rendition stays: %s",
                error,
                extra={"event": "rendition.stays", "code": error.code},
            )


def _read(form: FrameForm) -> bytes:
    source = form.open()
    return source.read(0, source.length)


def _ahead(
    pool: ThreadPoolExecutor, forms: Sequence[FrameForm], window: int
) -> Iterator[bytes]:
    """Yield frames in order while the next `window` are encoded."""
    waiting: deque[Future[bytes]] = deque()
    try:
        for form in forms:
            waiting.append(pool.submit(_read, form))
            if len(waiting) > window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for one in waiting:
            one.cancel()


class _Writer:
    """Appends frames to a file, and remembers where they are."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._table = array("Q")
        self.digest = hashlib.sha256()
        self.size = 0
        self.n_frames = 0
        self.tables: dict[int, tuple[bytes, bytes]] = {}

    @contextmanager
    def instance(self, instance: StoredInstance) -> Iterator[None]:
        """Take the frames of one instance; all or, when that fails, none."""
        before, kept = self.size, self.digest.copy()
        self._table = array("Q")
        try:
            yield
        except BaseException:
            self.size, self.digest = before, kept
            os.ftruncate(self._fd, before)
            raise
        if self._table:
            self.n_frames += len(self._table) // 3
            self.tables[instance.pk] = (instance.digest, _packed(self._table))

    def add(self, data: bytes) -> None:
        """Append one frame."""
        view, position = memoryview(data), self.size
        try:
            while view:
                written = os.pwrite(self._fd, view, position)
                position += written
                view = view[written:]
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise StorageFull("no space left for renditions") from error
            raise DependencyDown(f"rendition: {error.strerror}") from error
        self._table.extend((self.size, len(data), crc32c(data)))
        self.digest.update(data)
        self.size = position

    def done(self) -> dict[str, int]:
        """Return what has been written."""
        return {
            "instances": len(self.tables),
            "frames": self.n_frames,
            "bytes": self.size,
        }


def _packed(table: array[int]) -> bytes:
    if sys.byteorder == "big":
        table.byteswap()
    return table.tobytes()


def _unpacked(raw: bytes) -> array[int]:
    table = array("Q")
    table.frombytes(raw)
    if sys.byteorder == "big":
        table.byteswap()
    return table
