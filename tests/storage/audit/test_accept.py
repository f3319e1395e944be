"""Going on after a damage: it stays told, and new ones are told again."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import text

from storage.audit import AuditEvent, AuditTrail
from storage.audit.accept import accept
from storage.audit.findings import Damage, Verification
from storage.audit.keys import KEY_FILE, Memory, keyring
from storage.audit.trail import STREAM
from storage.db.engine import Database
from storage.db.tables import AuditAnchor, AuditRecord, AuditStream
from storage.kernel.clock import SystemClock
from storage.kernel.errors import Conflict
from tests.support.attacks import ATTACKS, N
from tests.support.auditing import attacking, copy_rows, put_back, verified, write

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
WHO = AuditEvent(action="audit.accept", actor="root", reason="a disk broke")


@pytest.fixture
def chain(database: Database, trail: AuditTrail) -> Database:
    write(trail, N)
    return database


def accepted(database: Database, folder: Path, found: Verification) -> None:
    keys = keyring(folder)
    memory = Memory(folder, STREAM, keys.own)
    accept(database, memory, keys, found, WHO, 1_000_000)


@on_sqlite
@pytest.mark.parametrize("attack", ATTACKS)
def test_what_was_accepted_is_listed_and_the_audit_goes_on(
    chain: Database, trail: AuditTrail, folder: Path, attack: str
) -> None:
    with attacking(chain) as connection:
        ATTACKS[attack][0](connection)
    found = verified(chain, folder)
    assert not found.is_clean

    accepted(chain, folder, found)
    write(trail, 3, first=100)

    done = verified(chain, folder)
    assert done.is_clean, done.findings
    stays = {Damage.HEAD, Damage.TRUNCATED, Damage.ROLLED_BACK}
    if not {one.damage for one in found.findings} <= stays:
        assert done.accepted


@on_sqlite
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_damage_that_comes_after_is_told(
    chain: Database, trail: AuditTrail, folder: Path, attack: str
) -> None:
    with attacking(chain) as connection:
        ATTACKS[attack][0](connection)
    accepted(chain, folder, verified(chain, folder))
    write(trail, 3, first=100)
    last = verified(chain, folder).sequence

    with attacking(chain) as connection:
        connection.execute(
            text("UPDATE audit_record SET actor = 'eve' WHERE sequence = :last"),
            {"last": last},
        )

    done = verified(chain, folder)
    assert done.first is not None
    assert (done.first.sequence, done.first.damage) == (last, Damage.ALTERED)


def test_after_a_backup_was_put_back_no_number_is_used_twice(
    database: Database, trail: AuditTrail, folder: Path
) -> None:
    write(trail, 8)
    tables = (AuditRecord.__table__, AuditStream.__table__, AuditAnchor.__table__)
    backup = [(table, copy_rows(database, table)) for table in tables]
    write(trail, 4, first=9)
    with attacking(database) as connection:
        for table, rows in backup:
            put_back(connection, table, rows)

    accepted(database, folder, verified(database, folder))
    write(trail, 1, first=100)

    done = verified(database, folder)
    assert done.is_clean, done.findings
    assert [str(one) for one in done.accepted] == [
        "record 9: missing: to 12 are missing",
        "record 13: unchecked: its contents cannot be checked without the one before",
    ]
    assert done.sequence == 15


def test_nobody_accepts_for_himself_by_changing_the_record(
    chain: Database, folder: Path
) -> None:
    with attacking(chain) as connection:
        connection.execute(text("DELETE FROM audit_record WHERE sequence = 12"))
    accepted(chain, folder, verified(chain, folder))

    with attacking(chain) as connection:
        connection.execute(
            text("UPDATE audit_record SET actor = 'eve' WHERE sequence = 5")
        )
        connection.execute(
            text(
                "UPDATE audit_record SET action = 'audit.accept',"
                """ detail = '{"accepted":["5:altered","13:altered","14:altered"]}'"""
                " WHERE action IN ('audit.accept', 'audit.resume')"
            )
        )

    done = verified(chain, folder)
    assert done.first is not None
    assert (done.first.sequence, done.first.damage) == (5, Damage.ALTERED)


def test_after_the_key_was_lost_the_audit_goes_on_with_another(
    chain: Database, trail: AuditTrail, folder: Path
) -> None:
    trail.close()
    (folder / KEY_FILE).unlink()
    other = AuditTrail(chain, SystemClock(), folder)
    write(other, 2)

    found = verified(chain, folder)
    assert (1, Damage.UNKNOWN) in {(one.sequence, one.damage) for one in found.findings}
    accepted(chain, folder, found)
    write(other, 2)
    other.close()

    done = verified(chain, folder)
    assert done.is_clean, done.findings
    # Their hashes are checked still.
    with attacking(chain) as connection:
        connection.execute(
            text("UPDATE audit_record SET actor = 'eve' WHERE sequence = 5")
        )
    done = verified(chain, folder)
    assert done.first is not None
    assert (done.first.sequence, done.first.damage) == (5, Damage.ALTERED)


def test_more_damages_than_can_be_named_are_not_accepted(
    chain: Database, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.audit.findings.LISTED", 3)
    with attacking(chain) as connection:
        connection.execute(text("UPDATE audit_record SET actor = 'eve'"))
    found = verified(chain, folder)

    with pytest.raises(Conflict, match="too many"):
        accepted(chain, folder, found)

    assert not verified(chain, folder).is_clean


#: What is accepted, what is done after, and what must be told then.
LATER = {
    "a longer gap": (
        "DELETE FROM audit_record WHERE sequence BETWEEN 5 AND 6",
        "DELETE FROM audit_record WHERE sequence BETWEEN 7 AND 9",
        (5, Damage.MISSING),
    ),
    "a gap that begins earlier": (
        "DELETE FROM audit_record WHERE sequence BETWEEN 5 AND 6",
        "DELETE FROM audit_record WHERE sequence = 4",
        (4, Damage.MISSING),
    ),
    "another change of a record": (
        "UPDATE audit_record SET actor = 'eve' WHERE sequence = 5",
        "UPDATE audit_record SET actor = 'mallory' WHERE sequence = 5",
        (5, Damage.ALTERED),
    ),
    "another hash of a record": (
        "UPDATE audit_record SET hash = mac WHERE sequence = 5",
        "UPDATE audit_record SET actor = 'mallory' WHERE sequence = 5",
        (5, Damage.MISPLACED),
    ),
    "another signature of a record": (
        "UPDATE audit_record SET mac = hash WHERE sequence = 5",
        "UPDATE audit_record SET mac = NULL_OF_32 WHERE sequence = 5",
        (5, Damage.FORGED),
    ),
    "a change of the record behind a gap": (
        "DELETE FROM audit_record WHERE sequence = 5",
        "UPDATE audit_record SET actor = 'eve' WHERE sequence = 6",
        (6, Damage.UNCHECKED),
    ),
    "a change of the record to go on with": (
        "DELETE FROM audit_record WHERE sequence = 12",
        "UPDATE audit_record SET reason = 'none' WHERE action = 'audit.resume'",
        (13, Damage.UNCHECKED),
    ),
    "a truncated chain that is longer": (
        "DELETE FROM audit_record WHERE sequence >= 11",
        "DELETE FROM audit_record WHERE sequence = 10",
        (10, Damage.MISSING),
    ),
}


@pytest.mark.parametrize("later", LATER)
def test_what_was_accepted_covers_nothing_else_at_its_place(
    chain: Database, trail: AuditTrail, folder: Path, later: str
) -> None:
    before, after, told = LATER[later]
    empty = "x'00'" if chain.is_sqlite else "'\\x00'::bytea"
    with attacking(chain) as connection:
        connection.execute(text(before))
    accepted(chain, folder, verified(chain, folder))
    write(trail, 3, first=100)
    assert verified(chain, folder).is_clean

    with attacking(chain) as connection:
        connection.execute(text(after.replace("NULL_OF_32", empty)))

    done = verified(chain, folder)
    assert done.first is not None
    assert (done.first.sequence, done.first.damage) == told


def test_an_anchor_in_a_gap_tells_what_follows_it(
    database: Database,
    trail: AuditTrail,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("storage.audit.append.ANCHOR_RECORDS", 4)
    write(trail, N)
    with attacking(database) as connection:
        connection.execute(text("DELETE FROM audit_record WHERE sequence IN (7, 8)"))
    found = verified(database, folder)
    assert [(one.sequence, one.damage) for one in found.findings] == [
        (7, Damage.MISSING)
    ]

    with attacking(database) as connection:
        connection.execute(
            text("UPDATE audit_record SET actor = 'eve' WHERE sequence = 9")
        )

    found = verified(database, folder)
    assert [(one.sequence, one.damage) for one in found.findings] == [
        (7, Damage.MISSING),
        (9, Damage.ALTERED),
    ]


@on_sqlite
def test_a_record_that_cannot_be_read_is_accepted_as_it_is(
    chain: Database, folder: Path
) -> None:
    def spoil(data: str) -> None:
        with attacking(chain) as connection:
            connection.execute(
                text(
                    f"UPDATE audit_record SET actor = CAST(x'{data}' AS TEXT)"  # noqa: S608
                    " WHERE sequence = 5"
                )
            )

    spoil("ff")
    accepted(chain, folder, verified(chain, folder))
    assert verified(chain, folder).is_clean

    spoil("fe")

    done = verified(chain, folder)
    assert done.first is not None
    assert (done.first.sequence, done.first.damage) == (5, Damage.ALTERED)
