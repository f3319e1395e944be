"""Stored values to grey: each step against values computed by hand (PS3.4 N.2)."""

from __future__ import annotations

import numpy as np
import pytest
from pydicom.dataset import Dataset

from pacs.rendering.grayscale import (
    Chain,
    Modality,
    Padding,
    Presentation,
    chain_of,
    modality_of,
    padding_of,
    read_presentation,
    voi_of,
    windowed,
)
from pacs.rendering.lookup import Lookup
from pacs.rendering.parameters import Window
from pacs.rendering.pixels import Frame
from storage.kernel.errors import InvalidParameter, MalformedObject
from tests.support.pictures import header


def grey(window: Window, *values: float) -> list[float]:
    return [float(v) for v in windowed(window, np.array(values, np.float64))]


def frame(
    raw: np.ndarray[tuple[int, ...], np.dtype[np.generic]] | list[list[int]],
    *,
    stored: int = 16,
    shift: int = 0,
    signed: bool = False,
) -> Frame:
    array = np.asarray(raw)
    if array.dtype.kind == "i":
        array = array.astype(np.int16).view(np.uint16)
    return Frame(array, stored, shift, signed, "MONOCHROME2")


def test_linear_follows_the_example_of_the_standard() -> None:
    # PS3.3 C.11.2.1.2.1: c=2048, w=4096 maps 0..4095 to the whole range.
    assert grey(Window(2048, 4096), 0, 4095) == [0.0, 1.0]
    assert grey(Window(2048, 4096), 2047.5) == [0.5]
    # c=0, w=100: at -50 and below black, above 49 white.
    assert grey(Window(0, 100), -50, -49.999, 49, 60)[0] == 0
    assert grey(Window(0, 100), -49)[0] == pytest.approx(1 / 99)
    assert grey(Window(0, 100), 48, 49) == [pytest.approx(98 / 99), 1.0]
    # c=0, w=1: a threshold between -1 and 0.
    assert grey(Window(0, 1), -1, -0.5, -0.4, 0) == [0, 0, 1, 1]


def test_linear_exact_has_no_half_pixel() -> None:
    # PS3.3 C.11.2.1.3.2: black at c - w/2, white at c + w/2.
    window = Window(0, 100, "linear-exact")
    assert grey(window, -51, -50, -25, 0, 25, 50, 51) == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert grey(Window(0.5, 0.25, "linear-exact"), 0.4375) == [0.25]


def test_sigmoid_is_half_at_the_center_and_never_overflows() -> None:
    # PS3.3 C.11.2.1.3.1: 1 / (1 + exp(-4 (x - c) / w)).
    window = Window(40, 400, "sigmoid")
    assert grey(window, 40, 140) == [0.5, pytest.approx(0.7310585786)]
    assert grey(window, -1e9, 1e9) == [pytest.approx(0), pytest.approx(1)]


@pytest.mark.parametrize(
    ("center", "width", "function"),
    [
        (0, 0, "linear"), (0, 0.99, "linear"), (0, -1, "linear"),
        (0, 0, "sigmoid"), (0, 0, "linear-exact"), (0, -2, "linear-exact"),
        (float("nan"), 1, "linear"), (0, float("inf"), "linear"), (1e13, 1, "linear"),
    ],
)  # fmt: skip
def test_a_width_that_no_function_takes_is_refused(
    center: float, width: float, function: str
) -> None:
    with pytest.raises(InvalidParameter):
        Window(center, width, function)  # type: ignore[arg-type]


def lut_item(entries: list[int], first: int, bits: int, tag_vr: str = "US") -> Dataset:
    item = Dataset()
    item.add_new(0x00283002, tag_vr, [len(entries) % 65_536, first, bits])
    item.add_new(0x00283006, "OW", np.array(entries, "<u2").tobytes())
    return item


def test_rescale_and_modality_lut() -> None:
    rescaled = Dataset()
    rescaled.RescaleIntercept, rescaled.RescaleSlope = -1024, 2
    stored = np.array([0, 512, 1000])
    assert modality_of(header(rescaled), signed=False)(stored).tolist() == [
        -1024, 0, 976,
    ]  # fmt: skip

    table = Dataset()
    table.ModalityLUTSequence = [lut_item([10, 20, 40], 5, 16)]
    # Before the first and behind the last input the ends are taken (PS3.3 C.11.1.1.1).
    stored = np.array([0, 5, 6, 7, 99])
    assert modality_of(header(table), signed=False)(stored).tolist() == [
        10, 10, 20, 40, 40,
    ]  # fmt: skip
    # A first input below 0 where pixels are signed.
    table.ModalityLUTSequence = [lut_item([1, 2, 3], -1, 16, "SS")]
    found = modality_of(header(table), signed=True)
    assert found(np.array([-9, -1, 0, 1])).tolist() == [1, 1, 2, 3]
    assert modality_of(header(Dataset()), signed=False) == Modality()


def test_a_slope_of_zero_is_left_out() -> None:
    ds = Dataset()
    ds.RescaleIntercept, ds.RescaleSlope = 5, 0
    assert modality_of(header(ds), signed=False)(np.array([1, 2])).tolist() == [6, 7]


def test_the_frames_own_groups_come_first() -> None:
    def group(slope: float, center: float) -> Dataset:
        transformation = Dataset()
        transformation.RescaleIntercept, transformation.RescaleSlope = 0, slope
        window = Dataset()
        window.WindowCenter, window.WindowWidth = center, 10
        item = Dataset()
        item.PixelValueTransformationSequence = [transformation]
        item.FrameVOILUTSequence = [window]
        return item

    ds = Dataset()
    ds.WindowCenter, ds.WindowWidth = 99, 10
    ds.RescaleIntercept, ds.RescaleSlope = 0, 7
    ds.SharedFunctionalGroupsSequence = [group(5, 50)]
    ds.PerFrameFunctionalGroupsSequence = [group(2, 20), Dataset(), group(4, 40)]

    for index, slope, center in ((0, 2, 20), (1, 5, 50), (2, 4, 40), (3, 5, 50)):
        found = header(ds, index=index)
        assert modality_of(found, signed=False).slope == slope
        assert voi_of(found, signed=False) == Window(center, 10)
    del ds.SharedFunctionalGroupsSequence
    assert modality_of(header(ds, index=1), signed=False).slope == 7


def test_the_first_window_is_taken_and_bad_ones_are_passed_over() -> None:
    ds = Dataset()
    ds.WindowCenter, ds.WindowWidth = [40, 80], [400, 100]
    assert voi_of(header(ds), signed=False) == Window(40, 400)
    ds.VOILUTFunction = "SIGMOID"
    assert voi_of(header(ds), signed=False) == Window(40, 400, "sigmoid")
    ds.VOILUTFunction = "LINEAR"
    ds.WindowCenter, ds.WindowWidth = 0.5, 0.25
    assert voi_of(header(ds), signed=False) == Window(0.5, 0.25, "linear-exact")
    ds.WindowWidth = 0
    assert voi_of(header(ds), signed=False) is None
    ds.VOILUTSequence = [lut_item([0, 255], 0, 8)]
    assert isinstance(voi_of(header(ds), signed=False), Lookup)


def test_a_voi_lut_is_scaled_by_its_bits() -> None:
    chain = Chain(voi=Lookup(10, 12, np.array([0, 1024, 4095], np.uint16)))
    shown = chain.render(frame(np.array([[9, 10, 11, 12, 13]], np.uint16)))
    assert shown.tolist() == [[0, 0, round(1024 / 4095 * 255), 255, 255]]


def test_without_a_window_the_frame_has_its_own_range_without_padding() -> None:
    raw = np.array([[100, 150, 200, 9999]], np.uint16)
    plain = Chain().render(frame(raw))
    padded = Chain(padding=Padding(9999, 9999)).render(frame(raw))

    assert plain.tolist()[0][3] == 255
    # Padding is black, and the rest has the whole range.
    assert padded.tolist() == [[0, 128, 255, 0]]
    assert Chain().render(frame(np.full((2, 2), 7, np.uint16))).max() == 0
    assert Chain(padding=Padding(0, 9)).render(
        frame(np.full((2, 2), 7, np.uint16))
    ).max() == 0  # fmt: skip


def test_padding_is_read_with_the_sign_of_the_pixels() -> None:
    ds = Dataset()
    ds.add_new(0x00280120, "US", 63_536)  # -2000, written as US
    signed = frame([[-2000, 0]], signed=True)
    unsigned = frame(np.array([[1]], np.uint16))
    assert padding_of(header(ds), signed) == Padding(-2000, -2000)
    assert padding_of(header(ds), unsigned) == Padding(63_536, 63_536)
    ds.add_new(0x00280121, "US", 63_000)
    assert padding_of(header(ds), unsigned) == Padding(63_000, 63_536)


def test_monochrome1_and_inverse_turn_grey_round() -> None:
    raw = np.array([[0, 128, 255]], np.uint8)
    inverse = Chain(voi=Window(128, 256), presentation=Presentation(inverse=True))
    assert inverse.render(Frame(raw, 8, 0, signed=False, photometric="")).tolist() == [
        [255, 127, 0]
    ]
    ds = Dataset()
    ds.PresentationLUTShape = "INVERSE"
    assert chain_of(header(ds), frame(raw)).presentation.inverse
    one = Frame(raw, 8, 0, signed=False, photometric="MONOCHROME1")
    # MONOCHROME1 with INVERSE, as the standard wants it, is inverted once.
    assert chain_of(header(ds), one).presentation == Presentation(inverse=True)


def test_a_presentation_lut_is_entered_by_the_whole_voi_range() -> None:
    ds = Dataset()
    ds.PresentationLUTSequence = [lut_item([0, 60_000, 65_535], 0, 16)]
    found = read_presentation(header(ds))
    assert found(np.array([0.0, 0.5, 1.0])).tolist() == [0, 60_000 / 65_535, 1]


def test_bits_that_are_not_stored_are_masked_and_signs_extended() -> None:
    # 12 bits in the upper part of 16: high bit 15.
    upper = Frame(
        np.array([0x7FF3, 0x8001], np.uint16), 12, 4, signed=True, photometric=""
    )
    assert upper.values(upper.raw).tolist() == [0x7FF, -2048]
    lower = Frame(
        np.array([0xF001, 0x0FFF], np.uint16), 12, 0, signed=False, photometric=""
    )
    assert lower.values(lower.raw).tolist() == [1, 0xFFF]
    negative = Frame(
        np.array([0xF001, 0x0FFF], np.uint16), 12, 0, signed=True, photometric=""
    )
    assert negative.values(negative.raw).tolist() == [1, -1]


def test_tables_and_plain_numbers_give_the_same() -> None:
    made = np.random.default_rng(3)
    raw = made.integers(0, 1 << 16, (40, 50)).astype(np.uint16)
    for voi in (Window(100, 3000), Window(-5, 900, "sigmoid"), None):
        chain = Chain(Modality(0.5, -8000), voi, Presentation(), Padding(3, 9))
        table = chain.render(Frame(raw, 16, 0, signed=True, photometric=""))
        wide = Frame(
            raw.view(np.int16).astype(np.int32).view(np.uint32),
            32, 0, signed=True, photometric="",
        )  # fmt: skip
        assert (chain.render(wide) == table).all()


def test_floats_that_are_no_numbers_are_black() -> None:
    raw = np.array([[0.0, 1.0, np.nan, np.inf, -np.inf]])
    shown = Chain().render(Frame(raw, 64, 0, signed=True, photometric=""))
    assert shown.tolist() == [[0, 255, 0, 255, 0]]
    nothing = Frame(np.full((1, 2), np.nan), 64, 0, signed=True, photometric="")
    assert Chain().render(nothing).tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("descriptor", "data"),
    [
        ([3, 0, 16], b"\0\0"),
        ([3, 0, 0], bytes(6)),
        ([3, 0, 99], bytes(6)),
        ([3], bytes(6)),
    ],
)
def test_a17_a_lut_that_is_none_is_refused(descriptor: list[int], data: bytes) -> None:
    item = Dataset()
    item.add_new(0x00283002, "US", descriptor)
    item.add_new(0x00283006, "OW", data)
    ds = Dataset()
    ds.ModalityLUTSequence = [item]
    with pytest.raises(MalformedObject):
        modality_of(header(ds), signed=False)
