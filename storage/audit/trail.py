"""The one audit trail of a process: what waits, what does not, and what is folded.

Whatever decides or changes something is in the database before its caller goes on.
Plain reads may wait: they are counted in memory and written together, once a second.
Reads of the same object by the same actor become one record with a count.

If it cannot be written, it does not happen: `record_now` raises, and `record` raises
once the reads that wait are too many or have waited too long.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from sqlalchemy import Connection

from storage.audit.append import (
    GIVEN,
    Entry,
    append,
    bound_waiting,
    entry_of,
    hash_at,
)
from storage.audit.chain import Head
from storage.audit.event import AuditEvent, Outcome, detail_text
from storage.audit.keys import Memory, Seen, keyring
from storage.db.engine import Database
from storage.group import GroupCommit, Ticket
from storage.kernel.clock import Clock
from storage.kernel.errors import DependencyDown, ImagingError
from storage.kernel.limits import Limits

log = logging.getLogger(__name__)

#: Where key and memory lie in the data folder.
FOLDER = "audit"
#: The chain of all that doors record.
STREAM = "access"
#: How long a first read of an object waits to be written, at most.
FLUSH_SECONDS = 1.0
#: Over how long further reads of the same object are counted before that is written.
FOLD_SECONDS = 10.0
#: Records of one transaction.
BATCH = 2000
#: Records that wait before they are written without waiting for their time.
EAGER = 1000
#: How long another process may keep the chain before a record is given up.
LOCK_SECONDS = 10.0
#: Characters of a key that is kept in memory.
KEY_CHARS = 8192

_INSTANCE = GIVEN.index("instance_uid")
#: Where a key has the text of the detail.
_KEY_DETAIL = -1


@dataclass(slots=True)
class _Fold:
    """Reads of one object by one actor.

    Attributes
    ----------
    waiting : Entry or None
        Those that are not written yet; without any, only the key is kept, to fold
        those to come.
    due : float
        When they are written, or the key is forgotten (monotonic seconds).
    """

    waiting: Entry | None
    due: float

    def add(self, more: int, last_us: int, instance: str | None) -> None:
        """Let what waits stand for `more` accesses."""
        entry = self.waiting
        if entry is None:
            raise ValueError("nothing waits")
        entry.last_us = max(entry.last_us, last_us)
        entry.count += more
        if entry.values[_INSTANCE] not in {None, instance}:
            # Several: the record names what they have in common.
            entry.drop("instance_uid")


class AuditObserver(Protocol):
    """Is told how writing goes; for metrics and alarms."""

    def written(self, accesses: int, seconds: float, *, failed: bool) -> None:
        """Take note of one transaction."""
        ...


class AuditTrail:
    """Record accesses of one process in the chain that all processes share.

    Make one after forking, and `close` it.

    Parameters
    ----------
    database : Database
    clock : Clock
    folder : Path
        Where the key and the memory lie; they are made on first use.
    limits : Limits
    flush_seconds, fold_seconds : float
        See `FLUSH_SECONDS` and `FOLD_SECONDS`.
    """

    def __init__(
        self,
        database: Database,
        clock: Clock,
        folder: Path,
        *,
        limits: Limits | None = None,
        stream: str = STREAM,
        flush_seconds: float = FLUSH_SECONDS,
        fold_seconds: float = FOLD_SECONDS,
        observer: AuditObserver | None = None,
    ) -> None:
        self._database = database
        self._clock = clock
        self._limits = limits or Limits()
        self._stream = stream
        self._flush_seconds = flush_seconds
        self._fold_seconds = fold_seconds
        self._observer = observer
        self._keys = keyring(folder)
        self._memory = Memory(folder, stream, self._keys.own)
        self._group = GroupCommit(self._commit_group, max_items=BATCH)
        self._lock = threading.Lock()
        self._folds: dict[tuple[str, ...], _Fold] = {}
        self._waiting = 0
        #: Since when the writer has tried to write what it could not yet.
        self._behind_since: float | None = None
        self._wake = threading.Event()
        self._writer: threading.Thread | None = None
        self._closed = False

    def record(self, event: AuditEvent) -> None:
        """Record a read; it is written within a second, together with others.

        An event whose outcome is not ``allow`` is written at once, as by
        `record_now`.

        Never waits for the database when the outcome is ``allow``.

        Raises
        ------
        DependencyDown
            Too many reads wait, or for too long: this one must not happen.
        """
        if event.outcome is not Outcome.ALLOW:
            self.record_now(event)
            return
        now = time.monotonic()
        now_us = event.time_us or self._clock.now_us()
        key = self._key(event)
        with self._lock:
            self._refuse_if_behind(now)
            fold = self._folds.get(key)
            if fold is not None and fold.waiting is not None:
                fold.add(1, now_us, event.instance_uid)
                return
        entry = entry_of(event, now_us, key[_KEY_DETAIL])
        if sum(map(len, key)) > KEY_CHARS:
            # Bound: what is kept in memory is cut as the record is.
            key = tuple(str(value) for value in entry.values[:_INSTANCE])
        with self._lock:
            self._wait_for(key, entry, now)

    def _wait_for(self, key: tuple[str, ...], entry: Entry, now: float) -> None:
        fold = self._folds.get(key)
        if fold is not None and fold.waiting is not None:
            fold.add(1, entry.last_us, entry.values[_INSTANCE])
            return
        if self._waiting >= self._limits.audit_pending:
            raise DependencyDown("audit: too many accesses wait to be written")
        self._waiting += 1
        if fold is not None:
            fold.waiting = entry
            return
        self._folds[key] = _Fold(entry, now + self._flush_seconds)
        self._start()
        if self._waiting == EAGER:
            self._wake.set()

    def record_now(self, event: AuditEvent) -> None:
        """Record a decision or a change; it is durable when this returns.

        Waits for the disk: not to be called in an event loop.

        Raises
        ------
        DependencyDown
            It was not recorded: what it tells of must not happen.
        """
        entry = self._entry(event)
        try:
            self._group.submit(entry, 0)
        except DependencyDown:
            raise
        except ImagingError as error:
            raise DependencyDown(f"audit: {error}") from error

    def record_in(
        self, connection: Connection, event: AuditEvent
    ) -> Callable[[], None]:
        """Record a change in the transaction that makes it.

        The last statement before the commit: the chain is locked until then. With
        SQLite the connection must come from `Database.write`.

        Returns
        -------
        callable
            Notes outside the database how far the chain is; to be called after the
            commit. Until it is, or the next record, this one could be cut off unseen.
        """
        now_us = self._clock.now_us()
        before, head = self._append(connection, [self._entry(event)], now_us)
        return partial(self._remember, before, head)

    def check(self) -> None:
        """Raise DependencyDown while reads are refused."""
        with self._lock:
            self._refuse_if_behind(time.monotonic())

    def flush(self) -> None:
        """Write all reads that wait.

        Raises
        ------
        DependencyDown
            They could not be written and go on waiting.
        """
        self._write_due(float("inf"))

    def close(self) -> None:
        """Write what waits and stop; what cannot be written is counted in the log."""
        with self._lock:
            self._closed = True
            writer = self._writer
        self._wake.set()
        if writer is not None:
            writer.join()
        try:
            self.flush()
        except ImagingError:
            with self._lock:
                waiting = [fold.waiting for fold in self._folds.values()]
                lost = sum(entry.count for entry in waiting if entry is not None)
            log.exception(
                "audited reads were lost",
                extra={"event": "audit.lost", "accesses": lost},
            )

    def _entry(self, event: AuditEvent) -> Entry:
        detail = detail_text(event.detail, self._limits.audit_detail_bytes)
        return entry_of(event, self._clock.now_us(), detail)

    def _key(self, event: AuditEvent) -> tuple[str, ...]:
        """Return what reads must share to be one record: all but time and instance."""
        return (
            event.actor,
            event.action,
            event.series_uid,
            event.study_uid,
            event.patient_id,
            event.object_kind,
            event.object_id,
            event.object_tenant,
            event.tenant,
            event.session,
            event.source,
            event.door,
            event.purpose,
            event.reason,
            detail_text(event.detail, self._limits.audit_detail_bytes),
        )

    def _refuse_if_behind(self, now: float) -> None:
        if self._closed:
            raise DependencyDown("audit: this process is stopping")
        allowed = self._limits.audit_pending_seconds
        if self._behind_since is not None and now - self._behind_since > allowed:
            raise DependencyDown("audit: accesses have waited too long to be written")

    def _start(self) -> None:
        if self._writer is None:
            self._writer = threading.Thread(target=self._run, name="audit", daemon=True)
            self._writer.start()

    def _run(self) -> None:
        while not self._closed:
            self._wake.wait(self._flush_seconds / 4)
            self._wake.clear()
            try:
                self._write_due(time.monotonic())
            except ImagingError as error:
                log.warning(
                    "audit not written: %s", error, extra={"event": "audit.failed"}
                )
                self._wake.wait(self._flush_seconds)
            except Exception:
                log.exception("audit not written", extra={"event": "audit.failed"})
                self._wake.wait(self._flush_seconds)

    def _write_due(self, now: float) -> None:
        """Write the folds whose time has come by `now`."""
        while entries := self._take(now):
            try:
                self._commit([entry for _, entry in entries])
            except BaseException:
                self._give_back(entries)
                raise
            with self._lock:
                self._behind_since = None

    def _take(self, now: float) -> list[tuple[tuple[str, ...], Entry]]:
        """Return a batch of what is due; forget the keys that are due without any."""
        taken: list[tuple[tuple[str, ...], Entry]] = []
        started = time.monotonic()
        with self._lock:
            eager = self._waiting >= EAGER
            # Bound: keys that are only kept to fold what may come.
            crowded = len(self._folds) > self._limits.audit_pending
            for key, fold in list(self._folds.items()):
                entry = fold.waiting
                if fold.due > now and not (eager and entry is not None):
                    continue
                if entry is None:
                    del self._folds[key]
                    continue
                if len(taken) == BATCH:
                    break
                taken.append((key, entry))
                fold.waiting = None
                fold.due = started + self._fold_seconds
                if crowded:
                    del self._folds[key]
            self._waiting -= len(taken)
            if taken and self._behind_since is None:
                self._behind_since = started
        return taken

    def _give_back(self, entries: Sequence[tuple[tuple[str, ...], Entry]]) -> None:
        """Let entries that were not written wait on."""
        with self._lock:
            now = time.monotonic()
            for key, entry in entries:
                fold = self._folds.get(key)
                later = fold.waiting if fold is not None else None
                self._folds[key] = given = _Fold(entry, now)
                if later is None:
                    self._waiting += 1
                else:
                    given.add(later.count, later.last_us, later.values[_INSTANCE])

    def _commit_group(self, tickets: Sequence[Ticket[Entry]]) -> None:
        self._commit([ticket.item for ticket in tickets])

    def _commit(self, entries: Sequence[Entry]) -> None:
        """Write in one transaction, synced; then remember how far the chain is."""
        started = time.perf_counter()
        before = None
        try:
            with self._database.write() as connection:
                bound_waiting(connection, LOCK_SECONDS)
                before, head = self._append(connection, entries, self._clock.now_us())
        finally:
            if self._observer is not None:
                accesses = sum(entry.count for entry in entries)
                seconds = time.perf_counter() - started
                self._observer.written(accesses, seconds, failed=before is None)
        self._remember(before, head)

    def _append(
        self, connection: Connection, entries: Sequence[Entry], now_us: int
    ) -> tuple[Head, Head]:
        return append(
            connection, self._stream, entries, self._keys, now_us, self._can_follow
        )

    def _can_follow(self, connection: Connection, head: Head) -> bool:
        """Tell whether a head of another host can follow what we remember."""
        try:
            seen = self._memory.read()
        except ImagingError:
            # Verification tells; the memory is made anew with the next record.
            return True
        if seen is None or seen.sequence <= head.base_sequence:
            return True
        if seen.sequence >= head.sequence:
            return (seen.sequence, seen.hash) == (head.sequence, head.hash)
        return hash_at(connection, self._stream, seen.sequence) == seen.hash

    def _remember(self, before: Head, head: Head) -> None:
        """Note the new head outside the database.

        The records are durable already: what goes wrong here is logged, and is not a
        failure of the access.
        """

        def hash_of(sequence: int) -> bytes | None:
            if sequence == before.sequence:
                return before.hash
            return self._hash_of(sequence)

        try:
            seen = Seen(head.sequence, head.hash, head.time_us)
            agrees = self._memory.advance(seen, hash_of)
        except ImagingError as error:
            log.error(  # noqa: TRY400
                "audit memory: %s", error, extra={"event": "audit.memory_failed"}
            )
            return
        if not agrees:
            log.error(
                "audit: records that were written are gone or replaced:"
                " run `huying audit verify`",
                extra={"event": "audit.forked"},
            )

    def _hash_of(self, sequence: int) -> bytes | None:
        with self._database.read() as connection:
            return hash_at(connection, self._stream, sequence)
