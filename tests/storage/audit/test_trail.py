"""The trail of a process: what is written at once, what waits, what is folded."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from storage.audit import AuditEvent, AuditTrail, Outcome
from storage.audit.keys import Memory, keyring
from storage.audit.trail import STREAM
from storage.db.engine import Database
from storage.kernel.clock import SystemClock
from storage.kernel.errors import DependencyDown, ImagingError, StorageFull
from storage.kernel.limits import Limits
from storage.kernel.types import Role
from tests.support.auditing import attacking, records, verified, write
from tests.support.waiting import wait_until

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
READ = AuditEvent(action="get", actor="li", series_uid="1.2.3", instance_uid="1.2.3.1")
LOGIN = AuditEvent(action="login", actor="li")


@pytest.fixture
def patient_trail(database: Database, folder: Path) -> Iterator[AuditTrail]:
    """Yield a trail that writes reads only when it is told to."""
    trail = AuditTrail(
        database,
        SystemClock(),
        folder,
        limits=Limits(audit_pending=100, audit_pending_seconds=0.05),
        flush_seconds=60,
        fold_seconds=60,
    )
    yield trail
    trail.close()


def test_a_decision_is_there_when_the_call_returns(
    database: Database, trail: AuditTrail
) -> None:
    trail.record_now(LOGIN)

    assert [row.action for row in records(database)] == ["login"]


@pytest.mark.parametrize("outcome", [Outcome.DENY, Outcome.ERROR])
def test_what_was_not_allowed_does_not_wait_even_if_it_was_a_read(
    database: Database, patient_trail: AuditTrail, outcome: Outcome
) -> None:
    patient_trail.record(replace(READ, outcome=outcome, reason="no"))

    assert [row.outcome for row in records(database)] == [outcome]


def test_a_read_is_written_without_being_asked_for(
    database: Database, folder: Path
) -> None:
    trail = AuditTrail(database, SystemClock(), folder, flush_seconds=0.05)

    trail.record(READ)

    wait_until(lambda: len(records(database)) == 1, "the record", seconds=5)
    trail.close()


def test_closing_writes_what_waits(
    database: Database, patient_trail: AuditTrail
) -> None:
    patient_trail.record(READ)
    assert records(database) == []

    patient_trail.close()

    assert [row.action for row in records(database)] == ["get"]
    with pytest.raises(DependencyDown):
        patient_trail.record(READ)


def test_reads_of_one_series_are_one_record(
    database: Database, patient_trail: AuditTrail
) -> None:
    for number in range(500):
        patient_trail.record(
            replace(READ, instance_uid=f"1.2.3.{number}", time_us=1000 + number)
        )
    patient_trail.flush()

    (row,) = records(database)
    assert (row.count, row.time_us, row.last_us) == (500, 1000, 1499)
    assert (row.series_uid, row.instance_uid) == ("1.2.3", None)


def test_reads_of_one_instance_keep_its_name(
    database: Database, patient_trail: AuditTrail
) -> None:
    for _ in range(3):
        patient_trail.record(READ)
    patient_trail.flush()

    (row,) = records(database)
    assert (row.count, row.instance_uid) == (3, "1.2.3.1")


@pytest.mark.parametrize(
    "other",
    [
        {"actor": "wang"}, {"session": "s2"}, {"source": "10.0.0.2"},
        {"series_uid": "1.2.4"}, {"study_uid": "1.9"}, {"action": "find"},
        {"patient_id": "P1"}, {"purpose": "quality"}, {"object_tenant": "city"},
        {"detail": {"query": "limit=2"}}, {"door": "dimse"}, {"object_id": "x"},
    ],
    ids=str,
)  # fmt: skip
@on_sqlite
def test_what_differs_is_a_record_of_its_own(
    database: Database, patient_trail: AuditTrail, other: dict[str, object]
) -> None:
    patient_trail.record(READ)
    patient_trail.record(replace(READ, **other))  # type: ignore[arg-type]
    patient_trail.flush()

    assert [row.count for row in records(database)] == [1, 1]


def test_reads_after_the_first_record_are_counted_and_written_later(
    database: Database, folder: Path
) -> None:
    trail = AuditTrail(
        database, SystemClock(), folder, flush_seconds=0.05, fold_seconds=0.3
    )
    trail.record(READ)
    wait_until(lambda: len(records(database)) == 1, "the record", seconds=5)

    for _ in range(7):
        trail.record(READ)

    assert len(records(database)) == 1
    wait_until(lambda: len(records(database)) == 2, "the record", seconds=5)
    assert [row.count for row in records(database)] == [1, 7]
    trail.close()


def test_many_reads_are_written_before_their_time(
    database: Database, folder: Path
) -> None:
    trail = AuditTrail(database, SystemClock(), folder, flush_seconds=3)

    for number in range(1000):
        trail.record(replace(READ, series_uid=f"1.2.{number}"))

    wait_until(lambda: len(records(database)) == 1000, "records", seconds=2)
    trail.close()


def test_at_the_limit_of_reads_that_wait_the_next_is_refused(
    database: Database, patient_trail: AuditTrail
) -> None:
    for number in range(100):
        patient_trail.record(replace(READ, series_uid=f"1.2.{number}"))

    with pytest.raises(DependencyDown, match="too many"):
        patient_trail.record(replace(READ, series_uid="1.3"))

    # One that waits already needs no more room.
    patient_trail.record(replace(READ, series_uid="1.2.5"))
    patient_trail.flush()
    patient_trail.record(replace(READ, series_uid="1.3"))
    assert len(records(database)) == 100


class Broken:
    """A database that does not take what it is given, until it is whole again."""

    def __init__(self, database: Database, error: ImagingError) -> None:
        self._database = database
        self._error: ImagingError | None = error
        self.is_sqlite = database.is_sqlite
        self.read = database.read

    @contextmanager
    def write(self) -> Iterator[Connection]:
        if self._error is not None:
            raise self._error
        with self._database.write() as connection:
            yield connection

    def mend(self) -> None:
        self._error = None


def a_broken_trail(
    database: Database, folder: Path, error: ImagingError
) -> tuple[Broken, AuditTrail]:
    broken = Broken(database, error)
    trail = AuditTrail(
        broken,  # type: ignore[arg-type]
        SystemClock(),
        folder,
        limits=Limits(audit_pending_seconds=0.05),
        flush_seconds=60,
    )
    return broken, trail


@on_sqlite
@pytest.mark.parametrize("error", [DependencyDown("gone"), StorageFull("full")])
def test_a_decision_that_cannot_be_recorded_must_not_happen(
    database: Database, folder: Path, error: ImagingError
) -> None:
    _, trail = a_broken_trail(database, folder, error)

    with pytest.raises(DependencyDown):
        trail.record_now(LOGIN)


def test_reads_are_refused_when_they_have_waited_too_long_and_none_is_lost(
    database: Database, folder: Path
) -> None:
    broken, trail = a_broken_trail(database, folder, DependencyDown("gone"))
    reader = Reading(trail)
    assert reader.is_allowed()
    with pytest.raises(DependencyDown):
        trail.flush()
    assert reader.is_allowed()

    wait_until(lambda: not reader.is_allowed(), "a refusal", seconds=5)
    with pytest.raises(DependencyDown):
        trail.check()

    broken.mend()
    trail.flush()
    trail.check()
    assert sum(row.count for row in records(database)) == reader.allowed
    trail.close()


class Reading:
    """Somebody who reads one object, and counts how often that was allowed."""

    def __init__(self, trail: AuditTrail) -> None:
        self._trail = trail
        self.allowed = 0

    def is_allowed(self) -> bool:
        try:
            self._trail.record(READ)
        except DependencyDown:
            return False
        self.allowed += 1
        return True


@on_sqlite
def test_reads_are_refused_while_a_write_hangs(
    database: Database, folder: Path
) -> None:
    trail = AuditTrail(
        database,
        SystemClock(),
        folder,
        limits=Limits(audit_pending_seconds=0.05),
        flush_seconds=0.02,
    )
    reader = Reading(trail)
    with database.write():
        assert reader.is_allowed()

        wait_until(lambda: not reader.is_allowed(), "a refusal", seconds=5)

    wait_until(reader.is_allowed, "the writer", seconds=5)
    trail.close()
    assert sum(row.count for row in records(database)) == reader.allowed
    assert verified(database, folder).is_clean


@on_sqlite
def test_reads_that_are_lost_at_the_end_are_counted_in_the_log(
    database: Database, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, trail = a_broken_trail(database, folder, DependencyDown("gone"))
    for _ in range(3):
        trail.record(READ)

    with caplog.at_level(logging.ERROR):
        trail.close()

    (entry,) = [one for one in caplog.records if one.message.startswith("audited")]
    assert entry.accesses == 3  # type: ignore[attr-defined]


def test_a_change_and_its_record_commit_together_or_not_at_all(
    database: Database, trail: AuditTrail, folder: Path
) -> None:
    with database.write() as connection:
        connection.execute(text(_TENANT.format("a")))
        note = trail.record_in(connection, LOGIN)
    note()
    # Cut off, it would be missed: how far the chain is, is known outside too.
    seen = Memory(folder, STREAM, keyring(folder).own).read()
    assert seen is not None
    assert seen.sequence == records(database)[-1].sequence
    with suppress(ZeroDivisionError), database.write() as connection:
        connection.execute(text(_TENANT.format("b")))
        trail.record_in(connection, LOGIN)
        raise ZeroDivisionError

    assert len(records(database)) == 1
    trail.record_now(LOGIN)
    assert verified(database, folder).is_clean


_TENANT = "INSERT INTO tenant (key, name, created_us) VALUES ('{}', '', 1)"


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit_record SET actor = 'nobody'",
        "DELETE FROM audit_record",
    ],
)
def test_the_database_refuses_to_change_a_record(
    database: Database, trail: AuditTrail, statement: str
) -> None:
    trail.record_now(LOGIN)

    with (
        pytest.raises(DBAPIError, match="append-only"),
        database.write() as connection,
    ):
        connection.execute(text(statement))

    assert len(records(database)) == 1


def test_values_of_enumerations_are_recorded_as_themselves(
    database: Database, trail: AuditTrail
) -> None:
    trail.record_now(
        AuditEvent(action=Role.AUDITOR, actor="li", roles=(Role.REVIEWER, Role.AUDITOR))
    )

    (row,) = records(database)
    assert (row.action, row.roles) == ("auditor", "auditor,reviewer")


class TestADamagedHead:
    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE audit_stream SET sequence = 1",
            "UPDATE audit_stream SET hash = base_hash",
            "DELETE FROM audit_stream",
        ],
    )
    def test_stops_the_audit_so_that_nothing_is_hidden(
        self, database: Database, trail: AuditTrail, statement: str
    ) -> None:
        write(trail, 3)
        with attacking(database) as connection:
            connection.execute(text(statement))

        with pytest.raises(DependencyDown, match="audit verify"):
            trail.record_now(LOGIN)

        assert len(records(database)) == 3

    def test_that_is_an_older_one_stops_it_too(
        self, database: Database, trail: AuditTrail, folder: Path
    ) -> None:
        write(trail, 3)
        with database.read() as connection:
            older = connection.execute(text("SELECT * FROM audit_stream")).mappings()
            values = dict(older.one())
        write(trail, 2)
        with attacking(database) as connection:
            names = ", ".join(f"{name} = :{name}" for name in values)
            connection.execute(text(f"UPDATE audit_stream SET {names}"), values)  # noqa: S608

        with pytest.raises(DependencyDown, match="audit verify"):
            trail.record_now(LOGIN)


@on_sqlite
def test_a_memory_that_cannot_be_written_does_not_undo_a_record(
    database: Database,
    trail: AuditTrail,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (folder / f"{STREAM}.lock").mkdir()

    trail.record_now(LOGIN)

    assert len(records(database)) == 1
    assert "audit memory" in caplog.text


@on_sqlite
def test_a_memory_torn_by_a_power_cut_is_put_aside(
    database: Database, trail: AuditTrail, folder: Path
) -> None:
    write(trail, 2)
    (folder / f"{STREAM}.head").write_bytes(b'{"sequence": 2, "ha')

    write(trail, 1)

    assert (folder / f"{STREAM}.damaged").exists()
    assert verified(database, folder).is_clean


def test_threads_that_record_at_the_same_time_share_the_chain(
    database: Database, trail: AuditTrail, folder: Path
) -> None:
    threads = [
        threading.Thread(target=write, args=(trail, 25), kwargs={"first": 100 * number})
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    done = verified(database, folder)
    assert done.is_clean, done.findings
    assert done.records == 200


class Counting:
    """An observer that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, bool]] = []

    def written(self, accesses: int, seconds: float, *, failed: bool) -> None:
        assert 0 < seconds < 60
        self.told.append((accesses, failed))


@on_sqlite
def test_an_observer_is_told_what_was_written_and_what_failed(
    database: Database, folder: Path
) -> None:
    broken = Broken(database, DependencyDown("gone"))
    observer = Counting()
    trail = AuditTrail(
        broken,  # type: ignore[arg-type]
        SystemClock(),
        folder,
        flush_seconds=60,
        observer=observer,
    )
    trail.record(READ)
    trail.record(READ)
    with pytest.raises(DependencyDown):
        trail.record_now(LOGIN)
    broken.mend()
    trail.record_now(LOGIN)
    trail.close()

    assert observer.told == [(1, True), (1, False), (2, False)]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_chain_that_another_keeps_is_not_waited_for_without_end(
    database: Database, trail: AuditTrail, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.audit.trail.LOCK_SECONDS", 0.2)
    write(trail, 1)
    with database.write() as other:
        trail.record_in(other, LOGIN)

        with pytest.raises(DependencyDown):
            trail.record_now(LOGIN)

    trail.record_now(LOGIN)
    assert len(records(database)) == 3
