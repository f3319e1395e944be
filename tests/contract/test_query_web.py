"""QIDO-RS over HTTP: parameters, forms, warnings (PS3.18 8.3.4, 10.6)."""

from __future__ import annotations

import http.client
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from typing import Any
from xml.etree import ElementTree as ET

import orjson
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse

from pacs.services.policy import AccessPolicy
from pacs.services.query import QueryService
from pacs.web import dependencies, search
from pacs.web.native_xml import NAMESPACE, native_model
from storage.db import migrate
from storage.db.engine import Database
from storage.kernel.errors import InvalidInput, Unsupported
from storage.kernel.limits import Limits
from storage.kernel.types import Actor, Role, TenantId
from tests.support.dicomweb import NoPeers
from tests.support.populated import Made, populate

ACTOR = Actor(TenantId("default"), "test", roles=frozenset({Role.OPEN}))
JSON = "application/dicom+json"
XML = 'multipart/related; type="application/dicom+xml"'
STUDIES = [
    Made(uid="1.1", patient_id="P1", name="Wang^Wei=王^伟", study_date="20240103"),
    Made(uid="1.2", patient_id="P2", name="=张^三", study_date="20240102"),
    Made(
        uid="1.3",
        patient_id="P3",
        name="<script>&\x07^%",
        modalities=("MR", "SR"),
        study_date="20240101",
    ),
]


@dataclass
class Answer:
    """A response, read whole."""

    status_code: int
    headers: Message
    content: bytes

    @property
    def text(self) -> str:
        return self.content.decode()

    def json(self) -> Any:
        return orjson.loads(self.content)

    @property
    def next(self) -> str:
        """The path of the next page, if there is one."""
        found = re.fullmatch(
            r'<http://testserver([^>]*)>; rel="next"', self.headers.get("link", "")
        )
        return found[1] if found else ""


class Client:
    """Sends paths exactly as they are written."""

    def __init__(self, port: int) -> None:
        self._port = port

    def get(self, path: str, headers: dict[str, str] | None = None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=20)
        try:
            connection.request("GET", path, headers=headers or {})
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read())
        finally:
            connection.close()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    url = f"sqlite:///{tmp_path_factory.mktemp('qido') / 'index.db'}"
    migrate.upgrade(url)
    database = Database(url)
    populate(database, STUDIES)
    service = QueryService(database=database, limits=Limits())
    policy = AccessPolicy(our_aes={}, peers=NoPeers(), open_access=True)
    app = FastAPI()

    @app.exception_handler(InvalidInput)
    async def refuse(_request: Request, error: InvalidInput) -> PlainTextResponse:
        status = 406 if isinstance(error, Unsupported) else 400
        return PlainTextResponse(str(error), status)

    app.include_router(search.router, prefix="/dicom-web")
    app.dependency_overrides = {
        dependencies.current_actor: lambda: ACTOR,
        search.query_service: lambda: service,
        dependencies.access_policy: lambda: policy,
        dependencies.base_url: lambda: dependencies.BaseUrl("http://testserver"),
    }
    config = uvicorn.Config(app, port=0, log_level="error", ws="none", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield Client(server.servers[0].sockets[0].getsockname()[1])
    server.should_exit = True
    thread.join()
    database.close()


def uids(client: Client, path: str, tag: str = "0020000D") -> list[str]:
    answer = client.get(f"/dicom-web{path}")
    if answer.status_code == 204:
        assert answer.content == b""
        return []
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == JSON
    return [row[tag]["Value"][0] for row in answer.json()]


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/studies", ["1.1", "1.2", "1.3"]),
        ("/studies?PatientID=P1", ["1.1"]),
        ("/studies?00100020=P1", ["1.1"]),
        ("/studies?PatientID=", ["1.1", "1.2", "1.3"]),
        ("/studies?StudyInstanceUID=1.1,1.3", ["1.1", "1.3"]),
        ("/studies?StudyInstanceUID=1.1%5C1.3", ["1.1", "1.3"]),
        ("/studies?StudyInstanceUID=1.1&StudyInstanceUID=1.2", ["1.1", "1.2"]),
        ("/studies?ModalitiesInStudy=MR,US", ["1.3"]),
        ("/studies?StudyDate=20240102-", ["1.1", "1.2"]),
        ("/studies?PatientName=%E7%8E%8B*", ["1.1"]),
        ("/studies?PatientName=zhang+san&fuzzymatching=true", ["1.2"]),
        ("/studies?PatientName=%25", []),
        ("/studies?PatientName=*%25", ["1.3"]),
        ("/studies?PatientName=%2525", []),
        ("/studies?limit=1", ["1.1"]),
        ("/studies?limit=1&offset=1", ["1.2"]),
        ("/studies?offset=9", []),
        ("/studies?limit=0", []),
        ("/studies?orderby=StudyDate", ["1.3", "1.2", "1.1"]),
        ("/studies?orderby=%2BStudyDate", ["1.3", "1.2", "1.1"]),
        ("/studies?orderby=-PatientID", ["1.3", "1.2", "1.1"]),
        ("/series?Modality=SR", ["1.3"]),
        ("/series?RequestAttributesSequence.ScheduledProcedureStepID=S1&PatientID=P1",
         ["1.1"]),
        ("/series?00400275.00401001=R2", []),
        ("/studies/1.3/series", ["1.3", "1.3"]),
        ("/studies/1.3/series?Modality=MR", ["1.3"]),
        ("/studies/9.9/series", []),
        ("/studies/1.1/instances", ["1.1", "1.1"]),
        ("/studies/1.1/series/1.1.1/instances?InstanceNumber=2", ["1.1"]),
        ("/studies/1.2/series/1.1.1/instances", []),
        ("/instances?SOPInstanceUID=1.1.1.1", ["1.1"]),
    ],
)  # fmt: skip
def test_parameters_select(client: Client, path: str, found: list[str]) -> None:
    assert uids(client, path) == found


@pytest.mark.parametrize(
    "query",
    [
        "NoSuchKeyword=1",
        "0010002=1",
        "00100099=1",
        "PatientName.GivenName=x",
        "PatientID.PatientName=x",
        "A.B.C.D.E.F.G.H.I.J=1",
        "limit=-1",
        "limit=1e12",
        "limit=x",
        "limit=",
        "offset=x",
        "offset=-1",
        "offset=999999999999999999999",
        "fuzzymatching=perhaps",
        "includefield=Nonsense",
        "orderby=Nonsense",
        "cursor=Nonsense",
        "PatientID=P1&PatientID=P2",
        "StudyDate=2024*",
        "StudyDate=-",
        "StudyInstanceUID=a%20b",
        "PatientID=%00",
        "PatientID=%C0%AF",
        "PatientID=%FF",
        "PatientID=%zz",
        "%ff=1",
        "=1",
        "&".join(f"0009{n:04x}=1" for n in range(300)),
    ],
)
def test_c19_c21_malformed_queries_are_400(client: Client, query: str) -> None:
    answer = client.get(f"/dicom-web/studies?{query}")

    assert answer.status_code == 400
    assert "P2" not in answer.text


@pytest.mark.parametrize(
    ("query", "warning"),
    [
        ("00091001=x", "(0009,1001)"),
        ("PatientAge=030Y", "(0010,1010)"),
        ("Modality=CT", "(0008,0060)"),
        ("OtherPatientIDsSequence.PatientID=x", "within this sequence"),
        ("limit=1000000000000", "reduced to 1000"),
        ("limit=2", "There are additional results that can be requested."),
        ("multiplevaluematching=true", "multiplevaluematching parameter is not"),
        ("includefield=PatientAge", "not indexed"),
    ],
)
def test_c19_what_is_legal_but_not_done_is_said(
    client: Client, query: str, warning: str
) -> None:
    answer = client.get(f"/dicom-web/studies?{query}")

    assert answer.status_code == 200
    said = answer.headers.get_all("warning") or []
    assert len(said) == 1
    assert said[0].startswith("299 http://testserver/dicom-web: ")
    assert warning in said[0]


@pytest.mark.parametrize("path", ["/studies/..%2f1/series", "/studies/1*/series"])
def test_c21_paths_that_are_no_uids_are_refused(client: Client, path: str) -> None:
    assert client.get(f"/dicom-web{path}").status_code in {400, 404}


def test_everything_is_allowed_at_instance_level(client: Client) -> None:
    (row, _) = client.get(
        "/dicom-web/studies/1.1/series/1.1.1/instances?includefield=all"
    ).json()

    assert list(row) == sorted(row)
    assert row["00080016"]["Value"] == ["1.2.840.10008.5.1.4.1.1.2"]


def test_included_fields_of_upper_levels_come_with_the_row(client: Client) -> None:
    (row,) = client.get(
        "/dicom-web/studies/1.1/series?includefield=PatientName,00081030"
        "&includefield=RequestAttributesSequence.ScheduledProcedureStepID"
    ).json()

    assert row["00100010"]["Value"] == [
        {"Alphabetic": "Wang^Wei", "Ideographic": "王^伟"}
    ]
    assert "00400275" in row


def test_the_link_header_leads_through_all_pages(client: Client) -> None:
    seen: list[str] = []
    path = "/dicom-web/studies?limit=1&PatientID=P*"
    while path:
        answer = client.get(path)
        seen += [row["0020000D"]["Value"][0] for row in answer.json()]
        path = answer.next

    assert seen == ["1.1", "1.2", "1.3"]


def test_totals_are_given_when_known_or_asked_for(client: Client) -> None:
    known = client.get("/dicom-web/studies")
    unknown = client.get("/dicom-web/studies?limit=1")
    asked = client.get("/dicom-web/studies?limit=1&totalcount=true")

    assert known.headers["x-total-count"] == "3"
    assert "x-total-count" not in unknown.headers
    assert asked.headers["x-total-count"] == "3"


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        (None, JSON),
        ("", JSON),
        ("*/*", JSON),
        ("application/json", JSON),
        ("application/*;q=0.5", JSON),
        ("text/html, application/dicom+json;q=0.1", JSON),
        (XML, "multipart"),
        ("multipart/related; type=application/dicom+xml", "multipart"),
        (f"application/dicom+json;q=0.2, {XML};q=0.8", "multipart"),
        (f"{XML};q=0, */*;q=0.1", JSON),
    ],
)
def test_c11_the_best_acceptable_form_is_chosen(
    client: Client, accept: str | None, form: str
) -> None:
    headers = {} if accept is None else {"accept": accept}

    answer = client.get("/dicom-web/studies", headers=headers)

    assert answer.headers["content-type"].startswith(form)


@pytest.mark.parametrize("accept", ["text/html", "image/png", f"{JSON};q=0"])
def test_c11_nothing_acceptable_is_406(client: Client, accept: str) -> None:
    answer = client.get("/dicom-web/studies", headers={"accept": accept})

    assert answer.status_code == 406
    assert JSON in answer.text


def test_c13_the_accept_parameter_wins(client: Client) -> None:
    answer = client.get(
        "/dicom-web/studies?accept=application/dicom%2Bjson", headers={"accept": XML}
    )

    assert answer.headers["content-type"] == JSON


def test_xml_parts_say_the_same(client: Client) -> None:
    answer = client.get("/dicom-web/studies", headers={"accept": XML})
    boundary = answer.headers["content-type"].partition("boundary=")[2]
    parts = answer.content.split(f"--{boundary}".encode())

    assert len(parts) == 5
    assert parts[-1].startswith(b"--")
    root = ET.fromstring(parts[3].partition(b"\r\n\r\n")[2])  # noqa: S314
    named = {
        element.get("keyword"): element
        for element in root.iter(f"{{{NAMESPACE}}}DicomAttribute")
    }
    family = named["PatientName"].find(f".//{{{NAMESPACE}}}FamilyName")
    assert family is not None
    assert family.text == "<script>&\ufffd"
    values = named["ModalitiesInStudy"].findall(f"{{{NAMESPACE}}}Value")
    assert [(value.get("number"), value.text) for value in values] == [
        ("1", "MR"),
        ("2", "SR"),
    ]


def test_native_xml_writes_every_kind_of_value() -> None:
    document = native_model(
        {
            "00091001": {"vr": "LO", "Value": ["a", None, "b"]},
            "00400275": {"vr": "SQ", "Value": [{"00400009": {"vr": "SH"}}, {}]},
            "7FE00010": {"vr": "OW", "BulkDataURI": '/x?a="b"&c'},
            "00420011": {"vr": "OB", "InlineBinary": "AAE="},
        }
    ).decode()

    assert '<DicomAttribute tag="00091001" vr="LO"><Value number="1">a' in document
    assert '<Value number="3">b</Value>' in document
    assert '<Item number="2"></Item>' in document
    assert "<BulkData uri='/x?a=\"b\"&amp;c'/>" in document
    assert "<InlineBinary>AAE=</InlineBinary>" in document
    ET.fromstring(document)  # noqa: S314


def test_warnings_and_links_cannot_break_out_of_their_header() -> None:
    parsed = search.parse_query(b"limit=1&0009%31001=%0D%0ASet-Cookie:x")

    assert parsed.search.keys == {0x00091001: "\r\nSet-Cookie:x"}
