"""Files of pictures, colour profiles, text in pictures, documents."""

from __future__ import annotations

import io
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image, ImageCms
from pydicom.dataset import Dataset

from pacs.rendering import fonts
from pacs.rendering.annotation import (
    PINYIN,
    burn_text,
    patient_lines,
    technique_lines,
)
from pacs.rendering.document import as_html, as_text, lines, person, selected
from pacs.rendering.parameters import GIF, JP2, JPEG, PNG, Wanted, Window
from pacs.rendering.picture import encode, encode_animation, with_profile
from storage.kernel.errors import TooLarge
from tests.support.pictures import header

RAMP = np.tile(np.arange(256, dtype=np.uint8), (32, 1))
COLOURS = np.stack([RAMP, 255 - RAMP, RAMP // 2], axis=-1)


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("kind", [PNG, JP2])
@pytest.mark.parametrize("pixels", [RAMP, COLOURS])
def test_png_and_jpeg_2000_lose_nothing(
    kind: str, pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
) -> None:
    assert (
        np.asarray(opened(encode(Image.fromarray(pixels), kind, 1))) == pixels
    ).all()


def test_jpeg_has_the_quality_that_is_asked_for() -> None:
    picture = Image.fromarray(COLOURS)
    small, large = (encode(picture, JPEG, quality) for quality in (10, 95))
    assert len(small) < len(large)
    error = np.abs(np.asarray(opened(large)).astype(int) - COLOURS)
    assert error.mean() < 2


def test_an_animation_has_its_frames_and_their_time() -> None:
    made = opened(encode_animation([Image.fromarray(RAMP + n) for n in range(3)], 40))
    assert (made.format, getattr(made, "n_frames", 0)) == ("GIF", 3)
    assert made.info["duration"] == 40
    assert Wanted(GIF).media_type == "image/gif"


@pytest.mark.parametrize("wanted", ["srgb", "adobergb", "rommrgb", "yes"])
def test_a_colour_picture_has_the_profile_that_is_asked_for(wanted: str) -> None:
    picture, profile = with_profile(Image.fromarray(COLOURS), header(Dataset()), wanted)
    embedded = opened(encode(picture, PNG, 1, profile)).info["icc_profile"]
    found = ImageCms.ImageCmsProfile(io.BytesIO(embedded))
    name = ImageCms.getProfileDescription(found)
    expected = {"adobergb": "Adobe RGB", "rommrgb": "ROMM RGB"}.get(wanted, "sRGB")
    assert expected.lower() in name.lower()
    # Back in sRGB the colours are what they were; those of sRGB are in all of them.
    plain = ImageCms.profileToProfile(
        picture, found, ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
    )  # fmt: skip
    error = np.abs(np.asarray(plain).astype(int) - COLOURS)
    # Eight bits round the darkest values of a plain gamma most.
    assert error[COLOURS >= 32].max() <= 8
    assert error.mean() < 1


def test_white_is_white_in_every_colour_space() -> None:
    white = Image.new("RGB", (2, 2), (255, 255, 255))
    for wanted in ("srgb", "adobergb", "rommrgb"):
        shown, _ = with_profile(white, header(Dataset()), wanted)
        assert np.asarray(shown).min() >= 254


def test_no_profile_is_embedded_unless_asked_for_nor_in_grey() -> None:
    assert with_profile(Image.fromarray(COLOURS), header(Dataset()), "no")[1] == b""
    assert with_profile(Image.fromarray(RAMP), header(Dataset()), "srgb")[1] == b""


def test_the_profile_of_the_image_is_its_own() -> None:
    ds = Dataset()
    own = with_profile(Image.fromarray(COLOURS), header(Dataset()), "adobergb")[1]
    ds.OpticalPathSequence = [Dataset()]
    ds.OpticalPathSequence[0].ICCProfile = own + b"\0" * (len(own) % 2)
    picture, profile = with_profile(Image.fromarray(COLOURS), header(ds), "yes")
    assert profile[: len(own)] == own
    assert (np.asarray(picture) == COLOURS).all()


def test_a_profile_that_is_none_is_taken_for_srgb() -> None:
    ds = Dataset()
    ds.ICCProfile = bytes(500)
    broken, _ = with_profile(Image.fromarray(COLOURS), header(ds), "adobergb")
    plain, _ = with_profile(Image.fromarray(COLOURS), header(Dataset()), "adobergb")
    assert (np.asarray(broken) == np.asarray(plain)).all()


def patient(name: str) -> Dataset:
    ds = Dataset()
    ds.SpecificCharacterSet = "GB18030"
    ds.PatientName, ds.PatientID = name, "P1"
    ds.PatientBirthDate, ds.PatientSex, ds.PatientAge = "19800203", "F", "044Y"
    return ds


def test_lines_say_who_and_how() -> None:
    assert patient_lines(header(patient("Wang^XiaoDong=王^小东"))) == [
        "王 小东", "P1", "1980-02-03 F 044Y",
    ]  # fmt: skip
    ds = Dataset()
    ds.Modality, ds.StudyDate, ds.SeriesNumber = "CT", "20240102", 3
    ds.SeriesDescription, ds.InstanceNumber = "Lung", 12
    ds.KVP, ds.SliceThickness = 120, 1.25
    assert technique_lines(header(ds), Window(-600, 1500)) == [
        "CT 2024-01-02", "Se 3 Lung", "Im 12", "kV 120", "ST 1.25", "WL -600 WW 1500",
    ]  # fmt: skip


def test_text_without_control_characters_and_of_bounded_length() -> None:
    line, changed = fonts.drawable("A\r\n\x1b[31mB\u202eC" + "x" * 1000)
    assert line.startswith("A [31mBC")
    assert len(line) == fonts.MAX_LINE
    assert not changed


def test_hanzi_are_drawn_where_there_is_a_font_else_in_pinyin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fonts.font_for.cache_clear()
    monkeypatch.setattr(fonts, "chinese_font", lambda: None)
    canvas = Image.new("L", (300, 300))
    assert fonts.drawable("王小东") == ("Wang Xiao Dong", True)
    assert burn_text(canvas, ["王小东"], []) == {PINYIN}
    assert np.asarray(canvas).max() == 255
    monkeypatch.undo()
    fonts.font_for.cache_clear()
    if fonts.chinese_font() is None:
        pytest.skip("no font with hanzi on this machine")
    first, second = Image.new("L", (300, 300)), Image.new("L", (300, 300))
    assert burn_text(first, ["王小东"], []) == burn_text(second, ["李明"], []) == set()
    # Two different names, not twice the box of a missing glyph.
    assert (np.asarray(first) != np.asarray(second)).any()


def test_a_picture_without_room_for_text_says_so() -> None:
    assert "too small" in next(iter(burn_text(Image.new("L", (50, 50)), ["A"], [])))


def coded(meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator = "1", "99T"
    code.CodeMeaning = meaning
    return code


def content(kind: str, name: str, **values: object) -> Dataset:
    item = Dataset()
    item.ValueType = kind
    item.ConceptNameCodeSequence = [coded(name)]
    for key, value in values.items():
        setattr(item, key, value)
    return item


def report() -> Dataset:
    measured = Dataset()
    measured.NumericValue = "12.5"
    measured.MeasurementUnitsCodeSequence = [coded("millimetre")]
    measured.MeasurementUnitsCodeSequence[0].CodeValue = "mm"
    place = Dataset()
    place.ReferencedSOPInstanceUID = "1.2.3"
    ds = patient("Wang^XiaoDong=王^小东")
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.ValueType = "CONTAINER"
    ds.ConceptNameCodeSequence = [coded("Chest & CT <report>")]
    ds.ContentSequence = [
        content(
            "CONTAINER",
            "Findings",
            ContentSequence=[
                content("TEXT", "Finding", TextValue="<b>右肺</b>\r\n结节"),
                content("NUM", "Diameter", MeasuredValueSequence=[measured]),
            ],
        ),
        content("CODE", "Impression", ConceptCodeSequence=[coded("Nodule")]),
        content("PNAME", "Reader", PersonName="Li^Ming=李^明"),
        content("IMAGE", "Source", ReferencedSOPSequence=[place]),
        content("DATE", "On", Date="20240102"),
    ]
    return ds


class Outline(HTMLParser):
    """Collects tags and texts, and sees that every tag is closed in its order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_document_is_a_page_whose_tags_are_all_ours() -> None:
    outline = Outline()
    outline.feed(as_html(header(report())))
    outline.close()

    assert outline.open == []
    assert set(outline.seen) == {
        "html", "head", "meta", "title", "style", "body", "h1", "table", "tr", "th",
        "td", "dl", "dt", "dd",
    }  # fmt: skip
    for text in (
        "Chest & CT <report>", "王 小东", "<b>右肺</b>\r\n结节", "12.5 mm", "Nodule",
        "李 明", "1.2.3", "20240102",
    ):  # fmt: skip
        assert text in outline.texts


def test_a_document_as_text_is_indented() -> None:
    text = as_text(header(report()))
    assert (
        "\nFindings:\n  Finding: <b>右肺</b>\n    结节\n  Diameter: 12.5 mm\n" in text
    )
    assert "\nImpression: Nodule\nReader: 李 明\n" in text


def test_a_document_of_endless_items_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pacs.rendering.document.MAX_ITEMS", 3)
    with pytest.raises(TooLarge):
        list(lines(header(report())))


def test_names_are_read_as_their_reader_knows_them() -> None:
    assert person("Wang^XiaoDong=王^小东=") == "王 小东"
    assert person("Yamada^Tarou=山田^太郎=やまだ^たろう") == "山田 太郎"
    assert person("Smith^John^^Dr") == "Smith John Dr"
    assert person("") == ""


def test_key_images_are_listed_with_their_series() -> None:
    image = Dataset()
    image.ReferencedSOPInstanceUID, image.ReferencedFrameNumber = "1.2.5", [7]
    listed = Dataset()
    listed.ReferencedSOPInstanceUID = "1.2.5"
    series = Dataset()
    series.SeriesInstanceUID, series.ReferencedSOPSequence = "1.2.4", [listed]
    study = Dataset()
    study.ReferencedSeriesSequence = [series]
    ds = Dataset()
    ds.CurrentRequestedProcedureEvidenceSequence = [study]
    ds.ContentSequence = [
        content("TEXT", "Note", TextValue="x"),
        content("IMAGE", "Key", ReferencedSOPSequence=[image]),
    ]
    (found,) = selected(header(ds))
    assert (found.series_uid, found.instance_uid, found.frames) == (
        "1.2.4",
        "1.2.5",
        (7,),
    )
