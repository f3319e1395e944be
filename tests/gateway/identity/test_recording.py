"""What cannot be recorded does not happen: nothing leaves, nobody gets in."""

from __future__ import annotations

from typing import NoReturn

import pytest

from storage.audit import AuditEvent
from storage.kernel.errors import DependencyDown
from tests.support.accounts import CLI, SYSTEM, Site
from tests.support.datasets import ct_slice, uid

STUDY = f"/dicom-web/studies/{uid(1)}"
FRAME = f"{STUDY}/series/{uid(1, 1)}/instances/{uid(1, 1, 1)}/frames/1"


def down(_event: AuditEvent) -> NoReturn:
    raise DependencyDown("audit: too many accesses wait to be written")


@pytest.fixture
def filled(site: Site) -> Site:
    site.store(ct_slice(seed=1))
    return site


def test_no_byte_of_a_study_leaves_unrecorded(
    filled: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    doctor = filled.logged_in("chen", "clinician")
    monkeypatch.setattr(filled.node.audit, "record", down)

    for path in (FRAME, f"{STUDY}/metadata", "/dicom-web/studies", STUDY):
        answer = doctor.request("GET", path, None, {"Accept": "*/*"})

        assert answer.status == 503, path
        assert answer.headers["content-type"] == "application/problem+json"
        assert len(answer.body) < 400
        assert "retry-after" in answer.headers
    # What says nothing of patients goes on.
    assert doctor.get("/api/v1/me").status == 200


def test_nobody_gets_in_unrecorded(
    filled: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled.add("wang", "radiologist")
    doctor = filled.logged_in("chen", "clinician")
    ticket = doctor.post("/api/v1/tickets", {"study": uid(1)}).json()["ticket"]
    monkeypatch.setattr(filled.node.audit, "record_now", down)

    assert filled.browser().log_in("wang").status == 503
    assert filled.browser().log_in("wang", "wrong").status == 503
    browser = filled.browser()
    assert browser.post("/api/v1/tickets/exchange", {"ticket": ticket}).status == 503
    assert not browser.cookies
    assert doctor.post("/api/v1/tickets", {"study": uid(1)}).status == 503
    with pytest.raises(DependencyDown):
        filled.node.identity.accounts.reset_password(SYSTEM, "wang", CLI)


def test_what_is_refused_stays_refused_without_a_record(
    filled: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    doctor = filled.logged_in("chen", "clinician")
    monkeypatch.setattr(filled.node.audit, "record_now", down)

    assert doctor.get("/api/v1/peers").status == 503
    assert doctor.request("DELETE", STUDY).status == 503
    monkeypatch.undo()
    assert doctor.get(f"{STUDY}/metadata").status == 200


def test_a_request_is_found_by_its_number(filled: Site) -> None:
    doctor = filled.logged_in("chen", "clinician")

    answer = doctor.get(f"{STUDY}/series/9.9/metadata")

    [record] = filled.audit(action="get", outcome="deny")
    assert record["request_id"] == answer.headers["x-request-id"]
    assert record["series_uid"] == "9.9"
