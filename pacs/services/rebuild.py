"""Derive the index anew from the first record of every pack.

What packs cannot give back (accounts, peers, the reasons of deletions) stays as it is;
it belongs to the backup. The change feed gets a new epoch, so that followers start
over, and every study settles again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import delete, insert, select

from pacs.repository.arrivals import Written
from pacs.repository.tables import (
    Deletion,
    FrameTableRow,
    Instance,
    InstanceRendition,
    Patient,
    Series,
    SeriesMetadata,
    Study,
)
from pacs.services.ingest import ORPHAN, IngestService
from pacs.services.recovery import LARGE_BYTES, Finding
from pacs.services.scratch import Scratch, batched
from pacs.services.verify import PACKS, Progress, fetched, pack_key
from storage.db.engine import Database
from storage.db.tables import OutboxEvent, Pack
from storage.kernel.clock import Clock
from storage.kernel.errors import Conflict, CorruptData, ImagingError, NotFound
from storage.objects.protocol import ObjectInfo, ObjectStore
from storage.outbox import ChangeFeed
from storage.packs.format import Buffer, RecordInfo
from storage.packs.reader import object_key
from storage.packs.recover import (
    Damage,
    is_alive,
    iter_pack_files,
    iter_records,
    read_record,
    remove_partial,
)
from storage.packs.writer import pack_path

log = logging.getLogger(__name__)

MAX_FINDINGS = 10_000
BATCH = 500
#: Children before their parents.
_TABLES = (
    SeriesMetadata,
    InstanceRendition,
    FrameTableRow,
    Instance,
    Series,
    Study,
    Patient,
    OutboxEvent,
    Pack,
)


@dataclass(slots=True)
class Rebuilt:
    """What a rebuild found and made."""

    packs: int = 0
    records: int = 0
    instances: int = 0
    buried: int = 0
    epoch: str = ""
    n_findings: int = 0
    findings: list[Finding] = field(default_factory=list)

    def report(self, finding: Finding) -> None:
        self.n_findings += 1
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(finding)


@dataclass(slots=True)
class Rebuilder:
    """Rebuild the index of a node that does not run.

    The caller holds the lock of the data folder.

    Attributes
    ----------
    database : Database
        With the tables made.
    folder : Path
        Local packs.
    ingest : IngestService
        Indexes the records.
    """

    database: Database
    folder: Path
    objects: ObjectStore | None
    ingest: IngestService
    clock: Clock
    node_id: str

    def rebuild(self, *, progress: Progress | None = None) -> Rebuilt:
        """Empty the index and fill it from the packs.

        It can be repeated: one that was cut off is done again from the start.

        Raises
        ------
        Conflict
            A process appends to a pack.
        DependencyDown
            Database or object store do not answer; the index is as it was when the
            packs could not be read, and partly filled when that came later.
        """
        files = list(iter_pack_files(self.folder))
        if any(map(is_alive, files)):
            raise Conflict("a process is storing into this folder: stop the node first")
        remove_partial(self.folder)
        done = Rebuilt()
        remote = list(self.objects.list(PACKS)) if self.objects is not None else []
        # Each pack is read twice: once for what it holds, once for what is indexed.
        total = 2 * (sum(p.stat().st_size for p in files) + sum(o.size for o in remote))
        count = _Counter(total, progress)
        with Scratch(self.folder.parent) as scratch:
            rows = [self._read_local(path, scratch, done, count) for path in files]
            rows += [self._read_object(one, scratch, done, count) for one in remote]
            for kept in scratch.decide():
                done.report(
                    Finding(
                        "record.contradicts",
                        kept.tenant,
                        instance_uid=kept.uid,
                        pack=kept.pack,
                        offset=kept.offset,
                    )
                )
            self._empty(rows)
            self._keep_erasing(scratch, done)
            local = self._local_objects(scratch, count)
            self._index(local, done)
            for key in scratch.remote_packs():
                self._index_object(key, scratch, done, count)
        done.epoch = ChangeFeed(self.database).new_epoch()
        log.info(
            "index rebuilt",
            extra={
                "event": "index.rebuilt",
                "packs": done.packs,
                "instances": done.instances,
                "findings": done.n_findings,
            },
        )
        return done

    def _read_local(
        self, path: Path, scratch: Scratch, done: Rebuilt, count: _Counter
    ) -> dict[str, object]:
        first, n, alone = self._read(path, path.stem, "local", scratch, done)
        size = path.stat().st_size
        count.add(size)
        return {
            "key": path.stem,
            "tenant": first.header.tenant if first else "",
            "kind": "large" if n == 1 and alone > LARGE_BYTES else "log",
            "place": "local",
            "node_id": self.node_id,
            "state": "closed",
            "size_bytes": size,
            "sha256": None,
            "created_us": first.header.received_us if first else self.clock.now_us(),
        }

    def _read_object(
        self, one: ObjectInfo, scratch: Scratch, done: Rebuilt, count: _Counter
    ) -> dict[str, object]:
        key = pack_key(one.key)
        if self.objects is None:
            raise NotFound("no object store")
        with fetched(self.objects, key, one.size, self.folder.parent) as (path, digest):
            first, _, _ = self._read(path, key, "object", scratch, done)
        count.add(one.size)
        return {
            "key": key,
            "tenant": first.header.tenant if first else "",
            "kind": "sealed",
            "place": "object",
            "node_id": self.node_id,
            "state": "closed",
            "size_bytes": one.size,
            "sha256": bytes.fromhex(digest),
            "created_us": first.header.received_us if first else self.clock.now_us(),
        }

    def _read(
        self, path: Path, key: str, place: str, scratch: Scratch, done: Rebuilt
    ) -> tuple[RecordInfo | None, int, int]:
        """Note what a pack holds; return its first record, how many, the largest."""
        first: RecordInfo | None = None
        n = largest = 0
        done.packs += 1
        try:
            for one in iter_records(path):
                if isinstance(one, Damage):
                    done.report(Finding("pack.damaged", pack=key, offset=one.start))
                    continue
                first = first or one
                n += 1
                largest = max(largest, one.location.object_length)
                if one.location.pack_key != key:
                    raise CorruptData("a pack's name is not its key")
                scratch.add(one, place=place)
        except CorruptData as error:
            done.report(Finding("pack.damaged", pack=key, detail=str(error)))
        done.records += n
        return first, n, largest

    def _empty(self, packs: list[dict[str, object]]) -> None:
        with self.database.write() as connection:
            for table in _TABLES:
                connection.execute(delete(table))
            for batch in batched(packs, BATCH):
                connection.execute(insert(Pack), list(batch))

    def _keep_erasing(self, scratch: Scratch, done: Rebuilt) -> None:
        """Note what was deleted and still lies in a pack, so that it is erased."""
        now_us = self.clock.now_us()
        for batch in batched(scratch.buried(), BATCH):
            done.buried += len(batch)
            with self.database.write() as connection:
                keys = {kept.pack for kept, _ in batch}
                known = {
                    (row.pack_key, row.record_offset)
                    for row in connection.execute(
                        select(Deletion.pack_key, Deletion.record_offset).where(
                            Deletion.pack_key.in_(keys)
                        )
                    )
                }
                fresh = [
                    {
                        "tenant": kept.tenant,
                        "study_instance_uid": "",
                        "series_instance_uid": "",
                        "sop_instance_uid": kept.uid,
                        "digest": kept.digest,
                        "pack_key": kept.pack,
                        "record_offset": kept.offset,
                        "actor": "rebuild",
                        "reason": reason,
                        "deleted_us": kept.received_us,
                        "deadline_us": now_us,
                        "reported_version": 0,
                    }
                    for kept, reason in batch
                    if (kept.pack, kept.offset) not in known and reason != ORPHAN
                ]
                if fresh:
                    connection.execute(insert(Deletion), fresh)

    def _local_objects(
        self, scratch: Scratch, count: _Counter
    ) -> Iterator[tuple[RecordInfo, Buffer]]:
        for key, offset in scratch.living_local():
            found = read_record(pack_path(self.folder, key), offset)
            if found is not None:
                count.add(found[0].location.object_length)
                yield found

    def _index_object(
        self, key: str, scratch: Scratch, done: Rebuilt, count: _Counter
    ) -> None:
        if self.objects is None:
            return
        info = self.objects.stat(object_key(key))
        if info is None:
            done.report(Finding("object.missing", pack=key))
            return
        with fetched(self.objects, key, info.size, self.folder.parent) as (path, _):
            found = (read_record(path, offset) for offset in scratch.living_in(key))
            self._index((one for one in found if one is not None), done)
        count.add(info.size)

    def _index(
        self, records: Iterator[tuple[RecordInfo, Buffer]], done: Rebuilt
    ) -> None:
        for one in self.ingest.reindex(records):
            if one.written in {Written.ADDED, Written.REPLACED}:
                done.instances += 1
            elif one.written is None:
                done.buried += 1
            elif one.error is not None:
                done.report(_refused(one.info, one.error))


@dataclass(slots=True)
class _Counter:
    """Tell how far it has come."""

    total: int
    progress: Callable[[int, int], None] | None
    done: int = 0

    def add(self, size: int) -> None:
        self.done = min(self.done + size, self.total)
        if self.progress is not None:
            self.progress(self.done, self.total)


def _refused(info: RecordInfo, error: ImagingError) -> Finding:
    return Finding(
        "record.refused",
        info.header.tenant,
        instance_uid=info.header.sop_instance_uid,
        pack=info.location.pack_key,
        offset=info.location.record_offset,
        detail=error.code,
    )
