"""Sealing: a settled series in a pack of its own, kept in the object store.

The records are copied in presentation order, stored, read back and compared; then all
of them change place in one transaction, and what they came from is retired once it is
empty. When a series grows, only what has come is sealed: writing all of it again would
cost more with every addition, and a deletion rewrites the smaller pack.

A series' pack is made and known to the index before it is filled, so that a job that
is killed at any point leaves at most a row and an object without instances, which
`Retirement` removes after a day. The job starts over and finds what is still to do.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pacs.repository import lifecycle
from pacs.repository import packs as rows
from pacs.repository.packs import Live
from pacs.services.retirement import Retirement
from pacs.services.settling import SETTLED
from storage.db.engine import Database
from storage.kernel.clock import Clock
from storage.kernel.errors import CorruptData, LostRace, Unavailable
from storage.objects.protocol import ObjectStore
from storage.outbox import Event
from storage.packs.format import Location
from storage.packs.reader import PackGone, PackReader, object_key
from storage.packs.seal import PackBuilder, new_key, whole_length

log = logging.getLogger(__name__)

#: What the follower listens to.
KINDS = frozenset({SETTLED})


class Jobs(Protocol):
    """Where durable jobs are asked for."""

    def enqueue(self, name: str, key: str, payload: Mapping[str, Any]) -> bool:
        """Ask for one job; False when it was asked for before."""
        ...


class Sealing:
    """Seal the settled series whose records lie on this node.

    Parameters
    ----------
    database : Database
    reader : PackReader
    objects : ObjectStore
    retirement : Retirement
    clock : Clock
    folder : Path
        Of the local packs; takes a pack while it is made.
    node_id : str
    pack_bytes : int
        A longer series gets several packs.
    min_free_bytes : int
    """

    def __init__(
        self,
        *,
        database: Database,
        reader: PackReader,
        objects: ObjectStore,
        retirement: Retirement,
        clock: Clock,
        folder: Path,
        node_id: str,
        pack_bytes: int,
        min_free_bytes: int = 0,
    ) -> None:
        self._database = database
        self._reader = reader
        self._objects = objects
        self._retirement = retirement
        self._clock = clock
        self._folder = folder
        self._node_id = node_id
        self._pack_bytes = pack_bytes
        self._min_free_bytes = min_free_bytes

    @property
    def job(self) -> str:
        """Name of the job, and of the follower: each node seals what it can read."""
        return f"seal.{self._node_id}"

    def follow(self, event: Event, jobs: Jobs) -> None:
        """Ask for a job for each series of the study with something to seal here."""
        study_uid = str(event.payload["study"])
        version = int(event.payload["version"])
        with self._database.read() as connection:
            study_pk = lifecycle.find_study(connection, event.tenant, study_uid)
            if study_pk is None:
                return
            found = rows.series_to_seal(
                connection, event.tenant, study_pk, self._node_id
            )
        for series_uid in found:
            # Versions begin again when the index is rebuilt; the event's time does not.
            key = f"{event.tenant}:{series_uid}:{version}:{event.created_us}"
            jobs.enqueue(
                self.job,
                key,
                {"tenant": event.tenant, "series": series_uid, "version": version},
            )

    def seal(self, payload: Mapping[str, Any]) -> dict[str, int]:
        """Seal what of a series lies in local packs of this node; the job's handler.

        Returns
        -------
        dict
            `instances`, `packs`, `bytes` sealed now.

        Raises
        ------
        DependencyDown, StorageFull, LostRace
            Nothing is lost by doing it again.
        """
        tenant, series_uid = str(payload["tenant"]), str(payload["series"])
        with self._database.read() as connection:
            found = rows.unsealed(connection, tenant, series_uid, self._node_id)
        done = {"instances": 0, "packs": 0, "bytes": 0}
        for part in self._parts(found):
            moved, size = self._seal_part(tenant, part)
            done["instances"] += moved
            done["packs"] += moved > 0
            done["bytes"] += size
        with self._database.write() as connection:
            rows.note_sealed(connection, tenant, series_uid, int(payload["version"]))
        self._retire({one.location.pack_key for one in found})
        log.info(
            "series sealed",
            extra={
                "event": "series.sealed",
                "tenant": tenant,
                "series": series_uid,
                **done,
            },
        )
        return done

    def _parts(self, found: Sequence[Live]) -> Iterator[list[Live]]:
        part: list[Live] = []
        size = 0
        for one in found:
            length = whole_length(one.location)
            if part and size + length > self._pack_bytes:
                yield part
                part, size = [], 0
            part.append(one)
            size += length
        if part:
            yield part

    def _seal_part(self, tenant: str, part: Sequence[Live]) -> tuple[int, int]:
        """Seal some records into one pack; return how many, and its size."""
        key = new_key()
        # A store that is down is found out before anything is copied or begun.
        self._objects.stat(object_key(key))
        with self._database.write() as connection:
            rows.register_pack(
                connection,
                key=key,
                tenant=tenant,
                kind="sealed",
                node_id=self._node_id,
                place="object",
                now_us=self._clock.now_us(),
            )
        with PackBuilder(
            self._folder, key, min_free_bytes=self._min_free_bytes
        ) as builder:
            try:
                moved = list(self._copy(builder, part))
                if moved:
                    builder.put(self._objects)
            except Unavailable:
                self._undo(key)
                raise
            if moved:
                self._swap(builder, moved)
                return len(moved), builder.size
        self._undo(key)
        return 0, 0

    def _copy(
        self, builder: PackBuilder, part: Sequence[Live]
    ) -> Iterator[tuple[Live, Location]]:
        for one in part:
            try:
                yield one, builder.copy(one.wanted(), self._reader.read)
            except CorruptData:
                # It stays where it is: verification names it, and the rest is sealed.
                log.error(  # noqa: TRY400 - the place says it all
                    "record is damaged",
                    extra={
                        "event": "record.damaged",
                        "pack": one.location.pack_key,
                        "offset": one.location.record_offset,
                    },
                )
            except PackGone as error:
                raise LostRace("a record moved while it was being sealed") from error

    def _swap(
        self, builder: PackBuilder, moved: Sequence[tuple[Live, Location]]
    ) -> None:
        try:
            with self._database.write() as connection:
                if not rows.swap(
                    connection,
                    builder.key,
                    moved,
                    size=builder.size,
                    sha256=builder.digest(),
                ):
                    raise LostRace("a record changed while it was being sealed")
        except LostRace:
            # After any other failure nobody knows whether the swap is in force.
            self._undo(builder.key)
            raise

    def _undo(self, key: str) -> None:
        """Remove a pack that was not needed; what fails here is removed in a day."""
        try:
            self._retirement.remove_bytes(key, "object")
            with self._database.write() as connection:
                rows.forget_pack(connection, key)
        except Unavailable as error:
            log.warning(
                "unfinished pack stays: %s",
                error,
                extra={"event": "pack.stays", "pack": key, "code": error.code},
            )

    def _retire(self, keys: set[str]) -> None:
        for key in sorted(keys):
            with self._database.read() as connection:
                pack = rows.find_pack(connection, key)
                alive = pack is None or bool(rows.live_bytes(connection, pack.pk))
            if pack is not None and not alive and pack.state == "closed":
                self._retirement.retire(pack)
