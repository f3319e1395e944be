"""What a record of an access names: the object, its owner, and what was refused."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

import pytest

from tests.gateway.identity.test_tenants import setup_totp
from tests.support.accounts import Browser, Site
from tests.support.datasets import ct_slice, uid
from tests.support.volumes import Phantom

OURS, THEIRS = 1, 2
STUDIES = "/dicom-web/studies"
VIEWER = "/api/v1/viewer"
TICKETS = "/api/v1/tickets"
#: Longer than what is kept of a query.
LONG = "x" * 3000
SERIES = (uid(OURS), uid(OURS, 1))
THEIR_SERIES = f"{STUDIES}/{uid(THEIRS)}/series/{uid(THEIRS, 1)}"
ONE = (*SERIES, uid(OURS, 1, 1))


def named(record: dict[str, Any]) -> tuple[str, ...]:
    names = ("study_uid", "series_uid", "instance_uid")
    return tuple(record[name] for name in names if record[name])


@pytest.fixture
def both(any_site: Site) -> Site:
    any_site.store(ct_slice(seed=OURS))
    any_site.store(ct_slice(seed=THEIRS), tenant="other")
    return any_site


@pytest.fixture
def doctor(both: Site) -> Browser:
    return both.logged_in("wang", "radiologist")


@pytest.mark.parametrize("pad", ["", LONG])
@pytest.mark.parametrize("path", ["render", "prefetch"])
def test_what_the_query_names_is_in_the_record(site: Site, path: str, pad: str) -> None:
    for ds in Phantom().datasets(series=1):
        site.store(ds)
    doctor = site.logged_in("wang", "radiologist")
    query = urlencode({"pad": pad, "study": SERIES[0], "series": SERIES[1]})

    # Of a parameter that comes twice, the routes read the last.
    answer = doctor.post(
        f"{VIEWER}/{path}?study={uid(9)}&{query}", {"kind": "plane", "plane": "axial"}
    )

    assert answer.status in {200, 202}, answer.text
    [record] = site.audit(action="get", actor="wang")
    assert named(record) == SERIES


@pytest.mark.parametrize("pad", ["", LONG])
def test_wado_uri_cannot_hide_what_it_asks_for(
    both: Site, doctor: Browser, pad: str
) -> None:
    query = {
        "pad": pad, "requestType": "WADO", "studyUID": ONE[0], "seriesUID": ONE[1],
        "objectUID": ONE[2],
    }  # fmt: skip

    assert doctor.get(f"/wado?{urlencode(query)}", Accept="*/*").status == 200

    [record] = both.audit(action="get", actor="wang")
    assert named(record) == ONE


@pytest.mark.parametrize(
    ("path", "names"),
    [
        (f"{VIEWER}/series/{SERIES[1]}/frames.bin", SERIES),
        (f"{VIEWER}/series/{SERIES[1]}/frames.bin?study={SERIES[0]}", SERIES),
        (f"{VIEWER}/series/{SERIES[1]}/frames.bin?v={LONG[:60]}", SERIES),
        (f"/api/v1/instances/{ONE[2]}/file", ONE),
    ],
)
def test_a_series_or_an_instance_is_recorded_with_its_study(
    both: Site, doctor: Browser, path: str, names: tuple[str, ...]
) -> None:
    assert doctor.get(path, Accept="*/*").status == 200

    [record] = both.audit(action="get", actor="wang")
    assert named(record) == names
    assert record["object_tenant"] is None


def test_no_other_study_is_named_for_the_frames_of_a_series(
    both: Site, doctor: Browser
) -> None:
    forged = f"{VIEWER}/series/{SERIES[1]}/frames.bin?study={uid(9)}"

    assert doctor.get(forged).status == 404

    [record] = both.audit(action="get", actor="wang")
    assert record["outcome"] == "deny"


@pytest.mark.parametrize(
    "path",
    [
        f"{STUDIES}/{uid(THEIRS)}/metadata",
        f"{THEIR_SERIES}/instances/{uid(THEIRS, 1, 1)}/frames/1",
        f"/api/v1/instances/{uid(THEIRS, 1, 1)}/file",
        f"{VIEWER}/series/{uid(THEIRS, 1)}/frames.bin",
        f"{STUDIES}?StudyInstanceUID={uid(THEIRS)}",
        f"{STUDIES}/{uid(THEIRS)}/series",
    ],
)
def test_an_auditor_sees_what_readers_of_other_institutions_did(
    both: Site, path: str
) -> None:
    both.add("consult", "radiologist", readable=("other",))
    consultant = both.browser()
    consultant.log_in("consult")
    auditor = both.logged_in("shen", "auditor", tenant="other")
    setup_totp(auditor)

    assert consultant.get(path, Accept="*/*").status == 200

    both.node.audit.flush()
    [record] = auditor.get("/api/v1/audit?actor=consult").json()["records"]
    assert record["object_tenant"] == "other"
    if "?" not in path:
        assert record["study_uid"] == uid(THEIRS)


def test_an_own_study_is_nobody_else_s_affair(both: Site) -> None:
    consultant = both.logged_in("consult", "radiologist", readable=("other",))

    assert consultant.get(f"{STUDIES}/{uid(OURS)}/metadata").status == 200

    [record] = both.audit(action="get", actor="consult")
    assert (record["object_tenant"], record["study_uid"]) == (None, uid(OURS))


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "action"),
    [
        ("POST", TICKETS, {"study": uid(THEIRS)}, 404, "ticket"),
        ("POST", TICKETS, {}, 400, "ticket"),
        ("POST", "/api/v1/me/password", {}, 400, "own_account"),
        ("GET", "/api/v1/changes", None, 403, "follow"),
        ("POST", f"/api/v1/studies/{uid(THEIRS)}/settle", None, 403, "settle"),
    ],
)
def test_what_a_service_refuses_is_recorded_once(
    both: Site,
    doctor: Browser,
    method: str,
    path: str,
    body: Any,
    status: int,
    action: str,
) -> None:
    assert doctor.request(method, path, body).status == status

    [record] = both.audit(action=action, actor="wang")
    assert record["outcome"] == ("error" if status == 400 else "deny")
    assert record["source"] == "127.0.0.1"
    assert record["reason"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "action", "object_id"),
    [
        ("PUT", "accounts/guard/roles", {"roles": ["auditor"]}, 403, "grant", "guard"),
        ("PUT", "accounts/li/roles", {"roles": ["auditor"]}, 404, "grant", "li"),
        ("POST", "accounts/li/disable", None, 404, "keep_accounts", "li"),
        (
            "POST",
            "accounts",
            {"name": "x1", "tenant": "other", "roles": ["clinician"]},
            403,
            "keep_accounts",
            None,
        ),
        ("DELETE", "tokens/robot", None, 404, "keep_tokens", "robot"),
    ],
)
def test_refused_attempts_on_accounts_are_recorded(
    both: Site,
    method: str,
    path: str,
    body: Any,
    status: int,
    action: str,
    object_id: str | None,
) -> None:
    both.add("li", "radiologist", tenant="other")
    both.token("robot", "device", tenant="other")
    guard = both.logged_in("guard", "security_administrator")
    setup_totp(guard)

    assert guard.request(method, f"/api/v1/{path}", body).status == status

    [record] = both.audit(action=action, actor="guard")
    assert (record["outcome"], record["object_id"]) == ("deny", object_id)


def test_a_ticket_session_that_tries_to_change_a_password_is_recorded(
    both: Site, doctor: Browser
) -> None:
    ticket = doctor.post(TICKETS, {"study": uid(OURS)}).json()["ticket"]
    browser = both.browser()
    opened = browser.post(f"{TICKETS}/exchange", {"ticket": ticket}).json()
    browser.csrf = opened["csrf"]

    answer = browser.post("/api/v1/me/password", {"old": "a", "new": "b"})

    assert answer.status >= 400
    [record] = both.audit(action="own_account")
    assert record["actor"] == "ticket:wang"
    assert record["outcome"] != "allow"


def test_who_nobody_knows_fills_no_audit(both: Site) -> None:
    for path in (f"{STUDIES}/{uid(OURS)}", "/api/v1/changes", TICKETS):
        assert both.browser().get(path).status == 401
        assert both.browser().post(path, {}).status == 401

    assert not both.audit(outcome="deny")


def test_a_change_is_recorded_before_it_and_once_more_when_it_failed(
    both: Site,
) -> None:
    keeper = both.logged_in("zhao", "archive_manager")
    for study, status in ((OURS, 204), (THEIRS, 404)):
        assert keeper.request("DELETE", f"{STUDIES}/{uid(study)}").status == status

    records = both.audit(action="delete", actor="zhao")
    assert [(one["study_uid"], one["outcome"]) for one in records] == [
        (uid(OURS), "allow"),
        (uid(THEIRS), "allow"),
        (uid(THEIRS), "deny"),
    ]


def test_a_deletion_is_in_the_audit_when_it_begins(
    both: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = both.logged_in("zhao", "archive_manager")
    began: list[int] = []

    def delete(*_arguments: Any, **_options: Any) -> int:
        began.append(len(both.audit(action="delete", outcome="allow")))
        return 1

    monkeypatch.setattr(both.node.deletion, "delete", delete)

    assert keeper.request("DELETE", f"{STUDIES}/{uid(OURS)}").status == 204
    assert began == [1]
