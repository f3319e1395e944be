"""Every object of the corpus, asked for as a picture over HTTP."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from PIL import Image
from sqlalchemy import select

from pacs.repository.tables import Instance, Series, Study
from pacs.services.rendering import Kind, kind_of
from storage.kernel.errors import ImagingError
from storage.kernel.types import DEFAULT_TENANT, Actor, TenantId
from tests.support.corpus import files, needs_corpus
from tests.support.dicomweb import WebArchive, web_archive
from tests.support.wado import get, keep
from tests.support.web import Response

pytestmark = [needs_corpus, pytest.mark.slow]

ACTOR = Actor(TenantId(DEFAULT_TENANT), "test")
FOLDERS = ("syntaxes", "objects", "broken", "charsets", "bone-dr")
MARKED = "/rendered?annotation=patient,technique&viewport=300,300&window=40,400,sigmoid"


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebArchive]:
    with web_archive(tmp_path_factory.mktemp("corpus")) as served:
        for folder in FOLDERS:
            for path in files(folder):
                try:
                    keep(served, path.read_bytes())
                except (ImagingError, AssertionError):
                    continue  # what no archive stores
        yield served


def paths(web: WebArchive) -> list[tuple[str, str, str]]:
    query = (
        select(
            Study.study_instance_uid,
            Series.series_instance_uid,
            Instance.sop_instance_uid,
        )
        .join(Series, Series.study_pk == Study.id)
        .join(Instance, Instance.series_pk == Series.id)
    )
    with web.archive.database.read() as connection:
        return [(row[0], row[1], row[2]) for row in connection.execute(query)]


def shown(answer: Response) -> bool:
    """Tell whether an answer is a whole picture; else it must say why not."""
    if answer.status == 200:
        if answer.headers["content-type"].startswith("image/"):
            Image.open(io.BytesIO(answer.body)).load()
        return True
    assert answer.status in {404, 406, 422}, answer.body[:300]
    assert answer.json()["detail"]
    return False


def test_c18_every_object_is_shown_or_says_why_not(web: WebArchive) -> None:
    instances = paths(web)
    assert len(instances) > 130
    pictures = 0
    for study, series, uid in instances:
        path = f"/studies/{study}/series/{series}/instances/{uid}"
        found = web.archive.retrieve.instance(ACTOR, study, series, uid)
        for suffix in ("/rendered", "/thumbnail", "/frames/1/rendered", MARKED):
            good = shown(get(web, path + suffix))
            pictures += good
            if suffix == "/frames/1/rendered":
                assert not good or kind_of(found) is Kind.IMAGE
    assert pictures > 3 * 100


def test_every_study_is_shown_or_says_why_not(web: WebArchive) -> None:
    studies = {study for study, _, _ in paths(web)}
    every = 'multipart/related; type="image/jpeg"'
    for study in studies:
        made = web.archive.thumbnails.prepare(study, DEFAULT_TENANT)
        thumbnail = shown(get(web, f"/studies/{study}/thumbnail"))
        assert thumbnail or not made
        assert shown(get(web, f"/studies/{study}/rendered")) == thumbnail
        whole = get(web, f"/studies/{study}/rendered", every)
        assert whole.status in {200, 406}
