"""The trail of a process: what is written at once, what waits, what is folded."""

from __future__ import annotations

from storage.audit import AuditEvent, AuditTrail, Outcome
from storage.db.engine import Database
from tests.support.auditing import records


def a_read(instance: str = "1.2.3.1", actor: str = "li") -> AuditEvent:
    return AuditEvent(
        action="get", actor=actor, series_uid="1.2.3", instance_uid=instance
    )


def test_a_decision_is_there_when_the_call_returns(
    database: Database, trail: AuditTrail
) -> None:
    trail.record_now(AuditEvent(action="login", actor="li"))

    assert [row.action for row in records(database)] == ["login"]


def test_a_refusal_does_not_wait_even_if_it_was_a_read(
    database: Database, trail: AuditTrail
) -> None:
    trail.record(
        AuditEvent(action="get", actor="li", outcome=Outcome.DENY, reason="no")
    )

    assert [row.outcome for row in records(database)] == ["deny"]


def test_reads_of_one_series_are_one_record(
    database: Database, trail: AuditTrail
) -> None:
    for number in range(500):
        trail.record(a_read(f"1.2.3.{number}"))
    trail.flush()

    (row,) = records(database)
    assert row.count == 500
    assert row.series_uid == "1.2.3"
    assert row.instance_uid is None
