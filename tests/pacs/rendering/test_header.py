"""Attributes as rendering reads them: any encoding, one frame's groups, bad values."""

from __future__ import annotations

import struct
import time

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from pacs.rendering.header import read_header
from tests.support.pictures import encoded, header

SYNTAXES = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)


def many_frames(count: int, *, undefined: bool) -> Dataset:
    ds = Dataset()
    items = []
    for number in range(count):
        window = Dataset()
        window.WindowCenter, window.WindowWidth = number, 10
        item = Dataset()
        item.FrameVOILUTSequence = [window]
        item.is_undefined_length_sequence_item = undefined
        items.append(item)
    ds.PerFrameFunctionalGroupsSequence = items
    ds["PerFrameFunctionalGroupsSequence"].is_undefined_length = undefined
    ds.add_new(0x52009999, "LO", "behind it")
    ds.PresentationLUTShape = "IDENTITY"
    return ds


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("undefined", [False, True])
def test_only_the_wanted_frames_groups_are_read(
    syntax: str, *, undefined: bool
) -> None:
    ds = many_frames(50, undefined=undefined)
    for index in (0, 17, 49):
        found = header(ds, syntax, index)
        (place, _) = list(found.places(0x00289132))
        assert place.number(0x00281050) == index
        # What lies behind the sequence is read too.
        assert found.code(0x20500020) == "IDENTITY"
    beyond = header(ds, syntax, 50)
    assert next(beyond.places(0x00289132)).number(0x00281050) is None


def test_a_frame_among_thousands_costs_little_once_known() -> None:
    data = encoded(many_frames(5000, undefined=True))
    key = b"5000 frames"
    read_header(data, ExplicitVRLittleEndian, 1, key)

    started = time.process_time()
    found = read_header(data, ExplicitVRLittleEndian, 4321, key)
    spent = time.process_time() - started

    assert found.groups[0].first(0x00289132) is not None
    assert next(iter(found.places(0x00289132))).number(0x00281050) == 4321
    # Reading all of them takes over a hundred times as long.
    assert spent < 0.05


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_values_are_read_in_their_byte_order(syntax: str) -> None:
    ds = Dataset()
    ds.Rows = 0x0102
    ds.WindowCenter = "1.5"
    ds.add_new(
        0x00281201, "OW", struct.pack("<2H" if syntax != SYNTAXES[2] else ">2H", 1, 512)
    )
    ds.add_new(0x00700022, "FL", [0.5, -1.25])
    found = header(ds, syntax)

    assert found.whole(0x00280010) == 0x0102
    assert found.number(0x00281050) == 1.5
    assert found.words(0x00281201).tolist() == [1, 512]
    assert found.numbers(0x00700022) == [0.5, -1.25]


def test_values_of_the_wrong_form_read_as_absent() -> None:
    ds = Dataset()
    for tag, vr, value in (
        (0x00281050, "DS", "abc"),
        (0x00281051, "DS", "nan"),
        (0x00281052, "DS", "1e999"),
        (0x00281053, "DS", ""),
        (0x00280010, "LO", "many"),
    ):
        ds.add_new(tag, vr, "0")
        ds[tag]._value = value  # noqa: SLF001  past pydicom's own checks
    found = header(ds)
    for tag in (0x00281050, 0x00281051, 0x00281052, 0x00281053, 0x00280010, 0x00990099):
        assert found.number(tag) is None
        assert found.whole(tag) == 0


def test_text_is_decoded_by_the_nearest_character_set() -> None:
    outer, inner = Dataset(), Dataset()
    outer.SpecificCharacterSet = "GB18030"
    outer.PatientName = "王小东"
    inner.SpecificCharacterSet = "ISO_IR 192"
    inner.UnformattedTextValue = "结节 ≥ 6"
    plain = Dataset()
    plain.UnformattedTextValue = "肺"
    outer.GraphicAnnotationSequence = [Dataset(), Dataset()]
    outer.GraphicAnnotationSequence[0].TextObjectSequence = [inner]
    outer.GraphicAnnotationSequence[1].TextObjectSequence = [plain]
    found = header(outer)

    first, second = found.items(0x00700001)
    assert found.text(0x00100010, "PN") == "王小东"
    assert first.items(0x00700008)[0].text(0x00700006, "ST") == "结节 ≥ 6"
    assert second.items(0x00700008)[0].text(0x00700006, "ST") == "肺"
