"""Deleting: gone at once for every reader, gone for good after every crash."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import MRImageStorage

from pacs.domain.study import Outcome
from pacs.repository import lifecycle
from pacs.repository.index import IndexWriter
from pacs.services.ingest import IngestService
from storage.kernel.errors import (
    DependencyDown,
    ImagingError,
    InvalidParameter,
    LostRace,
    NotAllowed,
    NotFound,
)
from storage.kernel.types import Actor, Role, TenantId
from storage.objects.files import FileObjectStore
from storage.packs.format import Kind, RecordInfo
from storage.packs.recover import iter_records
from tests.support.datasets import ct_slice, uid
from tests.support.lifecycle import REWRITE_SECONDS, Life, admin, content, lives

STUDY = uid(1)
#: Rounds of each race; the full loop runs in the load tests.
ROUNDS = 25


@pytest.fixture
def life(tmp_path: Path, database_url: str) -> Iterator[Life]:
    yield from lives(tmp_path, database_url, FileObjectStore(tmp_path / "objects"))


def tombstones(life: Life) -> list[str]:
    """Return the UIDs that tombstones name, oldest pack first."""
    return [
        found.header.sop_instance_uid
        for path in sorted(life.files(), key=lambda one: one.stat().st_mtime_ns)
        for found in iter_records(path)
        if isinstance(found, RecordInfo) and found.kind is Kind.TOMBSTONE
    ]


def two_series(life: Life) -> list[Dataset]:
    made = [
        ct_slice(series=1, number=1),
        ct_slice(series=1, number=2),
        ct_slice(series=2, number=1, modality="MR"),
    ]
    for ds in made:
        life.store(ds)
    return made


def test_an_instance_goes_and_its_study_is_counted_anew(life: Life) -> None:
    two_series(life)

    gone = life.deletion.delete(admin(), STUDY, uid(1, 1), uid(1, 1, 2), reason="test")

    assert gone == 1
    assert life.bytes_of(uid(1, 1, 2)) is None
    assert life.bytes_of(uid(1, 1, 1)) is not None
    assert life.rows("SELECT n_series, n_instances FROM study") == [(2, 2)]
    assert life.recount() == []
    [event] = life.events("instance.deleted")
    assert (event.subject, event.payload["remaining"]) == (uid(1, 1, 2), 2)
    assert tombstones(life) == [uid(1, 1, 2)]


def test_the_row_of_a_deletion_says_who_what_when_and_by_when(life: Life) -> None:
    life.store(ct_slice())
    life.deletion.delete(admin(), STUDY, reason="wrong patient")

    [row] = life.rows(
        "SELECT tenant, study_instance_uid, series_instance_uid, sop_instance_uid,"
        " actor, reason, deadline_us - deleted_us, erased_us FROM deletion"
    )
    assert row == (
        "default",
        STUDY,
        uid(1, 1),
        uid(1, 1, 1),
        "operator",
        "wrong patient",
        int(REWRITE_SECONDS * 1e6),
        None,
    )


def test_an_empty_series_goes_and_the_study_lists_what_is_left(life: Life) -> None:
    two_series(life)

    gone = life.deletion.delete(admin(), STUDY, uid(1, 2))

    assert gone == 1
    assert life.rows("SELECT series_instance_uid FROM series") == [(uid(1, 1),)]
    [(modalities, classes)] = life.rows("SELECT modalities, sop_classes FROM study")
    assert modalities == "CT"
    assert MRImageStorage not in classes
    assert life.recount() == []
    assert [one.subject for one in life.events("series.deleted")] == [uid(1, 2)]


def test_the_last_instance_takes_series_study_and_patient_along(life: Life) -> None:
    life.store(ct_slice())

    life.deletion.delete(admin(), STUDY, uid(1, 1), uid(1, 1, 1))

    for table in ("instance", "series", "study", "patient"):
        assert life.rows(f"SELECT count(*) FROM {table}") == [(0,)]  # noqa: S608
    [event] = life.events("study.deleted")
    assert event.payload["instances"] == [uid(1, 1, 1)]


def test_a_patient_with_another_study_stays(life: Life) -> None:
    life.store(ct_slice(seed=1, PatientID="P"))
    life.store(ct_slice(seed=2, PatientID="P"))

    life.deletion.delete(admin(), STUDY)

    assert life.rows("SELECT count(*) FROM patient") == [(1,)]


@pytest.mark.parametrize(
    ("study", "series", "instance"),
    [
        (uid(9), None, None),
        (STUDY, uid(9), None),
        (STUDY, uid(1, 1), uid(9)),
        (STUDY, uid(1, 2), uid(1, 1, 1)),
        (uid(2), uid(1, 1), None),
    ],
    ids=["study", "series", "instance", "instance-elsewhere", "series-elsewhere"],
)
def test_what_is_not_there_is_not_found(
    life: Life, study: str, series: str | None, instance: str | None
) -> None:
    two_series(life)
    life.store(ct_slice(seed=2))

    with pytest.raises(NotFound):
        life.deletion.delete(admin(), study, series, instance)

    assert life.rows("SELECT count(*) FROM instance") == [(4,)]
    assert tombstones(life) == []


def test_another_tenant_is_not_found_even_when_readable(life: Life) -> None:
    life.store(ct_slice(), tenant="a")

    with pytest.raises(NotFound):
        life.deletion.delete(admin("b", "a"), STUDY)

    life.store(ct_slice(), tenant="b")
    assert life.deletion.delete(admin("b", "a"), STUDY) == 1
    assert life.rows("SELECT tenant FROM instance") == [("a",)]


def test_the_right_to_delete_is_needed(life: Life) -> None:
    life.store(ct_slice())
    nobody = Actor(TenantId("default"), "CT1", roles=frozenset({Role.MODALITY}))

    with pytest.raises(NotAllowed):
        life.deletion.delete(nobody, STUDY)


def test_a_reason_is_bounded(life: Life) -> None:
    life.store(ct_slice())

    with pytest.raises(InvalidParameter):
        life.deletion.delete(admin(), STUDY, reason="x" * 1000)


def test_stored_again_it_is_back_and_survives_recovery(life: Life) -> None:
    ds = ct_slice()
    life.store(ds)
    life.deletion.delete(admin(), STUDY)

    life.store(ds)
    life.roll()
    life.recover()

    assert life.bytes_of(uid(1, 1, 1)) == content(ds)


def test_stored_again_after_the_clock_went_back_it_counts_as_later(life: Life) -> None:
    ds = ct_slice()
    life.store(ds)
    life.deletion.delete(admin(), STUDY)
    life.clock.turn(-7200)

    life.store(ds)

    [(received_us,)] = life.rows("SELECT received_us FROM instance")
    [(deleted_us,)] = life.rows("SELECT deleted_us FROM deletion")
    assert received_us > deleted_us


def test_recovery_does_not_bring_back_what_was_deleted(
    life: Life, tmp_path: Path, database_url: str
) -> None:
    for number in (1, 2):
        life.store(ct_slice(number=number))
    life.deletion.delete(admin(), STUDY, uid(1, 1), uid(1, 1, 2))
    life.packs._close("default")  # noqa: SLF001  # as a killed process leaves it
    life.recover()

    assert life.bytes_of(uid(1, 1, 2)) is None
    assert life.bytes_of(uid(1, 1, 1)) is not None


def test_a_crash_before_the_commit_is_completed_by_recovery(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        life.store(ct_slice(number=number))
    sync = life.packs.sync

    def dies() -> None:
        sync()
        raise KeyboardInterrupt

    monkeypatch.setattr(life.packs, "sync", dies)
    with pytest.raises(KeyboardInterrupt):
        life.deletion.delete(admin(), STUDY, uid(1, 1), uid(1, 1, 2))
    monkeypatch.undo()
    assert life.bytes_of(uid(1, 1, 2)) is not None
    life.packs.close()

    life.recover()

    assert life.bytes_of(uid(1, 1, 2)) is None
    assert life.bytes_of(uid(1, 1, 1)) is not None
    assert life.recount() == []


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("large", [False, True])
def test_what_a_deletion_buries_meanwhile_is_not_acknowledged(
    life: Life,
    tmp_path: Path,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    large: bool,
    others: int,
) -> None:
    """Another process stores the same and deletes it, while this one is writing."""
    ds = ct_slice()
    other = Life(tmp_path, database_url, life.objects, clock=life.clock)
    for number in range(others):
        life.store(ct_slice(number=2 + number))
    add = IndexWriter.add
    rounds: list[int] = []

    def overtaken(self: IndexWriter, *args: Any, **more: Any) -> None:
        rounds.append(1)
        add(self, *args, **more)

    def meanwhile() -> None:
        other.store(ds)
        other.deletion.delete(admin(), STUDY, uid(1, 1), uid(1, 1, 1))
        monkeypatch.setattr(IndexWriter, "add", overtaken)

    store = life.store_large if large else life.store
    write_rows = IngestService._write_rows  # noqa: SLF001

    def late(self: IngestService, *args: Any) -> Any:
        if self is life.ingest and not rounds:
            meanwhile()
        return write_rows(self, *args)

    monkeypatch.setattr(IngestService, "_write_rows", late)

    with pytest.raises(LostRace):
        store(ds)

    assert len(rounds) == 2
    assert life.bytes_of(uid(1, 1, 1)) is None
    assert life.recount() == []
    assert store(ds).outcome is Outcome.STORED
    other.close()
    life.packs.close()
    life.recover()
    assert life.bytes_of(uid(1, 1, 1)) is not None


def test_without_tombstones_nothing_is_deleted(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    life.store(ct_slice())

    def full(_: object) -> None:
        raise DependencyDown("pack storage: broken")

    monkeypatch.setattr(life.packs, "append", full)
    with pytest.raises(DependencyDown):
        life.deletion.delete(admin(), STUDY)

    assert life.bytes_of(uid(1, 1, 1)) is not None
    assert life.rows("SELECT count(*) FROM deletion") == [(0,)]
    assert life.events("study.deleted") == []


def test_a_lost_race_is_tried_again(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    life.store(ct_slice())
    lock = lifecycle.lock_target
    failures = [LostRace("once"), LostRace("twice")]

    def loses(*args: object) -> object:
        if failures:
            raise failures.pop()
        return lock(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(lifecycle, "lock_target", loses)

    assert life.deletion.delete(admin(), STUDY) == 1


def test_a_large_study_goes_in_one_piece_with_a_bounded_event(life: Life) -> None:
    for number in range(1, 601):
        life.store(ct_slice(number=number, size=4))

    assert life.deletion.delete(admin(), STUDY) == 600

    [event] = life.events("study.deleted")
    assert (len(event.payload["instances"]), event.payload["instances_count"]) == (
        500,
        600,
    )
    assert len(tombstones(life)) == 600


def test_d11_a_reader_under_way_finishes(life: Life) -> None:
    ds = ct_slice(size=1200)
    life.store(ds)
    stored = life.located(uid(1, 1, 1))
    stream = life.retrieve.dataset(stored, stored.transfer_syntax_uid)
    first = next(stream.chunks)

    life.deletion.delete(admin(), STUDY)

    assert first + b"".join(stream.chunks) == content(ds)


def test_c09_store_and_delete_race(
    life: Life, tmp_path: Path, database_url: str
) -> None:
    """One winner each round, counters right, nobody waits for ever."""
    other = Life(tmp_path, database_url, life.objects, clock=life.clock)
    ds = ct_slice(size=4)
    kept = ct_slice(number=2, size=4)
    life.store(kept)
    unexpected: list[BaseException] = []

    def storing(one: Life, at: threading.Barrier) -> None:
        at.wait()
        try:
            one.store(ds)
        except LostRace:
            pass
        except ImagingError as error:
            unexpected.append(error)

    def deleting(one: Life, at: threading.Barrier) -> None:
        at.wait()
        try:
            one.deletion.delete(admin(), STUDY, uid(1, 1), uid(1, 1, 1))
        except (NotFound, LostRace):
            pass
        except ImagingError as error:
            unexpected.append(error)

    for _ in range(ROUNDS):
        at = threading.Barrier(4)
        threads = [
            threading.Thread(target=work, args=(one, at))
            for work in (storing, deleting)
            for one in (life, other)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert life.recount() == []
        assert life.bytes_of(uid(1, 1, 1)) in {None, content(ds)}

    other.close()
    assert unexpected == []
    assert life.bytes_of(uid(1, 1, 2)) == content(kept)
    assert life.rows("SELECT count(*) FROM study") == [(1,)]


def test_c09_two_deletions_of_a_patients_last_studies(
    life: Life, tmp_path: Path, database_url: str
) -> None:
    other = Life(tmp_path, database_url, life.objects, clock=life.clock)
    for _ in range(ROUNDS):
        life.store(ct_slice(seed=1, size=4, PatientID="P"))
        other.store(ct_slice(seed=2, size=4, PatientID="P"))
        threads = [
            threading.Thread(target=one.deletion.delete, args=(admin(), study))
            for one, study in ((life, uid(1)), (other, uid(2)))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert life.rows("SELECT count(*) FROM patient") == [(0,)]
    other.close()
