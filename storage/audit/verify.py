"""Whether the chain is the one that was written, and if not, from where on.

What is detected of somebody who can change the database but has not the key:

===============================  ==================================================
a field of a record changed      ``altered``: the contents do not give the signed
                                 hash
records deleted                  ``missing``
records swapped or renumbered    ``misplaced``: neither hash nor signature fit
a record added                   ``misplaced``; after the end: ``extra``
all after a change hashed again  ``forged``: the hashes follow each other, but their
                                 signatures cannot be made
the last records deleted         ``truncated``: the signed head says how many were
... an older signed head, or     ``rolled_back``: this host remembers a later record
the whole database, put back     in a file outside the database
head or anchors changed          ``head``, ``anchor``
a record after one of these      ``unchecked``: whether its contents give its hash,
                                 only the hash before it could tell
===============================  ==================================================

Not detected: what somebody with the key does, unless a hash was noted elsewhere; what
was committed in the moment of a crash, and deleted before this host wrote again; an
older state of the database *and* of the data folder, put back together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import orjson
from sqlalchemy import Connection, func, select
from sqlalchemy.exc import OperationalError

from storage.audit import chain, reading
from storage.audit.append import as_bytes, as_number, head_of
from storage.audit.chain import ALGORITHMS, CONTENT, Head, Sealer
from storage.audit.event import clean
from storage.audit.findings import LISTED, Damage, Verification
from storage.audit.keys import Memory
from storage.db.engine import Database
from storage.db.tables import AuditAnchor, AuditRecord, AuditStream
from storage.kernel.errors import InvalidParameter

#: Records of one read transaction.
CHUNK = 5000
#: Action of a record that accepts damages, and what in its detail names them.
ACCEPT = "audit.accept"
ACCEPTED = "accepted"
_ALG = CONTENT.index("alg")
_FORMAT = CONTENT.index("format")
_SEQUENCE = CONTENT.index("sequence")
_ACTION = CONTENT.index("action")
_DETAIL = CONTENT.index("detail")
_N = len(CONTENT)


@dataclass(frozen=True, slots=True)
class Point:
    """A hash that is known from elsewhere, and what it means if another is found."""

    hash: bytes
    damage: Damage
    detail: str


class ChainVerifier:
    """Check chains record by record, in bounded memory, beside running writers.

    Parameters
    ----------
    keys : sequence of Sealer
        All keys that may have signed.
    """

    def __init__(self, database: Database, keys: Sequence[Sealer]) -> None:
        self._database = database
        self._keys = {sealer.key_id: sealer for sealer in keys}

    def streams(self) -> list[str]:
        """Return the names of all chains that have a head, records or anchors."""
        with self._database.read() as connection:
            names: set[str] = set()
            for table in (AuditStream, AuditRecord, AuditAnchor):
                names.update(connection.scalars(select(table.stream).distinct()))
        return sorted(names)

    def verify(
        self,
        stream: str,
        *,
        memory: Memory | None = None,
        noted: Mapping[int, bytes] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Verification:
        """Check one chain, up to the record that is its last when it is reached.

        Parameters
        ----------
        memory : Memory, optional
            What this host remembers outside the database.
        noted : mapping of int to bytes, optional
            Hashes that were noted elsewhere, by sequence number.
        progress : callable, optional
            Is told records done, and records in all.
        """
        run = _Run(Verification(stream), self._keys)
        # Before any record is read: what is remembered by now is committed.
        run.know(memory, noted or {})
        after: Any = reading.BEGINNING
        while True:
            with self._snapshot() as connection:
                # Order matters: the base is that of the chain that is read.
                head = _head(connection, stream)
                run.begin(head)
                after, rows = self._next(connection, stream, after, run)
                if not rows:
                    run.end(connection, head)
                    return run.done
                run.anchors(connection, rows)
            for row in rows:
                run.record(row)
            if progress is not None:
                total = as_number(head.sequence) if head is not None else 0
                progress(run.done.records, max(total, run.done.records))

    @contextmanager
    def _snapshot(self) -> Iterator[Connection]:
        with self._database.read() as connection:
            if not self._database.is_sqlite:
                connection.execution_options(isolation_level="REPEATABLE READ")
            yield connection

    def _next(
        self, connection: Connection, stream: str, after: Any, run: _Run
    ) -> tuple[Any, Sequence[Any]]:
        """Return the next records that can be read, and the place after them."""
        for size in (CHUNK, 1):
            try:
                rows = connection.execute(reading.records(stream, after, size)).all()
            except OperationalError:
                continue
            return (rows[-1][_SEQUENCE] if rows else after), rows
        # SQLite lets text be stored that is none.
        sequence = connection.execute(reading.sequences(stream, after)).scalar_one()
        run.unreadable(sequence, reading.bytes_of(connection, stream, sequence))
        return self._next(connection, stream, sequence, run)


def verify_export(
    lines: Iterable[bytes],
    keys: Iterable[Sealer],
    noted: Mapping[int, bytes] | None = None,
) -> Verification:
    """Check the lines of an export, as `storage.audit.search.as_line` writes them.

    Whether records after the last line are missing, only a noted hash can tell. The
    contents of a first line that is not the first record cannot be checked.

    Raises
    ------
    InvalidParameter
        A line is no record.
    """
    run = _Run(Verification("export"), {sealer.key_id: sealer for sealer in keys})
    run.know(None, noted or {})
    for number, line in enumerate(lines, 1):
        row = _row_of(line, number)
        if number == 1:
            run.begin_after(row[_SEQUENCE] - 1)
        run.record(row)
    run.end_alone()
    return run.done


def _row_of(line: bytes, number: int) -> tuple[Any, ...]:
    try:
        record = orjson.loads(line)
        values = {name: record[name] for name in (*CONTENT, "key_id")}
        digests = [
            bytes.fromhex(record[name] or "") if record[name] is not None else None
            for name in ("before", "after", "hash", "mac")
        ]
        if not isinstance(values["sequence"], int):
            raise TypeError
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidParameter("export", f"line {number} is no record") from error
    values["before"], values["after"], record_hash, mac = digests
    content = tuple(values[name] for name in CONTENT)
    return (*content, record_hash, values["key_id"], mac)


def _head(connection: Connection, stream: str) -> Any:
    return connection.execute(
        select(AuditStream).where(AuditStream.stream == stream)
    ).first()


class _Run:
    """The state of one verification: how far it is, and what must come next."""

    def __init__(self, done: Verification, keys: Mapping[str, Sealer]) -> None:
        self.done = done
        self._keys = keys
        self._begun = False
        self._base = 0
        self._last = 0
        #: The hash that the last record has, whether right or not.
        self._stored = chain.GENESIS
        self._is_part = False
        #: Hashes the next record may follow: more than one after a damaged record,
        #: none after a missing one.
        self._previous: tuple[bytes, ...] = (chain.GENESIS,)
        #: Whether that hash is known to be the one that was written.
        self._is_certain = True
        self._points: dict[int, list[Point]] = {}
        self._accepted: set[str] = set()
        self._unknown_key: str | None = None

    def know(self, memory: Memory | None, noted: Mapping[int, bytes]) -> None:
        """Take in what is known from outside the database."""
        for sequence, record_hash in noted.items():
            self._expect(
                sequence,
                Point(record_hash, Damage.ROLLED_BACK, "not the hash that was noted"),
            )
        if memory is None:
            return
        detail = "this host wrote another record here: records were replaced"
        try:
            seen = memory.read()
            for one in (*memory.lost(), *([seen] if seen is not None else [])):
                self._expect(one.sequence, Point(one.hash, Damage.ROLLED_BACK, detail))
        except InvalidParameter as error:
            self.done.add(self._last + 1, Damage.MEMORY, str(error), str(error))

    def _expect(self, sequence: int, point: Point) -> None:
        self._points.setdefault(sequence, []).append(point)

    def begin(self, row: Any) -> None:
        """Take the beginning of the chain from its head, once."""
        if self._begun:
            return
        self._begun = True
        if row is None:
            return
        head = head_of(row)
        problem = self._head_problem(row, head)
        if problem is not None:
            damage, detail = problem
            self.done.add(head.sequence, damage, detail, *row)
            # A beginning that nobody signed may hide what was deleted.
            return
        self._base = self._last = head.base_sequence
        self._previous = (head.base_hash,)
        self._stored = head.base_hash
        self._compare(self._base, head.base_hash)

    def _head_problem(self, row: Any, head: Head) -> tuple[Damage, str] | None:
        sealer = self._keys.get(row.key_id)
        if sealer is None:
            return Damage.UNKNOWN, _unknown("the head is", row.key_id)
        if not chain.same(sealer.head(head), as_bytes(row.mac)):
            return Damage.HEAD, "the head was changed: its signature does not fit"
        return None

    def record(self, row: Any) -> None:
        """Check the next record."""
        self.done.records += 1
        sequence = row[_SEQUENCE]
        stored, key_id, mac = (as_bytes(row[_N]), row[_N + 1], as_bytes(row[_N + 2]))
        if not self._comes_next(sequence, stored, row):
            return
        signed = self._signed(sequence, stored, key_id, mac)
        expected = self._expected(row)
        follows = stored in expected
        if not follows or signed is False:
            self._judge(row, follows=follows, signed=signed)
        self._last, self._stored = sequence, stored
        self._is_certain = follows if signed is None else signed
        # A hash that nobody signed is unsure: it may be what was changed.
        self._previous = (stored,) if signed or follows else (stored, *expected)
        self._compare(sequence, stored)
        self.done.sequence, self.done.hash = sequence, stored
        if follows and signed and row[_ACTION] == ACCEPT:
            self._accept(row[_DETAIL])

    def _accept(self, detail: str) -> None:
        """Take in which damages were accepted; the record is known to be true."""
        accepted = orjson.loads(detail).get(ACCEPTED, ())
        self._accepted.update(key for key in accepted if isinstance(key, str))

    def _signed(
        self, sequence: int, stored: bytes, key_id: str, mac: bytes
    ) -> bool | None:
        """Tell whether a record is signed; None: with a key that is not here.

        Records in a row with the same unknown key are one finding.
        """
        sealer = self._keys.get(key_id)
        if sealer is not None:
            self._unknown_key = None
            return chain.same(sealer.record(sequence, stored), mac)
        if key_id != self._unknown_key:
            detail = _unknown("from here on", key_id)
            self.done.add(sequence, Damage.UNKNOWN, detail, key_id, stored)
            self._unknown_key = key_id
        return None

    def _judge(self, row: Any, *, follows: bool, signed: bool | None) -> None:
        sequence = row[_SEQUENCE]
        if follows:
            detail = "hashed again: its signature was not made with the key"
            self.done.add(sequence, Damage.FORGED, detail, *row)
        elif signed is False:
            detail = "neither its hash nor its signature belong here"
            self.done.add(sequence, Damage.MISPLACED, detail, *row)
        elif self._is_certain:
            detail = "its contents do not give its hash"
            self.done.add(sequence, Damage.ALTERED, detail, *row)
        else:
            self.done.unchecked += 1
            if self._is_part and self.done.records == 1:
                return
            detail = "its contents cannot be checked without the one before"
            self.done.add(sequence, Damage.UNCHECKED, detail, *row)

    def _comes_next(self, sequence: Any, stored: bytes, row: Sequence[Any]) -> bool:
        """Tell whether this is a record of the chain; note what is missing."""
        if not isinstance(sequence, int):
            detail = "a record whose sequence number is none"
            self.done.add(self._last + 1, Damage.EXTRA, detail, *row)
            return False
        if sequence <= self._base:
            detail = "before the first record"
            self.done.add(sequence, Damage.EXTRA, detail, *row)
            return False
        if sequence > self._last + 1:
            self._miss(sequence - 1, stored)
        return True

    def _miss(self, last: int, after: bytes) -> None:
        """Note a gap up to `last`; `after` is the hash of the record behind it."""
        first = self._last + 1
        detail = "is missing" if first == last else f"to {last} are missing"
        self.done.add(first, Damage.MISSING, detail, last, self._stored, after)
        # Where an anchor signs the last of them, the next can be checked still.
        points = self._points.get(last, ())
        self._previous = tuple(
            point.hash for point in points if point.damage is Damage.ANCHOR
        )
        self._is_certain = bool(self._previous)

    def _expected(self, row: Any) -> tuple[bytes, ...]:
        """Return the hashes the record may have, from what it says."""
        if row[_FORMAT] != chain.FORMAT or row[_ALG] not in ALGORITHMS:
            return ()
        try:
            content = chain.canonical(tuple(row[:_N]))
        except TypeError:
            # Text that no encoding can carry, or a number beyond 64 bits.
            return ()
        return tuple(chain.link(row[_ALG], one, content) for one in self._previous)

    def unreadable(self, sequence: Any, held: Sequence[Any]) -> None:
        """Note a record the database cannot read, by the bytes it holds."""
        self.done.records += 1
        if self._comes_next(sequence, b"", held):
            self.done.add(sequence, Damage.ALTERED, "it cannot be read", *held)
            self._last, self._stored = sequence, b""
            self._previous = ()
            self._is_certain = False

    def anchors(self, connection: Connection, rows: Sequence[Any]) -> None:
        """Take in the anchors that concern `rows`, and what is missing before."""
        query = reading.anchors(self.done.stream).where(
            AuditAnchor.sequence > self._last,
            AuditAnchor.sequence <= rows[-1][_SEQUENCE],
        )
        for anchor in connection.execute(query):
            if self._is_signed(anchor):
                point = Point(
                    as_bytes(anchor.hash), Damage.ANCHOR, "its anchor has another hash"
                )
                self._expect(anchor.sequence, point)

    def _is_signed(self, anchor: Any) -> bool:
        sealer = self._keys.get(anchor.key_id)
        if sealer is None:
            # Proves nothing, and repeats only what records and head say.
            return False
        wanted = sealer.anchor(
            anchor.stream, anchor.sequence, as_bytes(anchor.hash), anchor.time_us
        )
        if not chain.same(wanted, as_bytes(anchor.mac)):
            detail = "its anchor was changed: its signature does not fit"
            self.done.add(anchor.sequence, Damage.ANCHOR, detail, *anchor)
            return False
        return True

    def _compare(self, sequence: int, stored: bytes) -> None:
        for point in self._points.pop(sequence, ()):
            if point.hash != stored:
                self.done.add(sequence, point.damage, point.detail, point.hash, stored)

    def end(self, connection: Connection, row: Any) -> None:
        """Hold the end of the chain against all that says where it should be."""
        last = self._last
        self._end_at_head(row)
        beyond = reading.anchors(self.done.stream).where(AuditAnchor.sequence > last)
        for anchor in connection.execute(beyond.limit(LISTED)):
            if self._is_signed(anchor):
                detail = f"an anchor signs record {anchor.sequence}"
                signed = (anchor.sequence, anchor.hash)
                self.done.add(last + 1, Damage.TRUNCATED, detail, *signed)
        held = connection.scalar(
            select(func.count())
            .select_from(AuditRecord)
            .where(AuditRecord.stream == self.done.stream)
        )
        if held != self.done.records:
            detail = f"{(held or 0) - self.done.records} records have no number"
            self.done.add(last + 1, Damage.EXTRA, detail, held)
        self.end_alone()

    def begin_after(self, sequence: int) -> None:
        """Begin with a part of the chain, whose first record follows `sequence`."""
        self._begun = True
        if sequence > 0:
            self._is_part = True
            self._base = self._last = sequence
            self._previous = ()
            self._is_certain = False

    def end_alone(self) -> None:
        """Hold the end against what is known from elsewhere."""
        for sequence in sorted(self._points):
            if sequence > self._last:
                detail = f"record {sequence} was written, as is known elsewhere"
                known = [point.hash for point in self._points[sequence]]
                self.done.add(
                    self._last + 1, Damage.ROLLED_BACK, detail, sequence, *known
                )
        self.done.leave_out(frozenset(self._accepted))

    def _end_at_head(self, row: Any) -> None:
        last = self._last
        if row is None:
            if self.done.records:
                detail = "the head is missing"
                self.done.add(last, Damage.HEAD, detail, self._stored)
            return
        head = head_of(row)
        problem = self._head_problem(row, head)
        if problem is not None:
            damage, detail = problem
            if not any(found.detail == detail for found in self.done.findings):
                self.done.add(head.sequence, damage, detail, *row)
            return
        if head.sequence > last:
            detail = f"the chain ended at record {head.sequence}"
            self.done.add(last + 1, Damage.TRUNCATED, detail, head.sequence, head.hash)
        elif head.sequence < last:
            detail = f"the chain ends at record {head.sequence}"
            self.done.add(head.sequence + 1, Damage.EXTRA, detail, last, self._stored)
        elif self.done.records and head.hash != self.done.hash:
            detail = "the head has another hash"
            self.done.add(last, Damage.HEAD, detail, head.hash, self._stored)


def _unknown(what: str, key_id: Any) -> str:
    # Whoever changed the database may have put anything there.
    return f"{what} signed with key {clean(str(key_id), 32)}, which is not here"
