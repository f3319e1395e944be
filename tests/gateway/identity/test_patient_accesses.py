"""``huying audit search --patient`` and its route: who has seen a patient's images?

By whichever door they were read, also where a request names no more than a UID.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from typer.testing import CliRunner

from gateway import cli
from storage.kernel.settings import Dimse
from tests.gateway.identity.test_tenants import (
    FIND,
    GET,
    PEERS,
    associate,
    dicom_door,
    identifier,
)
from tests.support.accounts import Site, closed_site, with_identity
from tests.support.datasets import ct_slice, uid

PATIENT, OTHER = "PID1", "PID2"
STUDY = f"/dicom-web/studies/{uid(1)}"
SERIES = f"{STUDY}/series/{uid(1, 1)}"
INSTANCE = f"{SERIES}/instances/{uid(1, 1, 1)}"
WADO_URI = (
    f"/wado?requestType=WADO&studyUID={uid(1)}&seriesUID={uid(1, 1)}"
    f"&objectUID={uid(1, 1, 1)}"
)
READS = (
    STUDY,
    f"{STUDY}/metadata",
    f"{STUDY}/rendered",
    f"{SERIES}/thumbnail",
    f"{INSTANCE}/frames/1",
    f"{INSTANCE}/rendered",
    WADO_URI,
    f"/api/v1/instances/{uid(1, 1, 1)}/file",
    f"/api/v1/viewer/manifest/{uid(1)}",
)


@pytest.fixture
def site(tmp_path: Path, database_url: str) -> Iterator[Site]:
    with closed_site(
        tmp_path / "data",
        url=database_url,
        identity=with_identity(second_factor=frozenset()),
        dimse=Dimse(peers=PEERS),
    ) as made:
        made.store(ct_slice(seed=1))
        made.store(ct_slice(seed=2))
        yield made


def accesses(site: Site, patient: str, **more: str) -> list[dict[str, Any]]:
    """Return what the command finds."""
    site.node.audit.flush()
    options = [f"--{name}={value}" for name, value in more.items()]
    words = ["audit", "search", "--json", "--patient", patient, *options]
    settings = site.node.settings
    done = CliRunner().invoke(
        cli.app,
        [*words, "--data", str(settings.data)],
        env={"HUYING_DATABASE__URL": settings.database.url.get_secret_value()},
    )
    assert done.exit_code == 0, done.output
    return [orjson.loads(line) for line in done.output.splitlines()]


@pytest.mark.parametrize("path", READS)
def test_a_read_over_http_is_found(site: Site, path: str) -> None:
    doctor = site.logged_in("wang", "radiologist")

    assert doctor.request("GET", path, None, {"Accept": "*/*"}).status == 200

    [found] = accesses(site, PATIENT, actor="wang", action="get")
    assert found["study_uid"] == uid(1)
    assert found["outcome"] == "allow"
    assert accesses(site, OTHER, actor="wang") == []


def test_what_a_peer_finds_and_gets_is_found(site: Site) -> None:
    with dicom_door(site) as port:
        association = associate(port, "CT1", [])
        for kind in ("send_c_find", "send_c_get"):
            model = FIND if kind == "send_c_find" else GET
            list(getattr(association, kind)(identifier(1), model))
        association.release()

    found = accesses(site, PATIENT, actor="CT1")

    assert {one["action"] for one in found} == {"find", "get"}
    assert accesses(site, OTHER, actor="CT1") == []


def test_what_a_ticket_opens_is_found(site: Site) -> None:
    doctor = site.logged_in("chen", "clinician")
    ticket = doctor.post("/api/v1/tickets", {"study": uid(1)}).json()["ticket"]
    guest = site.browser()
    assert guest.post("/api/v1/tickets/exchange", {"ticket": ticket}).status == 200
    assert guest.get(f"{STUDY}/metadata").status == 200

    found = accesses(site, PATIENT)

    assert {"ticket.issue", "ticket.exchange", "get"} <= {
        one["action"] for one in found
    }
    assert accesses(site, OTHER) == []


def test_an_auditor_finds_the_same_over_rest(site: Site) -> None:
    doctor = site.logged_in("wang", "radiologist")
    auditor = site.logged_in("shen", "auditor")
    for path in READS:
        assert doctor.request("GET", path, None, {"Accept": "*/*"}).status == 200
    site.node.audit.flush()

    def found(patient: str) -> set[str]:
        query = f"/api/v1/audit?patient={patient}&actor=wang&action=get"
        return {one["study_uid"] for one in auditor.get(query).json()["records"]}

    assert found(PATIENT) == {uid(1)}
    assert found(OTHER) == set()
    assert not accesses(site, PATIENT, actor="shen")
