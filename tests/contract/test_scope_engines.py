"""What a scope leaves of an index: every selection, on both engines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import orjson
import pytest

from pacs.domain.study import Level
from pacs.imaging.frames import FrameTable
from pacs.repository import locate
from pacs.services.metadata import SeriesBundles
from pacs.services.query import QueryService, SearchRequest, StudyFilter
from storage.db import migrate
from storage.db.engine import Database
from storage.kernel.errors import NotFound
from storage.kernel.limits import Limits
from storage.kernel.types import Actor, PatientKey, Scope, StudyKey, TenantId
from tests.support import postgres
from tests.support.populated import Made, many, populate

STUDIES = [
    Made(uid="1.1", patient_id="P1", issuer="H1", modalities=("CT", "SR")),
    Made(uid="1.2", patient_id="P1", issuer="H1", study_date=None),
    Made(uid="1.3", patient_id="P1", issuer="H2"),
    Made(uid="1.4", patient_id="P2", issuer="H1"),
    Made(uid="1.1", patient_id="P1", issuer="H1", tenant="other"),
    Made(uid="1.5", patient_id="P1", issuer="H1", tenant="other"),
    *many(300),
    *many(30, tenant="other", seed=3),
]
ACTOR = Actor(
    TenantId("default"), "test", readable=frozenset({TenantId("other")}), scope=Scope()
)
P1 = PatientKey("default", "H1", "P1")
S1 = StudyKey("other", "1.1")
CASES = [
    (Scope(), set()),
    (Scope(patients=frozenset({P1})), {("default", "1.1"), ("default", "1.2")}),
    (Scope(studies=frozenset({S1})), {("other", "1.1")}),
    (
        Scope(studies=frozenset({S1}), patients=frozenset({P1})),
        {("default", "1.1"), ("default", "1.2"), ("other", "1.1")},
    ),
    # A tenant that the actor cannot read is not opened by a scope.
    (Scope(studies=frozenset({StudyKey("third", "1.1")})), set()),
]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def database(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Database]:
    with ExitStack() as until_done:
        if request.param == "sqlite":
            url = f"sqlite:///{tmp_path_factory.mktemp('scope') / 'index.db'}"
        else:
            server = request.getfixturevalue("postgres")
            url = until_done.enter_context(postgres.empty_database(server))
        migrate.upgrade(url)
        opened = Database(url)
        populate(opened, STUDIES)
        yield opened
        opened.close()


@pytest.mark.parametrize(("scope", "visible"), CASES)
def test_every_selection_is_narrowed(
    database: Database, scope: Scope, visible: set[tuple[str, str]]
) -> None:
    actor = replace(ACTOR, scope=scope)
    query = QueryService(database=database, limits=Limits())
    uids = sorted(uid for _, uid in visible)

    listed = query.list_studies(actor, StudyFilter())
    assert {(one.tenant, one.study_instance_uid) for one in listed.studies} == visible
    for order in ("", "PatientName", "-StudyDate"):
        found = query.search(actor, Level.STUDY, SearchRequest(order=order, total=True))
        rows = [orjson.loads(row) for row in found.rows]
        assert sorted(row["0020000D"]["Value"][0] for row in rows) == uids
        assert found.total == len(visible)
    for level in (Level.SERIES, Level.IMAGE):
        rows = [
            orjson.loads(row)
            for row in query.search(actor, level, SearchRequest()).rows
        ]
        assert {row["0020000D"]["Value"][0] for row in rows} == set(uids)
    for root, level in (("PATIENT", Level.PATIENT), ("STUDY", Level.STUDY)):
        matches = list(query.find(actor, level, {0x00100020: ""}, root=root))
        assert bool(matches) == bool(visible)
        assert all(match[0x00100020] == "P1" for match in matches)
    with database.read() as connection:
        for study in ("1.1", "1.2", "1.3", "1.4", "1.5"):
            found_there = locate.instances(connection, actor, study_uid=study)
            assert {(one.tenant, study) for one in found_there} == {
                key for key in visible if key[1] == study
            }
        several = locate.by_keys(connection, actor, patient_ids=["P1", "P2"])
        assert {(one.tenant, one.study_instance_uid) for one in several} == visible


def test_cursors_do_not_leave_the_scope(database: Database) -> None:
    actor = replace(ACTOR, scope=CASES[3][0])
    query = QueryService(database=database, limits=Limits())
    seen, cursor = [], ""

    for _ in range(5):
        page = query.list_studies(actor, StudyFilter(), cursor=cursor, limit=1)
        seen += [one.study_instance_uid for one in page.studies]
        cursor = page.cursor
        if not cursor:
            break

    assert sorted(seen) == ["1.1", "1.1", "1.2"]


def test_a_study_does_not_tell_how_many_others_the_patient_has(
    database: Database,
) -> None:
    query = QueryService(database=database, limits=Limits())
    counts = frozenset({0x00201200, 0x00201202, 0x00201204})

    def counted(actor: Actor) -> list[int]:
        request = SearchRequest(study_uid="1.1", include=counts)
        row = orjson.loads(query.search(actor, Level.STUDY, request).rows[0])
        return [row[f"{tag:08X}"]["Value"][0] for tag in sorted(counts)]

    whole = Actor(TenantId("other"), "test")
    assert counted(whole)[0] == 2
    assert counted(replace(ACTOR, scope=CASES[2][0]))[0] == 1


def test_metadata_of_another_patient_do_not_exist(database: Database) -> None:
    bundles = SeriesBundles(
        database, lambda _instance: b"{}", lambda _instance: FrameTable.empty()
    )
    actor = replace(ACTOR, scope=CASES[1][0])

    with pytest.raises(NotFound):
        bundles.study(actor, "1.4")
    assert bundles.study(actor, "1.2")[0]
