"""Adding records to a chain, inside a transaction.

The row of the stream is locked first, so that the writers of all processes and hosts
take turns and the chain has no forks. The lock is held until the transaction ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter, le
from typing import Any

from sqlalchemy import Connection, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from storage.audit import chain
from storage.audit.chain import CONTENT, GENESIS, Head, Keyring, Sealer
from storage.audit.event import LENGTHS as _LIMITS
from storage.audit.event import MAX_DIGEST_BYTES, AuditEvent, clean, plain
from storage.db.tables import AuditAnchor, AuditRecord, AuditStream
from storage.kernel.errors import CorruptData

#: An anchor is made when this many records, or this much time, have passed.
ANCHOR_RECORDS = 1000
ANCHOR_US = 3600 * 1_000_000

#: What the event gives of the content; before it stands what its place gives.
_OF_PLACE = 7
GIVEN = CONTENT[_OF_PLACE:]
_TEXTS = GIVEN[: GIVEN.index("detail")]
_LENGTHS = tuple(_LIMITS[name] for name in _TEXTS)
_texts_of = attrgetter(*_TEXTS)
_ROLES, _OUTCOME = _TEXTS.index("roles"), _TEXTS.index("outcome")
#: Fields of which "" means none, and is no value in the record.
_OPTIONAL = tuple(
    _TEXTS.index(name)
    for name in (
        "object_tenant", "patient_id", "study_uid", "series_uid", "instance_uid",
        "object_id",
    )
)  # fmt: skip
_COLUMNS = (*CONTENT, "hash", "key_id", "mac")


@dataclass(slots=True)
class Entry:
    """An event that is fit to be written.

    Attributes
    ----------
    time_us, last_us, count : int
        It stands for `count` accesses, between these instants.
    values : tuple
        The recorded values of `GIVEN`.
    """

    time_us: int
    last_us: int
    count: int
    values: tuple[Any, ...]

    def drop(self, name: str) -> None:
        """Leave a field without a value."""
        at = GIVEN.index(name)
        self.values = (*self.values[:at], None, *self.values[at + 1 :])


def entry_of(event: AuditEvent, now_us: int, detail: str) -> Entry:
    """Return an event as it is written; what is wrong with it is found here.

    Parameters
    ----------
    detail : str
        `detail_text` of its detail.

    Raises
    ------
    TypeError
        A value is none that its field can hold.
    """
    time_us = event.time_us or now_us
    if not 0 <= time_us < 1 << 62:
        raise TypeError("time_us is no time")
    texts: list[Any] = list(_texts_of(event))
    texts[_ROLES] = ",".join(sorted(event.roles))
    texts[_OUTCOME] = event.outcome.value
    # Nearly all text needs nothing: see that at the price of one look.
    if not (
        all(type(text) is str for text in texts)
        and all(map(le, map(len, texts), _LENGTHS))
        and "".join(texts).isprintable()
    ):
        texts = [
            clean(plain(text), length)
            for text, length in zip(texts, _LENGTHS, strict=True)
        ]
    for at in _OPTIONAL:
        texts[at] = texts[at] or None
    before, after = _digest(event.before), _digest(event.after)
    return Entry(time_us, time_us, 1, (*texts, detail, before, after))


def _digest(value: bytes | None) -> bytes | None:
    return None if value is None else bytes(value[:MAX_DIGEST_BYTES])


def append(
    connection: Connection,
    stream: str,
    entries: Sequence[Entry],
    keys: Keyring,
    now_us: int,
    remembered: Callable[[Connection, Head], bool],
) -> tuple[Head, Head]:
    """Write `entries` in this order; return the head before and the new one.

    Parameters
    ----------
    remembered : callable
        Tells whether a head that was signed with a key that is not here can follow
        what this host remembers. Hosts may have keys of their own; a shortened chain
        under a key of nobody would become a true one with our next signature.

    Raises
    ------
    CorruptData
        The head is missing, was changed, contradicts what is remembered, or is not
        that of the last record. Nothing is written: going on would hide it.
    """
    sealer = keys.own
    row = _locked(connection, stream, sealer, now_us)
    head = head_of(row)
    signer = keys.find(row.key_id)
    if signer is None:
        is_true = remembered(connection, head)
    else:
        is_true = chain.same(signer.head(head), as_bytes(row.mac))
    if not is_true:
        raise CorruptData(
            "audit: the head of the chain was changed: run `huying audit verify`"
        )
    if not entries:
        return head, head
    previous = head.hash
    rows: list[tuple[Any, ...]] = []
    for sequence, entry in enumerate(entries, head.sequence + 1):
        content = (
            chain.FORMAT,
            sealer.algorithm,
            stream,
            sequence,
            entry.time_us,
            entry.last_us,
            entry.count,
            *entry.values,
        )
        previous = chain.link(sealer.algorithm, previous, chain.canonical(content))
        signature = sealer.record(sequence, previous)
        rows.append((*content, previous, sealer.key_id, signature))
    _insert(connection, rows)
    new = replace(
        head, sequence=head.sequence + len(rows), hash=previous, time_us=now_us
    )
    anchored = _anchor_due(head, new, row.anchor_us)
    if anchored:
        # One that is there was put there by another, or belongs to another chain:
        # it stays, for verification to find.
        connection.execute(
            _module(connection)
            .insert(AuditAnchor)
            .values(_anchor(new, sealer))
            .on_conflict_do_nothing()
        )
    connection.execute(
        update(AuditStream)
        .where(AuditStream.stream == stream)
        .values(**_signed(new, sealer), anchor_us=now_us if anchored else row.anchor_us)
    )
    return head, new


def bound_waiting(connection: Connection, seconds: float) -> None:
    """Give up on a chain that another process keeps, and ours if it stands still.

    SQLite's writers queue on a lock of the data folder, which a process that ends
    gives back.
    """
    if connection.dialect.name == "postgresql":
        # Whole numbers of ours: nothing of a request is in them.
        limit = int(seconds * 1000)
        connection.exec_driver_sql(
            f"SET LOCAL lock_timeout = {limit};"
            f" SET LOCAL idle_in_transaction_session_timeout = {3 * limit}"
        )


def hash_at(connection: Connection, stream: str, sequence: int) -> bytes | None:
    """Return the hash of a record, or None."""
    found = connection.scalar(
        select(AuditRecord.hash).where(
            AuditRecord.stream == stream, AuditRecord.sequence == sequence
        )
    )
    return None if found is None else as_bytes(found)


def _insert(connection: Connection, rows: list[tuple[Any, ...]]) -> None:
    """Add records by the driver itself: at a third less than the toolkit's price."""
    mark = "?" if connection.dialect.name == "sqlite" else "%s"
    names = ", ".join(f'"{name}"' for name in _COLUMNS)
    marks = ", ".join([mark] * len(_COLUMNS))
    statement = f"INSERT INTO audit_record ({names}) VALUES ({marks})"  # noqa: S608
    try:
        connection.exec_driver_sql(statement, rows)
    except IntegrityError as error:
        raise CorruptData(
            "audit: the chain goes on after its head: run `huying audit verify`"
        ) from error


def begin_anew(connection: Connection, head: Head, sealer: Sealer) -> None:
    """Make `head` the one that the next record follows, whatever is there now."""
    values = {**_signed(head, sealer), "anchor_us": head.time_us}
    connection.execute(
        _module(connection)
        .insert(AuditStream)
        .values(stream=head.stream, **values)
        .on_conflict_do_update(index_elements=["stream"], set_=values)
    )


def head_of(row: Any) -> Head:
    """Return the head that a row of `AuditStream` describes.

    SQLite may hold values of other types than the columns': they become values that
    no signature fits.
    """
    return Head(
        stream=row.stream,
        base_sequence=as_number(row.base_sequence),
        base_hash=as_bytes(row.base_hash),
        sequence=as_number(row.sequence),
        hash=as_bytes(row.hash),
        time_us=as_number(row.time_us),
    )


def _module(connection: Connection) -> Any:
    """Return what knows ON CONFLICT of this database."""
    return sqlite if connection.dialect.name == "sqlite" else postgresql


def as_bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else b""


def as_number(value: Any) -> int:
    return value if isinstance(value, int) else -1


def _anchor_due(old: Head, new: Head, anchor_us: int) -> bool:
    return (
        new.sequence // ANCHOR_RECORDS > old.sequence // ANCHOR_RECORDS
        or new.time_us - anchor_us >= ANCHOR_US
    )


def _anchor(head: Head, sealer: Sealer) -> dict[str, Any]:
    return {
        "stream": head.stream,
        "sequence": head.sequence,
        "hash": head.hash,
        "time_us": head.time_us,
        "alg": sealer.algorithm,
        "key_id": sealer.key_id,
        "mac": sealer.anchor(head.stream, head.sequence, head.hash, head.time_us),
    }


def _signed(head: Head, sealer: Sealer) -> dict[str, Any]:
    return {
        "base_sequence": head.base_sequence,
        "base_hash": head.base_hash,
        "sequence": head.sequence,
        "hash": head.hash,
        "time_us": head.time_us,
        "alg": sealer.algorithm,
        "key_id": sealer.key_id,
        "mac": sealer.head(head),
    }


def _locked(connection: Connection, stream: str, sealer: Sealer, now_us: int) -> Any:
    """Return the stream's row, locked; the first writer makes it."""
    query = select(AuditStream).where(AuditStream.stream == stream).with_for_update()
    row = connection.execute(query).first()
    if row is not None:
        return row
    held = select(AuditRecord.sequence).where(AuditRecord.stream == stream).limit(1)
    if connection.execute(held).first() is not None:
        raise CorruptData(
            "audit: the head of the chain is missing: run `huying audit verify`"
        )
    first = Head(stream, 0, GENESIS, 0, GENESIS, now_us)
    connection.execute(
        _module(connection)
        .insert(AuditStream)
        .values(stream=stream, **_signed(first, sealer), anchor_us=now_us)
        .on_conflict_do_nothing()
    )
    return connection.execute(query).one()
