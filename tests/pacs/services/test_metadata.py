"""Series metadata kept ready, and remembered places, on both engines."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import orjson
import pytest
from pydicom import Dataset
from sqlalchemy import delete, func, select

from pacs.domain.study import Arrival, StoredInstance
from pacs.repository.tables import Instance, SeriesMetadata
from pacs.services import metadata
from pacs.services.metadata import MetadataBody, SeriesBundles
from storage.kernel.errors import Gone, NotFound
from storage.kernel.types import DEFAULT_TENANT, Actor, Digest, Door, Source, TenantId
from tests.support.datasets import ct_slice, dataset_bytes, part10, uid
from tests.support.dicomweb import Archive

ACTOR = Actor(DEFAULT_TENANT, "test")
OTHER = Actor(TenantId("other"), "test")
BOTH = Actor(DEFAULT_TENANT, "test", readable=frozenset({TenantId("other")}))


@pytest.fixture
def archive(database_url: str, tmp_path: Path) -> Iterator[Archive]:
    made = Archive(tmp_path, url=database_url)
    yield made
    made.close()


def keep(archive: Archive, ds: Dataset, actor: Actor = ACTOR) -> None:
    data = dataset_bytes(part10(ds))
    archive.ingest.accept(
        Arrival(
            actor,
            Source(Door.WEB),
            "1.2.840.10008.1.2.1",
            memoryview(data),
            Digest(hashlib.sha256(data).digest()),
        )
    )


class Counting:
    """Bundles that count the instances they read."""

    def __init__(self, archive: Archive) -> None:
        self.n_read = 0
        self._archive = archive
        self.bundles = SeriesBundles(
            archive.database, self._write, archive.retrieve.frame_table
        )

    def _write(self, instance: StoredInstance) -> bytes:
        self.n_read += 1
        return self._archive.retrieve.metadata(instance)


def names(body: MetadataBody) -> list[str]:
    found = orjson.loads(b"".join(body.text()))
    return [one["00080018"]["Value"][0] for one in found]


def test_a_series_is_read_once_for_each_of_its_states(archive: Archive) -> None:
    counting = Counting(archive)
    for number in (1, 2):
        keep(archive, ct_slice(number=number))

    first = counting.bundles.series(ACTOR, uid(1), uid(1, 1))
    again = counting.bundles.series(ACTOR, uid(1), uid(1, 1))

    assert first == again
    assert counting.n_read == 2
    keep(archive, ct_slice(number=3))
    grown = counting.bundles.series(ACTOR, uid(1), uid(1, 1))
    assert names(grown) == [uid(1, 1, n) for n in (1, 2, 3)]
    assert grown.etag != first.etag
    assert counting.n_read == 5


def test_preparing_leaves_nothing_to_build(archive: Archive) -> None:
    counting = Counting(archive)
    for series in (1, 2):
        keep(archive, ct_slice(series=series))

    assert counting.bundles.prepare(uid(1), "default") == 2
    etag, chunks = counting.bundles.study(ACTOR, uid(1))

    found = orjson.loads(b"".join(chunks))
    assert [one["0020000E"]["Value"][0] for one in found] == [uid(1, 1), uid(1, 2)]
    assert counting.n_read == 2
    assert counting.bundles.study(ACTOR, uid(1))[0] == etag


def test_tenants_are_never_mixed(archive: Archive) -> None:
    keep(archive, ct_slice(number=1))
    keep(archive, ct_slice(number=2), OTHER)

    both = archive.retrieve.series_metadata(BOTH, uid(1), uid(1, 1))

    assert sorted(names(both)) == [uid(1, 1, 1), uid(1, 1, 2)]
    ours = archive.retrieve.series_metadata(ACTOR, uid(1), uid(1, 1))
    theirs = archive.retrieve.series_metadata(OTHER, uid(1), uid(1, 1))
    assert (names(ours), names(theirs)) == ([uid(1, 1, 1)], [uid(1, 1, 2)])


def test_many_builders_agree_and_keep_one(archive: Archive) -> None:
    for number in range(1, 6):
        keep(archive, ct_slice(number=number))

    with ThreadPoolExecutor(8) as pool:
        jobs = [
            pool.submit(archive.retrieve.series_metadata, ACTOR, uid(1), uid(1, 1))
            for _ in range(16)
        ]
        found = {job.result().etag for job in jobs}

    assert len(found) == 1
    with archive.database.read() as connection:
        kept = connection.execute(select(func.count()).select_from(SeriesMetadata))
        assert kept.scalar_one() == 1


def test_a_study_that_changes_while_it_is_read_ends_in_an_error(
    archive: Archive,
) -> None:
    for series in (1, 2):
        keep(archive, ct_slice(series=series))
    _, chunks = archive.retrieve.study_metadata(ACTOR, uid(1))
    next(chunks)

    keep(archive, ct_slice(series=2, number=2))
    with archive.database.write() as connection:
        connection.execute(delete(SeriesMetadata))

    with pytest.raises(Gone):
        list(chunks)


def test_what_is_too_large_is_built_each_time(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "MAX_KEPT", 10)
    counting = Counting(archive)
    keep(archive, ct_slice())

    for _ in range(2):
        found = counting.bundles.series(ACTOR, uid(1), uid(1, 1))
        assert names(found) == [uid(1, 1, 1)]
    assert counting.n_read == 2


def test_what_is_not_there_is_not_found(archive: Archive) -> None:
    keep(archive, ct_slice())

    for study, series in ((uid(2), uid(1, 1)), (uid(1), uid(9))):
        with pytest.raises(NotFound):
            archive.retrieve.series_metadata(ACTOR, study, series)
    with pytest.raises(NotFound):
        archive.retrieve.study_metadata(OTHER, uid(1))


def test_a_remembered_place_is_forgotten_with_its_row(archive: Archive) -> None:
    where = (uid(1), uid(1, 1), uid(1, 1, 1))
    keep(archive, ct_slice())
    known = archive.retrieve.instance(ACTOR, *where)
    assert archive.retrieve.instance(ACTOR, *where) is known
    with pytest.raises(NotFound):
        archive.retrieve.instance(OTHER, *where)

    with archive.database.write() as connection:
        connection.execute(delete(Instance))

    with pytest.raises(NotFound):
        archive.retrieve.instance(ACTOR, *where)
