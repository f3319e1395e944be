"""STOW-RS over HTTP (PS3.18 10.5)."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import orjson
import pydicom
import pytest

from storage.kernel.errors import DependencyDown, StorageFull
from storage.kernel.limits import KIB, MIB, Limits
from tests.support.datasets import a_study, ct_slice, dataset_bytes, part10, uid
from tests.support.dicomweb import TENANT, WebArchive, multipart, split, web_archive
from tests.support.web import Response, request

JSON = "application/dicom+json"
LIMITS = Limits(memory_instance_bytes=64 * KIB, instance_bytes=4 * MIB)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebArchive]:
    with web_archive(tmp_path_factory.mktemp("stow"), limits=LIMITS) as served:
        yield served


def post(
    web: WebArchive,
    parts: list[Any],
    *,
    kind: str = "application/dicom",
    study: str = "",
    **headers: str,
) -> Response:
    body, named = multipart(parts, kind=kind)
    path = f"{web.dicomweb}/studies" + (f"/{study}" if study else "")
    return request(path, method="POST", body=body, headers=named | headers)


def values(answer: Response, sequence: str, tag: str) -> list[Any]:
    """Return the first value of `tag` of each item."""
    items = answer.json().get(sequence, {"Value": []})["Value"]
    return [item[tag]["Value"][0] for item in items]


def stored_file(web: WebArchive, instance_uid: str, **headers: str) -> Response:
    return request(f"{web.url}/api/v1/instances/{instance_uid}/file", headers=headers)


def test_a_study_is_stored_and_every_instance_named_in_order(web: WebArchive) -> None:
    study = a_study(seed=1, n_instances=20)

    answer = post(web, [part10(ds) for ds in study])

    assert answer.status == 200
    assert answer.headers["content-type"] == JSON
    assert values(answer, "00081199", "00081155") == [ds.SOPInstanceUID for ds in study]
    assert answer.json()["00081190"]["Value"] == [f"/dicom-web/studies/{uid(1)}"]
    assert "00081198" not in answer.json()
    first = answer.json()["00081199"]["Value"][0]
    assert first["00081190"]["Value"] == [
        f"/dicom-web/studies/{uid(1)}/series/{uid(1, 1)}/instances/{uid(1, 1, 1)}"
    ]
    for ds in study:
        kept = stored_file(web, ds.SOPInstanceUID)
        assert dataset_bytes(kept.body) == dataset_bytes(part10(ds))


def test_the_same_instance_twice_is_no_failure(web: WebArchive) -> None:
    file = part10(ct_slice(seed=2))

    first, again = post(web, [file]), post(web, [file, file])

    assert (first.status, again.status) == (200, 200)
    assert len(values(again, "00081199", "00081155")) == 2


def test_other_content_under_a_known_uid_is_refused(web: WebArchive) -> None:
    post(web, [part10(ct_slice(seed=3))])

    answer = post(web, [part10(ct_slice(seed=3, PatientName="Other"))])

    assert answer.status == 409
    assert values(answer, "00081198", "00081197") == [0x0111]


@pytest.mark.parametrize("size", [100, 300, 1000])
def test_large_instances_go_through_a_spool(web: WebArchive, size: int) -> None:
    ds = ct_slice(seed=4, number=size, size=size)

    answer = post(web, [part10(ds)])

    assert answer.status == 200
    kept = stored_file(web, ds.SOPInstanceUID)
    assert dataset_bytes(kept.body) == dataset_bytes(part10(ds))


def test_an_instance_beyond_the_limit_fails_alone(web: WebArchive) -> None:
    answer = post(
        web,
        [
            part10(ct_slice(seed=5, number=1, size=2000)),
            part10(ct_slice(seed=5, number=2)),
        ],
    )

    assert answer.status == 202
    assert values(answer, "00081198", "00081155") == [uid(5, 1, 1)]
    assert values(answer, "00081198", "00081197") == [0xA700]
    assert values(answer, "00081199", "00081155") == [uid(5, 1, 2)]
    assert stored_file(web, uid(5, 1, 1)).status == 404
    partial = web.archive.folder.rglob("*.partial")
    assert list(partial) == []


def test_an_instance_beyond_the_limit_alone_is_413(web: WebArchive) -> None:
    answer = post(web, [part10(ct_slice(seed=6, size=2000))])

    assert answer.status == 413


def test_a_warning_makes_it_202_and_names_the_attribute(web: WebArchive) -> None:
    answer = post(web, [part10(ct_slice(seed=7, PatientID=None))])

    assert answer.status == 202
    assert values(answer, "00081199", "00081196") == [0xB007]
    (item,) = answer.json()["00081199"]["Value"]
    (failed,) = item["00741048"]["Value"]
    assert failed["00720026"]["Value"] == ["00100020"]


def test_a_single_part_body_is_one_instance(web: WebArchive) -> None:
    answer = request(
        f"{web.dicomweb}/studies",
        method="POST",
        body=part10(ct_slice(seed=8)),
        headers={"Content-Type": "application/dicom"},
    )

    assert answer.status == 200
    assert values(answer, "00081199", "00081155") == [uid(8, 1, 1)]


def test_chunked_bodies_are_taken(web: WebArchive) -> None:
    body, headers = multipart([part10(ct_slice(seed=9, size=200))])
    pieces = (body[i : i + 999] for i in range(0, len(body), 999))

    answer = request(
        f"{web.dicomweb}/studies", method="POST", body=pieces, headers=headers
    )

    assert answer.status == 200


def test_the_answer_can_be_xml(web: WebArchive) -> None:
    answer = post(
        web, [part10(ct_slice(seed=10)), b"x" * 200], Accept="application/dicom+xml"
    )

    assert answer.status == 202
    assert answer.headers["content-type"] == "application/dicom+xml"
    root = ET.fromstring(answer.body)  # noqa: S314
    tags = [element.get("tag") for element in root]
    assert tags == ["00081190", "00081199", "0008119A"]


def test_an_answer_nobody_takes_is_refused_before_storing(web: WebArchive) -> None:
    answer = post(web, [part10(ct_slice(seed=11))], Accept="text/html")

    assert answer.status == 406
    assert stored_file(web, uid(11, 1, 1)).status == 404


def test_what_arrives_belongs_to_the_tenant_of_the_sender(web: WebArchive) -> None:
    file = part10(ct_slice(seed=12))

    answer = post(web, [file], **{TENANT: "other"})

    assert answer.status == 200
    assert stored_file(web, uid(12, 1, 1)).status == 404
    assert stored_file(web, uid(12, 1, 1), **{TENANT: "other"}).status == 200


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("text/plain", 415),
        ("", 415),
        ("multipart/form-data; boundary=x", 415),
        ('multipart/related; type="application/dicom+xml"; boundary=x', 415),
        ("application/dicom+xml", 415),
        ('multipart/related; type="application/dicom"', 400),
    ],
)
def test_other_bodies_are_refused_with_a_reason(
    web: WebArchive, content_type: str, status: int
) -> None:
    answer = request(
        f"{web.dicomweb}/studies",
        method="POST",
        body=b"--x--",
        headers={"Content-Type": content_type},
    )

    assert answer.status == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["detail"]


def as_json(ds: pydicom.Dataset, **bulk: str) -> bytes:
    attributes = ds.to_json_dict()
    for tag, uri in bulk.items():
        vr = attributes[tag.strip("t")]["vr"]
        attributes[tag.strip("t")] = {"vr": vr, "BulkDataURI": uri}
    return orjson.dumps([attributes])


def metadata(body: bytes) -> tuple[str, bytes]:
    return f"Content-Type: {JSON}", body


def bulk(kind: str, location: str, body: bytes) -> tuple[str, bytes]:
    return f"Content-Type: {kind}\r\nContent-Location: {location}", body


def test_metadata_and_bulk_data_make_an_instance(web: WebArchive) -> None:
    ds = ct_slice(seed=20)

    answer = post(
        web,
        [
            metadata(as_json(ds, t7FE00010="pixels")),
            bulk("application/octet-stream", "pixels", ds.PixelData),
        ],
        kind=JSON,
    )

    assert answer.status == 200, answer.text
    kept = pydicom.dcmread(web_file(web, uid(20, 1, 1)), force=True)
    assert kept.PixelData == ds.PixelData
    assert kept.PatientName == ds.PatientName
    assert kept.file_meta.TransferSyntaxUID == pydicom.uid.ExplicitVRLittleEndian


def web_file(web: WebArchive, instance_uid: str) -> Any:
    return io.BytesIO(stored_file(web, instance_uid).body)


def test_compressed_bulk_data_are_encapsulated(web: WebArchive) -> None:
    ds = ct_slice(seed=21, NumberOfFrames=2)
    frames = [b"\xff\xd8\xff\xf7" + bytes(98), b"\xff\xd8\xff\xf7" + bytes(50)]

    answer = post(
        web,
        [
            metadata(as_json(ds, t7FE00010="p")),
            *(bulk("image/jls", "p", frame) for frame in frames),
        ],
        kind=JSON,
    )

    assert answer.status in {200, 202}, answer.text
    kept = pydicom.dcmread(web_file(web, uid(21, 1, 1)))
    assert kept.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.4.80"
    found = list(pydicom.encaps.generate_frames(kept.PixelData, number_of_frames=2))
    assert found == frames


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b'"text"',
        b"[" * 2000 + b"]" * 2000,
    ],
)
def test_c10_metadata_that_are_no_metadata_are_400(
    web: WebArchive, body: bytes
) -> None:
    assert post(web, [metadata(body)], kind=JSON).status == 400


def broken_json(change: str) -> bytes:
    attributes = orjson.loads(as_json(ct_slice(seed=22)))[0]
    if change == "dangling":
        attributes["7FE00010"] = {"vr": "OW", "BulkDataURI": "nowhere"}
    elif change == "vr":
        attributes["00280010"] = {"vr": "LO", "Value": ["x"]}
    elif change == "base64":
        attributes["7FE00010"] = {"vr": "OW", "InlineBinary": "***"}
    elif change == "tag":
        attributes["nonsense"] = {"vr": "LO", "Value": ["x"]}
    else:
        inner: dict[str, Any] = {"00100020": {"vr": "LO", "Value": ["deep"]}}
        for _ in range(100):
            inner = {"00400275": {"vr": "SQ", "Value": [inner]}}
        attributes.update(inner)
    return json.dumps([attributes]).encode()


@pytest.mark.parametrize("change", ["dangling", "vr", "base64", "tag", "depth"])
def test_c10_broken_metadata_fail_and_their_neighbour_is_stored(
    web: WebArchive, change: str
) -> None:
    number = 30 + len(change)
    good = ct_slice(seed=23, number=number)
    both = b"[" + broken_json(change)[1:-1] + b"," + as_json(good)[1:]

    answer = post(web, [metadata(both)], kind=JSON)

    assert answer.status == 202, answer.text
    assert values(answer, "0008119A", "00081197") == [0xC000]
    assert values(answer, "00081199", "00081155") == [uid(23, 1, number)]
    assert stored_file(web, uid(22, 1, 1)).status == 404


def test_the_answer_of_many_failures_says_why_without_patient_data(
    web: WebArchive,
) -> None:
    secret = ct_slice(seed=24, SeriesInstanceUID=None, PatientName="Secret^Name")

    answer = post(web, [part10(secret), b"", b"no dicom" * 30])

    assert answer.status == 409
    assert b"Secret" not in answer.body
    assert values(answer, "00081198", "00081197") == [0xA900]
    assert values(answer, "0008119A", "00081197") == [0xC000, 0xC000]
    (item,) = answer.json()["00081198"]["Value"]
    assert "0020,000E" in item["00091001"]["Value"][0]


def test_inline_binary_is_data(web: WebArchive) -> None:
    attributes = orjson.loads(as_json(ct_slice(seed=25)))[0]
    attributes["00091010"] = {
        "vr": "OB", "InlineBinary": base64.b64encode(b"abcd").decode(),
    }  # fmt: skip
    attributes["00090010"] = {"vr": "LO", "Value": ["TEST"]}

    answer = post(web, [metadata(orjson.dumps(attributes))], kind=JSON)

    assert answer.status == 200, answer.text
    kept = pydicom.dcmread(web_file(web, uid(25, 1, 1)))
    assert kept[0x00091010].value == b"abcd"


def test_what_was_stored_can_be_retrieved_as_multipart(web: WebArchive) -> None:
    study = a_study(seed=26, n_instances=2)
    post(web, [part10(ds) for ds in study], study=uid(26))

    answer = request(f"{web.dicomweb}/studies/{uid(26)}")

    bodies = [dataset_bytes(body) for _, body in split(answer)]
    assert bodies == [dataset_bytes(part10(ds)) for ds in study]


def test_files_of_an_empty_folder_start_an_archive(tmp_path: Path) -> None:
    with web_archive(tmp_path) as web:
        assert post(web, [part10(ct_slice())]).status == 200


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (StorageFull("full"), 507),
        (DependencyDown("down"), 503),
        (ValueError("a bug"), 409),
    ],
)
def test_when_nothing_can_be_stored_the_status_says_whose_fault_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    def fail(_arrival: object) -> None:
        raise error

    with web_archive(tmp_path) as web:
        with monkeypatch.context() as patched:
            patched.setattr(web.archive.ingest, "accept", fail)
            answer = post(web, [part10(ct_slice())])

        assert answer.status == status
        assert ("retry-after" in answer.headers) == (status == 503)
        assert b"a bug" not in answer.body
        assert post(web, [part10(ct_slice())]).status == 200
