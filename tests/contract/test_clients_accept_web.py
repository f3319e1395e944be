"""What real clients say they accept, and what they get (PS3.18 8.7)."""
# ruff: noqa: E501  headers are quoted as they are sent

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.dicomweb import WebArchive
from tests.support.wado import IMAGE, MULTI, SERIES, STUDY, get, image, wado_archive

FRAME = f"{IMAGE}/frames/1"
SERIES_PATH = f"/studies/{STUDY}/series/{SERIES}"
JSON = "application/dicom+json"
LE = "1.2.840.10008.1.2.1"


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebArchive]:
    with wado_archive(tmp_path_factory.mktemp("clients")) as served:
        yield served


#: Client, path, Accept, and how Content-Type begins.
CLIENTS = [
    # OHIF and Cornerstone: unquoted types, any syntax.
    ("ohif", FRAME, "multipart/related; type=application/octet-stream; transfer-syntax=*", 'multipart/related; type="application/octet-stream"'),
    ("ohif", FRAME, "multipart/related; type=image/jphc; transfer-syntax=1.2.840.10008.1.2.4.202",
     'multipart/related; type="image/jphc"'),
    ("ohif", FRAME, "multipart/related; type=application/octet-stream; transfer-syntax=1.2.840.10008.1.2.1",
     'multipart/related; type="application/octet-stream"'),
    ("ohif", f"{SERIES_PATH}/metadata", JSON, JSON),
    ("ohif", f"/studies/{STUDY}/series", "application/dicom+json", JSON),
    ("cornerstone", FRAME, "application/octet-stream; transfer-syntax=*",
     f"application/octet-stream; transfer-syntax={LE}"),
    ("cornerstone", FRAME, "multipart/related; type=image/jpeg; q=0.9, multipart/related; type=application/octet-stream; q=0.5, */*;q=0.1",
     'multipart/related; type="image/jpeg"'),
    # Weasis: one type with several syntaxes, best first; XML for searches.
    ("weasis", IMAGE, 'multipart/related; type="application/dicom";transfer-syntax=*, multipart/related;type=application/dicom;q=0.5',
     'multipart/related; type="application/dicom"'),
    ("weasis", f"/studies/{STUDY}/series",
     'multipart/related; type="application/dicom+xml"',
     'multipart/related; type="application/dicom+xml"'),
    ("weasis", IMAGE, "application/dicom;transfer-syntax=1.2.840.10008.1.2.4.70,application/dicom;q=0.9", "application/dicom; transfer-syntax=1.2.840.10008.1.2.4.70"),
    # dcm4che's wadors and stowrs.
    ("dcm4che", IMAGE, "multipart/related;type=application/dicom",
     'multipart/related; type="application/dicom"'),
    ("dcm4che", f"{IMAGE}/metadata", "application/json", JSON),
    ("dcm4che", f"{IMAGE}/metadata",
     "multipart/related;type=application/dicom+xml",
     'multipart/related; type="application/dicom+xml"'),
    # Orthanc as a client of DICOMweb.
    ("orthanc", IMAGE, 'multipart/related; type="application/dicom"',
     'multipart/related; type="application/dicom"'),
    ("orthanc", f"/studies/{STUDY}", "multipart/related; type=application/dicom; transfer-syntax=*", 'multipart/related; type="application/dicom"'),
    ("orthanc", "/studies", "application/dicom+json, application/json", JSON),
    # dicomweb-client: quoted types and syntaxes, all it knows in one header.
    ("dicomweb-client", FRAME, 'multipart/related; type="application/octet-stream"; transfer-syntax="1.2.840.10008.1.2.1"',
     'multipart/related; type="application/octet-stream"'),
    ("dicomweb-client", image(MULTI) + "/frames/1,2",
     'multipart/related; type="image/dicom-rle"; transfer-syntax="*"',
     'multipart/related; type="image/dicom-rle"'),
    ("dicomweb-client", FRAME, 'multipart/related; type="image/jls"; transfer-syntax="1.2.840.10008.1.2.4.80", multipart/related; type="image/jp2"; transfer-syntax="1.2.840.10008.1.2.4.90"',
     'multipart/related; type="image/jls"'),
    ("dicomweb-client", IMAGE, 'multipart/related; type="application/dicom"; transfer-syntax="*"', 'multipart/related; type="application/dicom"'),
    # Browsers, curl, and those who say nothing.
    ("browser", f"/studies/{STUDY}/series",
     "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8",
     JSON),
    ("browser", f"{SERIES_PATH}/metadata", "text/html,*/*;q=0.8", JSON),
    ("fetch", FRAME, "*/*", 'multipart/related; type="application/octet-stream"'),
    ("curl", "/studies", "*/*", JSON),
    ("nobody", "/studies", None, JSON),
    ("nobody", FRAME, None, 'multipart/related; type="application/octet-stream"'),
    ("nobody", f"{SERIES_PATH}/metadata", "", JSON),
    # Odd, and still clear.
    ("odd", FRAME, "application/*", 'multipart/related; type="application/octet'),
    ("odd", FRAME, "image/*", "image/jpeg"),
    ("odd", FRAME, "image/png, image/jls;q=0.1", "image/jls"),
    ("odd", FRAME, "MULTIPART/RELATED ; TYPE=IMAGE/JLS",
     'multipart/related; type="image/jls"'),
    ("odd", "/studies", "application/dicom+json;q=0.2;charset=utf-8, text/plain", JSON),
    ("odd", "/studies", ",,, application/dicom+json ,", JSON),
]  # fmt: skip


@pytest.mark.parametrize(("client", "path", "accept", "kind"), CLIENTS)
def test_clients_get_what_they_ask_for(
    web: WebArchive, client: str, path: str, accept: str | None, kind: str
) -> None:
    answer = get(web, path, accept)

    assert answer.status == 200, answer.text
    assert answer.headers["content-type"].startswith(kind), client


@pytest.mark.parametrize(
    ("path", "query", "kind"),
    [
        ("/studies", "accept=application/dicom%2Bjson", JSON),
        ("/studies", "accept=application/dicom+json", JSON),
        (FRAME, "accept=image/jls", "image/jls"),
        (FRAME, "accept=image%2Fjphc%3B+transfer-syntax%3D1.2.840.10008.1.2.4.202",
         "image/jphc; transfer-syntax=1.2.840.10008.1.2.4.202"),
        (f"/studies/{STUDY}", "accept=application/zip", "application/zip"),
    ],
)  # fmt: skip
def test_the_parameter_wins_over_the_header(
    web: WebArchive, path: str, query: str, kind: str
) -> None:
    answer = get(web, f"{path}?{query}", "image/png, text/html")

    assert answer.status == 200, answer.text
    assert answer.headers["content-type"].startswith(kind)
