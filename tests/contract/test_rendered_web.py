"""Rendered and thumbnail resources over HTTP (PS3.18 8.3.5, 10.4.1.1.3-4)."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import (
    MPEG4HP41,
    CTImageStorage,
    EncapsulatedPDFStorage,
    EnhancedSRStorage,
    JPEGLSLossless,
)

from storage.kernel.limits import Limits
from tests.support.datasets import ct_slice, part10, uid
from tests.support.dicomweb import TENANT, WebArchive, split, web_archive
from tests.support.wado import compressed, get, image, keep
from tests.support.web import Response, request

STUDY, SERIES = uid(1), uid(1, 1)
CT, MULTI, REPORT, DOC, VIDEO, BROKEN, STATE = 1, 2, 3, 4, 5, 6, 7
#: Rendered pictures, and animations, have at most so many pixels here.
MAX_PIXELS = 200_000


def ramp(**values: Any) -> Dataset:
    """Return a CT whose columns are -100, -99 ... 99 HU, over 100 rows."""
    ds = ct_slice(seed=CT, size=8, **values)
    hu = np.tile(np.arange(-100, 100), (100, 1))
    ds.Rows, ds.Columns = hu.shape
    ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 15, 0
    ds.RescaleIntercept, ds.RescaleSlope = -1024, 1
    ds.WindowCenter, ds.WindowWidth = 0, 100
    ds.PixelSpacing = [1, 1]
    ds.PixelData = (hu + 1024).astype("<u2").tobytes()
    return ds


def multi_frame() -> Dataset:
    frames = np.stack([np.full((10, 20), 40 * n, np.uint8) for n in range(5)])
    ds = ct_slice(
        seed=MULTI, size=2, NumberOfFrames=5, BitsAllocated=8, BitsStored=8, HighBit=7,
        PixelRepresentation=0, RescaleIntercept=0, RescaleSlope=1, WindowCenter=128,
        WindowWidth=256,
    )  # fmt: skip
    ds.Rows, ds.Columns = 10, 20
    ds.PixelData = frames.tobytes()
    return ds


def coded(meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator = "1", "99T"
    code.CodeMeaning = meaning
    return code


def report() -> Dataset:
    ds = ct_slice(seed=REPORT, PixelData=None, Rows=None, Columns=None)
    ds.SOPClassUID = EnhancedSRStorage
    ds.Modality, ds.ValueType = "SR", "CONTAINER"
    ds.PatientName = "Zhao^Ming=趙^明"
    ds.ConceptNameCodeSequence = [coded("胸部CT报告")]
    finding = Dataset()
    finding.RelationshipType, finding.ValueType = "CONTAINS", "TEXT"
    finding.ConceptNameCodeSequence = [coded("Finding")]
    finding.TextValue = "<script>alert(1)</script> 右肺结节"
    ds.ContentSequence = [finding]
    return ds


def document() -> Dataset:
    ds = ct_slice(seed=DOC, PixelData=None, Rows=None, Columns=None)
    ds.SOPClassUID = EncapsulatedPDFStorage
    ds.EncapsulatedDocument = b"%PDF-1.7\n\n"
    ds.MIMETypeOfEncapsulatedDocument = "application/pdf"
    return ds


def state() -> Dataset:
    """Return a presentation state of the ramp: window, inverse, a quarter turn."""
    ds = ct_slice(seed=CT, series=9, PixelData=None, Rows=None, Columns=None)
    ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.11.1"
    ds.Modality = "PR"
    for name in ("WindowCenter", "WindowWidth", "BitsAllocated"):
        if name in ds:
            delattr(ds, name)
    reference = Dataset()
    reference.ReferencedSOPClassUID = CTImageStorage
    reference.ReferencedSOPInstanceUID = uid(CT, 1, 1)
    series = Dataset()
    series.SeriesInstanceUID = SERIES
    series.ReferencedImageSequence = [reference]
    ds.ReferencedSeriesSequence = [series]
    voi = Dataset()
    voi.WindowCenter, voi.WindowWidth = "0", "200"
    ds.SoftcopyVOILUTSequence = [voi]
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = -1024, 1, "HU"
    ds.PresentationLUTShape = "INVERSE"
    ds.ImageRotation, ds.ImageHorizontalFlip = 90, "N"
    return ds


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebArchive]:
    folder = tmp_path_factory.mktemp("rendered")
    with web_archive(folder, limits=Limits(rendered_pixels=MAX_PIXELS)) as served:
        for number in (1, 2, 3):
            keep(served, part10(ramp(number=number)))
        keep(served, part10(multi_frame()))
        keep(served, part10(report()))
        keep(served, part10(document()))
        keep(served, part10(state()))
        keep(served, compressed(ct_slice(seed=VIDEO), [b"video" * 10], MPEG4HP41))
        keep(served, compressed(ct_slice(seed=BROKEN), [b"\xff\xd8x"], JPEGLSLossless))
        keep(served, part10(ct_slice(seed=50)), "other")
        yield served


def picture(response: Response) -> Image.Image:
    assert response.status == 200, response.body[:300]
    return Image.open(io.BytesIO(response.body))


def grey(response: Response) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Return the pixels of a grey picture as numbers."""
    return np.asarray(picture(response).convert("L"))


IMAGE = image(CT)
PNG = "image/png"


def test_an_image_is_a_jpeg_by_its_own_window(web: WebArchive) -> None:
    answer = get(web, f"{IMAGE}/rendered")

    pixels = grey(answer)
    assert answer.headers["content-type"] == "image/jpeg"
    assert pixels.shape == (100, 200)
    # -50 and below is black, 49 and above white: PS3.3 C.11.2.1.2.1.
    assert pixels[50, :40].max() <= 3
    assert pixels[50, 160:].min() >= 252


def test_png_has_the_very_values_of_the_window_function(web: WebArchive) -> None:
    pixels = grey(get(web, f"{IMAGE}/rendered?window=0,101,linear", PNG))

    hu = np.arange(-100, 100)
    expected = np.clip(((hu + 0.5) / 100 + 0.5) * 255, 0, 255)
    assert (pixels[7] == np.floor(expected + 0.5)).all()


@pytest.mark.parametrize(
    ("accept", "kind", "form"),
    [
        (None, "image/jpeg", "JPEG"),
        ("*/*", "image/jpeg", "JPEG"),
        ("image/*", "image/jpeg", "JPEG"),
        ("image/avif,image/webp,image/apng,*/*;q=0.8", "image/jpeg", "JPEG"),
        ("image/png", "image/png", "PNG"),
        ("image/png;q=0.5, image/jp2", "image/jp2", "JPEG2000"),
        ("image/gif", "image/gif", "GIF"),
    ],
)
def test_the_accepted_form_is_sent(
    web: WebArchive, accept: str | None, kind: str, form: str
) -> None:
    answer = get(web, f"{IMAGE}/rendered", accept)

    assert answer.headers["content-type"] == kind
    assert picture(answer).format == form


def test_c13_the_accept_parameter_wins(web: WebArchive) -> None:
    answer = get(web, f"{IMAGE}/rendered?accept=image/png", "image/jpeg")
    assert picture(answer).format == "PNG"


def test_what_cannot_be_given_is_406(web: WebArchive) -> None:
    for path, accept in (
        (f"{IMAGE}/rendered", "text/html"),
        (f"{IMAGE}/rendered", "video/mp4"),
        (f"{image(REPORT)}/rendered", "image/jpeg"),
        (f"{image(DOC)}/rendered", "image/jpeg"),
        (f"{image(VIDEO)}/rendered", "image/jpeg"),
        (f"{IMAGE}/thumbnail", "image/gif"),
    ):
        assert get(web, path, accept).status == 406, path


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("window=1,0,linear", "window"),
        ("window=1,0.5,linear", "window"),
        ("window=1,0,sigmoid", "window"),
        ("window=1,-3,linear-exact", "window"),
        ("window=NaN,1,linear", "window"),
        ("window=1,inf,linear", "window"),
        ("window=1e99,1,linear", "window"),
        ("window=1,2", "window"),
        ("window=1,2,cubic", "window"),
        ("window=", "window"),
        ("window=1,2,linear,3", "window"),
        ("viewport=0,0", "viewport"),
        ("viewport=100", "viewport"),
        ("viewport=-5,10", "viewport"),
        ("viewport=1e9,1e9", "viewport"),
        ("viewport=1000000000,1000000000", "viewport"),
        ("viewport=999999999,999999999", "viewport"),
        ("viewport=500,500", "viewport"),  # more than rendered_pixels
        ("viewport=10,10,200,0,1,1", "viewport"),
        ("viewport=10,10,0,0,201,100", "viewport"),
        ("viewport=10,10,0,0,0,0", "viewport"),
        ("viewport=10,10,-1,0", "viewport"),
        ("viewport=10,10,NaN", "viewport"),
        ("viewport=10,10,0,0,1,1,1", "viewport"),
        ("quality=0", "quality"),
        ("quality=101", "quality"),
        ("quality=1.5", "quality"),
        ("quality=x", "quality"),
        ("iccprofile=cmyk", "iccprofile"),
    ],
)
def test_c17_values_that_are_none_are_refused(
    web: WebArchive, query: str, name: str
) -> None:
    answer = get(web, f"{IMAGE}/rendered?{query}")

    assert answer.status == 400
    assert name in answer.json()["detail"]


def test_a_viewport_keeps_the_aspect_and_cuts_and_flips(web: WebArchive) -> None:
    path = f"{IMAGE}/rendered?window=0,200,linear-exact&viewport="
    assert picture(get(web, path + "400,100", PNG)).size == (200, 100)
    assert picture(get(web, path + "100,400", PNG)).size == (100, 50)
    assert picture(get(web, path + "50,50,100,0,50,50", PNG)).size == (50, 50)
    assert picture(get(web, path + "90,90,,,,", PNG)).size == (90, 45)

    part = grey(get(web, path + "50,50,100,0,50,50", PNG))
    flipped = grey(get(web, path + "50,50,100,0,-50,50", PNG))

    assert (flipped == part[:, ::-1]).all()
    # Column 100 is 0 HU: the middle of the window.
    assert part[0, 0] == 128
    assert part[0, 49] == np.floor((49 / 200 + 0.5) * 255 + 0.5)


def test_quality_makes_smaller_files_and_is_of_jpeg_only(web: WebArchive) -> None:
    path = f"{IMAGE}/rendered?quality="
    low, high = (len(get(web, path + n).body) for n in ("10", "100"))

    assert low < high
    assert get(web, path + "0", PNG).status == 200


def test_annotations_are_burned_in_and_unknown_ones_warned_of(web: WebArchive) -> None:
    path = f"{IMAGE}/rendered?viewport=400,400&annotation="
    plain = grey(get(web, path, PNG))
    patient = get(web, path + "patient", PNG)
    both = get(web, path + "patient,technique,price", PNG)

    assert (grey(patient) != plain).sum() > 50
    assert (grey(both) != grey(patient)).sum() > 50
    assert "warning" not in patient.headers
    assert both.headers["warning"].startswith("299 ")
    assert "annotation" in both.headers["warning"]


def test_parameters_that_nobody_knows_are_ignored(web: WebArchive) -> None:
    assert get(web, f"{IMAGE}/rendered?zoom=3&viewPort=x").status == 200


def test_c16_a_picture_is_immutable_and_answers_conditions(web: WebArchive) -> None:
    first = get(web, f"{IMAGE}/rendered?window=0,50,linear")
    etag = first.headers["etag"]

    again = get(web, f"{IMAGE}/rendered?window=0,50,linear", if_none_match=etag)
    other = get(web, f"{IMAGE}/rendered?window=0,60,linear", if_none_match=etag)
    png = get(web, f"{IMAGE}/rendered?window=0,50,linear", PNG, if_none_match=etag)

    assert "immutable" in first.headers["cache-control"]
    assert (again.status, again.body) == (304, b"")
    assert other.status == png.status == 200


def test_c31_head_is_get_without_a_body(web: WebArchive) -> None:
    for path in (
        f"{IMAGE}/rendered",
        f"{IMAGE}/thumbnail",
        f"/studies/{STUDY}/thumbnail",
    ):
        whole = get(web, path)
        head = request(web.dicomweb + path, method="HEAD")
        assert (head.status, head.body) == (200, b"")
        for name in ("etag", "content-length", "content-type", "cache-control"):
            assert head.headers[name] == whole.headers[name]


def test_frames_are_rendered_one_by_one_or_together(web: WebArchive) -> None:
    path = f"{image(MULTI)}/frames"
    for number in (1, 3, 5):
        pixels = grey(get(web, f"{path}/{number}/rendered", PNG))
        assert (pixels == round(40 * (number - 1) * 255 / 255)).all()

    parts = split(get(web, f"{path}/4,2/rendered", f'multipart/related; type="{PNG}"'))
    values = [np.asarray(Image.open(io.BytesIO(body)))[0, 0] for _, body in parts]
    assert values == [120, 40]
    places = [headers["content-location"] for headers, _ in parts]
    assert [place.rsplit("/", 2)[-2] for place in places] == ["4", "2"]

    moving = picture(get(web, f"{path}/1,2,5/rendered", "image/gif"))
    assert (moving.format, getattr(moving, "n_frames", 0)) == ("GIF", 3)


@pytest.mark.parametrize(
    ("frames", "status"),
    [("0", 400), ("1,1", 400), ("a", 400), ("1,,2", 400), ("6", 404), ("1,6", 404)],
)
def test_c14_frames_that_are_none_are_refused(
    web: WebArchive, frames: str, status: int
) -> None:
    assert get(web, f"{image(MULTI)}/frames/{frames}/rendered").status == status


def test_a_multi_frame_image_moves_unless_a_still_is_asked_for(web: WebArchive) -> None:
    moving = picture(get(web, f"{image(MULTI)}/rendered"))
    still = get(web, f"{image(MULTI)}/rendered", "image/jpeg")

    assert (moving.format, getattr(moving, "n_frames", 0)) == ("GIF", 5)
    assert abs(int(grey(still)[0, 0]) - 80) <= 1  # the middle frame


def test_an_animation_that_is_too_large_is_a_still(web: WebArchive) -> None:
    answer = get(web, f"{image(MULTI)}/rendered?viewport=400,400", "*/*")
    assert picture(answer).format == "JPEG"


def test_a_study_is_rendered_instance_by_instance_or_by_one(web: WebArchive) -> None:
    for path in (f"/studies/{STUDY}", f"/studies/{STUDY}/series/{SERIES}"):
        one = get(web, f"{path}/rendered")
        every = get(web, f"{path}/rendered", 'multipart/related; type="image/jpeg"')

        assert picture(one).format == "JPEG"
        assert "no-cache" in one.headers["cache-control"]
        assert len(split(every)) == 3
        for _, body in split(every):
            assert Image.open(io.BytesIO(body)).size == (200, 100)


def test_a_presentation_state_is_its_image_shown_by_it(web: WebArchive) -> None:
    path = f"/studies/{STUDY}/series/{uid(1, 9)}/instances/{uid(1, 9, 1)}"
    pixels = grey(get(web, f"{path}/rendered", PNG))

    # A quarter turn clockwise: the left column, -100 HU, is the upper row.
    assert pixels.shape == (200, 100)
    hu = np.arange(-100, 100)
    normal = np.clip((hu + 0.5) / 199 + 0.5, 0, 1)
    assert (pixels[:, 9] == np.floor((1 - normal) * 255 + 0.5)).all()
    assert picture(get(web, f"{path}/thumbnail")).size == (128, 256)


def test_a_report_is_a_page_without_scripts_or_plain_text(web: WebArchive) -> None:
    page = get(web, f"{image(REPORT)}/rendered")
    text = get(web, f"{image(REPORT)}/rendered", "text/plain")

    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "sandbox" in page.headers["content-security-policy"]
    assert "<script" not in page.text
    assert "&lt;script&gt;" in page.text
    for told in (page.text, text.text):
        assert "胸部CT报告" in told
        assert "右肺结节" in told
        assert "趙 明" in told


def test_a_pdf_and_a_video_come_as_they_are(web: WebArchive) -> None:
    pdf = get(web, f"{image(DOC)}/rendered")
    video = get(web, f"{image(VIDEO)}/rendered")
    part = get(web, f"{image(VIDEO)}/rendered", range="bytes=5-9")

    assert pdf.body == b"%PDF-1.7\n\n"
    assert pdf.headers["content-type"] == "application/pdf"
    assert pdf.headers["x-content-type-options"] == "nosniff"
    assert (video.headers["content-type"], video.body) == ("video/mp4", b"video" * 10)
    assert (part.status, part.body) == (206, b"video")


def test_c18_what_has_no_picture_says_so(web: WebArchive) -> None:
    for seed in (REPORT, DOC, VIDEO):
        assert get(web, f"{image(seed)}/thumbnail").status == 406
        assert get(web, f"{image(seed)}/frames/1/rendered").status == 406
        assert get(web, f"/studies/{uid(seed)}/thumbnail").status == 406


def test_a19_what_cannot_be_decoded_is_422(web: WebArchive) -> None:
    for suffix in ("rendered", "thumbnail", "frames/1/rendered"):
        assert get(web, f"{image(BROKEN)}/{suffix}").status == 422
    assert get(web, f"{IMAGE}/rendered").status == 200


@pytest.mark.parametrize("suffix", ["", "/series/{1}", "/series/{1}/instances/{2}"])
def test_thumbnails_at_every_level(web: WebArchive, suffix: str) -> None:
    path = f"/studies/{STUDY}" + suffix.format("", SERIES, uid(1, 1, 1))

    assert picture(get(web, f"{path}/thumbnail")).size == (256, 128)
    assert picture(get(web, f"{path}/thumbnail?viewport=50,50")).size == (50, 25)
    for bad in ("0,5", "50", "10,10,0,0,5,5", "999999,999999"):
        assert get(web, f"{path}/thumbnail?viewport={bad}").status == 400


def test_a_thumbnail_of_a_frame_shows_that_frame(web: WebArchive) -> None:
    pixels = grey(get(web, f"{image(MULTI)}/frames/5/thumbnail", PNG))
    assert (pixels == 160).all()
    assert get(web, f"{image(MULTI)}/frames/1,2/thumbnail").status == 400


@pytest.mark.parametrize(
    "path",
    [
        "{1}/rendered", "{1}/thumbnail", "{2}/rendered", "{2}/thumbnail",
        "{3}/rendered", "{3}/thumbnail", "{3}/frames/1/rendered",
        "{3}/frames/1/thumbnail",
    ],
)  # fmt: skip
def test_c23_other_tenants_are_not_there(web: WebArchive, path: str) -> None:
    study, series = f"/studies/{uid(50)}", f"/studies/{uid(50)}/series/{uid(50, 1)}"
    full = path.format("", study, series, image(50))

    assert get(web, full).status == 404
    assert get(web, full, **{TENANT: "other"}).status == 200
    assert get(web, full.replace(uid(50), uid(51))).status == 404


def test_thumbnails_of_a_settled_study_are_kept_and_used(web: WebArchive) -> None:
    before = get(web, f"/studies/{STUDY}/series/{SERIES}/thumbnail")

    assert web.archive.thumbnails.prepare(STUDY, "default") == 1
    for pid in web.archive.decoders.pids():
        os.kill(pid, signal.SIGSTOP)
    try:
        kept = [
            get(web, f"/studies/{STUDY}{suffix}/thumbnail")
            for suffix in ("", f"/series/{SERIES}")
        ]
    finally:
        for pid in web.archive.decoders.pids():
            os.kill(pid, signal.SIGCONT)

    # Nothing was rendered: they are what was kept.
    assert [one.body for one in kept] == [before.body] * 2
    assert [one.headers["etag"] for one in kept] == [before.headers["etag"]] * 2


def test_a21_a_worker_killed_in_mid_request_costs_that_request(tmp_path: Path) -> None:
    import threading

    from tests.support.waiting import wait_until

    with web_archive(tmp_path) as served:
        keep(served, part10(ramp()))
        assert get(served, f"{IMAGE}/rendered").status == 200
        (victim,) = served.archive.decoders.pids()
        os.kill(victim, signal.SIGSTOP)
        answers: list[Response] = []
        thread = threading.Thread(
            target=lambda: answers.append(
                get(served, f"{IMAGE}/rendered?window=1,2,sigmoid")
            )
        )
        thread.start()
        wait_until(lambda: served.archive.decoders.pids() == [], "the worker's request")
        os.kill(victim, signal.SIGKILL)
        thread.join()

        assert answers[0].status == 503
        assert get(served, f"{IMAGE}/rendered?window=1,2,sigmoid").status == 200
