"""The door: what is acknowledged is durable, everything else is absent or complete."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pacs.domain.study import Outcome
from pacs.repository.index import IndexWriter, StaleIndex
from pacs.services.ingest import IngestService
from storage.db.engine import Database
from storage.kernel.errors import (
    DependencyDown,
    DuplicateInstance,
    IdentityMismatch,
    ImagingError,
    LostRace,
    StorageFull,
    UnsupportedSopClass,
    UnsupportedTransferSyntax,
)
from storage.kernel.settings import DuplicatePolicy, SyncPolicy
from storage.packs.format import Kind
from tests.support.datasets import a_study, ct_slice, dataset_bytes, part10, uid
from tests.support.door import SOURCE, Archive, actor, digest_of
from tests.support.waiting import wait_until

Open = Callable[..., Archive]


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


@pytest.fixture
def archive(opening: Open) -> Archive:
    return opening()


def buried(archive: Archive) -> list[str]:
    return [one.header.digest for one in archive.records(Kind.TOMBSTONE)]


def together(*works: Callable[[], Any]) -> list[Any]:
    """Run `works` at once; return what each gave or raised."""
    barrier = threading.Barrier(len(works))
    results: list[Any] = [None] * len(works)

    def run(number: int, work: Callable[[], Any]) -> None:
        barrier.wait()
        try:
            results[number] = work()
        except ImagingError as error:
            results[number] = error

    threads = [
        threading.Thread(target=run, args=(number, work))
        for number, work in enumerate(works)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@pytest.mark.parametrize("large", [False, True])
def test_bytes_are_kept_as_received(archive: Archive, *, large: bool) -> None:
    ds = ct_slice()

    accepted = (archive.store_large if large else archive.store)(ds)

    assert accepted.outcome is Outcome.STORED
    assert archive.bytes_of(ds.SOPInstanceUID) == dataset_bytes(part10(ds))
    assert archive.held() == {("default", ds.SOPInstanceUID): digest_of(ds)}


@pytest.mark.parametrize("large", [False, True])
def test_the_pack_is_synced_before_the_rows_are_committed(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, *, large: bool
) -> None:
    order: list[str] = []
    fdatasync, add = os.fdatasync, IndexWriter.add

    def syncing(fd: int) -> None:
        fdatasync(fd)
        order.append("synced")

    def adding(*args: Any, **kwargs: Any) -> None:
        add(*args, **kwargs)
        order.append("written")

    monkeypatch.setattr(os, "fdatasync", syncing)
    monkeypatch.setattr(IndexWriter, "add", adding)

    (archive.store_large if large else archive.store)(ct_slice())

    assert order == ["synced", "written"]


@pytest.mark.parametrize(
    ("policy", "n_syncs"), [(SyncPolicy.ASSOCIATION, 1), (SyncPolicy.NONE, 0)]
)
def test_a_weaker_policy_waits_for_the_disk_as_it_says(
    opening: Open, monkeypatch: pytest.MonkeyPatch, policy: SyncPolicy, n_syncs: int
) -> None:
    archive = opening(sync=policy)
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    for ds in a_study(n_instances=3):
        archive.store(ds)
    assert synced == []

    archive.ingest.flush()

    assert len(synced) == n_syncs


@pytest.mark.parametrize("large", [False, True])
def test_the_same_again_is_a_duplicate_and_costs_no_bytes(
    archive: Archive, *, large: bool
) -> None:
    store = archive.store_large if large else archive.store
    store(ct_slice())
    size = sum(path.stat().st_size for path in archive.pack_files())

    assert store(ct_slice()).outcome is Outcome.DUPLICATE

    assert sum(path.stat().st_size for path in archive.pack_files()) == size
    assert archive.rows("SELECT n_instances FROM study") == [(1,)]
    assert archive.recover().findings == []


@pytest.mark.parametrize("large", [False, True])
def test_other_content_is_refused_and_the_first_stays(
    archive: Archive, *, large: bool
) -> None:
    first, second = (ct_slice(StudyDescription=text) for text in "12")
    archive.store(first)

    with pytest.raises(DuplicateInstance):
        (archive.store_large if large else archive.store)(second)

    assert list(archive.held().values()) == [digest_of(first)]
    assert len(archive.pack_files()) == 1


@pytest.mark.parametrize("large", [False, True])
def test_other_content_replaces_when_the_policy_says_so(
    opening: Open, *, large: bool
) -> None:
    archive = opening(duplicates=DuplicatePolicy.IF_CHANGED)
    first, second = (ct_slice(StudyDescription=text) for text in "12")
    archive.store(first)

    accepted = (archive.store_large if large else archive.store)(second)

    assert accepted.outcome is Outcome.STORED
    assert archive.bytes_of(second.SOPInstanceUID) == dataset_bytes(part10(second))
    assert archive.rows("SELECT n_series, n_instances FROM study") == [(1, 1)]
    assert archive.rows("SELECT reason FROM deletion") == [("replaced",)]
    assert buried(archive) == [digest_of(first)]


def test_the_same_uid_in_two_tenants_is_two_instances(archive: Archive) -> None:
    first = ct_slice()
    second = ct_slice(PatientID="another", StudyDescription="other")

    archive.store(first, tenant="a")
    archive.store(second, tenant="b")

    assert archive.bytes_of(first.SOPInstanceUID, "a") == dataset_bytes(part10(first))
    assert archive.bytes_of(first.SOPInstanceUID, "b") == dataset_bytes(part10(second))
    assert len(archive.pack_files()) == 2


@pytest.mark.parametrize("n", range(4))
def test_two_processes_that_store_the_same_instance_at_once_keep_it_once(
    opening: Open, n: int
) -> None:
    processes = [opening(), opening()]
    ds = ct_slice(number=n + 1)

    results = together(*(lambda one=one: one.store(ds) for one in processes))

    assert all(one.outcome in set(Outcome) for one in results), results
    assert processes[0].rows("SELECT n_series, n_instances FROM study") == [(1, 1)]
    assert processes[0].bytes_of(ds.SOPInstanceUID) == dataset_bytes(part10(ds))


@pytest.mark.parametrize("n", range(4))
def test_of_two_contents_at_once_the_one_that_was_acknowledged_is_kept(
    opening: Open, n: int
) -> None:
    processes = [opening(), opening()]
    contents = [ct_slice(number=n + 1, StudyDescription=text) for text in "12"]

    results = together(
        *(
            lambda one=one, ds=ds: one.store(ds)
            for one, ds in zip(processes, contents, strict=True)
        )
    )

    kept = [
        digest_of(ds)
        for ds, result in zip(contents, results, strict=True)
        if not isinstance(result, ImagingError)
    ]
    assert list(processes[0].held().values()) == kept
    assert sum(isinstance(one, DuplicateInstance) for one in results) == 1
    lost = {digest_of(ds) for ds in contents} - set(kept)
    records = {one.digest.hex() for one in processes[0].records(Kind.OBJECT)}
    # Bytes of the loser, if it wrote any, are buried.
    assert set(buried(processes[0])) == lost & records


def test_many_threads_and_processes_keep_everything_and_count_right(
    opening: Open,
) -> None:
    processes = [opening(), opening(), opening()]
    made = a_study(n_series=3, n_instances=12, size=16)
    shares = [made[n::6] for n in range(6)]

    def work(number: int) -> None:
        for ds in shares[number]:
            processes[number % 3].store(ds)
        processes[number % 3].store(made[0])

    results = together(*(lambda n=n: work(n) for n in range(6)))

    assert results == [None] * 6
    assert set(processes[0].held().values()) == {digest_of(ds) for ds in made}
    assert processes[0].rows("SELECT n_series, n_instances FROM study") == [(3, 36)]
    assert processes[0].rows("SELECT n_instances FROM series") == [(12,)] * 3


def test_two_studies_that_claim_one_series_do_not_share_it(archive: Archive) -> None:
    archive.store(ct_slice(number=1))

    with pytest.raises(IdentityMismatch):
        archive.store(ct_slice(number=2, StudyInstanceUID=uid(77)))

    assert archive.rows("SELECT n_instances FROM study") == [(1,)]


def test_a_remembered_series_that_was_deleted_and_whose_key_was_given_out_again(
    opening: Open,
) -> None:
    first, other = opening(), opening()
    first.store(ct_slice(seed=1, number=1))
    with other.database.write() as connection:
        for table in ("instance", "series", "study"):
            connection.exec_driver_sql(f"DELETE FROM {table}")  # noqa: S608
    other.store(ct_slice(seed=2, number=1))

    first.store(ct_slice(seed=1, number=2))

    assert sorted(
        first.rows(
            "SELECT sop_instance_uid, series_instance_uid FROM instance"
            " JOIN series ON series.id = series_pk"
        )
    ) == [(uid(1, 1, 2), uid(1, 1)), (uid(2, 1, 1), uid(2, 1))]


def test_a_duplicate_of_what_is_deleted_meanwhile_is_not_acknowledged(
    opening: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, other = opening(), opening()
    archive.store(ct_slice())
    add = IndexWriter.add
    times: list[int] = []

    def deleted_first(*args: Any, **kwargs: Any) -> None:
        times.append(1)
        if len(times) == 1:
            raise StaleIndex
        add(*args, **kwargs)

    pre_check = IngestService._pre_check  # noqa: SLF001

    def deleting(self: IngestService, *args: Any) -> Any:
        if times:
            with other.database.write() as connection:
                connection.exec_driver_sql("DELETE FROM instance")
        return pre_check(self, *args)

    monkeypatch.setattr(IndexWriter, "add", deleted_first)
    monkeypatch.setattr(IngestService, "_pre_check", deleting)

    with pytest.raises(LostRace):
        archive.store(ct_slice())


def test_a_twin_of_what_is_refused_is_refused(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two copies in one group: the second is not acknowledged for the first's sake."""
    ds = ct_slice()
    find = IndexWriter._resolve  # noqa: SLF001

    def refusing(*_: Any) -> Any:
        raise IdentityMismatch("moved meanwhile", 0x0020000E)

    entered = threading.Event()
    append = archive.packs.append
    gate = threading.Event()

    def waiting(records: Any) -> Any:
        entered.set()
        assert gate.wait(30)
        return append(records)

    monkeypatch.setattr(archive.packs, "append", waiting)
    results: list[Any] = []

    def store(number: int) -> None:
        try:
            results.append(archive.store(ct_slice(seed=5, number=number)))
        except ImagingError as error:
            results.append(error)

    def copies() -> None:
        try:
            archive.store(ds)
        except ImagingError as error:
            results.append(error)

    first = threading.Thread(target=store, args=(1,))
    first.start()
    assert entered.wait(30)
    twins = [threading.Thread(target=copies) for _ in range(2)]
    for twin in twins:
        twin.start()
    wait_until(
        lambda: len(archive.ingest._group._waiting) == 2,  # noqa: SLF001
        "both copies to wait",
    )
    real = IndexWriter.add

    def add(self: IndexWriter, connection: Any, rows: Any, **more: Any) -> None:
        if len(rows) == 2:
            monkeypatch.setattr(IndexWriter, "_resolve", refusing)
        real(self, connection, rows, **more)

    monkeypatch.setattr(IndexWriter, "add", add)
    gate.set()
    for thread in (first, *twins):
        thread.join(30)
    monkeypatch.setattr(IndexWriter, "_resolve", find)

    refused = [one for one in results if isinstance(one, IdentityMismatch)]
    assert len(refused) == 2
    assert ("default", ds.SOPInstanceUID) not in archive.held()
    assert buried(archive) == [digest_of(ds)]


def test_d03_a_disk_that_is_full_acknowledges_nothing_and_recovers(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = a_study(n_instances=2)
    archive.store(first)

    def full(*_: object) -> None:
        raise OSError(28, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        for store in (archive.store, archive.store_large):
            with pytest.raises(StorageFull):
                store(second)
    assert len(archive.held()) == 1
    assert list(archive.folder.rglob("*.partial")) == []

    assert archive.store(second).outcome is Outcome.STORED
    assert archive.bytes_of(first.SOPInstanceUID) == dataset_bytes(part10(first))


def test_d05_without_a_database_nothing_is_written_or_acknowledged(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive.store(ct_slice(number=1))
    size = archive.pack_files()[0].stat().st_size

    def down(*_: object) -> None:
        raise DependencyDown("database")

    with monkeypatch.context() as patch:
        for way in ("read", "glance", "ingest", "write"):
            patch.setattr(Database, way, down)
        with pytest.raises(DependencyDown):
            archive.store(ct_slice(number=2))
    assert archive.pack_files()[0].stat().st_size == size

    archive.store(ct_slice(number=2))
    assert len(archive.held()) == 2


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"sop_class_uid": "1.2.3"}, UnsupportedSopClass),
        ({"transfer_syntax_uid": "1.2.3"}, UnsupportedTransferSyntax),
        ({"sop_instance_uid": "not a uid"}, IdentityMismatch),
    ],
)
def test_what_could_never_be_accepted_is_refused_before_its_bytes(
    archive: Archive, changed: dict[str, str], error: type[Exception]
) -> None:
    ds = ct_slice()
    good = {
        "sop_class_uid": str(ds.SOPClassUID),
        "sop_instance_uid": str(ds.SOPInstanceUID),
        "transfer_syntax_uid": "1.2.840.10008.1.2.1",
    }
    archive.ingest.check(actor(), SOURCE, **good)

    with pytest.raises(error):
        archive.ingest.check(actor(), SOURCE, **{**good, **changed})


def test_a_spool_that_is_aborted_leaves_nothing(archive: Archive) -> None:
    spool = archive.ingest.open_spool(
        actor(),
        SOURCE,
        sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
        sop_instance_uid="1.2.3",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
    )
    spool.write(bytes(1000))

    spool.abort()
    spool.abort()

    assert [path for path in archive.folder.rglob("*") if path.is_file()] == []


def test_d10_a_clock_that_steps_back_changes_no_order(opening: Open) -> None:
    archive = opening(duplicates=DuplicatePolicy.IF_CHANGED)
    first, second = (ct_slice(StudyDescription=text) for text in "12")
    now = archive.clock.now_us()
    archive.store(first)
    archive.clock.now_us = lambda: now - 3_600_000_000  # type: ignore[method-assign]

    archive.store(second)
    archive.store(first)

    assert list(archive.held().values()) == [digest_of(first)]
    received = [one.header.received_us for one in archive.records(Kind.OBJECT)]
    assert received == sorted(received)
