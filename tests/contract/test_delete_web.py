"""DELETE of studies, series and instances over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.datasets import a_study, part10, uid
from tests.support.dicomweb import TENANT, WebArchive, multipart, web_archive
from tests.support.web import Response, request

STUDY = f"/studies/{uid(1)}"
SERIES = f"{STUDY}/series/{uid(1, 1)}"
INSTANCE = f"{SERIES}/instances/{uid(1, 1, 1)}"


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebArchive]:
    with web_archive(tmp_path) as served:
        body, headers = multipart(
            [part10(ds) for ds in a_study(n_series=2, n_instances=2)]
        )
        url = f"{served.dicomweb}/studies"
        answer = request(url, method="POST", body=body, headers=headers)
        assert answer.status == 200
        yield served


def delete(web: WebArchive, path: str, **headers: str) -> Response:
    return request(web.dicomweb + path, method="DELETE", headers=headers)


def count(web: WebArchive) -> int:
    answer = request(f"{web.dicomweb}/instances")
    return len(answer.json()) if answer.status == 200 else 0


@pytest.mark.parametrize(("path", "left"), [(STUDY, 0), (SERIES, 2), (INSTANCE, 3)])
def test_what_is_deleted_is_gone_at_once(web: WebArchive, path: str, left: int) -> None:
    # The frame's place is known to the process before it goes.
    assert request(f"{web.dicomweb}{INSTANCE}/frames/1").status == 200
    assert request(f"{web.dicomweb}{SERIES}/metadata").status == 200

    answer = delete(web, path)

    assert (answer.status, answer.body) == (204, b"")
    assert count(web) == left
    for suffix in ("", "/frames/1", "/metadata", "/bulkdata/7FE00010"):
        assert request(f"{web.dicomweb}{INSTANCE}{suffix}").status == 404
    file = f"{web.url}/api/v1/instances/{uid(1, 1, 1)}/file"
    assert request(file).status == 404
    metadata = request(f"{web.dicomweb}{SERIES}/metadata")
    names = [one["00080018"]["Value"][0] for one in metadata.json()] if (
        metadata.status == 200
    ) else []  # fmt: skip
    assert uid(1, 1, 1) not in names
    assert delete(web, path).status == 404


@pytest.mark.parametrize(
    "path",
    [
        f"/studies/{uid(2)}",
        f"/studies/{uid(2)}/series/{uid(1, 1)}",
        f"/studies/{uid(1)}/series/{uid(1, 2)}/instances/{uid(1, 1, 1)}",
    ],
)
def test_what_is_not_there_is_404(web: WebArchive, path: str) -> None:
    answer = delete(web, path)

    assert answer.status == 404
    assert answer.headers["content-type"] == "application/problem+json"
    assert count(web) == 4


def test_c23_nobody_deletes_what_is_another_tenants(web: WebArchive) -> None:
    assert delete(web, STUDY, **{TENANT: "other"}).status == 404
    assert count(web) == 4


def test_c22_paths_that_are_no_uids_are_400(web: WebArchive) -> None:
    assert delete(web, f"/studies/{'1' * 65}").status == 400


def test_what_was_deleted_can_be_stored_again(web: WebArchive) -> None:
    (first, *_) = a_study(n_series=2, n_instances=2)
    delete(web, STUDY)
    body, headers = multipart([part10(first)])

    answer = request(
        f"{web.dicomweb}/studies", method="POST", body=body, headers=headers
    )

    assert answer.status == 200
    assert request(f"{web.dicomweb}{INSTANCE}/frames/1").status == 200
