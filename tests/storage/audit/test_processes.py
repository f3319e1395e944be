"""Several processes share one chain; one that is killed leaves it whole."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from storage.audit import AuditEvent, AuditTrail
from storage.db.engine import Database
from tests.support.auditing import records, verified, write
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[3]
PRELUDE = """
import sys, time
from pathlib import Path
from storage.audit import AuditEvent, AuditTrail
from storage.db.engine import Database
from storage.kernel.clock import SystemClock
database = Database(sys.argv[1])
trail = AuditTrail(database, SystemClock(), Path(sys.argv[2]))
name = sys.argv[3]
def event(number):
    return AuditEvent(action="login", actor=f"{name}-{number}")
"""
WRITES = """
for number in range(50):
    trail.record_now(event(number))
    trail.record(AuditEvent(action="get", actor=name, study_uid=f"1.2.{number}"))
trail.close()
"""
WRITES_FOR_EVER = """
number = 0
while True:
    trail.record_now(event(number))
    print(number, flush=True)
    number += 1
"""
APPENDS_AND_HANGS = """
with database.write() as connection:
    trail.record_in(connection, event(0))
    print("appended", flush=True)
    time.sleep(600)
"""
READS_AND_HANGS = """
trail.record(AuditEvent(action="get", actor=name, study_uid="1.2.3"))
time.sleep(600)
"""

pytestmark = pytest.mark.slow


def start(
    code: str, database_url: str, folder: Path, name: str = "other"
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, database_url, str(folder), name],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def kill(process: subprocess.Popen[str]) -> str:
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate(timeout=30)
    return rest


def test_processes_that_write_at_the_same_time_make_one_chain(
    database: Database, database_url: str, folder: Path
) -> None:
    names = ["a", "b", "c"]
    processes = [start(WRITES, database_url, folder, name) for name in names]
    for process in processes:
        assert process.communicate(timeout=120) is not None
        assert process.returncode == 0

    done = verified(database, folder)

    assert done.is_clean, done.findings
    assert done.records == len(names) * 100
    for name in names:
        own = [row.actor for row in records(database) if row.action == "login"]
        mine = [actor for actor in own if actor.startswith(name)]
        assert mine == [f"{name}-{number}" for number in range(50)]


def test_what_was_acknowledged_survives_a_kill(
    database: Database, database_url: str, folder: Path, trail: AuditTrail
) -> None:
    process = start(WRITES_FOR_EVER, database_url, folder)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(30)]

    lines += kill(process).splitlines()

    acknowledged = [f"other-{int(line)}" for line in lines]
    found = [row.actor for row in records(database)]
    assert found[: len(acknowledged)] == acknowledged
    # The last may have been committed and not acknowledged.
    assert len(found) <= len(acknowledged) + 1
    write(trail, 2)
    assert verified(database, folder).is_clean


def test_a_kill_between_append_and_commit_leaves_nothing(
    database: Database, database_url: str, folder: Path, trail: AuditTrail
) -> None:
    write(trail, 3)
    process = start(APPENDS_AND_HANGS, database_url, folder)
    assert process.stdout is not None
    assert process.stdout.readline() == "appended\n"
    assert len(records(database)) == 3

    kill(process)

    # Its lock on the chain is gone with it.
    write(trail, 2)
    assert [row.actor for row in records(database)] == [
        "user-1", "user-2", "user-3", "user-1", "user-2",
    ]  # fmt: skip
    assert verified(database, folder).is_clean


def test_a_read_is_safe_from_a_kill_after_a_second(
    database: Database, database_url: str, folder: Path
) -> None:
    process = start(READS_AND_HANGS, database_url, folder)
    wait_until(lambda: len(records(database)) == 1, "the read", seconds=30)

    kill(process)

    assert records(database)[0].study_uid == "1.2.3"
    assert verified(database, folder).is_clean


def test_a_memory_that_was_left_behind_by_a_kill_is_no_damage(
    database: Database, trail: AuditTrail, folder: Path
) -> None:
    """As when a process dies after its commit and before it notes it."""
    write(trail, 2)
    path = folder / "access.head"
    older = path.read_bytes()
    write(trail, 2)
    path.write_bytes(older)

    assert verified(database, folder).is_clean
    trail.record_now(AuditEvent(action="login", actor="li"))
    assert verified(database, folder).is_clean
    assert not (folder / "access.lost").exists()
