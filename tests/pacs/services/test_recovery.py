"""What a killed process leaves is found, completed or buried."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert

from pacs.repository.tables import Deletion
from pacs.services.recovery import Recovery
from storage.kernel.errors import DependencyDown, DuplicateInstance, IdentityMismatch
from storage.kernel.settings import DuplicatePolicy
from storage.kernel.types import Door
from storage.packs.format import Kind, RecordHeader, RecordInfo
from storage.packs.recover import iter_records
from tests.support.datasets import a_study, ct_slice, dataset_bytes, part10
from tests.support.door import Archive, arrival, digest_of

Open = Callable[..., Archive]


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs."""


@pytest.fixture
def opening(tmp_path: Path, database_url: str) -> Iterator[Open]:
    """Open processes of one node."""
    made: list[Archive] = []

    def start(**options: Any) -> Archive:
        made.append(Archive(tmp_path / "node", url=database_url, **options))
        return made[-1]

    yield start
    for one in made:
        one.close()


def kill_before_commit(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, *datasets: Any
) -> None:
    """Kill the process while the rows of `datasets` are not committed."""

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(archive.ingest, "_write_rows", killed)
        for ds in datasets:
            archive.ingest._doubtful.clear()  # noqa: SLF001  # it dies with it
            with pytest.raises(Killed):
                archive.store(ds)
    archive.die()


def test_an_unindexed_record_is_indexed(
    opening: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = opening()
    first, second, third = a_study(n_instances=3)
    dead.store(first)
    kill_before_commit(dead, monkeypatch, second, third)

    node = opening()
    done = node.recover()

    assert (done.packs, done.added, done.findings) == (1, 2, [])
    assert set(node.held().values()) == {digest_of(d) for d in (first, second, third)}
    assert node.bytes_of(third.SOPInstanceUID) == dataset_bytes(part10(third))
    assert node.rows("SELECT n_instances FROM study") == [(3,)]
    assert node.rows("SELECT count(*) FROM outbox_event") == [(3,)]


def test_a_pack_that_has_no_row_is_indexed_from_its_first_record(
    opening: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = opening()
    [only] = a_study(n_instances=1)
    kill_before_commit(dead, monkeypatch, only)
    node = opening()

    assert node.recover().added == 1
    size = node.pack_files()[0].stat().st_size
    assert node.rows("SELECT state, size_bytes FROM pack") == [("closed", size)]


def test_recovering_twice_changes_nothing(
    opening: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = opening()
    first, second = a_study(n_instances=2)
    dead.store(first)
    kill_before_commit(dead, monkeypatch, second)
    node = opening()
    node.recover()
    held, packs = node.held(), node.rows("SELECT * FROM pack")

    again = node.recover()
    other = opening().recover()

    for done in (again, other):
        assert (done.added, done.buried, done.cut_bytes, done.findings) == (0, 0, 0, [])
    assert node.held() == held
    assert node.rows("SELECT * FROM pack") == packs
    assert node.rows("SELECT count(*) FROM outbox_event") == [(2,)]


def test_a_torn_tail_is_cut(opening: Open) -> None:
    dead = opening()
    first, second = a_study(n_instances=2)
    dead.store(first)
    [path] = dead.pack_files()
    dead.store(second)
    one, two = (found for found in iter_records(path) if isinstance(found, RecordInfo))
    whole = path.read_bytes()[: one.end]
    torn = path.read_bytes()[one.end : two.end][:-9]
    dead.database.close()
    dead.die()
    path.write_bytes(whole + torn)
    node = opening()
    with node.database.write() as connection:
        connection.exec_driver_sql("DELETE FROM instance WHERE instance_number = 2")

    done = node.recover()

    assert (done.added, done.cut_bytes, done.findings) == (0, len(torn), [])
    assert path.read_bytes() == whole
    assert node.bytes_of(first.SOPInstanceUID) == dataset_bytes(part10(first))


def test_a_pack_that_a_living_process_appends_to_is_left_alone(opening: Open) -> None:
    living = opening()
    first, second = a_study(n_instances=2)
    living.store(first)

    done = opening().recover()
    living.store(second)

    assert (done.packs, done.findings) == (0, [])
    assert living.rows("SELECT state FROM pack") == [("open",)]
    assert len(living.held()) == 2


def test_the_pack_of_a_dead_process_is_recovered_while_the_others_go_on(
    opening: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    living, dying, worker = opening(), opening(), opening()
    first, second, third = a_study(n_instances=3)
    living.store(first)
    assert worker.recovery.tick() == 0

    kill_before_commit(dying, monkeypatch, second)

    assert worker.recovery.tick() == 1
    assert worker.recovery.tick() == 0
    living.store(third)
    assert len(worker.held()) == 3


def test_partial_files_of_the_dead_go_and_those_of_the_living_stay(
    opening: Open,
) -> None:
    living, dead = opening(), opening()
    header = RecordHeader("default", Door.DIMSE, 1, "1.2", "1.2", "1.2", 0)
    receiving = living.packs.open_large(header)
    abandoned = dead.packs.open_large(header)
    abandoned.release()

    done = opening().recover()

    assert done.partial == 1
    assert [p.stem for p in living.folder.glob("??/*.partial")] == [receiving.key]
    receiving.abort()


def test_a_large_object_whose_commit_failed_is_indexed(
    opening: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = opening()
    ds = ct_slice(size=1600)

    def killed(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(dead.ingest, "_write_rows", killed)
    with pytest.raises(Killed):
        dead.store_large(ds)
    dead.die()
    node = opening()

    done = node.recover()

    assert (done.added, done.findings) == (1, [])
    assert node.rows("SELECT kind, state FROM pack") == [("large", "closed")]
    assert node.bytes_of(ds.SOPInstanceUID) == dataset_bytes(part10(ds))


def test_an_unacknowledged_record_loses_against_what_was_acknowledged_since(
    opening: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = opening()
    first = ct_slice(StudyDescription="first try")
    second = ct_slice(StudyDescription="second try")
    kill_before_commit(dead, monkeypatch, first)
    node = opening()
    node.store(second)

    done = node.recover()

    assert (done.added, done.buried) == (0, 1)
    assert list(node.held().values()) == [digest_of(second)]
    assert node.recover().buried == 0


def test_an_unacknowledged_replacement_does_not_replace_what_came_later(
    opening: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = DuplicatePolicy.IF_CHANGED
    dead = opening(duplicates=policy)
    first, second, third = (ct_slice(StudyDescription=t) for t in "123")
    dead.store(first)
    kill_before_commit(dead, monkeypatch, second)
    node = opening(duplicates=policy)
    node.store(third)

    done = node.recover()

    assert (done.added, done.buried) == (0, 1)
    assert list(node.held().values()) == [digest_of(third)]


def test_a_replacement_that_was_cut_off_is_completed(
    opening: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = opening(duplicates=DuplicatePolicy.IF_CHANGED)
    first, second = (ct_slice(StudyDescription=t) for t in "12")
    dead.store(first)
    kill_before_commit(dead, monkeypatch, second)

    # The policy has changed since: what the record says decides.
    node = opening(duplicates=DuplicatePolicy.NEVER)
    done = node.recover()

    assert done.added == 1
    assert list(node.held().values()) == [digest_of(second)]
    assert node.rows("SELECT n_instances FROM study") == [(1,)]


def test_a_record_of_a_study_that_is_another_patients_is_buried(
    opening: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = opening()
    stray = ct_slice(PatientID="A", number=1)
    kill_before_commit(dead, monkeypatch, stray)
    node = opening()
    node.store(ct_slice(PatientID="B", number=2))

    assert node.recover().buried == 1
    assert len(node.held()) == 1


def test_what_was_deleted_stays_deleted(
    opening: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = opening()
    first, second = a_study(n_instances=2)
    dead.store(first)
    [(digest, received, key, offset)] = dead.rows(
        "SELECT digest, received_us, key, record_offset"
        " FROM instance JOIN pack ON pack.id = pack_pk"
    )
    kill_before_commit(dead, monkeypatch, second)
    node = opening()
    with node.database.write() as connection:
        connection.exec_driver_sql("DELETE FROM instance")
        connection.exec_driver_sql("DELETE FROM pack")
        connection.execute(
            insert(Deletion).values(
                tenant="default", study_instance_uid="1", series_instance_uid="1",
                sop_instance_uid=first.SOPInstanceUID, digest=digest, pack_key=key,
                record_offset=offset, actor="x", deleted_us=received,
                deadline_us=received,
            )
        )  # fmt: skip

    assert node.recover().added == 1
    assert list(node.held().values()) == [digest_of(second)]

    # The same object, sent again, is received later and stays, whatever the clock says.
    node.clock.now_us = lambda: 1000  # type: ignore[method-assign]
    node.store(first)
    [(again,)] = node.rows("SELECT received_us FROM instance WHERE instance_number = 1")
    assert again > received


def test_a_deletion_that_was_cut_off_is_completed(opening: Open) -> None:
    dead = opening()
    first, second = a_study(n_instances=2)
    dead.store(first)
    dead.store(second)
    [(received,)] = dead.rows("SELECT max(received_us) FROM instance")
    dead.packs.append_tombstones(
        [
            RecordHeader(
                "default", Door.SYSTEM, received, "1.2", "1.2",
                second.SOPInstanceUID, 0, digest=digest_of(second),
            )
        ]
    )  # fmt: skip
    dead.die()
    node = opening()
    asked: list[tuple[Any, ...]] = []

    class Deletions:
        def delete(self, actor: Any, *uids: str | None, reason: str = "") -> int:
            asked.append((actor.tenant, *uids))
            return 1

    Recovery(
        database=node.database,
        ingest=node.ingest,
        packs=node.packs,
        node_id="node-1",
        deletions=Deletions(),
    ).run()

    assert asked == [
        (
            "default",
            second.StudyInstanceUID,
            second.SeriesInstanceUID,
            second.SOPInstanceUID,
        )
    ]


def test_a_missing_pack_is_reported(opening: Open) -> None:
    dead = opening()
    dead.store(ct_slice())
    dead.die()
    dead.pack_files()[0].unlink()
    node = opening()

    assert [one.kind for one in node.recover().findings] == ["pack.missing"]
    assert node.recovery.tick() == 0


def test_a_pack_shorter_than_its_rows_say_is_reported_and_kept(opening: Open) -> None:
    dead = opening()
    for ds in a_study(n_instances=2):
        dead.store(ds)
    dead.die()
    [path] = dead.pack_files()
    *_, last = iter_records(path)
    os.truncate(path, last.end - 100)
    size = path.stat().st_size
    node = opening()

    assert [one.kind for one in node.recover().findings] == ["pack.short"]
    assert path.stat().st_size == size


def test_a_closed_pack_that_has_shrunk_is_reported(opening: Open) -> None:
    dead = opening()
    dead.store(ct_slice())
    dead.die()
    node = opening()
    node.recover()
    [path] = node.pack_files()
    os.truncate(path, 100)

    assert [one.kind for one in opening().recover().findings] == ["pack.short"]


def test_ten_thousand_packs_are_looked_at_once(
    opening: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = opening()
    node.store(ct_slice())
    [path] = node.pack_files()
    with node.database.write() as connection:
        connection.exec_driver_sql(
            "INSERT INTO pack (key, tenant, kind, place, node_id, state, size_bytes,"
            " created_us) WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i+1 FROM n"
            " WHERE i < 9999) SELECT 'k' || i, 'default', 'log', 'local', 'node-1',"
            " 'closed', 64, 1 FROM n"
        )
    for number in range(10_000):
        folder = node.folder / f"k{number}"[:2]
        folder.mkdir(exist_ok=True)
        os.link(path, folder / f"k{number}.pack")
    listed: list[str] = []
    listdir = os.listdir

    def listing(folder: str) -> list[str]:
        listed.append(folder)
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", listing)
    recovery = opening().recovery
    monkeypatch.setattr("pacs.services.recovery.SETTLED_SECONDS", -1)

    recovery.run()
    assert listed
    listed.clear()

    assert recovery.tick() == 0
    assert listed == []


@pytest.mark.parametrize("error", [DependencyDown("x"), RuntimeError("x")])
def test_a_commit_that_failed_is_resolved_before_the_next_one(
    opening: Open, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    node = opening()
    first, second = a_study(n_instances=2)

    def fails(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(node.ingest, "_write_rows", fails)
        with pytest.raises(type(error)):
            node.store(first)
    assert node.held() == {}

    node.store(second)

    assert set(node.held().values()) == {digest_of(first), digest_of(second)}
    assert node.store(first).outcome == "duplicate"


def test_a_record_whose_commit_failed_never_beats_what_was_sent_instead(
    opening: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, other = opening(), opening()
    first = ct_slice(StudyDescription="1")
    second = ct_slice(StudyDescription="2")

    def fails(*_: object) -> None:
        raise DependencyDown("database")

    with monkeypatch.context() as patch:
        patch.setattr(node.ingest, "_write_rows", fails)
        with pytest.raises(DependencyDown):
            node.store(first)
    other.store(second)

    with pytest.raises(DuplicateInstance):
        node.store(first)

    buried = [one.header.digest for one in node.records(Kind.TOMBSTONE)]
    assert buried == [digest_of(first)]
    assert list(node.held().values()) == [digest_of(second)]


def test_a_study_of_another_patient_is_refused_and_leaves_no_bytes(
    opening: Open,
) -> None:
    node = opening()
    node.store(ct_slice(PatientID="A", number=1))
    size = node.pack_files()[0].stat().st_size

    with pytest.raises(IdentityMismatch):
        node.ingest.accept(arrival(ct_slice(PatientID="B", number=2)))

    assert node.pack_files()[0].stat().st_size == size
