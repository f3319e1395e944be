"""What tests of the audit share: writing, reading, and attacking its tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from sqlalchemy import Connection, Table, insert, select, text, update

from storage.audit import AuditEvent, AuditTrail
from storage.audit.chain import CONTENT, canonical, link
from storage.audit.findings import Verification
from storage.audit.keys import Memory, keyring
from storage.audit.trail import STREAM
from storage.audit.verify import ChainVerifier
from storage.db.engine import Database
from storage.db.tables import AuditRecord

RECORDS = cast("Table", AuditRecord.__table__)


def write(trail: AuditTrail, count: int, *, first: int = 1) -> None:
    """Record `count` logins, each a record of its own."""
    for number in range(first, first + count):
        trail.record_now(AuditEvent(action="login", actor=f"user-{number}"))


def records(database: Database) -> list[Any]:
    with database.read() as connection:
        query = select(AuditRecord).order_by(AuditRecord.sequence)
        return list(connection.execute(query))


def verified(database: Database, folder: Path, **more: Any) -> Verification:
    """Verify as the command does: with the key and the memory of the folder."""
    keys = keyring(folder)
    memory = more.pop("memory", Memory(folder, STREAM, keys.own))
    return ChainVerifier(database, [*keys]).verify(STREAM, memory=memory, **more)


@contextmanager
def attacking(database: Database) -> Iterator[Connection]:
    """Yield what somebody has who may do anything to the database."""
    with database.write() as connection:
        drop_triggers(connection)
        yield connection


def drop_triggers(connection: Connection) -> None:
    if connection.dialect.name == "sqlite":
        for verb in ("update", "delete"):
            connection.execute(text(f"DROP TRIGGER IF EXISTS audit_record_{verb}"))
    else:
        connection.execute(
            text("DROP TRIGGER IF EXISTS audit_record_kept ON audit_record")
        )


def rechain(connection: Connection, start: int) -> bytes:
    """Hash all records from `start` on anew, as anybody can; return the last hash."""
    before = connection.scalar(
        select(AuditRecord.hash).where(AuditRecord.sequence == start - 1)
    )
    previous = before or bytes(32)
    columns = [getattr(AuditRecord, name) for name in CONTENT]
    query = select(*columns).where(AuditRecord.sequence >= start)
    for row in connection.execute(query.order_by(AuditRecord.sequence)).all():
        previous = link(row.alg, previous, canonical(tuple(row)))
        connection.execute(
            update(AuditRecord)
            .where(AuditRecord.sequence == row.sequence)
            .values(hash=previous)
        )
    return previous


def copy_rows(database: Database, table: Any) -> list[dict[str, Any]]:
    with database.read() as connection:
        return [dict(row) for row in connection.execute(select(table)).mappings()]


def put_back(
    connection: Connection, table: Any, rows: Sequence[dict[str, Any]]
) -> None:
    connection.execute(table.delete())
    if rows:
        connection.execute(insert(table), list(rows))
