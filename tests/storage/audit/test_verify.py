"""Every attack on the database alone is detected, and located."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Connection, select, text, update

from storage.audit import AuditTrail
from storage.audit.append import head_of
from storage.audit.chain import Sealer
from storage.audit.findings import Damage, Verification
from storage.audit.keys import KEY_FILE, own_key
from storage.audit.trail import STREAM
from storage.audit.verify import ChainVerifier
from storage.db.engine import Database
from storage.db.tables import AuditAnchor, AuditRecord, AuditStream
from storage.kernel.clock import SystemClock
from storage.kernel.errors import DependencyDown
from tests.support.attacks import ATTACKS, N, change_and_rechain, copy_to
from tests.support.auditing import (
    attacking,
    copy_rows,
    put_back,
    records,
    verified,
    write,
)


@pytest.fixture
def chain(database: Database, trail: AuditTrail) -> Database:
    """Return a database with a chain of `N` records."""
    write(trail, N)
    return database


def found(done: Verification) -> tuple[int, Damage]:
    assert done.first is not None
    return done.first.sequence, done.first.damage


def test_a_chain_that_nobody_touched_is_clean(chain: Database, folder: Path) -> None:
    done = verified(chain, folder)

    assert done.is_clean, done.findings
    assert (done.records, done.sequence) == (N, N)
    assert done.hash == records(chain)[-1].hash


@pytest.mark.parametrize("attack", ATTACKS)
def test_d15_an_attack_is_detected_and_located(
    chain: Database, folder: Path, attack: str
) -> None:
    act, sequence, damage = ATTACKS[attack]

    with attacking(chain) as connection:
        act(connection)

    assert found(verified(chain, folder)) == (sequence, damage)


def test_an_older_state_put_back_is_known_by_the_memory_outside(
    database: Database, trail: AuditTrail, folder: Path
) -> None:
    """Records, head, anchors and signatures are all true, and too old."""
    write(trail, 8)
    tables = (AuditRecord.__table__, AuditStream.__table__, AuditAnchor.__table__)
    older = [(table, copy_rows(database, table)) for table in tables]
    write(trail, 4, first=9)

    with attacking(database) as connection:
        for table, rows in older:
            put_back(connection, table, rows)

    assert found(verified(database, folder)) == (9, Damage.ROLLED_BACK)
    # Only the memory can tell.
    assert verified(database, folder, memory=None).is_clean


def test_writing_on_after_an_older_state_was_put_back_hides_nothing(
    database: Database, trail: AuditTrail, folder: Path
) -> None:
    write(trail, 8)
    tables = (AuditRecord.__table__, AuditStream.__table__, AuditAnchor.__table__)
    older = [(table, copy_rows(database, table)) for table in tables]
    write(trail, 4, first=9)
    with attacking(database) as connection:
        for table, rows in older:
            put_back(connection, table, rows)

    write(trail, 10, first=100)

    assert found(verified(database, folder)) == (12, Damage.ROLLED_BACK)


def test_a_hash_noted_elsewhere_finds_what_the_key_has_signed_anew(
    chain: Database, folder: Path
) -> None:
    noted = {7: records(chain)[6].hash}
    key = own_key(folder)
    with attacking(chain) as connection:
        change_and_rechain(connection)
        for row in connection.execute(select(AuditRecord)).all():
            connection.execute(
                update(AuditRecord)
                .where(AuditRecord.sequence == row.sequence)
                .values(mac=key.record(row.sequence, row.hash))
            )
        sign_head(connection, key, hash=row.hash)

    assert verified(chain, folder, memory=None).is_clean
    done = verified(chain, folder, memory=None, noted=noted)
    assert found(done) == (7, Damage.ROLLED_BACK)


def sign_head(connection: Connection, key: Sealer, **changes: object) -> None:
    row = connection.execute(select(AuditStream)).one()
    head = replace(head_of(row), **changes)  # type: ignore[arg-type]
    connection.execute(update(AuditStream).values(**changes, mac=key.head(head)))


def test_a_beginning_that_was_archived_is_not_missed(
    chain: Database, folder: Path
) -> None:
    fourth = records(chain)[3].hash
    with attacking(chain) as connection:
        connection.execute(text("DELETE FROM audit_record WHERE sequence <= 4"))
        sign_head(connection, own_key(folder), base_sequence=4, base_hash=fourth)

    done = verified(chain, folder)

    assert done.is_clean, done.findings
    assert done.records == N - 4


def test_all_damages_are_found_not_only_the_first(
    chain: Database, folder: Path
) -> None:
    with attacking(chain) as connection:
        for sequence in (3, 4, 7, 11):
            connection.execute(
                update(AuditRecord)
                .where(AuditRecord.sequence == sequence)
                .values(actor="eve")
            )

    done = verified(chain, folder)

    assert [one.sequence for one in done.findings] == [3, 4, 7, 11]
    assert {one.damage for one in done.findings} == {Damage.ALTERED}
    assert done.n_findings == 4


def test_a_record_after_a_gap_is_told_as_unchecked(
    chain: Database, folder: Path
) -> None:
    with attacking(chain) as connection:
        connection.execute(text("DELETE FROM audit_record WHERE sequence IN (4, 5)"))

    done = verified(chain, folder)

    assert [str(one) for one in done.findings] == [
        "record 4: missing: to 5 are missing",
        "record 6: unchecked: its contents cannot be checked without the one before",
    ]
    assert done.unchecked == 1


def test_a_key_that_is_not_here_is_no_clean_chain(
    chain: Database, folder: Path, tmp_path: Path
) -> None:
    other = own_key(tmp_path / "other")

    done = ChainVerifier(chain, [other]).verify(STREAM)

    assert done.first is not None
    assert done.first.damage is Damage.UNKNOWN
    assert ChainVerifier(chain, [other, own_key(folder)]).verify(STREAM).is_clean


def test_hosts_that_know_each_others_keys_share_a_chain(
    chain: Database, trail: AuditTrail, folder: Path, tmp_path: Path
) -> None:
    there = tmp_path / "other"
    own_key(there)
    shutil.copy(folder / KEY_FILE, there / "one.key")
    shutil.copy(there / KEY_FILE, folder / "other.key")
    one = AuditTrail(chain, SystemClock(), folder)
    other = AuditTrail(chain, SystemClock(), there)
    for trail_of_either in (other, one, other):
        write(trail_of_either, 2)
    one.close()
    other.close()

    for place in (folder, there):
        done = verified(chain, place)
        assert done.is_clean, done.findings
        assert done.records == N + 6


def test_hosts_with_keys_of_their_own_share_a_chain(
    chain: Database, trail: AuditTrail, folder: Path, tmp_path: Path
) -> None:
    """Each goes on from the other; who verifies needs both keys."""
    other = AuditTrail(chain, SystemClock(), tmp_path / "other")
    for trail_of_either in (other, trail, other, trail):
        write(trail_of_either, 2)
    other.close()

    done = verified(chain, folder)
    assert [(one.sequence, one.damage) for one in done.findings] == [
        (13, Damage.UNKNOWN),
        (17, Damage.UNKNOWN),
    ]
    keys = [own_key(folder), own_key(tmp_path / "other")]
    assert ChainVerifier(chain, keys).verify(STREAM).is_clean


@pytest.mark.parametrize("replaced", ["", "by others"])
def test_a_head_of_an_unknown_key_is_not_gone_on_from(
    chain: Database, trail: AuditTrail, folder: Path, replaced: str
) -> None:
    """Else our own signature would make a shortened chain a true one."""
    ninth = records(chain)[8].hash
    with attacking(chain) as connection:
        connection.execute(text("DELETE FROM audit_record WHERE sequence > 9"))
        connection.execute(
            update(AuditStream).values(sequence=9, hash=ninth, key_id="another")
        )
        if replaced:
            for sequence in range(10, N + 3):
                copy_to(connection, 3, sequence)
            connection.execute(update(AuditStream).values(sequence=N + 2))

    with pytest.raises(DependencyDown, match="audit verify"):
        write(trail, 1)

    assert not verified(chain, folder).is_clean


def test_records_in_a_row_with_one_unknown_key_are_one_finding(
    chain: Database, folder: Path
) -> None:
    with attacking(chain) as connection:
        connection.execute(
            text("UPDATE audit_record SET key_id = 'x' WHERE sequence IN (3, 4, 5, 9)")
        )

    done = verified(chain, folder)

    assert [(one.sequence, one.damage) for one in done.findings] == [
        (3, Damage.UNKNOWN),
        (9, Damage.UNKNOWN),
    ]


class TestAnchors:
    @pytest.fixture(autouse=True)
    def _every_fourth(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("storage.audit.append.ANCHOR_RECORDS", 4)

    def test_they_are_made_while_the_chain_grows(self, chain: Database) -> None:
        assert [row["sequence"] for row in anchors(chain)] == [4, 8, 12]

    def test_one_that_was_changed_is_found(self, chain: Database, folder: Path) -> None:
        with attacking(chain) as connection:
            connection.execute(
                text("UPDATE audit_anchor SET time_us = 1 WHERE sequence = 8")
            )

        assert found(verified(chain, folder)) == (8, Damage.ANCHOR)

    def test_one_after_the_end_tells_that_records_are_gone(
        self, database: Database, trail: AuditTrail, folder: Path
    ) -> None:
        write(trail, 7)
        older = copy_rows(database, AuditStream.__table__)
        write(trail, 5, first=8)
        with attacking(database) as connection:
            connection.execute(text("DELETE FROM audit_record WHERE sequence > 7"))
            put_back(connection, AuditStream.__table__, older)

        done = verified(database, folder, memory=None)

        assert found(done) == (8, Damage.TRUNCATED)


def anchors(database: Database) -> list[dict[str, object]]:
    rows = copy_rows(database, AuditAnchor.__table__)
    return sorted(rows, key=lambda row: int(str(row["sequence"])))


@pytest.mark.parametrize("size", [1, 5, N, N + 1])
def test_the_borders_of_what_is_read_at_a_time_do_not_matter(
    chain: Database, folder: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr("storage.audit.append.ANCHOR_RECORDS", 4)
    monkeypatch.setattr("storage.audit.verify.CHUNK", size)
    assert verified(chain, folder).is_clean

    with attacking(chain) as connection:
        connection.execute(text("DELETE FROM audit_record WHERE sequence = 5"))

    assert found(verified(chain, folder)) == (5, Damage.MISSING)


def test_a_damaged_memory_is_told(chain: Database, folder: Path) -> None:
    (folder / f"{STREAM}.head").write_bytes(b"{}")

    assert found(verified(chain, folder)) == (1, Damage.MEMORY)


def test_a_memory_that_was_written_by_another_key_is_told(
    chain: Database, folder: Path
) -> None:
    path = folder / f"{STREAM}.head"
    path.write_bytes(path.read_bytes().replace(b'"sequence":12', b'"sequence":11'))

    assert found(verified(chain, folder)) == (1, Damage.MEMORY)


on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@on_sqlite
class TestWhatOnlySqliteLetsBeStored:
    @pytest.mark.parametrize(
        ("statement", "sequence", "damage"),
        [
            ("SET actor = CAST(x'ff' AS TEXT) WHERE sequence = 5", 5, "altered"),
            ("SET actor = x'ff' WHERE sequence = 5", 5, "altered"),
            ("SET time_us = 'yesterday' WHERE sequence = 5", 5, "altered"),
            ("SET hash = 'text' WHERE sequence = 5", 5, "misplaced"),
            ("SET mac = 'text' WHERE sequence = 5", 5, "forged"),
            ("SET sequence = 'five' WHERE sequence = 5", 5, "missing"),
            ("SET sequence = 5.5 WHERE sequence = 5", 5, "extra"),
        ],
    )
    def test_is_located(
        self,
        chain: Database,
        folder: Path,
        statement: str,
        sequence: int,
        damage: str,
    ) -> None:
        with attacking(chain) as connection:
            connection.execute(text(f"UPDATE audit_record {statement}"))

        assert found(verified(chain, folder)) == (sequence, damage)

    @pytest.mark.parametrize("column", ["sequence", "hash", "mac", "base_hash"])
    def test_in_the_head_is_told(
        self, chain: Database, folder: Path, column: str
    ) -> None:
        with attacking(chain) as connection:
            connection.execute(text(f"UPDATE audit_stream SET {column} = 'text'"))  # noqa: S608

        done = verified(chain, folder)

        assert Damage.HEAD in {one.damage for one in done.findings}


def test_verification_goes_on_while_others_write(
    chain: Database, trail: AuditTrail, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.audit.verify.CHUNK", 5)
    more = iter(range(3))

    def write_on(done: int, total: int) -> None:
        if next(more, None) is not None:
            write(trail, 2, first=1000 + done)

    done = verified(chain, folder, progress=write_on)

    assert done.is_clean, done.findings
    assert done.records == N + 6


def test_streams_are_those_of_all_tables(chain: Database) -> None:
    with attacking(chain) as connection:
        connection.execute(
            text("UPDATE audit_record SET stream = 'other' WHERE sequence = 5")
        )

    verifier = ChainVerifier(chain, [])

    assert verifier.streams() == [STREAM, "other"]
