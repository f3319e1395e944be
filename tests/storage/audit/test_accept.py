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
        "record 9: missing: to 12 are missing"
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
    assert "1:unknown" in {one.key for one in found.findings}
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
