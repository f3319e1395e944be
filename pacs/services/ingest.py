"""Accepting composite instances into the archive: the only door.

C-STORE, STOW-RS, import, federation and AI results all end in
`IngestService.accept`, so that a rule has one place. The order is fixed: bytes
appended, pack synced, rows and events committed, acknowledged (core: packs).
Arrivals that wait at the same time share a sync and a transaction.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pacs.domain.study import Accepted, Arrival, Outcome, Spool, Warned
from pacs.imaging import sopclasses, syntaxes
from pacs.imaging.part10 import file_meta
from pacs.repository.index import (
    INSTANCE_UID_TAG,
    IndexWriter,
    InstanceRow,
    StaleIndex,
    Written,
)
from pacs.services.describe import Rules, describe
from storage.db.engine import Database
from storage.group import GroupCommit, Ticket
from storage.kernel.clock import Clock
from storage.kernel.errors import (
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
from storage.packs.format import Buffer, Location, Record, RecordHeader
from storage.packs.writer import LargeRecord, PackWriter

#: Attempts of one group against concurrent writers before it is given up.
MAX_ATTEMPTS = 8


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
    record: Record | None


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

    def check(
        self,
        actor: Actor,
        source: Source,
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
        """Force to stable storage what weaker sync policies left in memory."""
        if self._sync is not SyncPolicy.INSTANCE:
            self._packs.sync()

    def reindex(self, records: Iterable[tuple[RecordHeader, Location, Buffer]]) -> int:
        """Index records that lie in packs already; return how many were new.

        The code is that of `accept`, so that recovery and receiving agree. Records
        that contradict what is indexed lose, as they would have on arrival.
        """
        added = 0
        batch: list[_Work] = []
        for header, location, part10 in records:
            view = memoryview(part10)
            try:
                row, _ = describe(
                    view[header.dataset_offset :],
                    header,
                    rules=self._rules,
                    digest=header_digest(view, header),
                )
            except ImagingError:
                continue
            finally:
                view.release()
            row.location = location
            batch.append(_Work(row, None))
            if len(batch) >= 200:
                added += self._reindex_batch(batch)
                batch = []
        return added + (self._reindex_batch(batch) if batch else 0)

    def _reindex_batch(self, batch: Sequence[_Work]) -> int:
        self._write_rows([work.row for work in batch])
        return sum(work.row.written is Written.ADDED for work in batch)

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
        record = Record(header, (head, dataset), arrival.digest)
        self._group.submit(_Work(row, record), row.object_length)
        return self._answer(row, warnings)

    def _accept_large(self, arrival: Arrival, spool: Spool) -> Accepted:
        if not isinstance(spool, PackSpool):
            raise TypeError("spools come from open_spool")
        large = spool.large
        try:
            with large.mmap() as mapped:
                row, warnings = self._describe_mapped(arrival, spool, mapped)
            self._pre_check([row])
            if row.written is None:
                row.location = large.finish(arrival.digest)
                row.pack_kind = "large"
            else:
                large.abort()
            self._group.submit(_Work(row, None), 0)
            if row.written not in (Written.ADDED, Written.REPLACED):
                # Lost a race after the pack was finished: nothing refers to it.
                large.abort()
        except BaseException:
            large.abort()
            raise
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
        if duplicate and row.kept_digest not in (b"", row.digest):
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
        works = [ticket.item for ticket in group]
        rows = [work.row for work in works]
        self._pre_check([work.row for work in works if work.record is not None])
        fresh = [w for w in works if w.record is not None and w.row.written is None]
        if fresh:
            records = [work.record for work in fresh if work.record is not None]
            for work, location in zip(fresh, self._packs.append(records), strict=True):
                work.row.location = location
        self._write_rows(rows)

    def _pre_check(self, rows: Sequence[InstanceRow]) -> None:
        """Mark duplicates and contradictions, so that no bytes are written for them."""
        keys = [(row.key.tenant, row.sop_instance_uid) for row in rows]
        seen: dict[tuple[str, str], bytes] = {}
        with self._database.read() as connection:
            held = self._index.known_digests(connection, keys)
            for key, row in zip(keys, rows, strict=True):
                kept = held.get(key) or seen.get(key)
                if kept is not None and not self._replaces(row, kept, key in held):
                    row.written, row.kept_digest = Written.DUPLICATE, kept
                    continue
                row.replace = key in held
                try:
                    self._index.check_parents(connection, row)
                except IdentityMismatch as error:
                    row.written, row.error = Written.REFUSED, error
                    continue
                seen[key] = row.digest

    def _replaces(self, row: InstanceRow, kept: bytes, indexed: bool) -> bool:  # noqa: FBT001
        return (
            indexed
            and kept != row.digest
            and self._rules.duplicates is DuplicatePolicy.IF_CHANGED
        )

    def _write_rows(self, rows: Sequence[InstanceRow]) -> None:
        """Commit the rows of one group, repeating when other writers interfere."""
        settle_due_us = self._clock.now_us() + int(self._rules.settle_seconds * 1e6)
        for attempt in range(MAX_ATTEMPTS):
            try:
                with self._database.ingest() as connection:
                    self._index.add(connection, rows, settle_due_us=settle_due_us)
            except (StaleIndex, LostRace):
                if attempt == MAX_ATTEMPTS - 1:
                    raise LostRace("index: too many concurrent changes") from None
                self._index.forget()
                for row in rows:
                    row.written, row.error, row.kept_digest = None, None, b""
                self._pre_check(rows)
            else:
                return


def _size(arrival: Arrival) -> int:
    if isinstance(arrival.dataset, memoryview):
        return arrival.dataset.nbytes
    return getattr(getattr(arrival.dataset, "large", None), "object_length", 0)


def header_digest(part10: memoryview, header: RecordHeader) -> Digest:
    """Return the digest kept with a record; computed when the header lacks it."""
    import hashlib

    return Digest(hashlib.sha256(part10[header.dataset_offset :]).digest())
