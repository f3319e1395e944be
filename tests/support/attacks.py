"""What somebody may do to the audit who has the database, and not the key."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Connection, insert, select, text, update

from storage.audit.findings import Damage
from storage.db.tables import AuditRecord, AuditStream
from tests.support.auditing import RECORDS, rechain

#: Records of the chain that is attacked.
N = 12


def sql(statement: str) -> Callable[[Connection], object]:
    return lambda connection: connection.execute(text(statement))


def swap(connection: Connection) -> None:
    """Exchange the places of records 5 and 6, with all they carry."""
    for old, new in ((5, -1), (6, 5), (-1, 6)):
        connection.execute(
            update(AuditRecord).where(AuditRecord.sequence == old).values(sequence=new)
        )


def close_the_gap(connection: Connection) -> None:
    """Delete record 5, renumber the later ones, and hash them anew."""
    connection.execute(text("DELETE FROM audit_record WHERE sequence = 5"))
    for sequence in range(6, N + 1):
        connection.execute(
            update(AuditRecord)
            .where(AuditRecord.sequence == sequence)
            .values(sequence=sequence - 1)
        )
    rechain(connection, 5)


def change_and_rechain(connection: Connection) -> None:
    connection.execute(
        text("UPDATE audit_record SET actor = 'nobody' WHERE sequence = 5")
    )
    rechain(connection, 5)


def rechain_with_head(connection: Connection) -> None:
    change_and_rechain(connection)
    last = connection.scalar(select(AuditRecord.hash).where(AuditRecord.sequence == N))
    connection.execute(update(AuditStream).values(hash=last))


def insert_one(connection: Connection) -> None:
    """Put a copy of record 5 after it, and move the later ones on."""
    for sequence in range(N, 5, -1):
        connection.execute(
            update(AuditRecord)
            .where(AuditRecord.sequence == sequence)
            .values(sequence=sequence + 1)
        )
    copy_to(connection, 5, 6)


def copy_to(connection: Connection, source: int, target: int) -> None:
    row = connection.execute(
        select(RECORDS).where(RECORDS.c.sequence == source)
    ).mappings()
    connection.execute(insert(RECORDS), {**row.one(), "sequence": target})


def replay(connection: Connection) -> None:
    """Put record 3 in the place of record 5: a true record, in a wrong place."""
    connection.execute(text("DELETE FROM audit_record WHERE sequence = 5"))
    copy_to(connection, 3, 5)


#: What is done to the database, and what verification says first.
ATTACKS: dict[str, tuple[Callable[[Connection], object], int, Damage]] = {
    "flip actor": (
        sql("UPDATE audit_record SET actor = 'eve' WHERE sequence = 5"),
        5, Damage.ALTERED,
    ),
    "flip outcome": (
        sql("UPDATE audit_record SET outcome = 'deny' WHERE sequence = 5"),
        5, Damage.ALTERED,
    ),
    "flip time": (
        sql("UPDATE audit_record SET time_us = time_us + 1 WHERE sequence = 5"),
        5, Damage.ALTERED,
    ),
    "flip count": (
        sql("UPDATE audit_record SET count = 2 WHERE sequence = 5"),
        5, Damage.ALTERED,
    ),
    "empty text for no value": (
        sql("UPDATE audit_record SET study_uid = '' WHERE sequence = 5"),
        5, Damage.ALTERED,
    ),
    "unknown format": (
        sql("UPDATE audit_record SET format = 2 WHERE sequence = 5"),
        5, Damage.ALTERED,
    ),
    "weaker algorithm": (
        sql("UPDATE audit_record SET alg = 'md5' WHERE sequence = 5"),
        5, Damage.ALTERED,
    ),
    "change the last": (
        sql("UPDATE audit_record SET actor = 'eve' WHERE sequence = 12"),
        N, Damage.ALTERED,
    ),
    "change the first": (
        sql("UPDATE audit_record SET actor = 'eve' WHERE sequence = 1"),
        1, Damage.ALTERED,
    ),
    "change a hash": (
        lambda c: c.execute(
            update(AuditRecord)
            .where(AuditRecord.sequence == 5)
            .values(hash=b"x" * 32)
        ),
        5, Damage.MISPLACED,
    ),
    "change a signature": (
        lambda c: c.execute(
            update(AuditRecord).where(AuditRecord.sequence == 5).values(mac=b"x" * 32)
        ),
        5, Damage.FORGED,
    ),
    "name another key": (
        sql("UPDATE audit_record SET key_id = 'none' WHERE sequence = 5"),
        5, Damage.UNKNOWN,
    ),
    "delete one": (
        sql("DELETE FROM audit_record WHERE sequence = 5"), 5, Damage.MISSING,
    ),
    "delete three": (
        sql("DELETE FROM audit_record WHERE sequence BETWEEN 5 AND 7"),
        5, Damage.MISSING,
    ),
    "delete the first": (
        sql("DELETE FROM audit_record WHERE sequence <= 3"), 1, Damage.MISSING,
    ),
    "delete and close the gap": (close_the_gap, 5, Damage.FORGED),
    "swap two": (swap, 5, Damage.MISPLACED),
    "replay a record": (replay, 5, Damage.MISPLACED),
    "insert one": (insert_one, 6, Damage.MISPLACED),
    "change and hash all anew": (change_and_rechain, 5, Damage.FORGED),
    "with the head's hash": (rechain_with_head, 5, Damage.FORGED),
    "truncate": (
        sql("DELETE FROM audit_record WHERE sequence = 12"), N, Damage.TRUNCATED,
    ),
    "truncate all": (sql("DELETE FROM audit_record"), 1, Damage.TRUNCATED),
    "truncate, head as well": (
        lambda c: (
            c.execute(text("DELETE FROM audit_record WHERE sequence > 9")),
            c.execute(
                update(AuditStream).values(
                    sequence=9,
                    hash=c.scalar(
                        select(AuditRecord.hash).where(AuditRecord.sequence == 9)
                    ),
                )
            ),
        ),
        9, Damage.HEAD,
    ),
    "append": (lambda c: copy_to(c, N, N + 1), N + 1, Damage.MISPLACED),
    "put before the first": (lambda c: copy_to(c, 1, 0), 0, Damage.EXTRA),
    "delete the head": (sql("DELETE FROM audit_stream"), N, Damage.HEAD),
    "pretend an archive": (
        lambda c: (
            c.execute(text("DELETE FROM audit_record WHERE sequence <= 4")),
            c.execute(
                update(AuditStream).values(base_sequence=4, base_hash=b"x" * 32)
            ),
        ),
        1, Damage.MISSING,
    ),
    "delete everything": (
        lambda c: (
            c.execute(text("DELETE FROM audit_record")),
            c.execute(text("DELETE FROM audit_stream")),
            c.execute(text("DELETE FROM audit_anchor")),
        ),
        1, Damage.ROLLED_BACK,
    ),
}  # fmt: skip
