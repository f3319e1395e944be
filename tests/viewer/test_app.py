"""The routes of the first page, with fakes behind them."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import pytest
from fastapi import FastAPI

from storage.activity import Activity, Amount
from storage.kernel.errors import NotAuthenticated
from storage.kernel.types import Actor, TenantId
from tests.support.dicomweb import application as with_errors
from tests.support.dicomweb import serving
from tests.support.web import Response, request
from viewer import app as page
from viewer.activity import Report, Totals
from viewer.app import NodeCard, StudyLine, StudyPage, StudySearch
from viewer.assets import TYPES

ACTOR = Actor(TenantId("default"), "doctor")
LINE = StudyLine(
    tenant="default",
    study_instance_uid="1.2.3",
    patient_name="Ji^Ye=𠮷^野",
    patient_id="P1",
    birth_date="19700101",
    sex="M",
    study_date="20240102",
    study_time="103000",
    accession_number="A1",
    study_description="胸部CT平扫",
    modalities=("CT", "SR"),
    n_series=2,
    n_instances=300,
    size_bytes=157_286_400,
    updated_us=1_704_164_400_000_000,
)


@dataclass
class Directory:
    """Remembers what it was asked."""

    asked: list[tuple[Actor, StudySearch, str, int]] = field(default_factory=list)

    def list_studies(
        self, actor: Actor, wanted: StudySearch, *, cursor: str, limit: int
    ) -> StudyPage:
        self.asked.append((actor, wanted, cursor, limit))
        return StudyPage((LINE,), "next")


class Counters:
    def report(self, actor: Actor) -> Report:
        amount = Amount(3, 1024)
        recent = Activity(amount, amount, amount, (0,) * 59 + (3,))
        return Report(Totals(1, 2, 3, 4), recent)


@pytest.fixture
def directory() -> Directory:
    return Directory()


@pytest.fixture
def application(directory: Directory) -> FastAPI:
    return with_errors(
        [("", page.router)],
        {
            page.current_actor: lambda: ACTOR,
            page.study_directory: lambda: directory,
            page.activity_source: Counters,
            page.node_card: lambda: NodeCard('A"<&>', 11112, "0.1.0"),
        },
    )


@dataclass(frozen=True, slots=True)
class Client:
    """Asks one server."""

    url: str

    def get(self, path: str, **headers: str) -> Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return request(f"{self.url}{path}", headers=named)


@pytest.fixture
def client(application: FastAPI) -> Iterator[Client]:
    with serving(application) as url:
        yield Client(url)


def policy(header: str) -> dict[str, str]:
    parts = (part.strip().partition(" ") for part in header.split(";"))
    return {name: value for name, _, value in parts}


def test_the_page_allows_only_files_of_its_own(client: Client) -> None:
    found = client.get("/")

    rules = policy(found.headers["content-security-policy"])
    assert found.headers["content-type"] == "text/html; charset=utf-8"
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == "'self'"
    assert rules["frame-ancestors"] == rules["base-uri"] == "'none'"
    assert found.headers["x-content-type-options"] == "nosniff"
    assert found.headers["referrer-policy"] == "no-referrer"


def test_the_page_holds_nothing_that_the_policy_forbids(client: Client) -> None:
    text = client.get("/").text

    assert re.findall(r"<style|\sstyle=|\son[a-z]+=", text) == []
    assert re.findall(r"<script(?![^>]*\ssrc=)", text) == []
    assert re.findall(r"(?:src|href)=\"(?:https?:)?//", text) == []


def test_fields_of_the_search_have_no_names_to_send(client: Client) -> None:
    inputs = re.findall(r"<input[^>]*>", client.get("/").text)

    assert len(inputs) == 6
    assert [one for one in inputs if " name=" in one] == []


def test_values_of_the_node_are_escaped(client: Client) -> None:
    text = client.get("/").text

    assert 'data-aet="A&quot;&lt;&amp;&gt;"' in text
    assert 'data-dimse-port="11112"' in text
    assert "{{" not in text


def test_every_file_the_page_names_is_there_for_good(client: Client) -> None:
    named = re.findall(r'(?:src|href)="(/assets/[^"]+)"', client.get("/").text)

    assert {address.split("?")[0].rpartition("/")[2] for address in named} == set(TYPES)
    for address in named:
        found = client.get(address)
        assert found.status == 200
        assert "immutable" in found.headers["cache-control"]
        assert found.headers["content-type"] == TYPES[address[8:].split("?")[0]]
        assert found.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("version", ["", "?v=0000000000000000"])
def test_a_file_of_another_version_is_not_kept(client: Client, version: str) -> None:
    found = client.get(f"/assets/page.js{version}")

    assert found.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    "name",
    ["nothing.js", "index.html", "__init__.py", "..%2Fapp.py", "%2e%2e%2fapp.py"],
)
def test_nothing_else_is_served(client: Client, name: str) -> None:
    assert client.get(f"/assets/{name}").status == 404


@pytest.mark.parametrize("path", ["/", "/assets/page.css"])
def test_what_the_browser_has_is_not_sent_again(client: Client, path: str) -> None:
    etag = client.get(path).headers["etag"]

    for sent in (etag, f"W/{etag}", f'"other", {etag}'):
        found = client.get(path, If_None_Match=sent)
        assert (found.status, found.body) == (304, b"")
        assert found.headers["etag"] == etag
    assert client.get(path, If_None_Match='"other"').status == 200


def test_files_are_compressed_for_those_who_take_that(client: Client) -> None:
    plain = client.get("/assets/page.js")
    packed = client.get("/assets/page.js", Accept_Encoding="br, gzip")

    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(packed.body) == plain.body
    assert packed.headers["vary"] == "Accept-Encoding"


def test_head_tells_the_length_alone(client: Client) -> None:
    found = request(f"{client.url}/", method="HEAD")

    assert found.body == b""
    assert int(found.headers["content-length"]) == len(client.get("/").body)


def test_a_search_is_handed_on(client: Client, directory: Directory) -> None:
    query = urlencode(
        {
            "text": "wang 王",
            "name": "伟",
            "patient_id": "P1",
            "accession": "A1",
            "from": "2024-01-02",
            "to": "20240131",
            "modality": "CT, MR",
            "cursor": "abc",
            "limit": "20",
        }
    )

    found = client.get(f"/api/v1/study-list?{query}")

    wanted = StudySearch(
        text="wang 王",
        name="伟",
        patient_id="P1",
        accession="A1",
        date_from="20240102",
        date_to="20240131",
        modalities=("CT", "MR"),
    )
    assert found.status == 200
    assert directory.asked == [(ACTOR, wanted, "abc", 20)]


def test_the_list_is_json_that_nobody_keeps(client: Client) -> None:
    found = client.get("/api/v1/study-list")

    body: dict[str, Any] = found.json()
    assert found.headers["cache-control"] == "no-store"
    assert found.headers["x-content-type-options"] == "nosniff"
    assert body["cursor"] == "next"
    assert body["studies"][0]["patient_name"] == "Ji^Ye=𠮷^野"
    assert body["studies"][0]["modalities"] == ["CT", "SR"]
    assert list(body["studies"][0]) == list(StudyLine.__dataclass_fields__)


def test_a_page_is_bounded(client: Client, directory: Directory) -> None:
    client.get("/api/v1/study-list?limit=100000")

    assert directory.asked[0][3] == page.MAX_LIMIT


@pytest.mark.parametrize(
    "query",
    [
        "from=2024-0102",
        "to=yesterday",
        "from=%EF%BC%92024-01-02",
        "modality=CT%5CMR",
        "modality=%3Cscript%3E",
        "modality=TOO_LONG_FOR_A_CODE",
    ],
)
def test_a_malformed_field_is_refused(
    client: Client, directory: Directory, query: str
) -> None:
    assert client.get(f"/api/v1/study-list?{query}").status == 400
    assert directory.asked == []


@pytest.mark.parametrize("query", ["limit=0", "limit=x", f"text={'x' * 257}"])
def test_a_field_out_of_range_is_refused(
    client: Client, directory: Directory, query: str
) -> None:
    assert client.get(f"/api/v1/study-list?{query}").status == 400
    assert directory.asked == []


def test_activity_is_told(client: Client) -> None:
    body = client.get("/api/v1/activity").json()

    assert body["totals"] == {
        "studies": 1,
        "series": 2,
        "instances": 3,
        "size_bytes": 4,
    }
    assert body["recent"]["minute"] == {"instances": 3, "size_bytes": 1024}
    assert body["recent"]["per_minute"] == [0] * 59 + [3]


@pytest.mark.parametrize(
    "path", ["/", "/assets/page.js", "/api/v1/study-list", "/api/v1/activity"]
)
def test_nobody_sees_anything_without_saying_who_asks(
    application: FastAPI, client: Client, path: str
) -> None:
    def nobody() -> Actor:
        raise NotAuthenticated("log in")

    application.dependency_overrides[page.current_actor] = nobody

    assert client.get(path).status == 401
