"""WADO-RS over HTTP: frames, bulk data, ranges (PS3.18 10.4.1.1)."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from pacs.imaging.codecs import DecoderPool, DecodeSpec
from pacs.imaging.encoders import ENCODERS
from storage.kernel.errors import DependencyDown
from storage.kernel.types import DEFAULT_TENANT, Actor
from tests.support.datasets import ct_slice, part10, uid
from tests.support.dicomweb import WebArchive, split
from tests.support.wado import (
    BIG,
    DICOM,
    DOC,
    IMAGE,
    IMPLICIT,
    JPEG,
    LSS,
    MULTI,
    OCTETS,
    PDF,
    RLE_FRAMES,
    SERIES,
    STUDY,
    VIDEO,
    as_sent,
    get,
    image,
    keep,
    pixels,
    wado_archive,
)
from tests.support.web import request


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebArchive]:
    with wado_archive(tmp_path_factory.mktemp("wado")) as served:
        yield served


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


@pytest.mark.parametrize(
    "accept",
    [
        "image/png",
        f"{OCTETS};q=0",
        "image/jpx",
        "image/jxl",
        "video/mp4",
        f"image/jpeg; transfer-syntax={JPEGBaseline8Bit}",
        f"image/jpeg; transfer-syntax={JPEGLSLossless}",
        f"{OCTETS}; transfer-syntax={ImplicitVRLittleEndian}",
        f"{OCTETS}; transfer-syntax=1.2.3",
    ],
)
def test_frames_in_another_form_are_406_and_say_which_there_are(
    web: WebArchive, accept: str
) -> None:
    answer = get(web, f"{IMAGE}/frames/1", accept)

    assert answer.status == 406
    for form in (
        "application/octet-stream; transfer-syntax=1.2.840.10008.1.2.1",
        f"image/jls; transfer-syntax={JPEGLSLossless}",
        f"image/jphc; transfer-syntax={HTJ2KLosslessRPCL}",
    ):
        assert form in answer.json()["detail"]


#: Media type, its transfer syntax when none is named, others that can be.
ENCODED = [
    ("image/jpeg", JPEGLosslessSV1, [JPEGLossless]),
    ("image/jls", JPEGLSLossless, []),
    ("image/jp2", JPEG2000Lossless, []),
    ("image/jphc", HTJ2KLossless, [HTJ2KLosslessRPCL]),
    ("image/dicom-rle", RLELossless, []),
]


@pytest.mark.parametrize(("media_type", "default", "others"), ENCODED)
@pytest.mark.parametrize("form", ["single", "multipart"])
def test_frames_are_encoded_as_asked_for(
    web: WebArchive, media_type: str, default: str, others: list[str], form: str
) -> None:
    kind = f'multipart/related; type="{media_type}"'
    if form == "single":
        kind = media_type
    named_too = [(other, other) for other in others]
    for wanted, syntax in (("", default), ("*", default), *named_too):
        named = f"; transfer-syntax={wanted}" if wanted else ""

        answer = get(web, f"{IMAGE}/frames/1", kind + named)

        assert answer.status == 200, answer.text
        headers, body = dict(answer.headers), answer.body
        if form == "multipart":
            ((headers, body),) = split(answer)
        assert headers["content-type"] == f"{media_type}; transfer-syntax={syntax}"
        spec = DecodeSpec(32, 32, 1, 16, 16)
        assert web.archive.decoders.decode(body, syntax, spec) == pixels()


def test_an_encoded_frame_can_be_had_in_ranges_and_is_not_made_for_304(
    web: WebArchive, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, accept = (
        f"{IMAGE}/frames/1",
        f"image/jphc; transfer-syntax={HTJ2KLosslessRPCL}",
    )
    whole = get(web, path, accept)
    ends = [int(end) for end in whole.headers["resolution-offsets"].split(", ")]
    tag = whole.headers["etag"]

    part = get(web, path, accept, range=f"bytes=0-{ends[0] - 1}", if_range=tag)

    assert (part.status, part.body) == (206, whole.body[: ends[0]])

    def busy(*_: object) -> None:
        raise DependencyDown("decoders are busy")

    monkeypatch.setattr(DecoderPool, "ask", busy)
    assert get(web, path, accept, if_none_match=tag).status == 304
    assert get(web, path, accept).status == 503


def test_instances_are_encoded_as_asked_for(web: WebArchive) -> None:
    for syntax in ENCODERS:
        ((headers, body),) = split(
            get(web, IMAGE, f"{DICOM}; transfer-syntax={syntax}")
        )

        assert headers["content-type"] == f"application/dicom; transfer-syntax={syntax}"
        file = pydicom.dcmread(io.BytesIO(body))
        assert file.file_meta.TransferSyntaxUID == syntax
        assert file.SOPInstanceUID == uid(1, 1, 1)
        ((_, native),) = split(get(web, f"{IMAGE}/frames/1"))
        (frame,) = generate_frames(file.PixelData, number_of_frames=1)
        spec = DecodeSpec(32, 32, 1, 16, file.BitsStored)
        assert web.archive.decoders.decode(frame, syntax, spec) == native


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
