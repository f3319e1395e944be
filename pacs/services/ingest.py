"""Accepting composite instances into the archive: the only door.

C-STORE, STOW-RS, import, federation and AI results all end in
`IngestService.accept`, so that a rule has one place. The order is fixed: bytes
appended, pack synced, rows and events committed, acknowledged (core: packs).
Arrivals that wait at the same time share a sync and a transaction.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from pacs.domain.study import (
    Accepted,
    Arrival,
    Outcome,
    Spool,
    Warned,
)
from pacs.imaging import sopclasses, syntaxes
from pacs.imaging.part10 import file_meta
from pacs.repository.arrivals import InstanceRow, Written
from pacs.repository.index import INSTANCE_UID_TAG, IndexWriter, StaleIndex
from pacs.services.describe import Rules, describe
from storage.db.engine import Database
from storage.group import GroupCommit, Ticket
from storage.kernel.clock import Clock
from storage.kernel.errors import (
    CorruptData,
    DuplicateInstance,
    IdentityMismatch,
    ImagingError,
    LostRace,
    UnsupportedSopClass,
    UnsupportedTransferSyntax,
)
from storage.kernel.settings import DuplicatePolicy, SyncPolicy
from storage.kernel.types import Actor, Digest, Source
from storage.kernel.uids import is_uid
from storage.packs.format import Buffer, Location, Record, RecordHeader, RecordInfo
from storage.packs.recover import read_record
from storage.packs.writer import LargeRecord, PackWriter, pack_path

log = logging.getLogger(__name__)

#: Reason in the tombstone of a record that never made it into the index.
ORPHAN = "orphan"
#: Attempts of one group against concurrent writers before it is given up.
MAX_ATTEMPTS = 8
#: Records that `reindex` writes in one transaction.
REINDEX_RECORDS = 200
REINDEX_BYTES = 32 << 20


class IngestObserver(Protocol):
    """Who counts what ingest does."""

    def ingested(
        self, door: str, outcome: str, seconds: float, size_bytes: int
    ) -> None:
        """Note one arrival and how it ended."""
        ...


class PackSpool:
    """A large data set on its way into a pack of its own."""

    def __init__(self, large: LargeRecord, header: RecordHeader, head: bytes) -> None:
        self.large = large
        self.header = header
        self.head_length = len(head)
        large.write(head)

    def write(self, data: Buffer) -> None:
        self.large.write(data)

    def abort(self) -> None:
        self.large.abort()


@dataclass(slots=True)
class _Work:
    """One arrival inside the group: its row, and its record if still to be written."""

    row: InstanceRow
    header: RecordHeader
    parts: tuple[Buffer, ...] = ()


@dataclass(frozen=True, slots=True)
class Reindexed:
    """What became of one record that `reindex` was given.

    Attributes
    ----------
    written : Written or None
        None: its content was deleted after it was received.
    error : ImagingError or None
        Why it was refused.
    """

    info: RecordInfo
    written: Written | None
    error: ImagingError | None = None


class IngestService:
    """Decide about received instances and make them durable.

    Parameters
    ----------
    database : Database
    packs : PackWriter
        This process' own.
    rules : Rules
        What is accepted, and the limits.
    clock : Clock
    sync : SyncPolicy
    node_id : str
    observer : IngestObserver, optional
    """

    def __init__(
        self,
        *,
        database: Database,
        packs: PackWriter,
        rules: Rules,
        clock: Clock,
        sync: SyncPolicy,
        node_id: str,
        observer: IngestObserver | None = None,
    ) -> None:
        self._database = database
        self._packs = packs
        self._rules = rules
        self._clock = clock
        self._sync = sync
        self._observer = observer
        self._index = IndexWriter(node_id=node_id, is_sqlite=database.is_sqlite)
        self._group: GroupCommit[_Work] = GroupCommit(self._commit)
        #: The index writer serves one thread at a time: the leader, or `reindex`.
        self._turn = threading.RLock()
        #: Records that lie in a pack while it is unknown whether their rows do.
        self._doubtful: list[Location] = []
        #: Tombstones that could not be written yet.
        self._unwritten: list[RecordHeader] = []

    def check(
        self,
        actor: Actor,  # noqa: ARG002  # rules by tenant and AE will ask
        source: Source,  # noqa: ARG002
        *,
        sop_class_uid: str,
        sop_instance_uid: str,
        transfer_syntax_uid: str,
    ) -> None:
        """Refuse early, before the bytes, what could never be accepted.

        Raises
        ------
        UnsupportedSopClass, UnsupportedTransferSyntax, IdentityMismatch
        StorageFull
            The free-space guard.
        """
        if not sopclasses.is_storage(sop_class_uid):
            raise UnsupportedSopClass("SOP class (0008,0016) is not stored here")
        if not syntaxes.is_known(transfer_syntax_uid):
            raise UnsupportedTransferSyntax("transfer syntax is unknown")
        if not is_uid(sop_instance_uid) and not self._rules.lenient_uids:
            raise IdentityMismatch("not a UID:", INSTANCE_UID_TAG)
        self._packs.check_space()

    def open_spool(
        self,
        actor: Actor,
        source: Source,
        *,
        sop_class_uid: str,
        sop_instance_uid: str,
        transfer_syntax_uid: str,
    ) -> Spool:
        """Start a pack of its own for a data set too large for memory."""
        head = file_meta(sop_class_uid, sop_instance_uid, transfer_syntax_uid)
        header = self._header(
            actor,
            source,
            sop_class_uid,
            sop_instance_uid,
            transfer_syntax_uid,
            len(head),
        )
        return PackSpool(self._packs.open_large(header), header, head)

    def accept(self, arrival: Arrival) -> Accepted:
        """Store one data set, or recognise that it is already here.

        When this returns, the instance survives a power cut (policy ``instance``).

        Raises
        ------
        MalformedObject, IdentityMismatch, Unsupported, TooLarge
            Nothing is left behind; the message names the attribute.
        DuplicateInstance
            The UID is taken by other content and the first is kept.
        StorageFull, DependencyDown
            Nothing was acknowledged; the sender may retry.
        """
        started = time.perf_counter()
        outcome = "failed"
        try:
            if isinstance(arrival.dataset, memoryview):
                accepted = self._accept_small(arrival, arrival.dataset)
            else:
                accepted = self._accept_large(arrival, arrival.dataset)
            outcome = accepted.outcome
        except ImagingError as error:
            outcome = error.code
            raise
        finally:
            if self._observer is not None:
                self._observer.ingested(
                    arrival.source.door,
                    outcome,
                    time.perf_counter() - started,
                    _size(arrival),
                )
        return accepted

    def flush(self) -> None:
        """Force to stable storage what the policy ``association`` left in memory."""
        if self._sync is SyncPolicy.ASSOCIATION:
            self._packs.sync()

    def reindex(
        self, records: Iterable[tuple[RecordInfo, Buffer]], *, pack_kind: str = "log"
    ) -> Iterator[Reindexed]:
        """Index records that lie in packs already; yield what became of each.

        The code is that of `accept`, so that recovery and receiving agree. Records
        that contradict what is indexed lose, as they would have on arrival; content
        replaces other content only where its record says so.

        Parameters
        ----------
        records : iterable of (RecordInfo, Buffer)
            With the Part-10 object, whose digest is compared.
        pack_kind : str
            Of the packs that have no row yet.
        """
        batch: list[tuple[RecordInfo, InstanceRow]] = []
        size = 0
        for info, part10 in records:
            try:
                row = self._describe_stored(info, part10)
            except ImagingError as error:
                yield Reindexed(info, Written.REFUSED, error)
                continue
            row.pack_kind = pack_kind
            batch.append((info, row))
            size += row.object_length
            if len(batch) >= REINDEX_RECORDS or size >= REINDEX_BYTES:
                yield from self._reindex_batch(batch)
                batch, size = [], 0
        yield from self._reindex_batch(batch)

    def _describe_stored(self, info: RecordInfo, part10: Buffer) -> InstanceRow:
        header = info.header
        view = memoryview(part10)[header.dataset_offset :]
        digest = Digest(hashlib.sha256(view).digest())
        if digest != info.digest:
            raise CorruptData("a record's data set is not what was received")
        row, _ = describe(view, header, rules=self._rules, digest=digest)
        row.shift(header.dataset_offset)
        row.location = info.location
        return row

    def _reindex_batch(
        self, batch: Sequence[tuple[RecordInfo, InstanceRow]]
    ) -> Iterator[Reindexed]:
        if not batch:
            return
        markers = {id(row): info.header.digest for info, row in batch}
        with self._turn:
            with self._database.read() as connection:
                living = [
                    row
                    for _, row in batch
                    if not self._index.is_deleted(connection, row)
                ]
            self._pre_check(living, markers)
            # Only what changes the index is written: no event tells of the rest.
            self._write_rows([row for row in living if row.written is None], markers)
        for info, row in batch:
            written, error = row.written, row.error
            if written is Written.DUPLICATE and row.kept_digest != row.digest:
                written = Written.REFUSED
                error = DuplicateInstance(row.sop_instance_uid, row.kept_digest.hex())
            yield Reindexed(info, written, error)

    def _accept_small(self, arrival: Arrival, dataset: memoryview) -> Accepted:
        source = arrival.source
        class_uid = arrival.claimed_class_uid
        instance_uid = arrival.claimed_instance_uid
        header = self._header(
            arrival.actor,
            source,
            class_uid or "",
            instance_uid or "",
            arrival.transfer_syntax_uid,
            0,
        )
        row, warnings = describe(
            dataset,
            header,
            rules=self._rules,
            digest=arrival.digest,
            study_uid=arrival.study_uid,
        )
        head = file_meta(
            row.sop_class_uid, row.sop_instance_uid, row.transfer_syntax_uid
        )
        header = header.described(
            sop_class_uid=row.sop_class_uid,
            sop_instance_uid=row.sop_instance_uid,
            dataset_offset=len(head),
        )
        row.shift(len(head))
        self._group.submit(_Work(row, header, (head, dataset)), row.object_length)
        return self._answer(row, warnings)

    def _accept_large(self, arrival: Arrival, spool: Spool) -> Accepted:
        if not isinstance(spool, PackSpool):
            raise TypeError("spools come from open_spool")
        large = spool.large
        try:
            with large.mmap() as mapped:
                row, warnings = self._describe_mapped(arrival, spool, mapped)
            self._pre_check([row])
            # The record's header is on the disk already, so that it cannot name what
            # it replaces; the tombstone that `_disown` writes does.
            if row.written is None:
                row.location = large.finish(row.digest)
                row.pack_kind = "large"
            self._group.submit(_Work(row, spool.header), 0)
            if row.location is not None:
                if row.written in {Written.ADDED, Written.REPLACED}:
                    large.release()
                else:
                    # A race was lost after the pack was finished.
                    large.discard()
        finally:
            large.abort()
        return self._answer(row, warnings)

    def _describe_mapped(
        self, arrival: Arrival, spool: PackSpool, mapped: mmap.mmap
    ) -> tuple[InstanceRow, tuple[Warned, ...]]:
        start = spool.large.object_offset + spool.head_length
        with memoryview(mapped) as whole, whole[start:] as view:
            row, warnings = describe(
                view,
                spool.header,
                rules=self._rules,
                digest=arrival.digest,
                study_uid=arrival.study_uid,
            )
        row.shift(spool.head_length)
        return row, warnings

    def _header(
        self,
        actor: Actor,
        source: Source,
        sop_class_uid: str,
        sop_instance_uid: str,
        transfer_syntax_uid: str,
        dataset_offset: int,
    ) -> RecordHeader:
        return RecordHeader(
            tenant=actor.tenant,
            door=source.door,
            calling_ae=source.calling_ae,
            called_ae=source.called_ae,
            peer=source.peer,
            origin=source.origin,
            received_us=self._clock.now_us(),
            transfer_syntax_uid=transfer_syntax_uid,
            sop_class_uid=sop_class_uid,
            sop_instance_uid=sop_instance_uid,
            dataset_offset=dataset_offset,
        )

    def _answer(self, row: InstanceRow, warnings: tuple[Warned, ...]) -> Accepted:
        """Turn what became of `row` into the caller's answer."""
        if row.error is not None:
            raise row.error
        duplicate = row.written is Written.DUPLICATE
        if duplicate and row.kept_digest != row.digest:
            raise DuplicateInstance(row.sop_instance_uid, row.kept_digest.hex())
        return Accepted(
            Outcome.DUPLICATE if duplicate else Outcome.STORED,
            row.sop_class_uid,
            row.sop_instance_uid,
            row.key.study_instance_uid,
            row.key.series_instance_uid,
            warnings,
        )

    def _commit(self, group: Sequence[Ticket[_Work]]) -> None:
        """Append, sync and index one group; runs in the leader's thread."""
        with self._turn:
            self._commit_works([ticket.item for ticket in group])

    def _commit_works(self, works: Sequence[_Work]) -> None:
        self._resolve_doubts()
        small = [work.row for work in works if work.parts]
        twins = self._pre_check(small)
        fresh = [work for work in works if work.parts and work.row.written is None]
        if fresh:
            for work in fresh:
                work.header = _final(work.header, work.row)
            records = [Record(w.header, w.parts, w.row.computing) for w in fresh]
            for work, location in zip(fresh, self._packs.append(records), strict=True):
                work.row.location = location
        try:
            repeated = self._write_rows([work.row for work in works])
        except BaseException:
            self._doubtful += [w.row.location for w in fresh if w.row.location]
            raise
        for row, first in twins if repeated is None else repeated:
            if first.written is Written.REFUSED:
                row.written, row.error = Written.REFUSED, first.error
            elif first.written is Written.DUPLICATE:
                row.kept_digest = first.kept_digest
        self._disown(works)

    def _pre_check(
        self, rows: Sequence[InstanceRow], markers: Mapping[int, str] | None = None
    ) -> list[tuple[InstanceRow, InstanceRow]]:
        """Mark duplicates and contradictions, so that no bytes are written for them.

        Parameters
        ----------
        markers : mapping, optional
            For records that exist: by the row's identity, what each says it replaces.

        Returns
        -------
        list of pairs
            Each row whose UID another row of `rows` has taken, with that one.
        """
        seen: dict[tuple[str, str], InstanceRow] = {}
        twins = []
        with self._database.glance() as connection:
            keys = [(row.key.tenant, row.sop_instance_uid) for row in rows]
            known = self._index.held(connection, keys)
            for key, row in zip(keys, rows, strict=True):
                held = known.get(key)
                if held is not None and held.digest:
                    if not self._replaces(row, held.digest, markers):
                        row.written, row.kept_digest = Written.DUPLICATE, held.digest
                        continue
                    row.replace, row.kept_digest = True, held.digest
                elif key in seen:
                    first = seen[key]
                    row.written, row.kept_digest = Written.DUPLICATE, first.digest
                    twins.append((row, first))
                    continue
                if held is not None and row.location is not None:
                    if self._index.is_deleted(connection, row):
                        # Its record says that it came before the deletion.
                        row.written = Written.REFUSED
                        row.error = LostRace("index: deleted meanwhile")
                        continue
                elif held is not None:
                    # Whatever the clock does: received after what it follows.
                    row.received_us = max(row.received_us, held.until_us + 1)
                try:
                    self._index.check_parents(connection, row)
                except IdentityMismatch as error:
                    row.written, row.error = Written.REFUSED, error
                    continue
                seen[key] = row
        return twins

    def _replaces(
        self, row: InstanceRow, kept: bytes, markers: Mapping[int, str] | None
    ) -> bool:
        if markers is not None:
            return markers[id(row)] == kept.hex()
        return (
            kept != row.digest and self._rules.duplicates is DuplicatePolicy.IF_CHANGED
        )

    def _write_rows(
        self, rows: Sequence[InstanceRow], markers: Mapping[int, str] | None = None
    ) -> list[tuple[InstanceRow, InstanceRow]] | None:
        """Commit the rows of one group, repeating when other writers interfere.

        Returns what `_pre_check` did when it had to be repeated.
        """
        twins: list[tuple[InstanceRow, InstanceRow]] | None = None
        settle_due_us = self._clock.now_us() + int(self._rules.settle_seconds * 1e6)
        for _ in range(MAX_ATTEMPTS if rows else 0):
            try:
                with self._database.ingest() as connection:
                    self._index.add(connection, rows, settle_due_us=settle_due_us)
            except (StaleIndex, LostRace):
                self._index.forget()
                for row in rows:
                    row.written, row.error, row.kept_digest = None, None, b""
                    row.replace = False
                twins = self._pre_check(rows, markers)
            except BaseException:
                # What was remembered may have been rolled back.
                self._index.forget()
                raise
            else:
                return twins
        if rows:
            raise LostRace("index: too many concurrent changes")
        return twins

    def _resolve_doubts(self) -> None:
        """Index what an earlier group left in its pack when its commit failed.

        Those senders were told to try again; a record that lies in a pack without
        anybody knowing could one day contradict what they sent then.
        """
        while self._doubtful:
            location = self._doubtful[-1]
            found = read_record(
                pack_path(self._packs.folder, location.pack_key), location.record_offset
            )
            if found is not None:
                for one in self.reindex([found]):
                    if one.written is Written.REFUSED:
                        self._unwritten.append(tombstone(one.info))
            self._doubtful.pop()
        self._write_tombstones()

    def _disown(self, works: Sequence[_Work]) -> None:
        """Bury records that lost a race, and content that was replaced.

        A rebuild, which sees only packs, must not bring them back. What cannot be
        written now is written with the next group; until then the record that
        replaced other content says so in its header.
        """
        for work in works:
            row, header = work.row, work.header
            lost = row.written in {Written.REFUSED, Written.DUPLICATE}
            if row.location is None or (lost and row.pack_kind == "large"):
                continue
            if lost and row.kept_digest != row.digest:
                self._unwritten.append(
                    replace(header, digest=row.digest.hex(), origin=ORPHAN)
                )
            elif row.written is Written.REPLACED:
                named = row.kept_digest.hex() == header.digest
                until = row.received_us if named else self._clock.now_us()
                self._unwritten.append(
                    replace(
                        header,
                        digest=row.kept_digest.hex(),
                        received_us=max(until, row.received_us),
                        origin="replaced",
                    )
                )
        if self._unwritten:
            try:
                self._write_tombstones()
            except ImagingError as error:
                log.warning(
                    "tombstones wait: %s",
                    error,
                    extra={"event": "ingest.tombstones", "code": error.code},
                )

    def _write_tombstones(self) -> None:
        if self._unwritten:
            self._packs.append_tombstones(self._unwritten)
            self._unwritten = []


def _final(header: RecordHeader, row: InstanceRow) -> RecordHeader:
    """Return the header as it is written, once the index has been asked."""
    if not row.replace and row.received_us == header.received_us:
        return header
    return replace(
        header,
        received_us=row.received_us,
        digest=row.kept_digest.hex() if row.replace else "",
    )


def tombstone(info: RecordInfo) -> RecordHeader:
    """Return the tombstone of a record that lost against another."""
    return replace(info.header, digest=info.digest.hex(), origin=ORPHAN)


def _size(arrival: Arrival) -> int:
    if isinstance(arrival.dataset, memoryview):
        return arrival.dataset.nbytes
    return getattr(getattr(arrival.dataset, "large", None), "object_length", 0)
