"""What cannot be recorded does not happen: nothing leaves, nobody gets in."""

from __future__ import annotations

from typing import NoReturn

import pytest

from gateway.identity.services import NewAccount
from storage.audit.keys import Memory, keyring
from storage.audit.trail import FOLDER as AUDIT
from storage.audit.trail import STREAM
from storage.kernel.errors import DependencyDown
from tests.support.accounts import CLI, PASSWORD, SYSTEM, Site
from tests.support.auditing import verified
from tests.support.datasets import ct_slice, uid

STUDY = f"/dicom-web/studies/{uid(1)}"
FRAME = f"{STUDY}/series/{uid(1, 1)}/instances/{uid(1, 1, 1)}/frames/1"


def down(*_arguments: object) -> NoReturn:
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
    for way in ("record_now", "record_in"):
        monkeypatch.setattr(filled.node.audit, way, down)

    assert filled.browser().log_in("wang").status == 503
    assert filled.browser().log_in("wang", "wrong").status == 503
    browser = filled.browser()
    assert browser.post("/api/v1/tickets/exchange", {"ticket": ticket}).status == 503
    assert not browser.cookies
    assert doctor.post("/api/v1/tickets", {"study": uid(1)}).status == 503
    monkeypatch.undo()
    # It was not used up by the attempt.
    assert browser.post("/api/v1/tickets/exchange", {"ticket": ticket}).status == 200


def kept(site: Site) -> dict[str, list[tuple[object, ...]]]:
    """Return what identity keeps."""
    tables = ("account", "api_token", "session", "launch_ticket", "old_password")
    with site.node.database.read() as connection:
        return {
            table: [
                tuple(row)
                for row in connection.exec_driver_sql(
                    f"SELECT * FROM {table} ORDER BY id"  # noqa: S608
                )
            ]
            for table in tables
        }


def test_what_cannot_be_recorded_does_not_change_anything(
    any_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    any_site.store(ct_slice(seed=1))
    accounts, tokens = any_site.node.identity.accounts, any_site.node.identity.tokens
    doctor = any_site.logged_in("chen", "clinician")
    machine = any_site.token("his", "clinician")
    assert machine.post("/api/v1/tickets", {"study": uid(1)}).status == 201
    new = NewAccount("new", "elsewhere", ("clinician",))
    [secret] = doctor.cookies.values()
    login = any_site.node.identity.sessions.find(secret)
    assert login is not None
    before = kept(any_site)
    monkeypatch.setattr(any_site.node.audit, "record_in", down)

    for change in (
        lambda: accounts.add(SYSTEM, new, CLI),
        lambda: accounts.disable(SYSTEM, "chen", CLI),
        lambda: accounts.enable(SYSTEM, "chen", CLI),
        lambda: accounts.reset_password(SYSTEM, "chen", CLI),
        lambda: accounts.reset_totp(SYSTEM, "chen", CLI),
        lambda: accounts.set_roles(SYSTEM, "chen", ["reviewer"], CLI),
        lambda: tokens.add(SYSTEM, new, CLI),
        lambda: tokens.revoke(SYSTEM, "his", CLI),
        lambda: any_site.node.identity.logins.begin_totp(login, CLI),
        lambda: any_site.node.identity.logins.change_password(
            login, PASSWORD, "Other#horse-8", CLI
        ),
    ):
        with pytest.raises(DependencyDown):
            change()

        assert kept(any_site) == before


def test_a_change_is_in_the_chain_it_commits_with(any_site: Site) -> None:
    any_site.add("chen", "clinician")
    any_site.node.identity.accounts.disable(SYSTEM, "chen", CLI)
    node = any_site.node
    folder = node.settings.data / AUDIT
    assert verified(node.database, folder).is_clean

    # Nor can it be cut off again: how far the chain is, is known outside too.
    seen = Memory(folder, STREAM, keyring(folder).own).read()

    with node.database.read() as connection:
        last = connection.exec_driver_sql("SELECT max(sequence) FROM audit_record")
        assert seen is not None
        assert seen.sequence == last.scalar()


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
