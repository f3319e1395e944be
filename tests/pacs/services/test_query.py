"""The query service: hierarchy of C-FIND, JSON of QIDO-RS, attributes not indexed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from pacs.domain.study import Level, StoredInstance
from pacs.services.query import QueryService, SearchRequest, StudyFilter
from storage.db import migrate
from storage.db.engine import Database
from storage.kernel.errors import CorruptData, InvalidParameter
from storage.kernel.limits import Limits
from storage.kernel.types import Actor, TenantId
from tests.support.populated import Made, populate

Row = dict[str, Any]
ACTOR = Actor(TenantId("default"), "test")
STUDY_UID, SERIES_UID, INSTANCE_UID = 0x0020000D, 0x0020000E, 0x00080018
PATIENT_ID, LEVEL = 0x00100020, 0x00080052
STUDIES = [
    Made(
        uid="1.1",
        patient_id="P1",
        name="Wang^Wei=王^伟=",
        modalities=("CT", "SR"),
        referring='Quote"^\\"00100010":',
        description="CHEST",
    ),
    Made(uid="1.2", patient_id="P2", name="", study_date=None, description=""),
]


class Headers:
    """Stored headers, some of them damaged."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def metadata(self, instance: StoredInstance) -> bytes:
        self.read.append(instance.sop_instance_uid)
        if instance.study_instance_uid == "1.2":
            raise CorruptData("damaged")
        return orjson.dumps(
            {
                "00080070": {"vr": "LO", "Value": ["互影"]},
                "00101010": {"vr": "AS", "Value": ["030Y"]},
                "00180050": {"vr": "DS", "Value": [1.25]},
            }
        )


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    url = f"sqlite:///{tmp_path / 'index.db'}"
    migrate.upgrade(url)
    opened = Database(url)
    populate(opened, STUDIES)
    yield opened
    opened.close()


@pytest.fixture
def headers() -> Headers:
    return Headers()


@pytest.fixture
def query(database: Database, headers: Headers) -> QueryService:
    return QueryService(database=database, limits=Limits(), headers=headers)


@pytest.mark.parametrize(
    ("root", "level", "keys", "named"),
    [
        ("STUDY", Level.PATIENT, {}, "QueryRetrieveLevel"),
        ("WORKLIST", Level.STUDY, {}, "QueryRetrieveLevel"),
        ("PATIENT_STUDY_ONLY", Level.SERIES, {}, "QueryRetrieveLevel"),
        ("PATIENT", Level.STUDY, {}, "PatientID"),
        ("PATIENT", Level.STUDY, {PATIENT_ID: "P*"}, "PatientID"),
        ("STUDY", Level.SERIES, {}, "StudyInstanceUID"),
        ("STUDY", Level.SERIES, {STUDY_UID: ""}, "StudyInstanceUID"),
        ("STUDY", Level.SERIES, {STUDY_UID: "1.1\\1.2"}, "StudyInstanceUID"),
        ("STUDY", Level.IMAGE, {STUDY_UID: "1.1"}, "SeriesInstanceUID"),
        ("PATIENT", Level.SERIES, {STUDY_UID: "1.1"}, "PatientID"),
    ],
)
def test_b19_unique_keys_of_upper_levels_are_required_at_once(
    query: QueryService, root: str, level: Level, keys: dict[int, str], named: str
) -> None:
    with pytest.raises(InvalidParameter) as refusal:
        query.find(ACTOR, level, keys, root=root)

    assert refusal.value.name == named


def test_relational_queries_need_no_upper_keys(query: QueryService) -> None:
    found = query.find(ACTOR, Level.IMAGE, {}, root="PATIENT", relational=True)

    assert len(list(found)) == 6


def test_each_match_has_the_asked_and_the_unique_keys(query: QueryService) -> None:
    keys = {
        LEVEL: "SERIES",
        PATIENT_ID: "P1",
        STUDY_UID: "1.1",
        0x00080060: "CT",
        0x00100010: "",
        0x00080056: "",
        0x00080061: "",
        0x00201209: "",
        0x00400009: "",
        0x00101010: "",
    }

    (match,) = query.find(ACTOR, Level.SERIES, keys, root="PATIENT")

    assert match == {
        PATIENT_ID: "P1",
        STUDY_UID: "1.1",
        SERIES_UID: "1.1.1",
        0x00080060: "CT",
        0x00100010: "Wang^Wei=王^伟=",
        0x00080056: "ONLINE",
        0x00080061: "CT\\SR",
        0x00201209: "2",
        0x00400009: "S1",
    }
    assert match.keys() - {0x00101010} <= query.supported(Level.SERIES)


def test_unknown_dates_and_times_are_empty(query: QueryService) -> None:
    keys = {STUDY_UID: "1.2", 0x00080020: "", 0x00200011: ""}

    (match,) = query.find(ACTOR, Level.STUDY, keys, root="STUDY")

    assert match == {STUDY_UID: "1.2", 0x00080020: ""}


def objects(query: QueryService, level: Level, request: SearchRequest) -> list[Row]:
    found = query.search(ACTOR, level, request)
    assert found.body == b"[" + ",".join(found.rows).encode() + b"]"
    rows: list[Row] = orjson.loads(found.body)
    for row in rows:
        assert list(row) == sorted(row)
    return rows


def value(row: Row, tag: str) -> Any:
    return row[tag]["Value"][0]


def test_a_study_has_the_attributes_of_its_table(query: QueryService) -> None:
    """PS3.18 Table 10.6.3-3."""
    request = SearchRequest(keys={STUDY_UID: "1.1"}, base_url="https://pacs.example")

    (row,) = objects(query, Level.STUDY, request)

    assert value(row, "00081190") == "https://pacs.example/dicom-web/studies/1.1"
    assert row["00080061"] == {"vr": "CS", "Value": ["CT", "SR"]}
    assert row["00201206"] == {"vr": "IS", "Value": [2]}
    assert row["00201208"] == {"vr": "IS", "Value": [4]}
    assert value(row, "00100010") == {"Alphabetic": "Wang^Wei", "Ideographic": "王^伟"}
    assert row["00200010"] == {"vr": "SH"}
    assert value(row, "00080056") == "ONLINE"
    assert value(row, "00080090") == {"Alphabetic": 'Quote"^'}


def test_a_series_names_its_study_and_only_all_series_describe_it(
    query: QueryService,
) -> None:
    """PS3.18 Table 10.6.3-4 and 10.6.3.3.2."""
    of_study = objects(query, Level.SERIES, SearchRequest(study_uid="1.1"))
    of_all = objects(query, Level.SERIES, SearchRequest())

    assert [value(row, "00080060") for row in of_study] == ["CT", "SR"]
    assert value(of_study[0], "0020000D") == "1.1"
    assert value(of_study[0], "00400275")["00400009"]["Value"] == ["S1"]
    assert "00100010" not in of_study[0]
    assert len(of_all) == 3
    assert value(of_all[-1], "00100020") == "P1"
    assert value(of_all[-1], "00201208") == 4
    assert value(of_all[-1], "00081190") == "/dicom-web/studies/1.1/series/1.1.1"


def test_an_instance_has_what_its_resource_leaves_open(query: QueryService) -> None:
    """PS3.18 Table 10.6.3-5 and 10.6.3.3.3."""
    of_series = objects(
        query, Level.IMAGE, SearchRequest(study_uid="1.1", series_uid="1.1.1")
    )
    of_study = objects(query, Level.IMAGE, SearchRequest(study_uid="1.1"))
    of_all = objects(query, Level.IMAGE, SearchRequest())

    assert [value(row, "00200013") for row in of_series] == [1, 2]
    assert value(of_series[0], "00280010") == 512
    assert value(of_series[0], "00081190") == (
        "/dicom-web/studies/1.1/series/1.1.1/instances/1.1.1.1"
    )
    assert "00080060" not in of_series[0]
    assert "00100010" not in of_study[0]
    assert [value(row, "00080060") for row in of_study] == ["CT", "CT", "SR", "SR"]
    assert len(of_all) == 6
    assert value(of_all[-1], "00100020") == "P1"
    assert value(of_all[-1], "00201209") == 2


def test_parents_that_contradict_the_keys_find_nothing(query: QueryService) -> None:
    request = SearchRequest(study_uid="1.1", keys={STUDY_UID: "1.2"})

    assert query.search(ACTOR, Level.SERIES, request).rows == ()
    same = SearchRequest(study_uid="1.1", keys={STUDY_UID: "1.1\\1.2"})
    assert len(query.search(ACTOR, Level.SERIES, same).rows) == 2


def test_all_means_everything_the_index_knows(
    query: QueryService, headers: Headers
) -> None:
    request = SearchRequest(include_all=True, keys={PATIENT_ID: "P1"})

    (row,) = objects(query, Level.STUDY, request)

    assert value(row, "00080062") == "1.2.840.10008.5.1.4.1.1.2"
    assert value(row, "00201200") == 1
    assert headers.read == []


def test_attributes_not_indexed_come_from_one_header_per_row(
    query: QueryService, headers: Headers
) -> None:
    wanted = frozenset({0x00080070, 0x00101010, 0x00180050, 0x00081030})

    rows = objects(query, Level.STUDY, SearchRequest(include=wanted))
    found = query.search(ACTOR, Level.STUDY, SearchRequest(include=wanted))
    (series,) = objects(
        query,
        Level.SERIES,
        SearchRequest(include=wanted, study_uid="1.1", keys={0x00080060: "CT"}),
    )

    assert value(rows[0], "00101010") == "030Y"
    assert "00080070" not in rows[0], "an attribute of series"
    assert "00180050" not in series, "an attribute of instances"
    assert value(series, "00080070") == "互影"
    assert value(series, "00081030") == "CHEST"
    assert "00101010" not in rows[1]
    assert any("could not be read" in text for text in found.warnings)
    assert headers.read == ["1.1.1.1", "1.2.3.1", "1.1.1.1", "1.2.3.1", "1.1.1.1"]


def test_without_headers_the_answer_says_what_it_lacks(database: Database) -> None:
    query = QueryService(database=database, limits=Limits())

    found = query.search(
        ACTOR, Level.STUDY, SearchRequest(include=frozenset({0x00101010}))
    )

    assert len(found.rows) == 2
    assert found.warnings == ("Attributes that are not indexed are not returned.",)


def test_limits_are_capped_and_say_so(database: Database) -> None:
    query = QueryService(database=database, limits=Limits(query_limit=1))

    capped = query.search(ACTOR, Level.STUDY, SearchRequest(limit=10**12, total=True))
    none = query.search(ACTOR, Level.STUDY, SearchRequest(limit=0))

    assert len(capped.rows) == 1
    assert capped.more
    assert capped.total == 2
    assert capped.warnings == (
        "The limit was reduced to 1.",
        "There are additional results that can be requested.",
    )
    assert none.rows == ()
    assert none.more
    assert none.cursor == ""


def test_keys_that_cannot_be_matched_are_named(query: QueryService) -> None:
    keys = {0x00101010: "030Y", 0x00080060: "CT", 0x00091001: "x"}

    found = query.search(ACTOR, Level.STUDY, SearchRequest(keys=keys))

    assert len(found.rows) == 2
    assert [text.split()[2] for text in found.warnings] == [
        "(0008,0060)",
        "(0009,1001)",
        "(0010,1010)",
    ]


def test_a_hostile_base_url_stays_inside_its_string(query: QueryService) -> None:
    request = SearchRequest(base_url='http://x","00100010":{"vr":"')

    (row, _) = objects(query, Level.STUDY, request)

    assert str(value(row, "00081190")).startswith('http://x","0010')


def test_only_studies_can_be_ordered_otherwise(query: QueryService) -> None:
    with pytest.raises(InvalidParameter):
        query.search(ACTOR, Level.SERIES, SearchRequest(order="PatientName"))
    with pytest.raises(InvalidParameter):
        query.search(ACTOR, Level.STUDY, SearchRequest(order="Rows"))


def test_the_study_list_gives_what_a_line_shows(query: QueryService) -> None:
    first, second = query.list_studies(ACTOR, StudyFilter()).studies

    assert first.modalities == ("CT", "SR")
    assert first.size_bytes == 4000
    assert (second.study_date, second.patient_name) == (None, "")


@pytest.mark.parametrize(
    "wanted",
    [
        StudyFilter(text="a b c d e f g h i"),
        StudyFilter(date_from="yesterday"),
        StudyFilter(patient_id="a\0b"),
        StudyFilter(modality="CT\\*"),
        StudyFilter(text="x" * 2000),
    ],
)
def test_the_study_list_refuses_what_it_cannot_read(
    query: QueryService, wanted: StudyFilter
) -> None:
    with pytest.raises(InvalidParameter):
        query.list_studies(ACTOR, wanted)
