"""Another institution's UIDs, and another patient's, by every door: nothing is found,
nothing tells that there is something, and the attempt is in the audit.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyotp
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE, build_context, build_role, evt
from pynetdicom.sop_class import (
    CTImageStorage,
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
)

from gateway import app as composition
from gateway.http.rules import RuleTable
from pacs.dimse.command import CommandField
from pacs.dimse.commit import CommitHandler
from pacs.dimse.counts import AssociationCounts
from pacs.dimse.deliver import Outgoing
from pacs.dimse.find import FindHandler
from pacs.dimse.get import GetHandler
from pacs.dimse.move import MoveHandler
from pacs.dimse.server import DimseServer
from pacs.services.permissions import Action
from pacs.services.policy import KnownPeer
from storage.kernel.settings import AeSettings, Dimse, PeerSettings
from storage.kernel.types import PatientKey
from tests.gateway.identity.test_access import every_route
from tests.support.accounts import CLI, SYSTEM, Browser, Site, closed_site
from tests.support.datasets import ct_slice, uid
from tests.support.dicom_peers import PyScp

OURS, THEIRS, NOWHERE = 1, 2, 3
RULES = RuleTable()
STUDIES = "/dicom-web/studies"


@pytest.fixture
def both(any_site: Site) -> Site:
    any_site.store(ct_slice(seed=OURS))
    any_site.store(ct_slice(seed=THEIRS), tenant="other")
    return any_site


def filled(path: str, seed: int) -> str:
    """Put the UIDs of a study into the path of a route."""
    values = {
        "study": uid(seed), "series": uid(seed, 1), "instance": uid(seed, 1, 1),
        "frames": "1", "path": "7FE00010", "transaction": uid(seed),
    }  # fmt: skip
    path = re.sub(r"\{(\w+)(?::path)?\}", lambda m: values[m[1]], path)
    return f"{path}?study={uid(seed)}" if "/viewer/series/" in path else path


def routes_about_studies(site: Site) -> list[tuple[str, str]]:
    """Return every route whose path names a study, a series or an instance."""
    return sorted(
        (method, path)
        for method, path in every_route(site.face)
        if re.search(r"\{(study|series|instance)", path) and method != "HEAD"
    )


def told(browser: Browser, method: str, path: str, seed: int) -> tuple[int, str]:
    """Return what a route says, without the UIDs that were asked for."""
    body: Any = {} if method == "POST" and "dicom-web" not in path else None
    answer = browser.request(
        method, filled(path, seed), body, {"Accept": "*/*", "Content-Type": "x/y"}
    )
    text = answer.body.decode("utf-8", "replace")
    return answer.status, text.replace(uid(seed), "UID")


def test_every_route_answers_as_for_what_does_not_exist(both: Site) -> None:
    routes = routes_about_studies(both)
    assert len(routes) > 30
    doctor = both.logged_in("wang", "radiologist", "archive_manager")

    for method, path in routes:
        theirs = told(doctor, method, path, THEIRS)
        nowhere = told(doctor, method, path, NOWHERE)

        assert theirs == nowhere, (method, path)
        rule, _ = RULES.match(method, filled(path, THEIRS).partition("?")[0])
        assert rule is not None
        if rule.action is Action.GET and method == "GET":
            assert theirs[0] == 404, (method, path)
    # Nothing was deleted or changed by all that.
    guest = both.logged_in("li", "radiologist", tenant="other")
    assert guest.get(f"{STUDIES}/{uid(THEIRS)}/metadata").status == 200


def test_every_route_is_closed_to_other_patients(any_site: Site) -> None:
    """Also after a doctor has been there, and much is remembered."""
    any_site.store(ct_slice(seed=OURS))
    any_site.store(ct_slice(seed=THEIRS))
    doctor = any_site.logged_in("wang", "radiologist")
    mine = (PatientKey("default", "", f"PID{OURS}"),)
    patient = any_site.logged_in("p1", "patient", patients=mine)
    issued = doctor.post("/api/v1/tickets", {"study": uid(OURS)}).json()
    guest = any_site.browser()
    guest.post("/api/v1/tickets/exchange", {"ticket": issued["ticket"]})
    n_open = 0

    for method, path in routes_about_studies(any_site):
        if method != "GET":
            continue
        for seed in (OURS, THEIRS):
            n_open += told(doctor, method, path, seed)[0] == 200
        for scoped in (patient, guest):
            theirs = told(scoped, method, path, THEIRS)
            nowhere = told(scoped, method, path, NOWHERE)
            assert theirs == nowhere, (method, path)
            assert theirs[0] != 200 or "count" in path, (method, path)
    assert n_open > 40


def test_the_attempts_are_in_the_audit(both: Site) -> None:
    doctor = both.logged_in("wang", "radiologist", "archive_manager")
    study = f"{STUDIES}/{uid(THEIRS)}"
    instance = f"{study}/series/{uid(THEIRS, 1)}/instances/{uid(THEIRS, 1, 1)}"
    wado = (
        f"/wado?requestType=WADO&studyUID={uid(THEIRS)}"
        f"&seriesUID={uid(THEIRS, 1)}&objectUID={uid(THEIRS, 1, 1)}"
    )
    attempts = {
        ("GET", f"{study}/metadata"): ("get", "deny"),
        ("GET", f"{instance}/frames/1"): ("get", "deny"),
        ("GET", wado): ("get", "deny"),
        ("DELETE", study): ("delete", "deny"),
        ("GET", f"{study}/series"): ("find", "allow"),
    }  # fmt: skip
    for (method, path), (action, outcome) in attempts.items():
        answer = doctor.request(method, path)
        assert answer.status in {204, 404}, path
        found = both.audit(action=action, actor="wang", study_uid=uid(THEIRS))
        assert found, path
        assert found[-1]["outcome"] == outcome
        assert found[-1]["source"] == "127.0.0.1"


def test_searches_find_only_what_is_ours(both: Site) -> None:
    doctor = both.logged_in("wang", "radiologist")
    for path in (
        f"{STUDIES}?StudyInstanceUID={uid(THEIRS)}",
        f"{STUDIES}?PatientID=PID{THEIRS}",
        f"/dicom-web/series?SeriesInstanceUID={uid(THEIRS, 1)}",
        f"/dicom-web/instances?SOPInstanceUID={uid(THEIRS, 1, 1)}",
    ):
        assert doctor.get(path).status == 204
    listed = doctor.get("/api/v1/study-list").json()["studies"]
    assert [one["study_instance_uid"] for one in listed] == [uid(OURS)]
    assert doctor.get("/api/v1/activity").json()["totals"]["studies"] == 1


def test_a_granted_tenant_is_read_and_not_written(both: Site) -> None:
    doctor = both.logged_in(
        "wang", "radiologist", "archive_manager", readable=("other",)
    )
    study = f"{STUDIES}/{uid(THEIRS)}"

    assert doctor.get(f"{study}/metadata").status == 200
    assert doctor.request("DELETE", study).status == 404
    assert doctor.post(f"/api/v1/studies/{uid(THEIRS)}/settle").status == 404
    changes = doctor.get("/api/v1/changes?limit=1000").json()["events"]
    assert {event["tenant"] for event in changes} <= {"default"}
    assert doctor.get(f"{study}/metadata").status == 200


def test_two_people_of_one_tenant_do_not_share_what_is_remembered(site: Site) -> None:
    """The same path, first for a doctor, then for another patient, and back."""
    site.store(ct_slice(seed=OURS))
    doctor = site.logged_in("wang", "radiologist")
    patient = site.logged_in(
        "p2", "patient", patients=(PatientKey("default", "", "PID9"),)
    )
    for tail in ("frames/1", "metadata", "rendered", "thumbnail", "bulkdata/7FE00010"):
        path = filled(
            f"{STUDIES}/{{study}}/series/{{series}}/instances/{{instance}}/{tail}", OURS
        )
        statuses = [
            one.request("GET", path, None, {"Accept": "*/*"}).status
            for one in (doctor, patient, doctor, patient)
        ]
        assert statuses == [200, 404, 200, 404], tail


def test_an_account_of_another_tenant_does_not_exist(site: Site) -> None:
    site.add("li", "radiologist", tenant="other")
    settings_free = site.token("sec", "administrator")
    assert settings_free.get("/api/v1/accounts").status == 403
    guard = site.logged_in("guard", "security_administrator")
    setup_totp(guard)

    assert [one["name"] for one in guard.get("/api/v1/accounts").json()] == ["guard"]
    for path in ("disable", "enable", "reset-password", "reset-totp"):
        for name in ("li", "nobody"):
            assert guard.post(f"/api/v1/accounts/{name}/{path}").status == 404
    body = {"name": "x1", "tenant": "other", "roles": ["clinician"]}
    assert guard.post("/api/v1/accounts", body).status == 403


def setup_totp(browser: Browser) -> None:
    secret = browser.post("/api/v1/me/totp", {}).json()["secret"]
    answer = browser.post("/api/v1/me/totp", {"code": pyotp.TOTP(secret).now()})
    assert answer.status == 200, answer.text
    browser.csrf = answer.json()["csrf"]


def test_nobody_grants_to_himself_over_http(site: Site) -> None:
    guard = site.logged_in("guard", "security_administrator")
    setup_totp(guard)

    for method, path, body in (
        ("PUT", "/api/v1/accounts/guard/roles", {"roles": ["archive_manager"]}),
        ("PUT", "/api/v1/accounts/GUARD/roles", {"roles": ["archive_manager"]}),
        ("POST", "/api/v1/accounts/guard/reset-totp", None),
        ("POST", "/api/v1/accounts/guard/disable", None),
        ("POST", "/api/v1/accounts", {"name": "guard", "roles": ["auditor"]}),
    ):
        assert guard.request(method, path, body).status == 403, path
    assert guard.get("/api/v1/me").json()["roles"] == ["security_administrator"]
    made = guard.post("/api/v1/accounts", {"name": "new", "roles": ["clinician"]})
    assert made.status == 201
    given = guard.request(
        "PUT", "/api/v1/accounts/new/roles", {"roles": ["radiologist"]}
    )
    assert given.status == 204
    [record] = site.audit(action="account.roles", outcome="allow")
    assert (record["actor"], record["object_id"]) == ("guard", "new")


def keeper_of(site: Site, tenant: str, **options: Any) -> Browser:
    """Return a security administrator of an institution."""
    keeper = site.logged_in(
        f"sec-{tenant}", "security_administrator", tenant=tenant, **options
    )
    setup_totp(keeper)
    return keeper


ACCOUNTS = "/api/v1/accounts"
AS_RADIOLOGIST = {"roles": ["radiologist"]}


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "roles", AS_RADIOLOGIST),
        ("PUT", "roles", {"roles": ["radiologist"], "readable": ["default"]}),
        ("PUT", "roles", {"roles": ["reviewer"], "readable": ["default", "c"]}),
        ("POST", "reset-password", None),
        ("POST", "reset-totp", None),
        ("POST", "enable", None),
    ],
)
def test_no_institution_is_gained_through_an_account_that_sees_it(
    any_site: Site, method: str, path: str, body: Any
) -> None:
    any_site.store(ct_slice(seed=OURS))
    any_site.add("consult", "reviewer", tenant="b", readable=("default",))
    if path == "enable":
        any_site.node.identity.accounts.disable(SYSTEM, "consult", CLI)
    keeper = keeper_of(any_site, "b")
    before = keeper.get(ACCOUNTS).json()

    answer = keeper.request(method, f"{ACCOUNTS}/consult/{path}", body)

    assert answer.status == 403, answer.text
    assert "the account sees" in answer.json()["detail"]
    assert "password" not in answer.json()
    assert keeper.get(ACCOUNTS).json() == before


def test_an_account_of_other_patients_is_not_taken_over(any_site: Site) -> None:
    elsewhere = (PatientKey("default", "", "PID1"),)
    any_site.add("p1", "patient", tenant="b", patients=elsewhere)
    keeper = keeper_of(any_site, "b")

    for path in ("reset-password", "reset-totp", "enable"):
        assert keeper.post(f"{ACCOUNTS}/p1/{path}").status == 403, path
    assert keeper.post(f"{ACCOUNTS}/p1/disable").status == 204


def test_rights_in_other_institutions_can_be_taken_away(any_site: Site) -> None:
    """And what sees no more than the own institution is kept as ever."""
    any_site.add("consult", "radiologist", "reviewer", tenant="b", readable=("a", "c"))
    keeper = keeper_of(any_site, "b")
    roles = f"{ACCOUNTS}/consult/roles"

    for body in (
        {"roles": ["reviewer"]},
        {"roles": ["reviewer"], "readable": ["c"]},
        {"roles": ["radiologist"], "readable": []},
    ):
        assert keeper.request("PUT", roles, body).status == 204, body
    answer = keeper.post(f"{ACCOUNTS}/consult/reset-password")
    assert answer.status == 200
    again = {"roles": ["radiologist"], "readable": ["c"]}
    assert keeper.request("PUT", roles, again).status == 403


def test_a_keeper_of_both_institutions_keeps_accounts_that_see_both(
    any_site: Site,
) -> None:
    any_site.add("consult", "reviewer", tenant="b", readable=("default",))
    keeper = keeper_of(any_site, "b", readable=("default",))

    roles = f"{ACCOUNTS}/consult/roles"
    assert keeper.request("PUT", roles, AS_RADIOLOGIST).status == 204
    for path in ("reset-password", "reset-totp", "disable", "enable"):
        assert keeper.post(f"{ACCOUNTS}/consult/{path}").status in {200, 204}, path


def test_a_name_that_is_taken_does_not_say_by_whom(any_site: Site) -> None:
    any_site.add("rad", "radiologist")
    any_site.add("near", "clinician", tenant="b")
    any_site.token("his", "clinician")
    any_site.token("near", "clinician", tenant="b")
    keeper = keeper_of(any_site, "b")

    answers = [
        keeper.post(path, {"name": name, "roles": ["clinician"]})
        for path, name in (
            (ACCOUNTS, "rad"),
            (ACCOUNTS, "near"),
            ("/api/v1/tokens", "his"),
            ("/api/v1/tokens", "near"),
        )
    ]

    assert [one.status for one in answers] == [409] * 4
    assert len({one.json()["detail"] for one in answers}) == 1
    for name in ("rad", "nobody"):
        assert keeper.post(f"{ACCOUNTS}/{name}/disable").status == 404


# -- DIMSE


PEERS = (
    PeerSettings(
        title="CT1",
        tenant="default",
        may=frozenset({"echo", "store", "find", "get", "move"}),
    ),
    PeerSettings(title="STOREONLY", tenant="default"),
)


@contextmanager
def dicom_door(site: Site) -> Iterator[int]:
    """Serve DICOM of a site on a free port."""
    node = site.node
    limits = node.settings.limits
    server = DimseServer(
        settings=node.settings.dimse,
        limits=limits,
        policy=node.policy,
        ingest=node.ingest,
        handlers={
            CommandField.C_FIND_RQ: FindHandler(node.query, node.policy, limits),
            CommandField.C_GET_RQ: GetHandler(node.retrieve, node.policy, limits),
            CommandField.C_MOVE_RQ: MoveHandler(
                node.retrieve, node.policy, limits, ("HUYING",), Outgoing()
            ),
            CommandField.N_ACTION_RQ: CommitHandler(
                composition.commitment(node), node.policy, node.peers, limits
            ),
        },
        counts=AssociationCounts.for_settings(node.settings, 1),
        slot=0,
        trail=node.audit,
    )
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.serve, args=(listener, None, stop))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            stop.set()
            thread.join()


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[tuple[Site, int]]:
    dimse = Dimse(peers=PEERS, aes=(AeSettings(title="THEIRS", tenant="other"),))
    with closed_site(tmp_path / "data", dimse=dimse) as site, dicom_door(site) as port:
        site.store(ct_slice(seed=OURS))
        site.store(ct_slice(seed=THEIRS), tenant="other")
        yield site, port


def identifier(seed: int) -> Dataset:
    ds = Dataset()
    ds.QueryRetrieveLevel = "STUDY"
    ds.StudyInstanceUID = uid(seed)
    ds.PatientID = ""
    return ds


FIND = StudyRootQueryRetrieveInformationModelFind
GET = StudyRootQueryRetrieveInformationModelGet
MOVE = StudyRootQueryRetrieveInformationModelMove


def associate(port: int, title: str, got: list[str]) -> Any:
    client = AE(title)

    def keep(event: Any) -> int:
        got.append(str(event.dataset.StudyInstanceUID))
        return 0

    return client.associate(
        "127.0.0.1",
        port,
        [build_context(one) for one in (FIND, GET, MOVE, CTImageStorage)],
        ext_neg=[build_role(CTImageStorage, scu_role=True, scp_role=True)],
        evt_handlers=[(evt.EVT_C_STORE, keep)],
        ae_title="HUYING",
    )


def test_a_peer_finds_and_gets_what_is_its_tenants(closed: tuple[Site, int]) -> None:
    site, port = closed
    got: list[str] = []
    association = associate(port, "CT1", got)
    assert association.is_established

    def found(seed: int) -> list[str]:
        answers = association.send_c_find(identifier(seed), FIND)
        return [str(ds.StudyInstanceUID) for status, ds in answers if ds is not None]

    def retrieved(seed: int) -> tuple[int, int]:
        *_, (status, _) = association.send_c_get(identifier(seed), GET)
        return status.Status, int(status.NumberOfCompletedSuboperations)

    def moved(seed: int) -> int:
        *_, (status, _) = association.send_c_move(identifier(seed), "NOBODY", MOVE)
        return int(status.Status)

    assert found(OURS) == [uid(OURS)]
    assert retrieved(OURS) == (0, 1)
    assert got == [uid(OURS)]
    assert found(THEIRS) == found(NOWHERE) == []
    assert retrieved(THEIRS) == retrieved(NOWHERE) == (0, 0)
    assert moved(THEIRS) == moved(OURS) == 0xA801
    association.release()

    reads = site.audit(action="get", door="dimse", actor="CT1")
    assert {(one["study_uid"], one["outcome"]) for one in reads} == {
        (uid(OURS), "allow"), (uid(THEIRS), "deny"), (uid(NOWHERE), "deny"),
    }  # fmt: skip
    searches = site.audit(action="find", door="dimse")
    assert {one["study_uid"] for one in searches} == {
        uid(OURS), uid(THEIRS), uid(NOWHERE)
    }  # fmt: skip


def test_a_move_takes_nothing_of_others_along(closed: tuple[Site, int]) -> None:
    site, port = closed
    with PyScp(title="DEST").running() as there:
        at = KnownPeer("DEST", "127.0.0.1", there.port, "", frozenset())
        site.node.peers.put(at)
        association = associate(port, "CT1", [])
        for seed in (THEIRS, OURS):
            *_, (status, _) = association.send_c_move(identifier(seed), "DEST", MOVE)
            assert status.Status == 0
        association.release()

    assert [one.instance_uid for one in there.received] == [uid(OURS, 1, 1)]
    records = site.audit(action="move", door="dimse")
    assert [(one["study_uid"], one["outcome"]) for one in records] == [
        (uid(THEIRS), "deny"), (uid(OURS), "allow"),
    ]  # fmt: skip
    assert "DEST" in str(records[1]["detail"])


def test_a_peer_without_the_grant_is_refused_and_recorded(
    closed: tuple[Site, int],
) -> None:
    site, port = closed
    association = associate(port, "STOREONLY", [])

    answers = list(association.send_c_find(identifier(OURS), FIND))
    assert [status.Status for status, _ in answers] == [0x0124]
    *_, (status, _) = association.send_c_get(identifier(OURS), GET)
    assert status.Status == 0x0124
    ds = ct_slice(seed=7)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    stored = association.send_c_store(ds)
    assert stored.Status == 0
    association.release()

    denied = site.audit(door="dimse", outcome="deny", actor="STOREONLY")
    assert {one["action"] for one in denied} == {"find", "get"}
    [store] = site.audit(action="store", door="dimse")
    assert (store["study_uid"], store["outcome"]) == (uid(7), "allow")


def test_strangers_are_rejected_and_recorded(closed: tuple[Site, int]) -> None:
    site, port = closed

    assert associate(port, "STRANGER", []).is_rejected

    [record] = site.audit(action="associate")
    assert (record["actor"], record["outcome"]) == ("STRANGER", "deny")
    assert record["source"] == "127.0.0.1"
