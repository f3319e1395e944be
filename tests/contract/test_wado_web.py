"""WADO-RS over HTTP: instances, who may have them, methods (PS3.18 10.4)."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pydicom
import pytest
from pydicom.uid import (
    MPEG4HP41,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGLSLossless,
)

from tests.support.datasets import ct_slice, dataset_bytes, part10, uid
from tests.support.dicomweb import TENANT, WebArchive, split
from tests.support.wado import (
    BIG,
    DICOM,
    DOC,
    IMAGE,
    IMPLICIT,
    INSTANCE,
    JPEG,
    LSS,
    SERIES,
    STUDY,
    VIDEO,
    as_sent,
    get,
    image,
    wado_archive,
)
from tests.support.web import request


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebArchive]:
    with wado_archive(tmp_path_factory.mktemp("wado")) as served:
        yield served


@pytest.mark.parametrize(
    ("path", "count"),
    [(f"/studies/{STUDY}", 6), (f"/studies/{STUDY}/series/{SERIES}", 3), (IMAGE, 1)],
)
@pytest.mark.parametrize(
    "accept",
    [
        None,
        "*/*",
        DICOM,
        "multipart/related; type=application/dicom",
        f"{DICOM}; transfer-syntax=*",
        f'{DICOM}; transfer-syntax="1.2.840.10008.1.2.1"',
        f"text/html, {DICOM};q=0.1",
        'Multipart/Related; Type="application/dicom; transfer-syntax=*"',
    ],
)
def test_instances_come_as_multipart(
    web: WebArchive, path: str, count: int, accept: str | None
) -> None:
    answer = get(web, path, accept)

    assert answer.status == 200, answer.text
    assert answer.headers["content-type"].startswith(f"{DICOM}; boundary=")
    assert int(answer.headers["content-length"]) == len(answer.body)
    parts = split(answer)
    assert len(parts) == count
    headers, body = parts[0]
    assert headers["content-type"] == (
        "application/dicom; transfer-syntax=1.2.840.10008.1.2.1"
    )
    assert headers["content-location"] == f"/dicom-web{IMAGE}"
    assert int(headers["content-length"]) == len(body)
    assert dataset_bytes(body) == dataset_bytes(part10(ct_slice()))


def test_one_instance_can_come_as_a_single_part(web: WebArchive) -> None:
    answer = get(web, IMAGE, "application/dicom")

    assert answer.headers["content-type"].startswith("application/dicom;")
    assert dataset_bytes(answer.body) == dataset_bytes(part10(ct_slice()))


@pytest.mark.parametrize("seed", [IMPLICIT, BIG])
@pytest.mark.parametrize("accept", [None, f"{DICOM}; transfer-syntax=*"])
def test_implicit_and_big_endian_never_leave(
    web: WebArchive, seed: int, accept: str | None
) -> None:
    ((headers, body),) = split(get(web, image(seed), accept))

    assert headers["content-type"].endswith("=1.2.840.10008.1.2.1")
    file = pydicom.dcmread(io.BytesIO(body))
    assert file.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert file.PixelData == as_sent(seed)


@pytest.mark.parametrize(
    ("seed", "accept", "syntax"),
    [
        (LSS, f"{DICOM}; transfer-syntax=*", JPEGLSLossless),
        (LSS, f"{DICOM}; transfer-syntax={JPEGLSLossless}", JPEGLSLossless),
        (JPEG, None, JPEGBaseline8Bit),
        (VIDEO, None, MPEG4HP41),
        (1, f"{DICOM}; transfer-syntax=1.2.3, {DICOM};q=0.5", ExplicitVRLittleEndian),
        (DOC, f"{DICOM}; transfer-syntax={JPEGLSLossless}", ExplicitVRLittleEndian),
    ],
)
def test_c12_the_stored_syntax_leaves_where_it_is_asked_for(
    web: WebArchive, seed: int, accept: str | None, syntax: str
) -> None:
    ((headers, _),) = split(get(web, image(seed), accept))

    assert headers["content-type"] == f"application/dicom; transfer-syntax={syntax}"


@pytest.mark.parametrize(
    "accept",
    [
        f"{DICOM}; transfer-syntax={ImplicitVRLittleEndian}",
        f"{DICOM}; transfer-syntax={ExplicitVRBigEndian}",
        f"{DICOM}; transfer-syntax=1.2.3",
        f"{DICOM}; transfer-syntax={JPEGBaseline8Bit}",
        "image/png",
        f"{DICOM};q=0",
        "application/dicom+json",
    ],
)
@pytest.mark.parametrize("path", [IMAGE, f"/studies/{STUDY}"])
def test_c12_what_cannot_be_given_is_406_and_says_what_can(
    web: WebArchive, path: str, accept: str
) -> None:
    answer = get(web, path, accept)

    assert answer.status == 406
    assert answer.headers["content-type"] == "application/problem+json"
    assert "application/dicom" in answer.json()["detail"]


def test_c13_the_accept_parameter_wins(web: WebArchive) -> None:
    answer = get(web, f"{IMAGE}?accept=application/dicom", DICOM)

    assert answer.headers["content-type"].startswith("application/dicom;")


def test_the_file_is_what_was_stored(web: WebArchive) -> None:
    for seed, syntax in (
        (IMPLICIT, ImplicitVRLittleEndian),
        (BIG, ExplicitVRBigEndian),
    ):
        answer = request(f"{web.url}/api/v1/instances/{uid(seed, 1, 1)}/file")

        assert dataset_bytes(answer.body) == dataset_bytes(
            part10(ct_slice(seed=seed), syntax)
        )
        assert answer.headers["content-disposition"] == (
            f'attachment; filename="{uid(seed, 1, 1)}.dcm"'
        )
        assert answer.headers["accept-ranges"] == "bytes"


WRONG = [
    f"/studies/{uid(2)}/series/{SERIES}/instances/{INSTANCE}",
    f"/studies/{STUDY}/series/{uid(1, 2)}/instances/{INSTANCE}",
    f"/studies/{STUDY}/series/{SERIES}/instances/{uid(1, 2, 1)}",
    image(50),
]
SUFFIXES = [
    "", "/metadata", "/frames/1", "/bulkdata/7FE00010", "/bulkdata", "/pixeldata",
    "/rendered", "/thumbnail", "/frames/1/rendered",
]  # fmt: skip


@pytest.mark.parametrize("path", WRONG)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_c23_every_uid_must_own_the_next(
    web: WebArchive, path: str, suffix: str
) -> None:
    answer = get(web, path + suffix)
    nobody = get(web, image(99) + suffix)

    assert answer.status == nobody.status == 404
    assert answer.body == nobody.body


@pytest.mark.parametrize(
    "path",
    [
        f"/studies/{uid(50)}",
        f"/studies/{uid(50)}/metadata",
        f"/studies/{uid(50)}/pixeldata",
        f"/studies/{uid(50)}/series/{uid(50, 1)}",
        f"/studies/{uid(50)}/series/{uid(50, 1)}/metadata",
        f"/studies/{uid(50)}/rendered",
        f"/studies/{uid(50)}/bulkdata",
    ],
)
def test_c23_other_tenants_are_not_there(web: WebArchive, path: str) -> None:
    assert get(web, path).status == 404
    assert get(web, path, **{TENANT: "other"}).status != 404


def test_c23_metadata_of_one_tenant_never_hold_those_of_another(
    web: WebArchive,
) -> None:
    path = f"/studies/{STUDY}/series/{SERIES}/metadata"

    ours, theirs = get(web, path), get(web, path, **{TENANT: "other"})

    assert (len(ours.json()), len(theirs.json())) == (3, 1)


@pytest.mark.parametrize("name", ["1%202", "a*", "1" * 65, "%00", "..%2f..", "%ff"])
def test_c21_c22_paths_that_are_no_uids_are_refused(web: WebArchive, name: str) -> None:
    for path in (f"/studies/{name}", f"/studies/1/series/{name}/metadata"):
        assert get(web, path).status in {400, 404}


@pytest.mark.parametrize(
    "path",
    [IMAGE, f"/studies/{STUDY}", f"{IMAGE}/frames/1", f"{IMAGE}/metadata",
     f"/studies/{STUDY}/metadata"],
)  # fmt: skip
def test_c31_head_is_get_without_a_body(web: WebArchive, path: str) -> None:
    whole = get(web, path)

    head = request(web.dicomweb + path, method="HEAD")

    assert (head.status, head.body) == (200, b"")
    for name in ("etag", "content-length", "cache-control"):
        if name in whole.headers:
            assert head.headers[name] == whole.headers[name]
