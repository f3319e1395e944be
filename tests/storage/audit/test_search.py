"""Searching the audit: filters, tenants, pages, and the export."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import orjson
import pytest

from storage.audit import AuditEvent, AuditTrail, Outcome
from storage.audit.chain import CONTENT
from storage.audit.search import AuditQuery, AuditReader, as_json, as_line
from storage.db.engine import Database
from storage.kernel.errors import InvalidParameter
from storage.kernel.types import Actor, TenantId

CITY = TenantId("city")
TOWN = TenantId("town")
AUDITOR = Actor(CITY, "auditor")


@pytest.fixture
def reader(database: Database) -> AuditReader:
    return AuditReader(database)


def put(trail: AuditTrail, at: int, **fields: object) -> None:
    made = {"action": "get", "actor": "li", "tenant": CITY, **fields}
    trail.record_now(AuditEvent(time_us=at, **made))  # type: ignore[arg-type]


def times(
    reader: AuditReader, asking: Actor | None = AUDITOR, /, **fields: object
) -> list[int]:
    query = AuditQuery(**fields)  # type: ignore[arg-type]
    return [row.time_us for row in reader.search(asking, query, 100).records]


@pytest.fixture
def filled(trail: AuditTrail) -> None:
    put(trail, 10, patient_id="P1", study_uid="1.1")
    put(trail, 20, actor="wang", action="find")
    put(trail, 30, outcome=Outcome.DENY, patient_id="P1", study_uid="1.2")
    put(trail, 40, outcome=Outcome.ERROR, actor="wang", study_uid="1.1")
    put(trail, 50, action="login", object_kind="account", object_id="li")


@pytest.mark.usefixtures("filled")
class TestFilters:
    @pytest.mark.parametrize(
        ("fields", "found"),
        [
            ({}, [50, 40, 30, 20, 10]),
            ({"actor": "wang"}, [40, 20]),
            ({"actor": "nobody"}, []),
            ({"actor": "w"}, []),
            ({"patient_id": "P1"}, [30, 10]),
            ({"study_uid": "1.1"}, [40, 10]),
            ({"study_uid": "1.1", "actor": "li"}, [10]),
            ({"study_uid": "1.2", "patient_id": "P1", "actor": "li"}, [30]),
            ({"outcome": Outcome.DENY}, [30]),
            ({"outcome": Outcome.ERROR}, [40]),
            ({"outcome": Outcome.ALLOW}, [50, 20, 10]),
            ({"outcome": Outcome.DENY, "actor": "wang"}, []),
            ({"action": "find"}, [20]),
            ({"action": "get", "outcome": Outcome.ALLOW}, [10]),
            ({"since_us": 30}, [50, 40, 30]),
            ({"until_us": 30}, [30, 20, 10]),
            ({"since_us": 20, "until_us": 40, "actor": "wang"}, [40, 20]),
            ({"since_us": 31, "until_us": 39}, []),
        ],
        ids=str,
    )
    def test_all_must_match(
        self, reader: AuditReader, fields: dict[str, object], found: list[int]
    ) -> None:
        assert times(reader, **fields) == found
        assert times(reader, None, **fields) == found


@pytest.mark.usefixtures("filled")
def test_a_patient_is_found_by_the_record_or_by_the_study(reader: AuditReader) -> None:
    def found(*studies: str, **fields: object) -> list[int]:
        return times(reader, patient_id="P1", studies=studies, **fields)

    assert found() == [30, 10]
    assert found("1.1", "1.9") == [40, 30, 10]
    assert found("1.1", study_uid="1.2") == [30]
    assert found("1.1", actor="wang") == [40]
    assert found("1.1", outcome=Outcome.DENY) == [30]


class TestTenants:
    @pytest.fixture(autouse=True)
    def _filled(self, trail: AuditTrail) -> None:
        put(trail, 10)
        put(trail, 20, tenant=TOWN)
        put(trail, 30, tenant=TOWN, object_tenant="city")
        put(trail, 40, object_tenant="town")
        put(trail, 50, tenant=TenantId("other"))

    def test_one_sees_its_accesses_and_those_to_its_objects(
        self, reader: AuditReader
    ) -> None:
        assert times(reader) == [40, 30, 10]
        assert times(reader, Actor(TOWN, "auditor")) == [40, 30, 20]
        assert times(reader, Actor(TenantId("none"), "auditor")) == []

    def test_a_filter_does_not_widen_what_is_seen(self, reader: AuditReader) -> None:
        assert times(reader, Actor(TOWN, "auditor"), actor="li") == [40, 30, 20]

    def test_granted_tenants_are_seen_too_and_nothing_twice(
        self, reader: AuditReader
    ) -> None:
        both = Actor(CITY, "auditor", readable=frozenset({TOWN}))

        assert times(reader, both) == [40, 30, 20, 10]

    def test_many_tenants_are_seen_as_well(self, reader: AuditReader) -> None:
        many = frozenset(TenantId(f"t{n}") for n in range(20)) | {TOWN}

        assert times(reader, Actor(CITY, "auditor", readable=many)) == [40, 30, 20, 10]

    def test_the_node_itself_sees_all(self, reader: AuditReader) -> None:
        assert times(reader, None) == [50, 40, 30, 20, 10]


def pages(
    reader: AuditReader, actor: Actor | None, query: AuditQuery, limit: int
) -> Iterator[list[int]]:
    cursor = None
    while True:
        page = reader.search(actor, query, limit, cursor)
        yield [row.time_us for row in page.records]
        cursor = page.next
        if cursor is None:
            return


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 100])
@pytest.mark.parametrize("readable", [frozenset(), frozenset({TOWN})], ids=len)
def test_pages_together_are_the_whole(
    trail: AuditTrail, reader: AuditReader, limit: int, readable: frozenset[TenantId]
) -> None:
    instants = [10, 20, 20, 20, 30, 40, 50]
    for at in instants:
        put(trail, at, object_tenant="town" if at == 20 else "")

    found = list(
        pages(reader, Actor(CITY, "auditor", readable=readable), AuditQuery(), limit)
    )

    assert [at for page in found for at in page] == instants[::-1]
    assert all(len(page) <= limit for page in found)


def test_a_search_in_vain_ends_and_can_be_continued(
    trail: AuditTrail, reader: AuditReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.audit.search.SCAN", 3)
    put(trail, 10, action="delete")
    for at in range(20, 30):
        put(trail, at)

    found = list(pages(reader, AUDITOR, AuditQuery(action="delete"), 100))

    assert found[:3] == [[], [], []]
    assert [at for page in found for at in page] == [10]


def test_what_is_added_between_pages_does_not_move_them(
    trail: AuditTrail, reader: AuditReader
) -> None:
    for at in (10, 20, 30):
        put(trail, at)
    first = reader.search(AUDITOR, AuditQuery(), 2)
    put(trail, 40)

    second = reader.search(AUDITOR, AuditQuery(), 2, first.next)

    assert [row.time_us for row in second.records] == [10]


@pytest.mark.parametrize(
    "cursor",
    ["", "-", "1", "1-", "-1", "a-b", "1-2-3", "٣-٤", "9" * 30 + "-1", "1-" + "9" * 30],
)
def test_a_cursor_of_others_is_refused(reader: AuditReader, cursor: str) -> None:
    with pytest.raises(InvalidParameter, match="cursor"):
        reader.search(AUDITOR, AuditQuery(), 10, cursor)


def test_a_page_has_a_greatest_length(
    trail: AuditTrail, reader: AuditReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.audit.search.MAX_PAGE", 2)
    for at in (10, 20, 30):
        put(trail, at)

    assert len(reader.search(AUDITOR, AuditQuery(), 10**9).records) == 2


def test_a_record_is_read_as_it_was_written(
    trail: AuditTrail, reader: AuditReader
) -> None:
    event = AuditEvent(
        action="account.change",
        actor="王芳",
        tenant=CITY,
        roles=("radiologist", "auditor"),
        session="s-1",
        source="2001:db8::1",
        door="web",
        object_kind="account",
        object_id="li",
        purpose="operation",
        request_id="r-1",
        detail={"field": "roles", "n": 2},
        before=b"\1" * 32,
        after=b"\2" * 32,
        time_us=1_769_848_200_000_001,
    )
    trail.record_now(event)

    record = as_json(reader.search(AUDITOR, AuditQuery(), 1).records[0])

    assert record["time"] == "2026-01-31T08:30:00.000001Z"
    assert record["roles"] == ["auditor", "radiologist"]
    assert record["detail"] == {"field": "roles", "n": 2}
    assert record["before"] == "01" * 32
    assert record["study_uid"] == ""
    for name in ("actor", "action", "tenant", "session", "source", "door", "purpose"):
        assert record[name] == getattr(event, name)


def test_anybody_can_follow_the_hashes_of_an_export(
    trail: AuditTrail, reader: AuditReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing but JSON and SHA-256, as the documentation says."""
    monkeypatch.setattr("storage.audit.search.EXPORT_CHUNK", 2)
    for at in (10, 20, 30, 40, 50):
        put(trail, at, actor="王芳", detail={"q": '"\n'}, before=b"\1" * 32)

    lines = [orjson.loads(as_line(row)) for row in reader.export()]

    previous = bytes(32)
    for number, line in enumerate(lines, 1):
        assert line["sequence"] == number
        content = orjson.dumps([line[name] for name in CONTENT])
        previous = hashlib.sha256(previous + content).digest()
        assert line["hash"] == previous.hex()
    assert len(lines) == 5


@pytest.mark.parametrize(
    ("first", "last", "found"),
    [
        (1, None, [1, 2, 3]),
        (2, None, [2, 3]),
        (2, 2, [2]),
        (1, 9, [1, 2, 3]),
        (4, 9, []),
    ],
)
def test_a_part_can_be_exported(
    trail: AuditTrail,
    reader: AuditReader,
    first: int,
    last: int | None,
    found: list[int],
) -> None:
    for at in (10, 20, 30):
        put(trail, at)

    assert [row.sequence for row in reader.export(first, last)] == found
