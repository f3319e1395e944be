"""Adding records to a chain, inside a transaction.

The row of the stream is locked first, so that the writers of all processes and hosts
take turns and the chain has no forks. The lock is held until the transaction ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from storage.audit import chain
from storage.audit.chain import GENESIS, Head, Sealer
from storage.audit.event import LENGTHS, MAX_DIGEST_BYTES, AuditEvent, clean
from storage.db.tables import AuditAnchor, AuditRecord, AuditStream
from storage.kernel.errors import CorruptData

#: An anchor is made when this many records, or this much time, have passed.
ANCHOR_RECORDS = 1000
ANCHOR_US = 3600 * 1_000_000

_INSERT = insert(AuditRecord).inline()
_OPTIONAL = (
    "object_tenant", "patient_id", "study_uid", "series_uid", "instance_uid",
    "object_id",
)  # fmt: skip
_TEXTS = tuple(name for name in LENGTHS if name not in {"roles", "tenant", *_OPTIONAL})


@dataclass(frozen=True, slots=True)
class Entry:
    """An event that is ready to be written.

    Attributes
    ----------
    detail : str
        A JSON object.
    count : int
        Accesses it stands for, the last of them at `last_us`.
    """

    event: AuditEvent
    detail: str
    last_us: int
    count: int = 1


def append(
    connection: Connection,
    stream: str,
    entries: Sequence[Entry],
    sealer: Sealer,
    now_us: int,
) -> tuple[Head, Head]:
    """Write `entries` in this order; return the head before and the new one.

    Raises
    ------
    CorruptData
        The head is missing, was changed by somebody without the key, or is not that
        of the last record. Nothing is written: going on would hide it.
    """
    row = _locked(connection, stream, sealer, now_us)
    head = head_of(row)
    if row.key_id == sealer.key_id and not chain.same(
        sealer.head(head), as_bytes(row.mac)
    ):
        raise CorruptData(
            "audit: the head of the chain was changed: run `huying audit verify`"
        )
    previous, rows = head.hash, []
    for sequence, entry in enumerate(entries, head.sequence + 1):
        made = _row(entry, stream, sequence, sealer.algorithm)
        content = chain.canonical([made[name] for name in chain.CONTENT])
        previous = chain.link(sealer.algorithm, previous, content)
        made["hash"] = previous
        made["key_id"] = sealer.key_id
        made["mac"] = sealer.record(sequence, previous)
        rows.append(made)
    if not rows:
        return head, head
    try:
        connection.execute(_INSERT, rows)
    except IntegrityError as error:
        raise CorruptData(
            "audit: the chain goes on after its head: run `huying audit verify`"
        ) from error
    new = replace(
        head, sequence=head.sequence + len(rows), hash=previous, time_us=now_us
    )
    anchored = _anchor_due(head, new, row.anchor_us)
    if anchored:
        connection.execute(insert(AuditAnchor), _anchor(new, sealer))
    connection.execute(
        update(AuditStream)
        .where(AuditStream.stream == stream)
        .values(**_signed(new, sealer), anchor_us=now_us if anchored else row.anchor_us)
    )
    return head, new


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
    module = sqlite if connection.dialect.name == "sqlite" else postgresql
    connection.execute(
        module.insert(AuditStream)
        .values(stream=stream, **_signed(first, sealer), anchor_us=now_us)
        .on_conflict_do_nothing()
    )
    return connection.execute(query).one()


def _row(entry: Entry, stream: str, sequence: int, algorithm: str) -> dict[str, Any]:
    event = entry.event
    row: dict[str, Any] = {
        "format": chain.FORMAT,
        "alg": algorithm,
        "stream": stream,
        "sequence": sequence,
        "time_us": event.time_us,
        "last_us": entry.last_us,
        "count": entry.count,
        "tenant": clean(event.tenant, LENGTHS["tenant"]),
        "roles": clean(",".join(sorted(event.roles)), LENGTHS["roles"]),
        "outcome": str(event.outcome),
        "detail": entry.detail,
        "before": _digest(event.before),
        "after": _digest(event.after),
    }
    for name in _TEXTS:
        row[name] = clean(getattr(event, name), LENGTHS[name])
    for name in _OPTIONAL:
        row[name] = clean(getattr(event, name), LENGTHS[name]) or None
    return row


def _digest(value: bytes | None) -> bytes | None:
    return None if value is None else bytes(value[:MAX_DIGEST_BYTES])
