"""QIDO-RS extensions: totals, counts, order, and pages that hold still."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from storage.kernel.limits import Limits
from tests.support.datasets import ct_slice, part10, uid
from tests.support.dicomweb import TENANT, WebArchive, web_archive
from tests.support.wado import get, keep

N_STUDIES = 12


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebArchive]:
    with web_archive(tmp_path, limits=Limits(find_results=30)) as served:
        for seed in range(1, N_STUDIES + 1):
            study(served, seed)
        for number in range(1, 8):
            keep(served, part10(ct_slice(seed=1, series=2, number=number)))
        yield served


def study(web: WebArchive, seed: int, date: str | None = "20240105") -> None:
    keep(web, part10(ct_slice(seed=seed, StudyDate=date)))


def following(web: WebArchive, path: str) -> Iterator[list[str]]:
    """Yield the UIDs of each page, following the links."""
    level = path.partition("?")[0].rsplit("/", 1)[-1]
    tag = {"studies": "0020000D", "series": "0020000E", "instances": "00080018"}[level]
    while path:
        answer = get(web, path)
        assert answer.status in {200, 204}, answer.text
        rows = answer.json() if answer.body else []
        yield [row[tag]["Value"][0] for row in rows]
        link = answer.headers.get("link", "")
        path = ""
        if link:
            target = urlsplit(link.partition(">")[0].removeprefix("<"))
            path = target.path.removeprefix("/dicom-web") + "?" + target.query
            assert 'rel="next"' in link
            assert "additional results" in answer.headers["warning"]


ORDERS = [
    "/studies?limit=3",
    "/studies?limit=3&orderby=StudyDate",
    "/studies?limit=3&orderby=-PatientID",
    "/studies?limit=5&orderby=PatientName",
    "/series?limit=3",
    "/instances?limit=4",
    f"/studies/{uid(1)}/instances?limit=2&orderby=-InstanceNumber",
]


@pytest.mark.parametrize("path", ORDERS)
def test_pages_hold_each_match_once(web: WebArchive, path: str) -> None:
    whole = next(following(web, re.sub("limit=.", "limit=100", path)))

    pages = list(following(web, path))

    assert [one for page in pages for one in page] == whole
    assert len(pages) > 1


@pytest.mark.parametrize("path", ORDERS[:6])
@pytest.mark.parametrize("date", ["20300101", "20240105", "19990101", None])
def test_pages_hold_still_while_studies_arrive(
    web: WebArchive, path: str, date: str | None
) -> None:
    before = next(following(web, re.sub("limit=.", "limit=100", path)))
    seen: list[str] = []
    seed = 100

    for page in following(web, path):
        seen += page
        if seed < 110:
            seed += 1
            study(web, seed, date)

    # What was there is seen once, in its order, whatever comes before or behind it.
    assert len(seen) == len(set(seen))
    assert [one for one in seen if one in set(before)] == before


def test_offsets_do_not_hold_still_but_cursors_go_on_from_them(web: WebArchive) -> None:
    whole = next(following(web, "/studies?limit=100"))

    pages = list(following(web, "/studies?limit=4&offset=2"))

    assert [one for page in pages for one in page] == whole[2:]


def test_a_cursor_belongs_to_its_search(web: WebArchive) -> None:
    link = get(web, "/studies?limit=3").headers["link"]
    cursor = link.partition("cursor=")[2].partition(">")[0]

    for path in (f"/instances?limit=3&cursor={cursor}",
                 f"/studies?orderby=PatientID&cursor={cursor}",
                 f"/studies?cursor={cursor[:-3]}",
                 f"/studies?cursor={'A' * 5000}"):  # fmt: skip
        assert get(web, path).status == 400, path


@pytest.mark.parametrize(
    ("level", "total"), [("studies", 12), ("series", 13), ("instances", 19)]
)
def test_totals_are_counted_when_asked_for(
    web: WebArchive, level: str, total: int
) -> None:
    page = get(web, f"/{level}?limit=2&totalcount=true")
    counted = get(web, f"/{level}/count", "application/json")

    assert page.headers["x-total-count"] == str(total)
    assert "x-total-count-approximate" not in page.headers
    assert counted.json() == {"count": total, "approximate": False}
    assert counted.headers["content-type"] == "application/json"
    assert "warning" not in counted.headers


def test_a_count_stops_and_says_so(web: WebArchive) -> None:
    for seed in range(200, 230):
        study(web, seed)

    answer = get(web, "/studies?limit=1&totalcount=true")

    assert answer.headers["x-total-count"] == "30"
    assert answer.headers["x-total-count-approximate"] == "true"
    assert get(web, "/studies/count").json() == {"count": 30, "approximate": True}


@pytest.mark.parametrize(
    ("path", "count"),
    [
        (f"/studies/count?StudyInstanceUID={uid(1)},{uid(2)}", 2),
        ("/studies/count?StudyDate=20200101", 0),
        (f"/studies/{uid(1)}/series/count", 2),
        (f"/studies/{uid(1)}/instances/count", 8),
        (f"/studies/{uid(1)}/series/{uid(1, 2)}/instances/count", 7),
        (f"/studies/{uid(99)}/series/count", 0),
    ],
)
def test_counts_are_of_the_search(web: WebArchive, path: str, count: int) -> None:
    answer = get(web, path)

    assert answer.json()["count"] == count


def test_counts_are_refused_as_searches_are(web: WebArchive) -> None:
    assert get(web, "/studies/count?NoSuchKeyword=1").status == 400
    assert get(web, "/studies/a%20b/series/count").status == 400
    assert get(web, "/studies/count", "image/png").status == 406
    other = get(web, "/studies/count", **{TENANT: "other"})
    assert other.json()["count"] == 0


@pytest.mark.parametrize(
    ("path", "order"),
    [
        (f"/studies/{uid(1)}/series?orderby=SeriesNumber", [uid(1, 1), uid(1, 2)]),
        (f"/studies/{uid(1)}/series?orderby=-SeriesNumber", [uid(1, 2), uid(1, 1)]),
        (
            f"/studies/{uid(1)}/series/{uid(1, 2)}/instances?orderby=-InstanceNumber",
            [uid(1, 2, n) for n in range(7, 0, -1)],
        ),
    ],
)
def test_series_and_instances_of_a_study_have_orders_too(
    web: WebArchive, path: str, order: list[str]
) -> None:
    assert next(following(web, path)) == order


@pytest.mark.parametrize(
    "path",
    [
        "/series?orderby=SeriesNumber",
        "/instances?orderby=InstanceNumber",
        f"/studies/{uid(1)}/series?orderby=StudyDate",
        "/studies?orderby=SeriesNumber",
    ],
)
def test_other_orders_are_refused(web: WebArchive, path: str) -> None:
    answer = get(web, path)

    assert answer.status == 400
    assert "ordered by" in answer.json()["detail"]
