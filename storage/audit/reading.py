"""Reading the tables of the audit in the order of the chain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, LargeBinary, Select, cast, select

from storage.audit.chain import CONTENT
from storage.audit.findings import mark
from storage.db.tables import AuditAnchor, AuditRecord

#: Before every sequence number.
BEGINNING = -(2**63)

_COLUMNS = (
    *(getattr(AuditRecord, name) for name in CONTENT),
    AuditRecord.hash,
    AuditRecord.key_id,
    AuditRecord.mac,
)
_RECORD = select(*_COLUMNS)


def records(stream: str, after: Any, size: int) -> Select[Any]:
    """Select the records behind `after`, at most `size`."""
    return (
        _RECORD.where(AuditRecord.stream == stream, AuditRecord.sequence > after)
        .order_by(AuditRecord.sequence)
        .limit(size)
    )


def bytes_of(connection: Connection, stream: str, sequence: Any) -> Sequence[Any]:
    """Return the bytes of a record that the database cannot read as what it is."""
    columns = (cast(column, LargeBinary) for column in _COLUMNS)
    query = select(*columns).where(
        AuditRecord.stream == stream, AuditRecord.sequence == sequence
    )
    return connection.execute(query).one()


def mark_of(connection: Connection, stream: str, sequence: int) -> str:
    """Return the mark of a damage that is this record, as it is now."""
    return mark(*connection.execute(records(stream, sequence - 1, 1)).one())


def sequences(stream: str, after: Any) -> Select[Any]:
    """Select the number of the record behind `after`."""
    return (
        select(AuditRecord.sequence)
        .where(AuditRecord.stream == stream, AuditRecord.sequence > after)
        .order_by(AuditRecord.sequence)
        .limit(1)
    )


def anchors(stream: str) -> Select[Any]:
    """Select all anchors, in order."""
    return (
        select(AuditAnchor)
        .where(AuditAnchor.stream == stream)
        .order_by(AuditAnchor.sequence)
    )
