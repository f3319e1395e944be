"""Launch tickets: for one thing, for a short time, once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text

from gateway.identity.tickets import WantedTicket
from storage.kernel.errors import NotAuthenticated
from storage.kernel.types import PatientKey
from tests.support.accounts import (
    CLI,
    SYSTEM,
    Browser,
    Site,
    closed_site,
    with_identity,
)
from tests.support.datasets import ct_slice, uid
from tests.support.web import Response

TICKETS = "/api/v1/tickets"
EXCHANGE = "/api/v1/tickets/exchange"
STUDIES = "/dicom-web/studies"


def fill(site: Site) -> None:
    """Two studies of one patient, one of another, and one of another institution."""
    site.store(ct_slice(seed=1))
    site.store(ct_slice(seed=2, PatientID="PID1"))
    site.store(ct_slice(seed=3))
    site.store(ct_slice(seed=4), tenant="other")


def exchange(site: Site, ticket: str) -> tuple[Browser, Response]:
    browser = site.browser()
    return browser, browser.post(EXCHANGE, {"ticket": ticket})


def seen(browser: Browser) -> set[str]:
    answer = browser.get(STUDIES)
    if answer.status == 204:
        return set()
    return {row["0020000D"]["Value"][0] for row in answer.json()}


def test_a_study_s_ticket_opens_that_study(any_site: Site) -> None:
    fill(any_site)
    doctor = any_site.logged_in("chen", "clinician")

    issued = doctor.post(TICKETS, {"study": uid(1)})
    assert issued.status == 201, issued.text
    browser, answer = exchange(any_site, issued.json()["ticket"])

    assert answer.status == 200
    assert answer.json()["studies"] == [uid(1)]
    assert answer.json()["purpose"] == "treatment"
    assert seen(browser) == {uid(1)}
    assert browser.get(f"{STUDIES}/{uid(1)}/metadata").status == 200
    for other in (2, 3, 4, 404):
        assert browser.get(f"{STUDIES}/{uid(other)}/metadata").status == 404
        assert browser.get(f"{STUDIES}/{uid(other)}").status == 404
    listed = browser.get("/api/v1/study-list").json()["studies"]
    assert [one["study_instance_uid"] for one in listed] == [uid(1)]


def test_a_patient_s_ticket_opens_all_the_patient_has_here(site: Site) -> None:
    fill(site)
    machine = site.token("his", "clinician")

    issued = machine.post(TICKETS, {"patient_id": "PID1", "purpose": "treatment"})
    browser, answer = exchange(site, issued.json()["ticket"])

    assert answer.json()["patients"] == ["PID1"]
    assert seen(browser) == {uid(1), uid(2)}
    # What arrives later is the patient's too.
    site.store(ct_slice(seed=5, PatientID="PID1"))
    assert seen(browser) == {uid(1), uid(2), uid(5)}


def test_a_ticket_in_an_address_becomes_a_cookie_and_goes(site: Site) -> None:
    fill(site)
    doctor = site.logged_in("chen", "clinician")
    url = doctor.post(TICKETS, {"study": uid(1)}).json()["url"]
    browser = site.browser()
    # A link that is only looked at does not use the ticket up.
    assert browser.request("HEAD", url).status == 401

    answer = browser.get(url)

    assert answer.status == 303
    assert answer.headers["location"] == "/"
    assert "no-store" in answer.headers["cache-control"]
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert seen(browser) == {uid(1)}
    assert browser.get("/").status == 200
    assert browser.get("/viewer").status == 303


def test_a_spent_ticket_leads_on_where_its_study_is_open_already(site: Site) -> None:
    fill(site)
    doctor = site.logged_in("chen", "clinician")
    url = doctor.post(TICKETS, {"study": uid(1)}).json()["url"]
    other = doctor.post(TICKETS, {"study": uid(2)}).json()["url"]
    browser = site.browser()
    assert browser.get(url).status == 303

    again = browser.get(url)

    assert again.status == 303
    assert again.headers["location"] == "/"
    assert "set-cookie" not in again.headers
    assert doctor.get(url).status == 303
    assert site.audit(action="ticket.exchange", outcome="deny") == []
    # Neither strangers, nor the sessions of other tickets, nor who has no patients.
    assert site.browser().get(url).status == 401
    elsewhere = site.browser()
    assert elsewhere.get(other).status == 303
    assert elsewhere.get(url).status == 401
    keeper = site.logged_in("zhao", "archive_manager", tenant="elsewhere")
    assert keeper.get(url).status == 401


def test_browsers_without_a_session_get_the_login_page(site: Site) -> None:
    for path in ("/viewer", "/viewer/", "/viewer?ticket=forged"):
        shown = site.browser().get(path, Accept="text/html", Sec_Fetch_Mode="navigate")
        assert shown.status == 401
        assert shown.headers["content-type"].startswith("text/html")
        told = site.browser().get(path)
        assert told.status == 401
        assert told.json()["code"] == "not_authenticated"


def test_a_page_is_told_what_it_need_not_offer(site: Site) -> None:
    fill(site)
    doctor = site.logged_in("chen", "clinician")
    guest = site.browser()
    guest.get(doctor.post(TICKETS, {"study": uid(1)}).json()["url"])
    manager = site.logged_in("zhao", "archive_manager")

    may = guest.get("/api/v1/me").json()["may"]
    assert "find" in may
    assert "measure" not in may
    assert {"find", "measure", "delete"} <= set(manager.get("/api/v1/me").json()["may"])


def test_a_ticket_can_become_a_bearer_token(site: Site) -> None:
    fill(site)
    ticket = site.token("his", "clinician").post(TICKETS, {"study": uid(1)}).json()

    answer = site.browser().post(EXCHANGE, {"ticket": ticket["ticket"], "as": "bearer"})

    assert "set-cookie" not in answer.headers
    bearer = site.browser(Authorization=f"Bearer {answer.json()['token']}")
    assert seen(bearer) == {uid(1)}


def test_a_ticket_opens_nothing_else(site: Site) -> None:
    fill(site)
    doctor = site.logged_in("chen", "clinician", "archive_manager")
    ticket = doctor.post(TICKETS, {"study": uid(1)}).json()["ticket"]
    browser, answer = exchange(site, ticket)
    browser.csrf = answer.json()["csrf"]

    for method, path in (
        ("GET", "/api/v1/changes"),
        ("GET", "/api/v1/activity"),
        ("GET", "/api/v1/peers"),
        ("GET", "/api/v1/accounts"),
        ("GET", "/api/v1/audit"),
        ("GET", "/api/v1/node"),
        ("POST", TICKETS),
        ("POST", STUDIES),
        ("POST", f"/api/v1/studies/{uid(1)}/settle"),
        ("DELETE", f"{STUDIES}/{uid(1)}"),
    ):
        assert browser.request(method, path, {}).status == 403, (method, path)
    assert (
        browser.post("/api/v1/me/password", {"present": "x", "password": "y"}).status
        == 403
    )
    assert browser.get("/api/v1/me").json()["kind"] == "ticket"
    assert browser.post("/api/v1/logout").status == 204
    assert seen_status(browser) == 401


def seen_status(browser: Browser) -> int:
    return browser.get(STUDIES).status


def test_a_ticket_is_good_once(any_site: Site) -> None:
    fill(any_site)
    doctor = any_site.logged_in("chen", "clinician")
    ticket = doctor.post(TICKETS, {"study": uid(1)}).json()
    statuses: list[int] = []

    def use() -> None:
        statuses.append(exchange(any_site, ticket["ticket"])[1].status)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(statuses) == [200] + [401] * 7
    assert any_site.browser().get(f"/viewer?ticket={ticket['ticket']}").status == 401
    refused = any_site.audit(action="ticket.exchange", outcome="deny")
    assert {one["reason"] for one in refused} == {"used before"}
    assert {one["object_id"] for one in refused} == {ticket["id"]}


@pytest.mark.parametrize(
    "ticket",
    ["x", "A" * 43, "é" * 43, "../../etc/passwd", "' OR 1=1 --", "\n", "0" * 128],
)
def test_a_forged_ticket_is_refused_and_recorded(site: Site, ticket: str) -> None:
    browser, answer = exchange(site, ticket)

    assert answer.status == 401
    assert answer.json()["detail"] == "the ticket is not good, or no longer"
    assert not browser.cookies
    [record] = site.audit(action="ticket.exchange", outcome="deny")
    assert record["reason"] == "forged"


def test_a_ticket_that_was_changed_is_forged(site: Site) -> None:
    fill(site)
    doctor = site.logged_in("chen", "clinician")
    ticket = doctor.post(TICKETS, {"study": uid(1)}).json()["ticket"]
    flipped = ticket[:-1] + ("A" if ticket[-1] != "A" else "B")

    assert exchange(site, flipped)[1].status == 401
    assert exchange(site, ticket.swapcase())[1].status == 401
    assert exchange(site, ticket)[1].status == 200


def test_an_expired_ticket_is_refused(tmp_path: Path) -> None:
    with closed_site(
        tmp_path / "data", identity=with_identity(ticket_seconds=0.2)
    ) as site:
        fill(site)
        doctor = site.logged_in("chen", "clinician")
        ticket = doctor.post(TICKETS, {"study": uid(1)}).json()["ticket"]
        threading.Event().wait(0.3)

        assert exchange(site, ticket)[1].status == 401
        [record] = site.audit(action="ticket.exchange", outcome="deny")
        assert record["reason"] == "expired"


def test_what_a_ticket_opened_ends(tmp_path: Path) -> None:
    settings = with_identity(ticket_minutes=1.4 / 60)
    with closed_site(tmp_path / "data", identity=settings) as site:
        fill(site)
        doctor = site.logged_in("chen", "clinician")
        ticket = doctor.post(TICKETS, {"study": uid(1)}).json()["ticket"]
        browser, _ = exchange(site, ticket)
        assert seen(browser) == {uid(1)}
        threading.Event().wait(1.5)
        site.node.identity.sessions.forget()

        assert seen_status(browser) == 401


@pytest.mark.parametrize("role", ["reviewer", "archive_manager", "device"])
def test_who_may_not_give_out_tickets(site: Site, role: str) -> None:
    fill(site)

    answer = site.token("machine", role).post(TICKETS, {"study": uid(1)})

    assert answer.status == 403
    [record] = site.audit(action="ticket", outcome="deny")
    assert record["actor"] == "token:machine"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"study": uid(4)}, 404),  # of another institution
        ({"study": uid(404)}, 404),
        ({"patient_id": "PID4"}, 404),
        ({"patient_id": "PID1", "issuer": "elsewhere"}, 404),
        ({"patient_id": "PID%"}, 404),
        ({}, 400),
        ({"study": uid(1), "patient_id": "PID1"}, 400),
        ({"study": uid(1), "purpose": "curiosity"}, 400),
        ({"study": uid(1), "purpose": "quality"}, 403),
        ({"study": uid(1), "scope": "everything"}, 400),
        ({"study": [uid(1)]}, 400),
    ],
)
def test_a_ticket_is_for_what_its_issuer_sees_and_why(
    site: Site, body: dict[str, object], status: int
) -> None:
    fill(site)
    doctor = site.logged_in("chen", "clinician")

    assert doctor.post(TICKETS, body).status == status


def test_a_granted_institution_s_study_can_be_in_a_ticket(site: Site) -> None:
    fill(site)
    doctor = site.logged_in("chen", "radiologist", readable=("other",))
    ticket = doctor.post(TICKETS, {"study": uid(4)}).json()["ticket"]

    browser, _ = exchange(site, ticket)

    assert seen(browser) == {uid(4)}


def test_two_patients_with_one_id_need_the_issuer(site: Site) -> None:
    site.store(ct_slice(seed=1, IssuerOfPatientID="H1"))
    site.store(ct_slice(seed=2, PatientID="PID1", IssuerOfPatientID="H2"))
    doctor = site.logged_in("chen", "clinician")

    vague = doctor.post(TICKETS, {"patient_id": "PID1"})
    assert vague.status == 400
    assert "issuer" in vague.json()["detail"]

    exact = doctor.post(TICKETS, {"patient_id": "PID1", "issuer": "H2"}).json()
    assert seen(exchange(site, exact["ticket"])[0]) == {uid(2)}


def test_a_ticket_ends_with_its_issuer(site: Site) -> None:
    fill(site)
    doctor, machine = (
        site.logged_in("chen", "clinician"),
        site.token("his", "clinician"),
    )
    tickets = [
        one.post(TICKETS, {"study": uid(1)}).json()["ticket"]
        for one in (doctor, doctor, machine, machine)
    ]
    by_doctor, by_machine = (exchange(site, one)[0] for one in tickets[::2])
    assert seen(by_doctor) == seen(by_machine) == {uid(1)}

    site.node.identity.accounts.disable(SYSTEM, "chen", CLI)
    site.node.identity.tokens.revoke(SYSTEM, "his", CLI)

    assert [seen_status(one) for one in (by_doctor, by_machine)] == [401, 401]
    assert [exchange(site, one)[1].status for one in tickets[1::2]] == [401, 401]


def _take_roles(site: Site) -> None:
    site.node.identity.accounts.set_roles(SYSTEM, "chen", ["reviewer"], CLI)


def _take_readable(site: Site) -> None:
    site.node.identity.accounts.set_roles(
        SYSTEM, "chen", ["radiologist"], CLI, readable=[]
    )


def _reset_password(site: Site) -> None:
    site.node.identity.accounts.reset_password(SYSTEM, "chen", CLI)


def _reset_totp(site: Site) -> None:
    site.node.identity.accounts.reset_totp(SYSTEM, "chen", CLI)


def _disable_for_a_while(site: Site) -> None:
    site.node.identity.accounts.disable(SYSTEM, "chen", CLI)
    site.node.identity.accounts.enable(SYSTEM, "chen", CLI)


@pytest.mark.parametrize(
    "take",
    [
        _take_roles,
        _take_readable,
        _reset_password,
        _reset_totp,
        _disable_for_a_while,
    ],
)
def test_waiting_tickets_end_with_the_rights_they_were_issued_by(
    any_site: Site, take: Callable[[Site], None]
) -> None:
    fill(any_site)
    doctor = any_site.logged_in("chen", "radiologist", readable=("other",))
    asked = ({"study": uid(4)}, {"patient_id": "PID4"})
    waiting, used = (doctor.post(TICKETS, one).json()["ticket"] for one in asked)
    guest, _ = exchange(any_site, used)
    assert seen(guest) == {uid(4)}

    take(any_site)

    assert seen_status(guest) == 401
    assert exchange(any_site, waiting)[1].status == 401
    [record] = any_site.audit(action="ticket.exchange", outcome="deny")
    assert record["reason"].startswith("withdrawn")


def test_waiting_tickets_end_with_their_machine_s_token(any_site: Site) -> None:
    fill(any_site)
    ticket = any_site.token("his", "clinician").post(TICKETS, {"study": uid(1)}).json()

    any_site.node.identity.tokens.revoke(SYSTEM, "his", CLI)

    assert exchange(any_site, ticket["ticket"])[1].status == 401
    [record] = any_site.audit(action="ticket.exchange", outcome="deny")
    assert record["reason"].startswith("withdrawn")


@pytest.mark.parametrize(
    ("column", "value"),
    [("readable", ""), ("roles", "reviewer"), ("roles", "clinician")],
)
def test_a_ticket_needs_the_rights_its_issuer_has_when_it_is_used(
    any_site: Site, column: str, value: str
) -> None:
    """However they were lost: the ticket was for quality, in another institution."""
    fill(any_site)
    doctor = any_site.logged_in("chen", "radiologist", readable=("other",))
    asked = {"study": uid(4), "purpose": "quality"}
    waiting, used = (doctor.post(TICKETS, asked).json()["ticket"] for _ in range(2))
    guest, _ = exchange(any_site, used)
    assert seen(guest) == {uid(4)}
    with any_site.node.database.write() as connection:
        connection.execute(text(f"UPDATE account SET {column} = '{value}'"))  # noqa: S608
    any_site.node.identity.sessions.forget()

    assert exchange(any_site, waiting)[1].status == 401
    assert seen_status(guest) == 401
    [record] = any_site.audit(action="ticket.exchange", outcome="deny")
    assert record["reason"] == "its issuer may no longer"


def test_nobody_issues_a_ticket_with_a_session_that_has_ended(any_site: Site) -> None:
    """Other processes know of the end within seconds only."""
    fill(any_site)
    identity = any_site.node.identity
    doctor = any_site.logged_in("chen", "clinician")
    [secret] = doctor.cookies.values()
    remembered = identity.sessions.find(secret)
    assert remembered is not None
    identity.accounts.reset_password(SYSTEM, "chen", CLI)

    with pytest.raises(NotAuthenticated):
        identity.tickets.issue(remembered, WantedTicket(uid(1)), CLI)


def test_tickets_are_not_in_logs_of_ours_or_the_database(site: Site) -> None:
    fill(site)
    doctor = site.logged_in("chen", "clinician")
    ticket = doctor.post(TICKETS, {"study": uid(1)}).json()["ticket"]
    site.browser().get(f"/viewer?ticket={ticket}")

    assert ticket not in str(site.audit())
    with site.node.database.read() as connection:
        rows = connection.exec_driver_sql("SELECT * FROM launch_ticket").all()
    assert len(rows) == 1
    assert ticket not in str(rows)


def test_issue_and_exchange_are_in_the_audit(site: Site) -> None:
    fill(site)
    doctor = site.logged_in("chen", "clinician")
    issued = doctor.post(TICKETS, {"study": uid(1)}).json()
    browser, _ = exchange(site, issued["ticket"])
    browser.get(f"{STUDIES}/{uid(1)}/metadata")
    browser.get(f"{STUDIES}/{uid(3)}/metadata")

    [issue] = site.audit(action="ticket.issue")
    [opened] = site.audit(action="ticket.exchange")
    assert (issue["actor"], issue["study_uid"]) == ("chen", uid(1))
    assert issue["object_id"] == opened["object_id"] == issued["id"]
    assert opened["actor"] == "ticket:chen"
    reads = site.audit(action="get", actor="ticket:chen")
    assert {(one["study_uid"], one["outcome"]) for one in reads} == {
        (uid(1), "allow"), (uid(3), "deny"),
    }  # fmt: skip
    assert {one["purpose"] for one in reads} == {"treatment"}


def test_a_patient_account_is_held_to_the_patient(any_site: Site) -> None:
    fill(any_site)
    patients = (PatientKey("default", "", "PID1"), PatientKey("other", "", "PID4"))
    browser = any_site.logged_in("p1", "patient", patients=patients)

    assert seen(browser) == {uid(1), uid(2), uid(4)}
    assert browser.get(f"{STUDIES}/{uid(3)}/metadata").status == 404
    assert browser.get(f"{STUDIES}?PatientID=PID3").status == 204
