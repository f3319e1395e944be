"""``GET /api/v1/audit`` on a closed node: who may, what is found, in which pages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from gateway.audit import ACTIONS, instant
from storage.audit import AuditEvent, Outcome
from storage.kernel.errors import InvalidParameter
from storage.kernel.types import TenantId
from tests.support.accounts import Browser, Site, closed_site, with_identity
from tests.support.datasets import ct_slice

AUDIT = "/api/v1/audit"
#: 2026-01-31T08:30:00Z.
THEN = 1_769_848_200_000_000
ROLES = (
    "administrator", "security_administrator", "archive_manager", "radiologist",
    "reviewer", "clinician", "device",
)  # fmt: skip


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    one_factor = with_identity(second_factor=frozenset())
    with closed_site(tmp_path / "data", identity=one_factor) as made:
        yield made


@pytest.fixture
def auditor(site: Site) -> Browser:
    return site.logged_in("shen", "auditor")


def put(site: Site, number: int, **fields: object) -> None:
    made = {"action": "get", "actor": f"doctor-{number}", **fields}
    site.node.audit.record_now(
        AuditEvent(time_us=THEN + number, **made)  # type: ignore[arg-type]
    )


def test_an_auditor_reads_and_is_recorded_himself(site: Site, auditor: Browser) -> None:
    put(site, 1, study_uid="1.2.3", patient_id="P1", outcome=Outcome.DENY, reason="no")

    answer = auditor.get(f"{AUDIT}?study=1.2.3&patient=P1&outcome=deny&actor=doctor-1")

    assert answer.status == 200
    assert answer.headers["cache-control"] == "no-store"
    [record] = answer.json()["records"]
    assert record["reason"] == "no"
    assert record["time"] == "2026-01-31T08:30:00.000001Z"
    assert answer.json()["next"] is None
    [read] = site.audit(action="read_audit")
    assert read["actor"] == "shen"
    assert "study=1.2.3" in read["detail"]


@pytest.mark.parametrize("role", ROLES)
def test_no_other_role_reads_it_and_the_attempt_is_recorded(
    site: Site, role: str
) -> None:
    browser = site.token("other", role) if role == "device" else None
    browser = browser or site.logged_in("other", role)

    assert browser.get(AUDIT).status == 403

    [attempt] = site.audit(action="read_audit")
    assert attempt["actor"].endswith("other")
    assert attempt["outcome"] == "deny"


def test_nobody_reads_it_without_a_login(site: Site) -> None:
    assert site.browser().get(AUDIT).status == 401


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_there_is_no_way_to_change_it(
    site: Site, auditor: Browser, method: str
) -> None:
    put(site, 1)

    assert auditor.request(method, AUDIT, {}).status in {404, 405}

    assert site.audit(actor="doctor-1")


def test_an_auditor_sees_the_own_institution_only(site: Site, auditor: Browser) -> None:
    put(site, 1, tenant=TenantId("city"))
    put(site, 2, tenant=TenantId("city"), object_tenant="default")

    found = auditor.get(f"{AUDIT}?until=2026-02-01").json()["records"]

    assert [record["actor"] for record in found] == ["doctor-2"]


def test_a_patient_is_found_by_the_studies_that_accesses_name(
    site: Site, auditor: Browser
) -> None:
    for seed, patient in ((1, "P1"), (2, "P1"), (3, "P2")):
        ds = ct_slice(seed=seed)
        ds.PatientID = patient
        site.store(ds)
    doctor = site.logged_in("wang", "radiologist")
    uids = [str(ct_slice(seed=seed).StudyInstanceUID) for seed in (1, 2, 3)]
    for uid in uids:
        assert doctor.get(f"/dicom-web/studies/{uid}/metadata").status == 200
    put(site, 1, patient_id="P1", actor="wang")
    site.node.audit.flush()

    def found(query: str) -> list[str]:
        body = auditor.get(f"{AUDIT}?actor=wang&{query}").json()
        return [one["study_uid"] for one in body["records"] if one["action"] == "get"]

    assert found("patient=P1") == [uids[1], uids[0], ""]
    assert found("patient=P2") == [uids[2]]
    assert found(f"patient=P1&study={uids[0]}") == [uids[0]]
    assert found(f"patient=P2&study={uids[0]}") == []
    assert found("patient=P3") == []


def test_pages_follow_each_other(site: Site, auditor: Browser) -> None:
    for number in range(7):
        put(site, number)
    found: list[str] = []
    cursor = ""
    while True:
        path = f"{AUDIT}?limit=3&until=2026-02-01{cursor}"
        body = auditor.get(path).json()
        found += [record["actor"] for record in body["records"]]
        if body["next"] is None:
            break
        cursor = f"&cursor={body['next']}"

    assert found == [f"doctor-{number}" for number in reversed(range(7))]


def test_times_are_dates_or_instants(site: Site, auditor: Browser) -> None:
    put(site, 0)

    def count(**query: str) -> int:
        text = "&".join(f"{name}={quote(value)}" for name, value in query.items())
        records = auditor.get(f"{AUDIT}?actor=doctor-0&{text}").json()["records"]
        return len(records)

    assert count(since="2026-01-31", until="2026-01-31") == 1
    assert count(since="2026-01-31T16:30:00+08:00") == 1
    assert count(since="2026-01-31T08:30:00.000001Z") == 0
    assert count(until="2026-01-31T08:29:59.999999Z") == 0
    assert count(until="2026-01-30") == 0


@pytest.mark.parametrize(
    "query",
    [
        "since=yesterday", "until=2026-13-01", "since=2026-02-30", "since=now%00",
        "until=2026-01-31T25:00:00Z", "since=%EF%BC%92026-01-31", "outcome=maybe",
        "limit=0", "limit=x", "limit=-1", "cursor=x", "cursor=1-2-3",
        "cursor=" + "9" * 65, "actor=" + "x" * 129,
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_a_bad_request(auditor: Browser, query: str) -> None:
    answer = auditor.get(f"{AUDIT}?{query}")

    assert answer.status == 400
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("year", ["0001", "9999"])
def test_times_far_away_find_nothing_or_all(auditor: Browser, year: str) -> None:
    path = f"{AUDIT}?actor=nobody&since={year}-01-01T00:00:00%2B23:59"

    assert auditor.get(path).json() == {"records": [], "next": None}


def test_a_forged_name_is_one_record_that_tells_it(
    site: Site, auditor: Browser
) -> None:
    name = 'eve\n{"action":"login","actor":"root"}\r\x1b[2J\u202e'
    site.browser().log_in(name, "Wrong#horse-7")

    [attempt] = [
        record
        for record in auditor.get(f"{AUDIT}?outcome=deny").json()["records"]
        if record["actor"].startswith("eve")
    ]

    assert attempt["actor"].isprintable()
    assert "\n" not in attempt["actor"]


def test_it_fails_closed_where_it_cannot_be_recorded(
    site: Site, auditor: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site.node.audit, "_behind_since", 0.0)

    assert auditor.get(AUDIT).status == 503
    ready = site.browser().get("/readyz")
    assert ready.status == 503
    assert "audit" in ready.text


def test_instants_keep_their_microseconds() -> None:
    assert instant("since", "") is None
    assert instant("since", "2026-01-31T08:30:00.000001Z") == THEN + 1
    assert instant("since", "1969-12-31T23:59:59.999999Z") == -1
    with pytest.raises(InvalidParameter, match="since"):
        instant("since", "2026-1-31")


#: Functions that are given the name of what is recorded.
_NAMING = {
    "AuditEvent", "_changing", "_event", "_record", "_refuse", "command_event", "note",
    "record", "refusals", "refuse", "replace",
}  # fmt: skip


def names_in(source: str) -> Iterator[str]:
    """Yield the dotted names that calls in `source` record, and ``action=``."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = getattr(function, "attr", getattr(function, "id", ""))
        if name not in _NAMING:
            continue
        given = [one for one in node.args if isinstance(one, ast.Constant)]
        for one in given:
            if isinstance(one.value, str) and re.fullmatch(
                r"[a-z]+\.[a-z_]+", one.value
            ):
                yield one.value
        for keyword in node.keywords:
            if keyword.arg == "action" and isinstance(keyword.value, ast.Constant):
                yield str(keyword.value.value)


def test_every_action_that_is_recorded_is_known() -> None:
    root = Path(__file__).parents[2]
    sources = [
        path.read_text("utf-8")
        for package in ("ai", "gateway", "pacs", "storage", "viewer", "xds")
        for path in (root / package).rglob("*.py")
    ]

    named = {name for source in sources for name in names_in(source)}

    assert {"account.add", "audit.verify", "forward.end", "associate"} <= named
    assert named <= ACTIONS


def test_an_unknown_action_is_refused(auditor: Browser) -> None:
    answer = auditor.get(f"{AUDIT}?action=reed")

    assert answer.status == 400
    assert "reed is none of account.add" in answer.text
    assert auditor.get(f"{AUDIT}?action=peer.change").status == 200
