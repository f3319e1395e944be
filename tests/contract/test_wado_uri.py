"""WADO-URI over HTTP (PS3.18 9)."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from storage.kernel.limits import Limits
from tests.contract.test_rendered_web import (
    CT,
    DOC,
    MAX_PIXELS,
    MULTI,
    REPORT,
    document,
    multi_frame,
    ramp,
    report,
    state,
)
from tests.support.datasets import ct_slice, part10, uid
from tests.support.dicomweb import TENANT, WebArchive, web_archive
from tests.support.wado import RLE_FRAMES, compressed, keep
from tests.support.wado import multi_frame as small_frames
from tests.support.web import Response, request

PNG = "image/png"
RLE = 8


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebArchive]:
    folder = tmp_path_factory.mktemp("uri")
    with web_archive(folder, limits=Limits(rendered_pixels=MAX_PIXELS)) as served:
        keep(served, part10(ramp(), ImplicitVRLittleEndian))
        for made in (multi_frame(), report(), document(), state()):
            keep(served, part10(made))
        ds = small_frames()
        ds.StudyInstanceUID, ds.SeriesInstanceUID = uid(RLE), uid(RLE, 1)
        ds.SOPInstanceUID = uid(RLE, 1, 1)
        keep(served, compressed(ds, RLE_FRAMES, RLELossless))
        keep(served, part10(ct_slice(seed=50)), "other")
        yield served


def ask(
    web: WebArchive,
    seed: int = CT,
    *,
    accept: str | None = None,
    headers: dict[str, str] | None = None,
    method: str = "GET",
    **parameters: Any,
) -> Response:
    query = {
        "requestType": "WADO",
        "studyUID": uid(seed),
        "seriesUID": uid(seed, 1),
        "objectUID": uid(seed, 1, 1),
        **parameters,
    }
    given = {name: value for name, value in query.items() if value is not None}
    named = dict(headers or {}, **({"Accept": accept} if accept else {}))
    return request(f"{web.url}/wado?{urlencode(given)}", headers=named, method=method)


def grey(response: Response) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    assert response.status == 200, response.body[:300]
    return np.asarray(Image.open(io.BytesIO(response.body)).convert("L"))


def test_the_default_is_a_jpeg_of_an_image(web: WebArchive) -> None:
    for accept in (None, "*/*", "image/avif,image/webp,*/*;q=0.8"):
        answer = ask(web, accept=accept)
        assert answer.headers["content-type"] == "image/jpeg"
        assert grey(answer).shape == (100, 200)


def test_content_types_are_taken_in_their_order(web: WebArchive) -> None:
    for wanted, got in (
        ("image/png", "image/png"),
        ("image/webp,image/jp2,image/jpeg", "image/jp2"),
        ("image/gif", "image/gif"),
        ("application/dicom", "application/dicom"),
    ):
        answer = ask(web, contentType=wanted)
        assert answer.headers["content-type"].startswith(got)
    assert ask(web, contentType="video/mpeg").status == 406


def test_windows_rows_columns_and_regions(web: WebArchive) -> None:
    png: dict[str, Any] = {
        "contentType": PNG,
        "windowCenter": "0",
        "windowWidth": "101",
    }

    whole = grey(ask(web, **png))
    part = grey(ask(web, region="0.5,0,1,0.5", **png))

    hu = np.arange(-100, 100)
    expected = np.clip((hu + 0.5) / 100 + 0.5, 0, 1) * 255
    assert (whole[3] == np.floor(expected + 0.5)).all()
    assert (part == whole[:50, 100:]).all()
    assert grey(ask(web, rows=50, **png)).shape == (50, 100)
    assert grey(ask(web, columns=50, **png)).shape == (25, 50)
    assert grey(ask(web, rows=10, columns=400, **png)).shape == (10, 20)


@pytest.mark.parametrize(
    "parameters",
    [
        {"requestType": None},
        {"requestType": "wado"},
        {"studyUID": None},
        {"seriesUID": ""},
        {"objectUID": None},
        {"objectUID": "1.2.3/../4"},
        {"windowCenter": "1"},
        {"windowWidth": "1"},
        {"windowCenter": "x", "windowWidth": "10"},
        {"windowCenter": "1", "windowWidth": "0"},
        {"windowCenter": "1", "windowWidth": "NaN"},
        {"rows": "0"},
        {"rows": "-1"},
        {"columns": "1.5"},
        {"columns": "999999999"},
        {"rows": "1000", "columns": "1000"},
        {"region": "0,0,1"},
        {"region": "0,0,1,2"},
        {"region": "0.5,0,0.5,1"},
        {"region": "0,0,1,NaN"},
        {"frameNumber": "0"},
        {"frameNumber": "a"},
        {"imageQuality": "0"},
        {"imageQuality": "101"},
        {"anonymize": "no"},
        {"presentationUID": "1.2.3", "windowCenter": "1", "windowWidth": "2"},
        {"presentationUID": "1.2.3"},
    ],
)
def test_c17_values_that_are_none_are_refused(
    web: WebArchive, parameters: dict[str, Any]
) -> None:
    answer = ask(web, **parameters)
    assert answer.status == 400, answer.body


def test_anonymize_is_refused_in_words(web: WebArchive) -> None:
    answer = ask(web, anonymize="yes", contentType="application/dicom")
    assert answer.status == 406
    assert "anonymize" in answer.json()["detail"]


def test_a_frame_is_chosen_by_its_number(web: WebArchive) -> None:
    pixels = grey(ask(web, MULTI, frameNumber=4, contentType=PNG))
    assert (pixels == 120).all()
    assert ask(web, MULTI, frameNumber=6).status == 404
    # Several frames come as the object, or as an animation.
    assert ask(web, MULTI).headers["content-type"].startswith("application/dicom")
    moving = Image.open(io.BytesIO(ask(web, MULTI, contentType="image/gif").body))
    assert getattr(moving, "n_frames", 0) == 5


def test_a_presentation_state_shows_the_image(web: WebArchive) -> None:
    shown: dict[str, Any] = {
        "presentationUID": uid(1, 9, 1),
        "presentationSeriesUID": uid(1, 9),
    }

    pixels = grey(ask(web, contentType=PNG, **shown))

    assert pixels.shape == (200, 100)
    assert int(pixels[0, 0]) == 255
    assert int(pixels[199, 0]) == 0
    # The state does not refer to another image of the study; no state is none.
    assert ask(web, MULTI, frameNumber=1, **shown).status == 404
    wrong: dict[str, Any] = {
        "presentationUID": uid(1, 1, 1),
        "presentationSeriesUID": uid(1, 1),
    }
    assert ask(web, **wrong).status == 404


def test_the_object_comes_in_a_syntax_that_may_leave(web: WebArchive) -> None:
    plain = ask(web, contentType="application/dicom")
    rle = ask(web, RLE, contentType="application/dicom", transferSyntax=RLELossless)
    unpacked = ask(web, RLE, contentType="application/dicom")

    for answer, syntax in (
        (plain, ExplicitVRLittleEndian),
        (rle, RLELossless),
        (unpacked, ExplicitVRLittleEndian),
    ):
        ds = pydicom.dcmread(io.BytesIO(answer.body))
        assert ds.file_meta.TransferSyntaxUID == syntax
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert pydicom.dcmread(io.BytesIO(unpacked.body)).PixelData == bytes(
        [1, 2, 3, 4, 5, 6, 7, 8]
    )
    for never in (ImplicitVRLittleEndian, "1.2.840.10008.1.2.2", "1.2.3"):
        answer = ask(web, contentType="application/dicom", transferSyntax=never)
        assert answer.status == 406


def test_a_report_is_a_page_in_utf_8(web: WebArchive) -> None:
    page = ask(web, REPORT)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "右肺结节" in page.text
    assert "<script" not in page.text
    text = ask(web, REPORT, contentType="text/plain", charset="utf-8")
    assert "右肺结节" in text.text
    assert ask(web, REPORT, charset="iso-8859-1").status == 406


def test_a_pdf_comes_as_file_or_as_pdf(web: WebArchive) -> None:
    assert ask(web, DOC).headers["content-type"].startswith("application/dicom")
    assert ask(web, DOC, contentType="application/pdf").body.startswith(b"%PDF-")


def test_annotations_and_conditions(web: WebArchive) -> None:
    plain = ask(web, contentType=PNG)
    noted = ask(web, contentType=PNG, annotation="patient,technique,colour")
    etag = noted.headers["etag"]

    assert (grey(plain) != grey(noted)).any()
    assert noted.headers["warning"].startswith("299 ")
    again = ask(
        web,
        contentType=PNG,
        annotation="patient,technique,colour",
        headers={"If-None-Match": etag},
    )
    assert (again.status, again.body) == (304, b"")
    head = ask(web, contentType=PNG, method="HEAD")
    assert head.headers["content-length"] == plain.headers["content-length"]


def test_c23_other_tenants_are_not_there(web: WebArchive) -> None:
    assert ask(web, 50).status == 404
    assert ask(web, 50, headers={TENANT: "other"}).status == 200
    assert ask(web, seriesUID=uid(MULTI, 1)).status == 404
