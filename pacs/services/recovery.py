"""Bring the index level with the packs: at start, and when a process has died.

The pack is the log. A process that is killed between the sync of its pack and the
commit of its rows leaves whole records that the index does not have, and perhaps a
torn tail. Both lie behind the last indexed record of a pack that nobody appends to;
only that stretch is read. Packs of living processes are locked and left alone.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from sqlalchemy import func, select, update

from pacs.repository.arrivals import Written
from pacs.repository.packs import register_pack
from pacs.repository.tables import Deletion, Instance, Series, Study
from pacs.services.ingest import IngestService, tombstone
from storage.db.engine import Database
from storage.db.tables import Pack
from storage.kernel.errors import (
    CorruptData,
    DuplicateInstance,
    IdentityMismatch,
    ImagingError,
)
from storage.kernel.limits import MIB
from storage.kernel.types import Actor, Role, TenantId
from storage.packs.format import (
    FILE_HEADER_LENGTH,
    Buffer,
    Kind,
    RecordHeader,
    RecordInfo,
)
from storage.packs.recover import (
    Damage,
    claimed,
    cut,
    iter_records,
    record_at,
    view_object,
)
from storage.packs.writer import PARTIAL, PackWriter, pack_path

log = logging.getLogger(__name__)

#: Findings that one report keeps; the rest is only counted.
MAX_FINDINGS = 1000
#: A folder that changed this recently may change again within its time stamp.
SETTLED_SECONDS = 2.0
#: Keys of one query.
CHUNK = 500
#: A lone object longer than this got a pack of its own.
LARGE_BYTES = 4 * MIB


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be; without patient data.

    Attributes
    ----------
    kind : str
        Dotted, stable name.
    offset : int or None
        Of the record in the pack.
    """

    kind: str
    tenant: str = ""
    study_uid: str = ""
    series_uid: str = ""
    instance_uid: str = ""
    pack: str = ""
    offset: int | None = None
    detail: str = ""


@dataclass(slots=True)
class Recovered:
    """What a recovery did.

    Attributes
    ----------
    packs : int
        Packs that were read.
    added : int
        Records that the index did not have.
    buried : int
        Records that lost against acknowledged ones.
    cut_bytes : int
        Length of torn tails.
    partial : int
        Unfinished large objects removed.
    """

    packs: int = 0
    added: int = 0
    buried: int = 0
    cut_bytes: int = 0
    partial: int = 0
    n_findings: int = 0
    findings: list[Finding] = field(default_factory=list)

    def report(self, finding: Finding) -> None:
        self.n_findings += 1
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(finding)
        log.error(
            "recovery finding",
            extra={
                "event": "recovery.finding",
                "kind": finding.kind,
                "tenant": finding.tenant,
                "instance": finding.instance_uid,
                "pack": finding.pack,
                "offset": finding.offset,
                "detail": finding.detail,
            },
        )


class Deleter(Protocol):
    """Completes a deletion whose tombstone was written and whose rows were not."""

    def delete(
        self,
        actor: Actor,
        study_uid: str,
        series_uid: str | None = None,
        instance_uid: str | None = None,
        *,
        reason: str = "",
    ) -> int:
        """Delete an instance; return how many were deleted."""
        ...


def recover(
    *,
    database: Database,
    ingest: IngestService,
    packs: PackWriter,
    node_id: str,
    deletions: Deleter | None = None,
) -> Recovered:
    """Recover everything on this host once; at start, before anything is served."""
    recovery = Recovery(
        database=database,
        ingest=ingest,
        packs=packs,
        node_id=node_id,
        deletions=deletions,
    )
    return recovery.run()


class Recovery:
    """Recover the packs of processes that have died.

    One thread uses it.

    Parameters
    ----------
    database : Database
    ingest : IngestService
        Indexes the records; the code is that of receiving.
    packs : PackWriter
        Takes the tombstones of records that lost.
    node_id : str
        Whose local packs lie in the folder of `packs`.
    deletions : Deleter, optional
        Completes deletions that were cut off; else they are reported.
    """

    def __init__(
        self,
        *,
        database: Database,
        ingest: IngestService,
        packs: PackWriter,
        node_id: str,
        deletions: Deleter | None = None,
    ) -> None:
        self._database = database
        self._ingest = ingest
        self._packs = packs
        self._folder = packs.folder
        self._node_id = node_id
        self._deletions = deletions
        self._looked: dict[str, int] = {}
        self._known: set[str] = set()
        self._strays: set[str] = set()
        self._partials: set[Path] = set()
        self._told: set[str] = set()

    def run(self) -> Recovered:
        """Recover all, and compare the packs that are closed with their rows."""
        done = Recovered()
        self._recover(done)
        self._check_closed(done)
        log.info(
            "recovered",
            extra={
                "event": "recovered",
                "packs": done.packs,
                "added": done.added,
                "cut_bytes": done.cut_bytes,
                "findings": done.n_findings,
            },
        )
        return done

    def tick(self) -> int:
        """Recover what has been abandoned since; return how many packs that were."""
        done = Recovered()
        self._recover(done)
        return done.packs

    def _recover(self, done: Recovered) -> None:
        self._look()
        for path in list(self._partials):
            with claimed(path) as mine:
                if mine:
                    path.unlink(missing_ok=True)
                    done.partial += 1
                if mine or not path.exists():
                    self._partials.discard(path)
        rows = self._open_rows()
        for key in rows:
            self._recover_abandoned(key, rows[key], done)
        for key in sorted(self._without_row(self._strays - rows.keys())):
            self._recover_abandoned(key, None, done)

    def _look(self) -> None:
        """Note files that are new since the last look."""
        now = time.time()
        for folder in os.scandir(self._folder):
            if len(folder.name) != 2 or not folder.is_dir():
                continue
            changed_ns = folder.stat().st_mtime_ns
            if self._looked.get(folder.name) == changed_ns:
                continue
            for name in os.listdir(folder.path):  # noqa: PTH208  # thousands, often
                if name.endswith(".pack"):
                    key = name.removesuffix(".pack")
                    if key not in self._known:
                        self._strays.add(key)
                elif name.endswith(PARTIAL):
                    self._partials.add(Path(folder.path, name))
            if now - changed_ns / 1e9 > SETTLED_SECONDS:
                self._looked[folder.name] = changed_ns

    def _open_rows(self) -> dict[str, int]:
        """Return key and row key of each pack that somebody appends to, or did."""
        with self._database.read() as connection:
            rows = connection.execute(
                select(Pack.key, Pack.id).where(
                    Pack.state == "open",
                    Pack.place == "local",
                    Pack.node_id == self._node_id,
                )
            )
            return {row[0]: row[1] for row in rows}

    def _is_open(self, pk: int) -> bool:
        with self._database.read() as connection:
            state = connection.scalar(select(Pack.state).where(Pack.id == pk))
        return state == "open"

    def _without_row(self, keys: Iterable[str]) -> set[str]:
        """Return those of `keys` that have no row, and remember the others."""
        ordered = sorted(keys)
        found: set[str] = set()
        with self._database.read() as connection:
            for start in range(0, len(ordered), CHUNK):
                chunk = ordered[start : start + CHUNK]
                found |= set(
                    connection.scalars(select(Pack.key).where(Pack.key.in_(chunk)))
                )
        self._known |= found
        self._strays -= found
        return set(ordered) - found

    def _recover_abandoned(self, key: str, pk: int | None, done: Recovered) -> None:
        path = pack_path(self._folder, key)
        with claimed(path) as mine:
            if mine:
                # Another process may have recovered it while we looked.
                if pk is None or self._is_open(pk):
                    done.packs += 1
                    self._recover_pack(path, key, pk, done)
                self._known.add(key)
                self._strays.discard(key)
            elif not path.exists():
                self._strays.discard(key)
                if pk is not None:
                    self._tell(done, Finding("pack.missing", pack=key))

    def _tell(self, done: Recovered, finding: Finding) -> None:
        """Report a finding that stays, once."""
        if finding.pack not in self._told:
            self._told.add(finding.pack)
            done.report(finding)

    def _recover_pack(
        self, path: Path, key: str, pk: int | None, done: Recovered
    ) -> None:
        size = path.stat().st_size
        last = self._last_indexed(pk, key) if pk is not None else None
        start = FILE_HEADER_LENGTH
        try:
            if last is not None:
                info = record_at(path, last)
                if info is None:
                    self._tell(
                        done, Finding("pack.short", pack=key, offset=last)
                    )  # evidence: nothing is cut
                    self._close(key, pk, size)
                    return
                start = info.end
            found = list(iter_records(path, start))
        except CorruptData as error:
            if pk is None and size < FILE_HEADER_LENGTH:
                path.unlink()
            else:
                self._tell(done, Finding("pack.damaged", pack=key, detail=str(error)))
            return
        infos = [one for one in found if isinstance(one, RecordInfo)]
        graves = Graves()
        for one in infos:
            if one.kind is Kind.TOMBSTONE:
                graves.add(one.header)
        living = [
            one for one in infos if one.kind is Kind.OBJECT and not graves.hold(one)
        ]
        self._index(path, living, done)
        self._complete_deletions(graves, done)
        for damage in found:
            if not isinstance(damage, Damage):
                continue
            if damage.torn:
                done.cut_bytes += damage.end - damage.start
            else:
                done.report(Finding("pack.damaged", pack=key, offset=damage.start))
        if pk is None and not infos:
            path.unlink()
            return
        # A torn tail goes, and what the writer had set aside behind the end.
        size = _end(found, start)
        cut(path, size)
        self._close(key, pk, size, infos)
        log.info(
            "pack recovered",
            extra={"event": "pack.recovered", "pack": key, "records": len(infos)},
        )

    def _index(self, path: Path, infos: Sequence[RecordInfo], done: Recovered) -> None:
        large = len(infos) == 1 and infos[0].location.object_length > LARGE_BYTES
        lost = []
        for one in self._ingest.reindex(
            with_objects(path, infos), pack_kind="large" if large else "log"
        ):
            if one.written in {Written.ADDED, Written.REPLACED}:
                done.added += 1
            elif isinstance(one.error, DuplicateInstance | IdentityMismatch):
                lost.append(tombstone(one.info))
            elif one.error is not None:
                done.report(
                    _about(one.info, "record.refused", one.error.code)
                )  # left as it is
        if lost:
            self._packs.append_tombstones(lost)
            done.buried += len(lost)

    def _complete_deletions(self, graves: Graves, done: Recovered) -> None:
        for (tenant, uid, digest), received_us in graves.items():
            with self._database.read() as connection:
                found = connection.execute(
                    select(Study.study_instance_uid, Series.series_instance_uid)
                    .select_from(Instance)
                    .join(Series, Series.id == Instance.series_pk)
                    .join(Study, Study.id == Series.study_pk)
                    .where(
                        Instance.tenant == tenant,
                        Instance.sop_instance_uid == uid,
                        Instance.digest == bytes.fromhex(digest),
                        Instance.received_us <= received_us,
                    )
                ).first()
            if found is None:
                continue
            finding = Finding("row.deleted", tenant, found[0], found[1], uid)
            if self._deletions is None:
                done.report(finding)
                continue
            actor = Actor(TenantId(tenant), "recovery", roles=frozenset({Role.SYSTEM}))
            try:
                self._deletions.delete(
                    actor, found[0], found[1], uid, reason="completed by recovery"
                )
            except ImagingError as error:
                log.warning(
                    "deletion not completed: %s",
                    error,
                    extra={"event": "recovery.deletion", "code": error.code},
                )
                done.report(finding)

    def _last_indexed(self, pk: int, key: str) -> int | None:
        """Return where the last record lies that the index has or had."""
        with self._database.read() as connection:
            places = (
                connection.scalar(
                    select(func.max(Instance.record_offset)).where(
                        Instance.pack_pk == pk
                    )
                ),
                connection.scalar(
                    select(func.max(Deletion.record_offset)).where(
                        Deletion.pack_key == key
                    )
                ),
            )
        return max((place for place in places if place is not None), default=None)

    def _close(
        self, key: str, pk: int | None, size: int, infos: Sequence[RecordInfo] = ()
    ) -> None:
        """Bring the pack's row up to date; make it when orphans are all it holds."""
        with self._database.write() as connection:
            if pk is None and infos:
                first = infos[0].header
                register_pack(
                    connection,
                    key=key,
                    tenant=first.tenant,
                    kind="log",
                    node_id=self._node_id,
                    now_us=first.received_us,
                )
            connection.execute(
                update(Pack)
                .where(Pack.key == key, Pack.state.in_(("open", "closed")))
                .values(state="closed", size_bytes=size)
            )

    def _check_closed(self, done: Recovered) -> None:
        """Compare the length of every local pack with its row."""
        with self._database.read() as connection:
            rows = connection.execute(
                select(Pack.key, Pack.size_bytes).where(
                    Pack.state == "closed",
                    Pack.place == "local",
                    Pack.node_id == self._node_id,
                )
            ).all()
        for key, size in rows:
            try:
                found = pack_path(self._folder, key).stat().st_size
            except FileNotFoundError:
                self._tell(done, Finding("pack.missing", pack=key))
                continue
            if found < size:
                self._tell(done, Finding("pack.short", pack=key, offset=found))


def _end(found: Sequence[RecordInfo | Damage], start: int) -> int:
    """Return where the whole records end that were found from `start` on."""
    if not found:
        return start
    last = found[-1]
    return last.start if isinstance(last, Damage) else last.end


class Graves:
    """What tombstones bury: each this content, received until then."""

    def __init__(self) -> None:
        self._until: dict[tuple[str, str, str], int] = {}

    def add(self, header: RecordHeader) -> None:
        """Take in a tombstone."""
        key = (header.tenant, header.sop_instance_uid, header.digest)
        self._until[key] = max(self._until.get(key, 0), header.received_us)

    def hold(self, info: RecordInfo) -> bool:
        """Tell whether an object's record is buried."""
        header = info.header
        key = (header.tenant, header.sop_instance_uid, info.digest.hex())
        return self._until.get(key, -1) >= header.received_us

    def items(self) -> Iterable[tuple[tuple[str, str, str], int]]:
        return self._until.items()


def with_objects(
    path: Path, infos: Iterable[RecordInfo]
) -> Iterator[tuple[RecordInfo, Buffer]]:
    """Yield each record with a view of its object."""
    for info in infos:
        yield info, view_object(path, info)


def _about(info: RecordInfo, kind: str, detail: str) -> Finding:
    return Finding(
        kind,
        info.header.tenant,
        instance_uid=info.header.sop_instance_uid,
        pack=info.location.pack_key,
        offset=info.location.record_offset,
        detail=detail,
    )
