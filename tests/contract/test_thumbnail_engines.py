"""Kept thumbnails on both engines: found, replaced, and nobody else's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import delete, func, select

from pacs.repository.tables import Instance, Thumbnail
from storage.kernel.errors import NotFound
from storage.kernel.types import Actor, Scope, StudyKey, TenantId
from tests.support.datasets import a_study, ct_slice, part10, uid
from tests.support.dicomweb import Archive, WebArchive
from tests.support.wado import keep

OURS, OTHERS = TenantId("default"), TenantId("other")
BOTH = Actor(OURS, "test", readable=frozenset({OTHERS}))


@pytest.fixture
def archive(database_url: str, tmp_path: Path) -> Iterator[Archive]:
    made = Archive(tmp_path, url=database_url)
    yield made
    made.close()


def kept(archive: Archive) -> int:
    with archive.database.read() as connection:
        count = select(func.count()).select_from(Thumbnail)
        return int(connection.execute(count).scalar_one())


def test_pictures_of_a_study_are_replaced_and_go_with_their_instances(
    archive: Archive,
) -> None:
    web = WebArchive(archive, "")
    for ds in a_study(seed=1, n_series=2, n_instances=3):
        keep(web, part10(ds))
    assert archive.thumbnails.prepare(uid(1), OURS) == 2
    one = archive.thumbnails.representative(BOTH, uid(1), uid(1, 2))
    assert one.kept is not None
    assert one.instance.sop_instance_uid == uid(1, 2, 2)

    keep(web, part10(ct_slice(seed=1, series=2, number=9)))
    assert archive.thumbnails.representative(BOTH, uid(1), uid(1, 2)).kept is None
    assert archive.thumbnails.prepare(uid(1), OURS) == 2
    assert kept(archive) == 2
    with archive.database.write() as connection:
        connection.execute(delete(Instance).where(Instance.tenant == OURS))
    assert kept(archive) == 0


def test_the_same_uids_elsewhere_have_their_own_picture(archive: Archive) -> None:
    web = WebArchive(archive, "")
    ours, theirs = ct_slice(seed=1, size=32), ct_slice(seed=1, size=64)
    keep(web, part10(ours))
    keep(web, part10(theirs), OTHERS)
    for tenant in (OURS, OTHERS):
        assert archive.thumbnails.prepare(uid(1), tenant) == 1
    elsewhere = Scope(studies=frozenset({StudyKey(OTHERS, uid(1))}))
    scoped = Actor(OURS, "ticket", readable=frozenset({OTHERS}), scope=elsewhere)

    mine = archive.thumbnails.representative(BOTH, uid(1))
    theirs_seen = archive.thumbnails.representative(scoped, uid(1))

    assert (mine.instance.tenant, mine.instance.rows) == (OURS, 32)
    assert mine.kept is not None
    assert (theirs_seen.instance.tenant, theirs_seen.instance.rows) == (OTHERS, 64)
    # Our own picture is not what a ticket for theirs opens.
    assert theirs_seen.kept is None or theirs_seen.kept != mine.kept
    nothing = Actor(OURS, "ticket", scope=Scope())
    with pytest.raises(NotFound):
        archive.thumbnails.representative(nothing, uid(1))
