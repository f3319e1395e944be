"""Packs that nobody needs any more: retired first, unlinked after the longest read.

A local pack is only retired once every record in it is known to live elsewhere or to
be deleted, and once the tombstones in it that still bury something are repeated in
another pack: packs are the log, and nothing is dropped from a log by mistake.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pacs.repository import packs as rows
from pacs.repository.packs import PackRow
from storage.db.engine import Database
from storage.kernel.clock import Clock
from storage.kernel.errors import CorruptData, DependencyDown, Unavailable
from storage.objects.protocol import ObjectStore
from storage.packs.format import Kind, Record, RecordHeader, RecordInfo
from storage.packs.reader import PackReader, object_key
from storage.packs.recover import Damage, is_alive, iter_records
from storage.packs.writer import PackWriter, pack_path, sync_folder

log = logging.getLogger(__name__)

#: Packs one tick looks at, and that it unlinks.
LOOKED_AT = 200
UNLINKED = 50
#: Tombstones of one append.
TOMBSTONES = 1000
#: After which a pack that was being made counts as abandoned.
ABANDONED_US = 86_400_000_000
#: How long a pack with unknown records is left alone before it is read again.
UNKNOWN_US = 3_600_000_000
MAX_REMEMBERED = 1000


@dataclass(slots=True)
class Contents:
    """What a local pack holds beside the records the index refers to.

    Attributes
    ----------
    unknown : list of RecordInfo
        Objects that neither live elsewhere nor were deleted: perhaps still on their
        way into the index.
    tombstones : list of RecordHeader
        Those that still bury something.
    """

    unknown: list[RecordInfo] = field(default_factory=list)
    tombstones: list[RecordHeader] = field(default_factory=list)


class Retirement:
    """Retire, unlink, and tidy up after work that was cut off.

    Parameters
    ----------
    database : Database
    packs : PackWriter
        This process' own; takes tombstones that must stay.
    reader : PackReader
    objects : ObjectStore
    clock : Clock
    node_id : str
    grace_seconds : float
        Longer than the longest read.
    """

    def __init__(
        self,
        *,
        database: Database,
        packs: PackWriter,
        reader: PackReader,
        objects: ObjectStore,
        clock: Clock,
        node_id: str,
        grace_seconds: float,
    ) -> None:
        self._database = database
        self._packs = packs
        self._reader = reader
        self._objects = objects
        self._clock = clock
        self._node_id = node_id
        self._grace_us = int(grace_seconds * 1e6)
        self._after_pk = 0
        self._left: dict[str, int] = {}

    def tick(self) -> int:
        """Do a bounded part of what is due; return how many packs changed."""
        return self._sweep() + self._unlink_due() + self._drop_abandoned()

    def path(self, pack: PackRow) -> Path:
        """Return where a local pack lies."""
        return pack_path(self._packs.folder, pack.key)

    def retire(self, pack: PackRow, *, copied: Collection[int] = ()) -> bool:
        """Retire a closed pack without live records, if that is safe.

        Parameters
        ----------
        copied : collection of int
            Offsets of records the caller has copied into another pack.
        """
        if pack.place == "local":
            path = self.path(pack)
            if path.exists():
                if is_alive(path):
                    return False
                contents = self.contents(pack, skip=copied)
                if contents.unknown:
                    self._leave(pack, "it has records the index does not know")
                    return False
                self._repeat(pack.tenant, contents.tombstones)
        delete_after_us = self._clock.now_us() + self._grace_us
        with self._database.write() as connection:
            done = rows.retire(connection, pack.key, delete_after_us)
        if done:
            log.info(
                "pack retired",
                extra={"event": "pack.retired", "pack": pack.key, "kind": pack.kind},
            )
        return done

    def contents(self, pack: PackRow, *, skip: Collection[int] = ()) -> Contents:
        """Read the headers of a closed local pack, and judge each record.

        Parameters
        ----------
        skip : collection of int
            Offsets of records that are accounted for.

        Raises
        ------
        CorruptData, DependencyDown
            The file cannot be read.
        """
        objects: list[RecordInfo] = []
        stones: list[RecordHeader] = []
        known = set(skip)
        try:
            for found in iter_records(self.path(pack), check_objects=False):
                if isinstance(found, Damage):
                    continue
                if found.kind is Kind.TOMBSTONE:
                    stones.append(found.header)
                elif found.location.record_offset not in known:
                    objects.append(found)
        except OSError as error:
            raise DependencyDown(f"pack storage: {error.strerror}") from error
        here = _latest(stones)
        uids = sorted(
            {info.header.sop_instance_uid for info in objects}
            | {stone.sop_instance_uid for stone in stones}
        )
        with self._database.read() as connection:
            indexed = rows.indexed(connection, pack.tenant, uids)
            buried = rows.buried(connection, pack.tenant, uids)
        contents = Contents()
        for info in objects:
            key = (info.header.sop_instance_uid, info.digest)
            until = buried[key].until_us if key in buried else 0
            until = max(until, here.get(key, 0))
            if key[0] not in indexed and info.header.received_us > until:
                contents.unknown.append(info)
        for stone in stones:
            state = buried.get((stone.sop_instance_uid, bytes.fromhex(stone.digest)))
            if state is None or not state.erased:
                contents.tombstones.append(stone)
        return contents

    def _leave(self, pack: PackRow, why: str) -> None:
        """Leave a pack to recovery for a while, and say so."""
        if len(self._left) >= MAX_REMEMBERED:
            self._left.clear()
        self._left[pack.key] = self._clock.now_us()
        log.warning(
            "pack is left alone: %s",
            why,
            extra={"event": "pack.left", "pack": pack.key},
        )

    def _repeat(self, tenant: str, stones: Iterable[RecordHeader]) -> None:
        """Append tombstones again, durably, before the pack they lie in goes."""
        waiting = list(stones)
        for start in range(0, len(waiting), TOMBSTONES):
            records = [
                Record(stone, (), bytes(32), Kind.TOMBSTONE)
                for stone in waiting[start : start + TOMBSTONES]
            ]
            placed = self._packs.append(records)
            self._packs.sync()
            with self._database.write() as connection:
                for key in {location.pack_key for location in placed}:
                    rows.register_pack(
                        connection,
                        key=key,
                        tenant=tenant,
                        kind="log",
                        node_id=self._node_id,
                        now_us=self._clock.now_us(),
                    )

    def _sweep(self) -> int:
        """Retire packs that have become empty, a stretch of them at a time."""
        with self._database.read() as connection:
            empty, self._after_pk = rows.empty_packs(
                connection, self._node_id, self._after_pk, LOOKED_AT
            )
        now_us = self._clock.now_us()
        return sum(
            self._try_to_retire(pack)
            for pack in empty
            if now_us - self._left.get(pack.key, -UNKNOWN_US) >= UNKNOWN_US
        )

    def _try_to_retire(self, pack: PackRow) -> bool:
        """Retire one of many; one that cannot be read does not hold up the others."""
        try:
            return self.retire(pack)
        except (CorruptData, DependencyDown) as error:
            self._leave(pack, str(error))
            return False

    def _unlink_due(self) -> int:
        with self._database.read() as connection:
            due = rows.to_unlink(
                connection, self._node_id, self._clock.now_us(), UNLINKED
            )
        return sum(map(self._unlink, due))

    def _drop_abandoned(self) -> int:
        """Remove what a job that was killed had begun to make."""
        before_us = self._clock.now_us() - ABANDONED_US
        with self._database.read() as connection:
            left = rows.abandoned(connection, before_us, UNLINKED)
        return sum(map(self._unlink, left))

    def _unlink(self, pack: PackRow) -> bool:
        """Remove a pack's bytes, then its row: a crash between repeats the first."""
        with self._database.read() as connection:
            needed = bool(rows.live(connection, pack.pk))
        if needed:
            with self._database.write() as connection:
                rows.revive(connection, pack.key)
            return False
        try:
            self.remove_bytes(pack.key, pack.place)
        except Unavailable as error:
            log.warning(
                "pack stays: %s",
                error,
                extra={"event": "pack.stays", "pack": pack.key, "code": error.code},
            )
            return False
        with self._database.write() as connection:
            rows.forget_pack(connection, pack.key)
        log.info(
            "pack removed",
            extra={"event": "pack.removed", "pack": pack.key, "kind": pack.kind},
        )
        return True

    def remove_bytes(self, key: str, place: str) -> None:
        """Remove a pack that nothing refers to from where it lies, durably."""
        self._reader.forget(key)
        if place == "object":
            self._objects.delete(object_key(key))
            return
        path = pack_path(self._packs.folder, key)
        if path.exists():
            path.unlink()
            sync_folder(path.parent)


def _latest(stones: Iterable[RecordHeader]) -> dict[tuple[str, bytes], int]:
    """Return, by UID and digest, until when tombstones bury."""
    found: dict[tuple[str, bytes], int] = {}
    for stone in stones:
        key = (stone.sop_instance_uid, bytes.fromhex(stone.digest))
        found[key] = max(found.get(key, 0), stone.received_us)
    return found
