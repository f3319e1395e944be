"""The verifier finds each kind of damage, and a rebuild gives the same index."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from crc32c import crc32c
from sqlalchemy import update

from pacs.services.rebuild import Rebuilder, Rebuilt
from pacs.services.verify import Verified, Verifier
from storage.db.tables import Pack
from storage.kernel.errors import Conflict, DependencyDown
from storage.kernel.settings import DuplicatePolicy, Objects
from storage.kernel.types import Door
from storage.objects.files import FileObjectStore
from storage.objects.protocol import ObjectStore
from storage.objects.s3 import S3ObjectStore
from storage.outbox import ChangeFeed
from storage.packs.format import Kind, RecordHeader
from storage.packs.reader import object_key
from storage.packs.writer import pack_path
from tests.support.datasets import a_study, ct_slice
from tests.support.door import Archive, digest_of

Open = Callable[..., Archive]


@pytest.fixture
def opening(tmp_path: Path, database_url: str) -> Iterator[Open]:
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


@pytest.fixture
def objects(tmp_path: Path) -> ObjectStore:
    return FileObjectStore(tmp_path / "node" / "objects")


def verify(
    archive: Archive, objects: ObjectStore | None = None, *, fast: bool = False
) -> Verified:
    return Verifier(
        database=archive.database,
        folder=archive.folder,
        objects=objects,
        node_id="node-1",
    ).verify(fast=fast)


def rebuild(archive: Archive, objects: ObjectStore | None = None) -> Rebuilt:
    return Rebuilder(
        database=archive.database,
        folder=archive.folder,
        objects=objects,
        ingest=archive.ingest,
        clock=archive.clock,
        node_id="node-1",
    ).rebuild()


def kinds(done: Verified) -> list[str]:
    return [one.kind for one in done.findings]


def execute(archive: Archive, sql: str) -> None:
    with archive.database.write() as connection:
        connection.exec_driver_sql(sql)


def bury(archive: Archive, ds: Any) -> None:
    """Write the tombstone of `ds`."""
    [(received,)] = archive.rows(
        "SELECT received_us FROM instance WHERE sop_instance_uid = :uid",
        uid=ds.SOPInstanceUID,
    )
    archive.packs.append_tombstones(
        [
            RecordHeader(
                "default", Door.SYSTEM, received, "1.2", "1.2",
                ds.SOPInstanceUID, 0, digest=digest_of(ds),
            )
        ]
    )  # fmt: skip


def to_store(archive: Archive, objects: ObjectStore) -> None:
    """Move every local pack into the object store, as sealing does."""
    archive.packs.close()
    for path in archive.pack_files():
        data = path.read_bytes()
        digest = hashlib.sha256(data)
        objects.put_file(object_key(path.stem), path, digest.hexdigest())
        path.unlink()
        with archive.database.write() as connection:
            connection.execute(
                update(Pack)
                .where(Pack.key == path.stem)
                .values(
                    place="object", kind="sealed", state="closed", size_bytes=len(data)
                )
            )


def test_a_sound_archive_is_clean(archive: Archive) -> None:
    for ds in a_study(n_series=2, n_instances=3):
        archive.store(ds)
        archive.store(ds, tenant="other")
    archive.store_large(ct_slice(seed=2, size=1600))

    done = verify(archive)

    assert done.is_clean, done.findings
    assert (done.packs, done.records, done.instances) == (3, 13, 13)


def test_an_empty_archive_is_clean(archive: Archive) -> None:
    assert verify(archive).is_clean


@pytest.mark.parametrize("where", ["object", "header", "trailer"])
def test_d04_a_flipped_bit_is_found_where_it_is(archive: Archive, where: str) -> None:
    first, second, third = a_study(n_instances=3)
    for ds in (first, second, third):
        archive.store(ds)
    record = next(
        one
        for one in archive.records(Kind.OBJECT)
        if one.header.sop_instance_uid == second.SOPInstanceUID
    )
    place = {
        "object": record.location.object_offset + 700,
        "header": record.location.record_offset + 40,
        "trailer": record.location.object_offset + record.location.object_length + 1,
    }[where]
    [path] = archive.pack_files()
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)

    [found] = verify(archive).findings

    assert found.kind == "record.damaged"
    assert found.instance_uid == second.SOPInstanceUID
    assert (found.pack, found.offset) == (path.stem, record.location.record_offset)


def test_d04_a_pack_deleted_behind_our_back_is_found(archive: Archive) -> None:
    archive.store(ct_slice())
    archive.pack_files()[0].unlink()

    assert kinds(verify(archive)) == ["pack.missing"]


def test_d04_a_deleted_row_is_found(archive: Archive) -> None:
    for ds in a_study(n_instances=2):
        archive.store(ds)
    execute(archive, "DELETE FROM instance WHERE instance_number = 2")

    assert sorted(kinds(verify(archive))) == [
        "counter.series",
        "counter.study",
        "record.unindexed",
    ]


def test_a_row_that_points_elsewhere_is_found(archive: Archive) -> None:
    for ds in a_study(n_instances=2):
        archive.store(ds)
    execute(
        archive,
        "UPDATE instance SET record_offset = record_offset + 8"
        " WHERE instance_number = 2",
    )

    assert kinds(verify(archive)) == ["record.damaged"]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ("tenant = 'other'", "record.header"),
        ("sop_instance_uid = '1.2.3'", "record.header"),
        ("object_offset = object_offset + 1", "record.place"),
        (f"digest = {{blob}}{'00' * 32}'", "record.digest"),
    ],
)
def test_a_row_that_says_something_else_is_found(
    archive: Archive, change: str, kind: str
) -> None:
    archive.store(ct_slice())
    blob = "x'" if archive.database.is_sqlite else "'\\x"
    execute(archive, "UPDATE instance SET " + change.format(blob=blob))  # noqa: S608

    found = kinds(verify(archive))

    assert found[0] == kind


def test_a_data_set_that_was_changed_with_its_checksum_is_found_unless_fast(
    archive: Archive,
) -> None:
    archive.store(ct_slice())
    [path] = archive.pack_files()
    [record] = archive.records(Kind.OBJECT)
    data = bytearray(path.read_bytes())
    start, length = record.location.object_offset, record.location.object_length
    data[start + 900] ^= 1
    crc = crc32c(bytes(data[start : start + length]))
    data[start + length + 8 : start + length + 12] = crc.to_bytes(4, "little")
    path.write_bytes(data)

    assert kinds(verify(archive)) == ["record.changed"]
    assert verify(archive, fast=True).is_clean


def test_wrong_counters_are_found(archive: Archive) -> None:
    archive.store(ct_slice())
    execute(archive, "UPDATE series SET size_bytes = 0")
    execute(archive, "UPDATE study SET n_series = 7")

    assert kinds(verify(archive)) == ["counter.series", "counter.study"]


def test_a_tombstone_of_what_is_indexed_is_found(archive: Archive) -> None:
    ds = ct_slice()
    archive.store(ds)
    bury(archive, ds)

    assert kinds(verify(archive)) == ["row.deleted"]


def test_a_pack_without_a_row_is_found(archive: Archive) -> None:
    archive.store(ct_slice())
    archive.packs.close()
    [path] = archive.pack_files()
    stray = pack_path(archive.folder, "ab" * 16)
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(path.read_bytes())

    [found] = verify(archive).findings

    assert (found.kind, found.pack) == ("pack.stray", "ab" * 16)


def test_the_pack_that_a_process_appends_to_is_no_finding(archive: Archive) -> None:
    archive.store(ct_slice(number=1))
    [path] = archive.pack_files()
    with path.open("ab") as file:
        file.write(b"half a record")

    assert verify(archive).is_clean


def test_objects_are_verified(archive: Archive, objects: ObjectStore) -> None:
    for ds in a_study(n_instances=3):
        archive.store(ds)
    to_store(archive, objects)

    assert verify(archive, objects).is_clean
    assert verify(archive, objects, fast=True).is_clean


def test_d04_a_missing_object_and_a_stray_one_are_found(
    archive: Archive, objects: ObjectStore, tmp_path: Path
) -> None:
    archive.store(ct_slice())
    to_store(archive, objects)
    [one] = objects.list()
    objects.delete(one.key)
    source = tmp_path / "source"
    source.write_bytes(b"x")
    objects.put_file(object_key("ab" * 16), source, hashlib.sha256(b"x").hexdigest())

    for fast in (True, False):
        found = verify(archive, objects, fast=fast)
        assert kinds(found) == ["object.missing", "object.stray"]


def test_d04_a_changed_object_is_found(
    archive: Archive, objects: ObjectStore, tmp_path: Path
) -> None:
    archive.store(ct_slice())
    to_store(archive, objects)
    [path] = [p for p in (tmp_path / "node" / "objects").rglob("*.pack") if p.is_file()]
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)

    assert kinds(verify(archive, objects)) == ["record.damaged"]


def test_a_store_that_is_down_is_a_finding_and_the_rest_is_verified(
    archive: Archive, objects: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive.store(ct_slice())
    to_store(archive, objects)
    archive.store(ct_slice(number=2))

    def down(*_: object) -> None:
        raise DependencyDown("x")

    monkeypatch.setattr(FileObjectStore, "stat", down)
    done = verify(archive, objects)

    assert kinds(done) == ["object.unreadable"]
    assert done.instances == 1


def snapshot(archive: Archive) -> list[list[tuple[Any, ...]]]:
    """Return what an index says, without keys and times of its own."""
    return [
        archive.rows(
            "SELECT study.tenant, study_instance_uid, patient_name, study.n_series,"
            " study.n_instances, study.size_bytes, modalities, study.json"
            " FROM study ORDER BY 1, 2"
        ),
        archive.rows(
            "SELECT series_instance_uid, n_instances, size_bytes, json FROM series"
            " ORDER BY tenant, series_instance_uid"
        ),
        archive.rows(
            "SELECT instance.tenant, sop_instance_uid, digest, pack.key,"
            " record_offset, object_offset, object_length, dataset_offset,"
            " header_end, pixel_offset, received_us, pack.kind, pack.place"
            " FROM instance JOIN pack ON pack.id = pack_pk ORDER BY 1, 2"
        ),
    ]


def test_a_rebuild_gives_the_same_index(
    archive: Archive, opening: Open, objects: ObjectStore
) -> None:
    for ds in a_study(seed=1, n_series=2, n_instances=3):
        archive.store(ds)
    to_store(archive, objects)
    second = opening()
    for ds in a_study(seed=2, n_instances=3):
        archive.store(ds)
        second.store(ds, tenant="other")
    archive.store_large(ct_slice(seed=3, size=1600))
    archive.packs.close()
    second.packs.close()
    before = snapshot(archive)
    epoch = ChangeFeed(archive.database).epoch()

    done = rebuild(archive, objects)

    assert done.findings == []
    assert done.instances == 13
    assert snapshot(archive) == before
    assert verify(archive, objects).is_clean
    assert ChangeFeed(archive.database).epoch() == done.epoch != epoch


def test_a_rebuild_from_nothing_but_packs(archive: Archive, tmp_path: Path) -> None:
    made = a_study(n_instances=3)
    for ds in made:
        archive.store(ds)
    before = snapshot(archive)
    archive.packs.close()
    fresh = Archive(tmp_path / "node", url=f"sqlite:///{tmp_path / 'fresh.db'}")

    rebuild(fresh)

    assert snapshot(fresh) == before
    fresh.close()


def test_a_rebuild_keeps_the_order_of_arrival(archive: Archive, opening: Open) -> None:
    second = opening()
    made = a_study(n_instances=6, InstanceNumber=None)
    for number, ds in enumerate(made):
        (archive, second)[number % 2].store(ds)
    order = archive.rows("SELECT sop_instance_uid FROM instance ORDER BY id")
    archive.packs.close()
    second.packs.close()

    rebuild(archive)

    assert archive.rows("SELECT sop_instance_uid FROM instance ORDER BY id") == order


def test_a_rebuild_honours_tombstones_and_goes_on_erasing(
    archive: Archive, tmp_path: Path
) -> None:
    first, second = a_study(n_instances=2)
    archive.store(first)
    archive.store(second)
    bury(archive, first)
    archive.packs.close()
    fresh = Archive(tmp_path / "node", url=f"sqlite:///{tmp_path / 'fresh.db'}")

    done = rebuild(fresh)

    assert list(fresh.held().values()) == [digest_of(second)]
    assert done.buried == 1
    assert fresh.rows("SELECT sop_instance_uid FROM deletion") == [
        (first.SOPInstanceUID,)
    ]
    assert verify(fresh).is_clean
    fresh.close()


def test_what_was_deleted_and_stored_again_survives_a_rebuild(
    archive: Archive, tmp_path: Path
) -> None:
    ds = ct_slice()
    archive.store(ds)
    bury(archive, ds)
    execute(archive, "DELETE FROM instance")
    archive.store(ds)
    archive.packs.close()
    fresh = Archive(tmp_path / "node", url=f"sqlite:///{tmp_path / 'fresh.db'}")

    rebuild(fresh)

    assert list(fresh.held().values()) == [digest_of(ds)]
    fresh.close()


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("contents", ["12", "121", "1213"])
def test_a_rebuild_does_not_bring_back_what_was_replaced(
    opening: Open, tmp_path: Path, contents: str, *, large: bool
) -> None:
    archive = opening(duplicates=DuplicatePolicy.IF_CHANGED)
    made = [ct_slice(StudyDescription=text) for text in contents]
    for ds in made:
        (archive.store_large if large else archive.store)(ds)
    archive.packs.close()
    assert verify(archive).is_clean
    fresh = Archive(tmp_path / "node", url=f"sqlite:///{tmp_path / 'fresh.db'}")

    done = rebuild(fresh)

    assert done.findings == []
    assert list(fresh.held().values()) == [digest_of(made[-1])]
    assert fresh.rows("SELECT n_instances FROM study") == [(1,)]
    fresh.close()


def test_a_rebuild_is_refused_while_a_process_stores(archive: Archive) -> None:
    archive.store(ct_slice())

    with pytest.raises(Conflict):
        rebuild(archive)

    assert len(archive.held()) == 1


def test_a_rebuild_is_repeatable(archive: Archive) -> None:
    for ds in a_study(n_instances=2):
        archive.store(ds)
    archive.packs.close()

    rebuild(archive)
    before = snapshot(archive)
    rebuild(archive)

    assert snapshot(archive) == before


def test_a_rebuild_reports_damage_and_goes_on(archive: Archive) -> None:
    for ds in a_study(n_instances=3):
        archive.store(ds)
    archive.packs.close()
    [path] = archive.pack_files()
    data = bytearray(path.read_bytes())
    data[archive.records(Kind.OBJECT)[1].location.object_offset + 500] ^= 1
    path.write_bytes(data)

    done = rebuild(archive)

    assert [one.kind for one in done.findings] == ["pack.damaged"]
    assert done.instances == 2


def test_progress_comes_to_its_end(archive: Archive) -> None:
    archive.store(ct_slice())
    archive.packs.close()
    archive.recover()
    seen: list[tuple[int, int]] = []

    Verifier(
        database=archive.database,
        folder=archive.folder,
        objects=None,
        node_id="node-1",
    ).verify(progress=lambda done, total: seen.append((done, total)))

    assert seen
    assert seen[-1][0] == seen[-1][1] > 0


def test_an_s3_store_is_verified_and_rebuilt_from(
    archive: Archive, seaweedfs: Any
) -> None:
    settings: Objects = seaweedfs.objects()
    store = S3ObjectStore(settings.s3)
    for ds in a_study(n_instances=3):
        archive.store(ds)
    to_store(archive, store)
    before = snapshot(archive)

    rebuild(archive, store)

    assert snapshot(archive) == before
    assert verify(archive, store).is_clean
