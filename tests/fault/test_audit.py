"""Row D14 of the bad-input table: an audit that cannot be written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from storage.kernel.limits import Limits
from tests.support.accounts import Browser, Site, closed_site
from tests.support.datasets import ct_slice, part10
from tests.support.dicomweb import multipart
from tests.support.waiting import wait_until

STUDIES = "/dicom-web/studies"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    limits = Limits(audit_pending_seconds=0.2)
    with closed_site(tmp_path / "data", limits=limits) as made:
        made.store(ct_slice(seed=1))
        yield made


@pytest.fixture
def doctor(site: Site) -> Browser:
    return site.logged_in("wang", "archive_manager")


def break_audit(site: Site) -> None:
    """Let the database take everything but audit records."""
    with site.node.database.write() as connection:
        connection.execute(
            text(
                "CREATE TRIGGER down BEFORE INSERT ON audit_record"
                " BEGIN SELECT RAISE(ABORT, 'down'); END"
            )
        )


def mend_audit(site: Site) -> None:
    with site.node.database.write() as connection:
        connection.execute(text("DROP TRIGGER down"))


def test_d14_reads_are_refused_while_the_audit_is_away_and_none_is_dropped(
    site: Site, doctor: Browser
) -> None:
    study = str(ct_slice(seed=1).StudyInstanceUID)
    break_audit(site)
    allowed = 0

    def is_refused() -> bool:
        nonlocal allowed
        answer = doctor.get(f"{STUDIES}/{study}/metadata")
        if answer.status == 503:
            assert study not in answer.text
            return True
        assert answer.status == 200
        allowed += 1
        return False

    wait_until(is_refused, "reads to be refused", seconds=20)
    assert site.browser().get("/readyz").status == 503

    mend_audit(site)
    wait_until(lambda: not is_refused(), "reads to be allowed", seconds=20)
    records = site.audit(action="get", actor="wang", study_uid=study)
    assert sum(record["count"] for record in records) == allowed
    assert site.browser().get("/readyz").status == 200


def test_d14_nobody_logs_in_while_the_audit_is_away(site: Site) -> None:
    site.add("li", "radiologist")
    break_audit(site)

    assert site.browser().log_in("li").status == 503

    mend_audit(site)
    assert site.browser().log_in("li").status == 200


def test_d14_nothing_is_deleted_while_the_audit_is_away(
    site: Site, doctor: Browser
) -> None:
    study = str(ct_slice(seed=1).StudyInstanceUID)
    break_audit(site)

    assert doctor.request("DELETE", f"{STUDIES}/{study}").status == 503

    mend_audit(site)
    assert study in doctor.get(STUDIES).text


def test_d14_nothing_is_stored_while_the_audit_is_away(
    site: Site, doctor: Browser
) -> None:
    body, headers = multipart([part10(ct_slice(seed=2))])
    break_audit(site)

    assert doctor.request("POST", STUDIES, body, headers).status == 503

    mend_audit(site)
    study = str(ct_slice(seed=2).StudyInstanceUID)
    assert study not in doctor.get(STUDIES).text
    assert doctor.request("POST", STUDIES, body, headers).status == 200
    assert study in doctor.get(STUDIES).text
