"""WADO-RS over HTTP: instances, metadata, frames, bulk data (PS3.18 10.4)."""

from __future__ import annotations

import gzip
import hashlib
import io
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    MPEG4HP41,
    EncapsulatedPDFStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from pacs.domain.study import Arrival
from pacs.imaging.part10 import read_file_meta
from storage.kernel.types import DEFAULT_TENANT, Actor, Digest, Door, Source, TenantId
from tests.support.datasets import a_study, ct_slice, dataset_bytes, part10, uid
from tests.support.dicomweb import TENANT, WebArchive, split, web_archive
from tests.support.web import Response, request

JSON = "application/dicom+json"
DICOM = 'multipart/related; type="application/dicom"'
OCTETS = 'multipart/related; type="application/octet-stream"'
AS_STORED = f"{OCTETS}; transfer-syntax=*"
PDF = b"%PDF-1.4 <script>alert(1)</script>"

STUDY, SERIES, INSTANCE = uid(1), uid(1, 1), uid(1, 1, 1)
IMAGE = f"/studies/{STUDY}/series/{SERIES}/instances/{INSTANCE}"
IMPLICIT, BIG, LSS, JPEG, VIDEO, MULTI, DOC, RGB = range(2, 10)


def keep(web: WebArchive, file: bytes, tenant: str = DEFAULT_TENANT) -> None:
    """Put a Part-10 file into the archive."""
    meta = read_file_meta(file)
    assert meta is not None
    data = file[meta.dataset_offset :]
    web.archive.ingest.accept(
        Arrival(
            Actor(TenantId(tenant), "test"),
            Source(Door.WEB),
            meta.transfer_syntax_uid,
            memoryview(data),
            Digest(hashlib.sha256(data).digest()),
        )
    )


def compressed(ds: Dataset, frames: list[bytes], syntax: str) -> bytes:
    ds.PixelData = encapsulate(frames)
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    return part10(ds, syntax)


def document() -> Dataset:
    ds = ct_slice(seed=DOC, PixelData=None, Rows=None, Columns=None)
    ds.SOPClassUID = EncapsulatedPDFStorage
    ds.EncapsulatedDocument = PDF
    ds.MIMETypeOfEncapsulatedDocument = "application/pdf"
    return ds


#: Two RLE frames of 2 by 2 bytes: header of one segment, one literal run of four.
RLE_FRAMES = [
    (1).to_bytes(4, "little") + (64).to_bytes(4, "little") + bytes(56)
    + b"\x03" + bytes(value) + b"\x00"
    for value in ([1, 2, 3, 4], [5, 6, 7, 8])
]  # fmt: skip


def multi_frame() -> Dataset:
    return ct_slice(
        seed=MULTI, size=2, NumberOfFrames=2, BitsAllocated=8, BitsStored=8, HighBit=7
    )


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebArchive]:
    with web_archive(tmp_path_factory.mktemp("wado")) as served:
        for ds in a_study(seed=1, n_series=2, n_instances=3):
            keep(served, part10(ds))
        keep(served, part10(ct_slice(seed=IMPLICIT), ImplicitVRLittleEndian))
        keep(served, part10(ct_slice(seed=BIG), ExplicitVRBigEndian))
        keep(served, compressed(ct_slice(seed=LSS), [b"\xff\xd8ls"], JPEGLSLossless))
        keep(served, compressed(ct_slice(seed=JPEG), [b"\xff\xd8jp"], JPEGBaseline8Bit))
        keep(
            served, compressed(ct_slice(seed=VIDEO), [b"video" * 9 + b"\0"], MPEG4HP41)
        )
        keep(served, compressed(multi_frame(), RLE_FRAMES, RLELossless))
        keep(served, part10(document()))
        keep(served, part10(ct_slice(seed=1)), "other")
        keep(served, part10(ct_slice(seed=50)), "other")
        yield served


def get(
    web: WebArchive, path: str, accept: str | None = None, **headers: str
) -> Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if accept is not None:
        named["Accept"] = accept
    return request(web.dicomweb + path, headers=named)


def image(seed: int) -> str:
    return f"/studies/{uid(seed)}/series/{uid(seed, 1)}/instances/{uid(seed, 1, 1)}"


def pixels(seed: int = 1, series: int = 1, number: int = 1) -> bytes:
    return bytes(ct_slice(seed=seed, series=series, number=number).PixelData)


def as_sent(seed: int) -> bytes:
    """Return pixels in little endian; the big endian file was written unswapped."""
    if seed != BIG:
        return pixels(seed)
    return np.frombuffer(pixels(seed), dtype="<u2").byteswap().tobytes()


# Instances


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
        f"{DICOM}; transfer-syntax={JPEGLSLossless}",
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


# Who owns what


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


# Metadata


def named(answer: Response) -> list[str]:
    return [item["00080018"]["Value"][0] for item in answer.json()]


def test_metadata_of_a_series_come_in_order(web: WebArchive) -> None:
    answer = get(web, f"/studies/{STUDY}/series/{SERIES}/metadata")

    assert answer.headers["content-type"] == JSON
    assert named(answer) == [uid(1, 1, n) for n in (1, 2, 3)]
    (first, *_) = answer.json()
    assert first["00100010"]["Value"] == [
        {"Alphabetic": "Test1^Case", "Ideographic": "测试^1"}
    ]
    assert first["7FE00010"] == {
        "vr": "OW", "BulkDataURI": f"/dicom-web{IMAGE}/bulkdata/7FE00010",
    }  # fmt: skip


def test_metadata_are_sent_compressed_to_who_takes_it(web: WebArchive) -> None:
    path = f"/studies/{STUDY}/series/{SERIES}/metadata"

    plain = get(web, path, accept_encoding="gzip;q=0, identity")
    packed = get(web, path, accept_encoding="br, gzip")

    assert packed.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in plain.headers
    assert gzip.decompress(packed.body) == plain.body
    assert packed.headers["etag"] != plain.headers["etag"]


def test_metadata_of_a_study_are_those_of_its_series(web: WebArchive) -> None:
    answer = get(web, f"/studies/{STUDY}/metadata")

    assert named(answer) == [uid(1, s, n) for s in (1, 2) for n in (1, 2, 3)]


def test_metadata_of_an_instance_are_an_array_of_one(web: WebArchive) -> None:
    answer = get(web, f"{IMAGE}/metadata")

    assert (
        answer.json()
        == get(web, f"/studies/{STUDY}/series/{SERIES}/metadata").json()[:1]
    )


def test_metadata_can_be_xml(web: WebArchive) -> None:
    for path in (f"{IMAGE}/metadata", f"/studies/{STUDY}/series/{SERIES}/metadata"):
        answer = get(web, path, 'multipart/related; type="application/dicom+xml"')

        headers, body = split(answer)[0]
        assert headers["content-type"] == "application/dicom+xml"
        assert ET.fromstring(body).tag.endswith("NativeDicomModel")  # noqa: S314


def test_c16_new_instances_give_new_metadata_and_a_new_tag(web: WebArchive) -> None:
    paths = (f"/studies/{uid(60)}/series/{uid(60, 1)}/metadata",
             f"/studies/{uid(60)}/metadata")  # fmt: skip
    for number in (1, 2):
        keep(web, part10(ct_slice(seed=60, number=number)))
        for path in paths:
            answer = get(web, path)
            assert len(answer.json()) == number
            tag = answer.headers["etag"]
            assert get(web, path, if_none_match=tag).status == 304
            assert get(web, path, if_none_match='"old"').status == 200
    keep(web, part10(ct_slice(seed=60, number=3)))
    for path in paths:
        assert get(web, path, if_none_match=tag).status == 200


def test_metadata_can_be_prepared(web: WebArchive) -> None:
    for series in (1, 2):
        keep(web, part10(ct_slice(seed=61, series=series)))

    assert web.archive.retrieve.prepare_metadata(uid(61), "default") == 2
    assert web.archive.retrieve.prepare_metadata(uid(61), "other") == 0


@pytest.mark.parametrize("path", [f"{IMAGE}", f"{IMAGE}/frames/1", f"{IMAGE}/metadata"])
@pytest.mark.parametrize(
    ("condition", "status"),
    [
        ("{tag}", 304),
        ("W/{tag}", 304),
        ('"x", {tag}', 304),
        ("*", 304),
        ('"x"', 200),
        ("", 200),
    ],
)
def test_c16_what_the_client_has_is_304(
    web: WebArchive, path: str, condition: str, status: int
) -> None:
    first = get(web, path)

    answer = get(web, path, if_none_match=condition.format(tag=first.headers["etag"]))

    assert answer.status == status
    assert answer.headers["etag"] == first.headers["etag"]
    if status == 304:
        assert answer.body == b""


def test_c16_if_modified_since_compares_times(web: WebArchive) -> None:
    modified = get(web, IMAGE).headers["last-modified"]

    assert get(web, IMAGE, if_modified_since=modified).status == 304
    early = "Mon, 01 Jan 2001 00:00:00 GMT"
    assert get(web, IMAGE, if_modified_since=early).status == 200
    assert get(web, IMAGE, if_modified_since="nonsense").status == 200


# Frames


@pytest.mark.parametrize(
    "accept", [None, "*/*", OCTETS, f"{OCTETS}; transfer-syntax=*"]
)
def test_a_frame_comes_as_multipart(web: WebArchive, accept: str | None) -> None:
    answer = get(web, f"{IMAGE}/frames/1", accept)

    ((headers, body),) = split(answer)
    assert body == pixels()
    assert headers["content-type"] == (
        "application/octet-stream; transfer-syntax=1.2.840.10008.1.2.1"
    )
    assert headers["content-location"] == f"/dicom-web{IMAGE}/frames/1"
    assert "immutable" in answer.headers["cache-control"]


def test_a_frame_can_come_as_a_single_part(web: WebArchive) -> None:
    answer = get(web, f"{IMAGE}/frames/1", "application/octet-stream")

    assert answer.body == pixels()


def test_frames_come_in_the_order_asked_for(web: WebArchive) -> None:
    for frames, order in (("1,2", [0, 1]), ("2,1", [1, 0]), ("2%2C1", [1, 0])):
        answer = get(
            web, f"{image(MULTI)}/frames/{frames}", f"{OCTETS}; transfer-syntax=*"
        )
        assert [body for _, body in split(answer)] == [RLE_FRAMES[i] for i in order]


@pytest.mark.parametrize("seed", [IMPLICIT, BIG])
def test_frames_are_little_endian(web: WebArchive, seed: int) -> None:
    ((_, body),) = split(get(web, f"{image(seed)}/frames/1"))

    assert body == as_sent(seed)


def test_compressed_frames_are_decoded_unless_asked_for(web: WebArchive) -> None:
    decoded = split(get(web, f"{image(MULTI)}/frames/1,2"))
    stored = get(web, f"{image(MULTI)}/frames/1", "image/dicom-rle")
    both = split(
        get(web, f"{image(MULTI)}/frames/1,2",
            'multipart/related; type="image/dicom-rle"')
    )  # fmt: skip

    assert [body for _, body in decoded] == [bytes([1, 2, 3, 4]), bytes([5, 6, 7, 8])]
    assert stored.body == RLE_FRAMES[0]
    assert stored.headers["content-type"] == (
        f"image/dicom-rle; transfer-syntax={RLELossless}"
    )
    assert [body for _, body in both] == RLE_FRAMES


def test_lossy_frames_and_video_come_as_stored(web: WebArchive) -> None:
    ((headers, body),) = split(get(web, f"{image(JPEG)}/frames/1"))
    assert body == b"\xff\xd8jp"
    assert headers["content-type"].endswith(f"transfer-syntax={JPEGBaseline8Bit}")
    ((headers, body),) = split(get(web, f"{image(VIDEO)}/frames/1"))
    assert body.startswith(b"video")
    assert headers["content-type"].startswith("video/mp4")


@pytest.mark.parametrize(
    ("frames", "status"),
    [
        ("0", 400), ("-1", 400), ("1,1", 400), ("1,,2", 400), ("a", 400), (",", 400),
        ("1,", 400), ("9999999999", 400), ("99999", 404), ("1,2", 404),
        (",".join(map(str, range(1, 10_001))), 400),
    ],
)  # fmt: skip
def test_c14_lists_of_frames(web: WebArchive, frames: str, status: int) -> None:
    assert get(web, f"{IMAGE}/frames/{frames}").status == status


def test_pixels_that_cannot_be_decoded_are_422_and_can_be_had_as_stored(
    web: WebArchive,
) -> None:
    broken = get(web, f"{image(LSS)}/frames/1")
    stored = get(web, f"{image(LSS)}/frames/1", "image/jls")

    assert broken.status == 422
    assert broken.headers["content-type"] == "application/problem+json"
    assert stored.body == b"\xff\xd8ls"


def test_frames_of_what_has_none_are_404(web: WebArchive) -> None:
    assert get(web, f"{image(DOC)}/frames/1").status == 404


@pytest.mark.parametrize("accept", ["image/png", f"{OCTETS};q=0", "image/jpeg"])
def test_frames_in_another_form_are_406(web: WebArchive, accept: str) -> None:
    assert get(web, f"{IMAGE}/frames/1", accept).status == 406


def test_native_colour_that_is_subsampled_has_two_samples_a_pixel(
    web: WebArchive,
) -> None:
    ds = ct_slice(
        seed=70, size=4, SamplesPerPixel=3, BitsAllocated=8, BitsStored=8, HighBit=7,
        PhotometricInterpretation="YBR_FULL_422", PlanarConfiguration=0,
        NumberOfFrames=2, PixelData=bytes(range(64)),
    )  # fmt: skip
    keep(web, part10(ds))

    ((_, second),) = split(get(web, f"{image(70)}/frames/2"))

    assert second == bytes(range(32, 64))


# Bulk data


def test_the_bulk_data_of_metadata_can_be_fetched(web: WebArchive) -> None:
    uri = get(web, f"{IMAGE}/metadata").json()[0]["7FE00010"]["BulkDataURI"]

    single = request(web.url + uri, headers={"Accept": "application/octet-stream"})
    ((headers, body),) = split(request(web.url + uri))

    assert single.body == body == pixels()
    assert headers["content-location"] == uri


def test_a49_documents_are_only_offered_for_saving(web: WebArchive) -> None:
    for accept in (None, "application/pdf", "application/octet-stream", OCTETS):
        answer = get(web, f"{image(DOC)}/bulkdata/00420011", accept)

        assert answer.status == 200
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-disposition"].startswith("attachment")
        assert "sandbox" in answer.headers["content-security-policy"]
    answer = get(web, f"{image(DOC)}/bulkdata/00420011")
    assert answer.headers["content-type"] == "application/pdf"
    assert answer.body.rstrip(b"\0") == PDF


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("00100099", 404), ("00080005/1/00100010", 404), ("nonsense", 400),
        ("..%2f..%2fetc", 400), ("7FE00010/0/00100010", 400),
    ],
)  # fmt: skip
def test_bulk_data_that_are_not_there(web: WebArchive, path: str, status: int) -> None:
    assert get(web, f"{IMAGE}/bulkdata/{path}").status == status


@pytest.mark.parametrize(
    ("path", "count"),
    [
        (f"/studies/{STUDY}/pixeldata", 6),
        (f"/studies/{STUDY}/series/{SERIES}/pixeldata", 3),
        (f"{IMAGE}/pixeldata", 1),
        (f"{image(MULTI)}/pixeldata", 2),
        (f"/studies/{STUDY}/bulkdata", 6),
        (f"/studies/{STUDY}/series/{SERIES}/bulkdata", 3),
        (f"{IMAGE}/bulkdata", 1),
    ],
)
def test_all_bulk_data_come_one_after_another(
    web: WebArchive, path: str, count: int
) -> None:
    parts = split(get(web, path))

    assert len(parts) == count
    expected = RLE_FRAMES[0] if uid(MULTI) in path else pixels()
    assert parts[0][1] == expected


# Ranges


RANGES = [
    ("bytes=0-0", 206, (0, 1)),
    ("bytes=5-9", 206, (5, 10)),
    ("bytes=-10", 206, (-10, None)),
    ("bytes=0-", 206, (0, None)),
    ("bytes=10-999999999", 206, (10, None)),
    ("bytes=-999999999", 206, (0, None)),
    ("bytes=999999999-", 416, None),
    ("bytes=-0", 416, None),
    ("bytes=9-5", 200, (0, None)),
    ("bytes=0-1,4-5", 200, (0, None)),
    ("items=0-1", 200, (0, None)),
    ("bytes=a-b", 200, (0, None)),
    ("bytes=-", 200, (0, None)),
]


@pytest.mark.parametrize(("asked", "status", "part"), RANGES)
@pytest.mark.parametrize(
    ("path", "accept"),
    [
        (f"{IMAGE}/frames/1", "application/octet-stream"),
        (f"{IMAGE}/bulkdata/7FE00010", "application/octet-stream"),
        (IMAGE, "application/dicom"),
    ],
)
def test_c15_ranges(
    web: WebArchive, path: str, accept: str, asked: str, status: int, part: Any
) -> None:
    whole = get(web, path, accept)

    answer = get(web, path, accept, range=asked)

    assert answer.status == status
    size = len(whole.body)
    if part is None:
        assert answer.headers["content-range"] == f"bytes */{size}"
        return
    assert answer.body == whole.body[slice(*part)]
    if status == 206:
        start = (part[0] + size) % size
        stop = size if part[1] is None else part[1]
        assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"


def test_c15_ranges_of_multipart_are_ignored(web: WebArchive) -> None:
    assert get(web, IMAGE, DICOM, range="bytes=0-9").status == 200


def test_c15_a_range_of_something_else_is_not_honoured(web: WebArchive) -> None:
    path, accept = f"{IMAGE}/frames/1", "application/octet-stream"
    tag = get(web, path, accept).headers["etag"]

    same = get(web, path, accept, range="bytes=0-9", if_range=tag)
    other = get(web, path, accept, range="bytes=0-9", if_range='"other"')

    assert (same.status, len(same.body)) == (206, 10)
    assert (other.status, len(other.body)) == (200, len(pixels()))


def test_c15_every_range_of_fragments_is_what_it_says(web: WebArchive) -> None:
    ds = ct_slice(seed=71)
    ds.PixelData = encapsulate([bytes(range(100))], fragments_per_frame=3)
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    keep(web, part10(ds, JPEGBaseline8Bit))
    source = web.archive.retrieve.open_frame(
        web.archive.retrieve.find_instance(
            Actor(DEFAULT_TENANT, "test"), uid(71, 1, 1)
        ),
        1,
    )

    whole = source.read(0, source.length)
    assert whole[:100] == bytes(range(100))
    made = np.random.default_rng(1)
    for _ in range(200):
        start, stop = sorted(made.integers(0, source.length + 1, 2))
        assert source.read(int(start), int(stop - start)) == whole[start:stop]


# Methods


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


@pytest.mark.parametrize("suffix", ["/rendered", "/thumbnail", "/frames/1/rendered"])
def test_rendered_forms_say_that_they_come_later(web: WebArchive, suffix: str) -> None:
    answer = get(web, IMAGE + suffix)

    assert answer.status == 406
    assert "rendering service" in answer.json()["detail"]
