"""An open node asks nobody who he is, whatever he shows; everything is recorded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.accounts import Site, closed_site
from tests.support.datasets import ct_slice, uid

STUDIES = "/dicom-web/studies"


@pytest.fixture
def open_site(tmp_path: Path) -> Iterator[Site]:
    with closed_site(tmp_path / "data", open_access=True) as made:
        made.store(ct_slice(seed=1))
        yield made


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Basic d2FuZzpwYXNz"},
        {"Authorization": "Bearer whatever"},
        {"Authorization": "nonsense"},
        {"Cookie": "huying=stale; other=1"},
    ],
)
def test_whatever_is_shown_opens_everything(
    open_site: Site, headers: dict[str, str]
) -> None:
    browser = open_site.browser(**headers)

    assert browser.get(STUDIES).status == 200
    assert browser.get("/api/v1/peers").status == 200
    assert browser.get("/").status == 200
    assert browser.post(f"/api/v1/studies/{uid(1)}/settle").status == 200
    assert browser.get("/api/v1/me").json()["kind"] == "open"


def test_what_is_looked_at_is_recorded(open_site: Site) -> None:
    open_site.browser().get(f"{STUDIES}/{uid(1)}/metadata")

    [record] = open_site.audit(action="get")
    assert (record["actor"], record["study_uid"]) == ("open", uid(1))


def test_methods_and_pages_that_are_not_there(open_site: Site) -> None:
    browser = open_site.browser()
    assert browser.get("/no-such-page").status == 404
    wrong = browser.request("PUT", STUDIES, b"")
    assert wrong.status == 405
    assert "GET" in wrong.headers["allow"]


def test_an_account_can_be_used_on_an_open_node_too(open_site: Site) -> None:
    doctor = open_site.logged_in("chen", "clinician")

    assert doctor.get("/api/v1/me").json()["roles"] == ["clinician"]
    assert doctor.get("/api/v1/peers").status == 403
    issued = doctor.post("/api/v1/tickets", {"study": uid(1)})
    assert issued.status == 201
