"""Colour spaces and palettes against values computed by hand (PS3.3 C.7.6.3.1)."""

from __future__ import annotations

import numpy as np
import pytest
from pydicom.dataset import Dataset

from pacs.rendering.colour import (
    colour_frame,
    palette_frame,
    supplemented,
    through_palette,
    ybr_to_rgb,
)
from pacs.rendering.lookup import expand, read_palette
from pacs.rendering.pixels import Frame
from storage.kernel.errors import MalformedObject, Unsupported
from tests.support.datasets import ct_slice, part10
from tests.support.pictures import header, rendered


def one(*samples: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.array([[samples]], np.uint8)


@pytest.mark.parametrize(
    ("photometric", "ybr", "rgb"),
    [
        ("YBR_FULL", (0, 128, 128), (0, 0, 0)),
        ("YBR_FULL", (255, 128, 128), (255, 255, 255)),
        # Pure red: Y = 76.245, Cb = 84.97, Cr = 255.5, rounded.
        ("YBR_FULL", (76, 85, 255), (254, 0, 0)),
        ("YBR_FULL_422", (150, 44, 21), (0, 255, 1)),
        ("YBR_ICT", (29, 255, 107), (0, 0, 254)),
        ("YBR_PARTIAL_422", (16, 128, 128), (0, 0, 0)),
        ("YBR_PARTIAL_422", (235, 128, 128), (255, 255, 255)),
        ("YBR_PARTIAL_420", (81, 90, 240), (254, 0, 0)),
    ],
)
def test_ybr_becomes_rgb_by_its_matrix(
    photometric: str, ybr: tuple[int, ...], rgb: tuple[int, ...]
) -> None:
    assert ybr_to_rgb(one(*ybr), photometric)[0, 0].tolist() == list(rgb)


def test_colour_of_other_depths_is_brought_to_eight_bits() -> None:
    deep = Frame(np.array([[[0xFFFF, 0x8000, 0]]], np.uint16), 16, 0, False, "RGB")
    flat = Frame(np.array([[[15, 7, 0]]], np.uint8), 4, 0, False, "RGB")
    assert colour_frame(deep)[0, 0].tolist() == [255, 128, 0]
    assert colour_frame(flat)[0, 0].tolist() == [255, 119, 0]
    with pytest.raises(Unsupported):
        colour_frame(Frame(one(1, 2, 3), 8, 0, False, "HSV"))


def palette(
    colours: list[tuple[int, int, int]], first: int = 0, bits: int = 16
) -> Dataset:
    ds = Dataset()
    ds.PixelRepresentation = 0
    for number in range(3):
        values = [colour[number] for colour in colours]
        ds.add_new(0x00281101 + number, "US", [len(values), first, bits])
        kind = "<u2" if bits == 16 else "u1"
        ds.add_new(0x00281201 + number, "OW", np.array(values, kind).tobytes())
    return ds


RGB = [(0xFF00, 0, 0), (0, 0xFF00, 0), (0, 0, 0xFF00), (0x8000, 0x8000, 0x8000)]


def indexed(*values: int) -> Frame:
    return Frame(np.array([values], np.uint8), 8, 0, False, "PALETTE COLOR")


def test_a17_indexes_outside_a_palette_get_its_ends() -> None:
    shown = palette_frame(header(palette(RGB, first=10)), indexed(0, 10, 11, 13, 255))
    assert shown[0].tolist() == [
        [255, 0, 0], [255, 0, 0], [0, 255, 0], [128, 128, 128], [128, 128, 128],
    ]  # fmt: skip


def test_entries_of_eight_bits_are_taken_as_such() -> None:
    eight = [(255, 0, 0), (0, 128, 0), (0, 0, 7), (9, 9, 9)]
    expected = [list(colour) for colour in eight]
    for bits in (8, 16):  # 16: declared wrongly, the values tell
        shown = palette_frame(header(palette(eight, bits=bits)), indexed(0, 1, 2, 3))
        assert shown[0].tolist() == expected


def test_a17_palettes_that_are_none_are_refused() -> None:
    missing = palette(RGB)
    del missing[0x00281202]
    short = palette(RGB)
    short.add_new(0x00281203, "OW", b"\0\0")
    uneven = palette(RGB)
    uneven.add_new(0x00281101, "US", [2, 0, 16])
    for ds in (missing, short, uneven, Dataset()):
        with pytest.raises(MalformedObject):
            palette_frame(header(ds), indexed(1))


def test_a_segmented_palette_is_expanded() -> None:
    # Discrete 0, 10; linear to 40 in 3 steps; the discrete segment once more.
    words = [0, 2, 0, 10, 1, 3, 40, 2, 1, 0, 0]
    assert expand(words, 7, wide=True).tolist() == [0, 10, 20, 30, 40, 0, 10]
    # The same in bytes: offsets are of four bytes.
    octets = [*words, 0, 0]
    assert expand(octets, 7, wide=False).tolist() == [0, 10, 20, 30, 40, 0, 10]
    # A copied linear segment starts from where the table is now.
    assert expand([0, 1, 100, 1, 2, 0, 2, 1, 6, 0], 5, wide=True).tolist() == [
        100, 50, 0, 0, 0,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        [], [0], [0, 5, 1], [1, 2, 40], [7, 1, 1], [0, 9, *range(9)],
        [0, 1, 1, 2, 2, 0xFFFF, 0xFFFF], [2, 1, 0, 0], [0, 1, 1, 2, 9, 6, 0],
        [0, 3, 1, 2, 3],
    ],
)  # fmt: skip
def test_a17_segments_that_are_none_are_refused(words: list[int]) -> None:
    with pytest.raises(MalformedObject):
        expand(words, 7, wide=True)


def test_segmented_data_are_found_under_their_own_tag() -> None:
    ds = Dataset()
    ds.add_new(0x00281101, "US", [5, 0, 16])
    ds.add_new(0x00281221, "OW", np.array([0, 1, 0, 1, 4, 400], "<u2").tobytes())
    assert read_palette(header(ds), 1, signed=False).entries.tolist() == [
        0, 100, 200, 300, 400,
    ]  # fmt: skip


def test_a_supplemental_palette_colours_what_it_maps() -> None:
    ds = palette(RGB, first=100)
    ds.PixelPresentation = "COLOR"
    frame = Frame(np.array([[5, 99, 100, 102]], np.uint16), 16, 0, False, "MONOCHROME2")
    grey = np.array([[1, 2, 3, 4]], np.uint8)
    shown = supplemented(header(ds), frame, grey)
    assert shown is not None
    assert shown[0].tolist() == [[1, 1, 1], [2, 2, 2], [255, 0, 0], [0, 0, 255]]
    ds.PixelPresentation = "MONOCHROME"
    assert supplemented(header(ds), frame, grey) is None


def test_values_of_any_type_go_through_a_palette() -> None:
    tables = tuple(
        read_palette(header(palette(RGB)), n, signed=False) for n in (1, 2, 3)
    )
    red, green, blue = tables
    shown = through_palette(np.array([-5, 1.4, 99]), (red, green, blue))
    assert shown.tolist() == [[255, 0, 0], [0, 255, 0], [128, 128, 128]]


@pytest.mark.parametrize("planar", [0, 1])
def test_planar_and_interleaved_colour_are_the_same_picture(planar: int) -> None:
    rgb = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    ds = ct_slice(
        SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=planar,
        BitsAllocated=8, BitsStored=8, HighBit=7, PixelRepresentation=0,
        PixelSpacing=None,
    )  # fmt: skip
    ds.Rows, ds.Columns = 4, 6
    ds.PixelData = (np.moveaxis(rgb, -1, 0) if planar else rgb).tobytes()
    assert (rendered(part10(ds)) == rgb).all()


def test_native_422_shares_its_chrominance() -> None:
    ds = ct_slice(
        SamplesPerPixel=3, PhotometricInterpretation="YBR_FULL_422",
        PlanarConfiguration=0, BitsAllocated=8, BitsStored=8, HighBit=7,
        PixelRepresentation=0, PixelSpacing=None,
    )  # fmt: skip
    ds.Rows, ds.Columns = 1, 4
    ds.PixelData = bytes([76, 0, 85, 255, 255, 128, 128, 128])
    shown = rendered(part10(ds))
    expected = [
        ybr_to_rgb(one(*ybr), "YBR_FULL")[0, 0].tolist()
        for ybr in ((76, 85, 255), (0, 85, 255), (255, 128, 128), (128, 128, 128))
    ]
    assert shown[0].tolist() == expected
