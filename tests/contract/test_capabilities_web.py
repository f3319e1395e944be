"""Retrieve Capabilities (PS3.18 8.9, Annex H) says what there is, and no more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from pacs.web.capabilities import NAMESPACE, WADL
from tests.support.dicomweb import WebArchive, web_archive
from tests.support.web import Response, request

WADL_TAG = f"{{{NAMESPACE}}}"


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebArchive]:
    with web_archive(tmp_path_factory.mktemp("capabilities")) as served:
        yield served


def ask(
    web: WebArchive, path: str, accept: str = "", method: str = "OPTIONS"
) -> Response:
    headers = {"Accept": accept} if accept else {}
    return request(f"{web.dicomweb}{path}", method=method, headers=headers)


def resources(element: ET.Element, above: str = "") -> dict[str, set[str]]:
    """Return the methods of each path."""
    found: dict[str, set[str]] = {}
    for one in element.findall(f"{WADL_TAG}resource"):
        path = f"{above}/{one.attrib['path']}"
        found[path] = {m.attrib["name"] for m in one.findall(f"{WADL_TAG}method")}
        found |= resources(one, path)
    return found


@pytest.mark.parametrize("path", ["", "/", "/studies", "/studies/1.2/series"])
@pytest.mark.parametrize("accept", ["", "*/*", WADL, "application/xml"])
def test_capabilities_are_a_wadl_document(
    web: WebArchive, path: str, accept: str
) -> None:
    answer = ask(web, path, accept)

    assert answer.status == 200
    assert answer.headers["content-type"] == WADL
    root = ET.fromstring(answer.body)  # noqa: S314
    assert root.tag == f"{WADL_TAG}application"
    (listed,) = root.findall(f"{WADL_TAG}resources")
    assert listed.attrib["base"].endswith("/dicom-web")
    found = resources(listed)
    instance = "/studies/{study}/series/{series}/instances/{instance}"
    assert found["/studies"] == {"GET", "POST"}
    assert found["/studies/{study}"] == {"GET", "POST", "DELETE"}
    for below in ("", "/metadata", "/frames/{frames}", "/rendered", "/bulkdata/{path}"):
        assert "GET" in found[instance + below], below


def test_every_resource_that_is_listed_exists(web: WebArchive) -> None:
    (listed,) = ET.fromstring(ask(web, "").body)  # noqa: S314
    for path, methods in resources(listed).items():
        if "GET" not in methods:
            continue
        for name, value in (("{study}", "1.2"), ("{series}", "1.3"),
                            ("{instance}", "1.4"), ("{frames}", "1"),
                            ("{path}", "7FE00010")):  # fmt: skip
            path = path.replace(name, value)  # noqa: PLW2901
        assert ask(web, path, method="GET").status in {200, 204, 404}, path


def test_capabilities_can_be_json(web: WebArchive) -> None:
    for path, method in (("", "OPTIONS"), ("/capabilities", "GET"), ("", "GET")):
        answer = ask(web, path, "application/json", method)

        assert answer.headers["content-type"] == "application/json"
        tree: Any = answer.json()["application"]["resources"]
        studies = next(one for one in tree["resource"] if one["@path"] == "studies")
        searched = next(one for one in studies["method"] if one["@name"] == "GET")
        assert {"@name": "limit", "@style": "query"} in searched["request"]["param"]
        kinds = searched["response"]["representation"]
        assert kinds[0] == {"@mediaType": "application/dicom+json"}


def test_frames_name_the_syntaxes_they_come_in(web: WebArchive) -> None:
    text = ask(web, "").text

    for form in ("image/jphc", "1.2.840.10008.1.2.4.202", "image/dicom-rle",
                 "application/zip", "video/mp4"):  # fmt: skip
        assert form in text
    assert "transfer-syntax=1.2.840.10008.1.2.2" not in text


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/studies", {"GET", "OPTIONS", "POST"}),
        ("/studies/1.2", {"DELETE", "GET", "HEAD", "OPTIONS", "POST"}),
        ("/studies/1.2/series/1.3/instances/1.4/frames/1", {"GET", "HEAD", "OPTIONS"}),
    ],
)
def test_options_name_the_methods_of_a_resource(
    web: WebArchive, path: str, allowed: set[str]
) -> None:
    answer = ask(web, path)

    assert set(answer.headers["allow"].split(", ")) == allowed


def test_what_is_not_there_stays_unknown(web: WebArchive) -> None:
    for method in ("OPTIONS", "GET", "PUT"):
        assert ask(web, "/nothing/here", method=method).status == 404
    assert ask(web, "/studies", method="PUT").status == 405


def test_other_forms_are_406(web: WebArchive) -> None:
    answer = ask(web, "", "image/png")

    assert answer.status == 406
    assert WADL in answer.json()["detail"]
