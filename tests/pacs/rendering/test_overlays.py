"""Overlay planes and shutters (PS3.3 C.9.2, C.7.6.11)."""

from __future__ import annotations

import numpy as np
import pytest
from pydicom.dataset import Dataset

from pacs.rendering.overlays import overlay_groups, overlay_mask, shutter_mask
from pacs.rendering.parameters import PNG, Wanted
from pacs.rendering.pixels import Frame
from storage.kernel.errors import MalformedObject
from tests.support.datasets import ct_slice, part10
from tests.support.pictures import header, rendered


def plane(
    bits: np.ndarray[tuple[int, ...], np.dtype[np.bool_]], **more: object
) -> Dataset:
    ds = Dataset()
    shape = bits.shape[-2:]
    ds.add_new(0x60000010, "US", shape[0])
    ds.add_new(0x60000011, "US", shape[1])
    ds.add_new(0x60000040, "CS", "G")
    ds.add_new(0x60000050, "SS", more.get("origin", [1, 1]))
    ds.add_new(0x60000100, "US", 1)
    ds.add_new(0x60000102, "US", 0)
    packed = np.packbits(bits.reshape(-1), bitorder="little").tobytes()
    ds.add_new(0x60003000, "OW", packed + b"\0" * (len(packed) % 2))
    if bits.ndim == 3:
        ds.add_new(0x60000015, "IS", bits.shape[0])
        ds.add_new(0x60000051, "US", more.get("first", 1))
    return ds


CROSS = np.zeros((5, 7), np.bool_)
CROSS[2], CROSS[:, 3] = True, True


def test_a_plane_lies_where_its_origin_says() -> None:
    found = header(plane(CROSS, origin=[2, 3]))
    assert list(overlay_groups(found)) == [0x6000]
    mask = overlay_mask(found, 0x6000, (10, 12), 0, None)
    assert mask is not None
    assert (mask[1:6, 2:9] == CROSS).all()
    assert mask.sum() == CROSS.sum()


@pytest.mark.parametrize("origin", [[-1, -2], [8, 9], [100, 100], [-100, 0]])
def test_what_reaches_beyond_the_image_is_cut_off(origin: list[int]) -> None:
    mask = overlay_mask(header(plane(CROSS, origin=origin)), 0x6000, (10, 12), 0, None)
    assert mask is not None
    assert mask.shape == (10, 12)
    big = np.zeros((400, 400), np.bool_)
    big[200 + origin[0] - 1 :][:5, 200 + origin[1] - 1 :][:, :7] = CROSS
    assert (mask == big[200:210, 200:212]).all()


def test_planes_of_many_frames_lie_on_theirs() -> None:
    planes = np.stack([CROSS, ~CROSS, CROSS])
    found = header(plane(planes, first=2))
    shape = (5, 7)
    assert overlay_mask(found, 0x6000, shape, 0, None) is None
    for index, expected in ((1, CROSS), (2, ~CROSS), (3, CROSS)):
        mask = overlay_mask(found, 0x6000, shape, index, None)
        assert mask is not None
        assert (mask == expected).all()
    assert overlay_mask(found, 0x6000, shape, 4, None) is None


def test_a_plane_without_its_bytes_is_not_drawn() -> None:
    short = plane(CROSS)
    short.add_new(0x60003000, "OW", b"\1\0")
    assert overlay_mask(header(short), 0x6000, (5, 7), 0, None) is None
    short.add_new(0x60000010, "US", 0)
    assert overlay_mask(header(short), 0x6000, (5, 7), 0, None) is None


def test_planes_in_unused_bits_are_found() -> None:
    raw = np.where(CROSS, 0x8000 | 5, 7).astype(np.uint16)
    frame = Frame(raw, 12, 0, signed=False, photometric="MONOCHROME2")
    ds = plane(CROSS)
    del ds[0x60003000]
    ds.add_new(0x60000100, "US", 16)
    ds.add_new(0x60000102, "US", 15)
    mask = overlay_mask(header(ds), 0x6000, (5, 7), 0, frame)
    assert mask is not None
    assert (mask == CROSS).all()
    # A bit that is stored is a pixel's, and one beyond the word nobody's.
    for position in (3, 16):
        ds.add_new(0x60000102, "US", position)
        assert overlay_mask(header(ds), 0x6000, (5, 7), 0, frame) is None


def test_graphics_are_burned_in_regions_of_interest_are_not() -> None:
    ds = ct_slice(size=32, PixelSpacing=None, WindowCenter=0, WindowWidth=100)
    ds.PixelData = bytes(2 * 32 * 32)
    plain = rendered(part10(ds))
    for element in plane(CROSS, origin=[11, 11]):
        ds.add(element)
    drawn = rendered(part10(ds))
    hidden = rendered(part10(ds), Wanted(PNG, overlays=False))
    ds.add_new(0x60000040, "CS", "R")

    assert (drawn[10:15, 10:17][CROSS] == 255).all()
    assert (drawn != plain).sum() == CROSS.sum()
    assert (hidden == plain).all()
    assert (rendered(part10(ds)) == plain).all()


def test_shutters_leave_what_is_inside() -> None:
    ds = Dataset()
    ds.ShutterShape = "RECTANGULAR"
    ds.ShutterLeftVerticalEdge, ds.ShutterRightVerticalEdge = 3, 6
    ds.ShutterUpperHorizontalEdge, ds.ShutterLowerHorizontalEdge = 2, 4
    seen = shutter_mask(header(ds), (10, 10))
    assert seen is not None
    assert seen.sum() == 4 * 3
    assert seen[1:4, 2:6].all()

    ds.ShutterShape = ["RECTANGULAR", "CIRCULAR"]
    ds.CenterOfCircularShutter, ds.RadiusOfCircularShutter = [2, 3], 1
    seen = shutter_mask(header(ds), (10, 10))
    assert seen is not None
    # Row 2, column 3, and of its four neighbours those in the rectangle.
    assert sorted(zip(*np.nonzero(seen), strict=True)) == [(1, 2), (1, 3), (2, 2)]

    ds.ShutterShape = "POLYGONAL"
    ds.VerticesOfThePolygonalShutter = [1, 1, 1, 5, 5, 5, 5, 1]
    seen = shutter_mask(header(ds), (10, 10))
    assert seen is not None
    assert seen[:5, :5].all()
    assert seen.sum() == 25
    assert shutter_mask(header(Dataset()), (10, 10)) is None


@pytest.mark.parametrize("shape", ["RECTANGULAR", "CIRCULAR", "POLYGONAL"])
def test_a_shutter_without_its_place_is_refused(shape: str) -> None:
    ds = Dataset()
    ds.ShutterShape = shape
    with pytest.raises(MalformedObject):
        shutter_mask(header(ds), (10, 10))


def test_what_a_shutter_hides_has_its_grey() -> None:
    ds = ct_slice(size=32, PixelSpacing=None)
    ds.ShutterShape = "RECTANGULAR"
    ds.ShutterLeftVerticalEdge, ds.ShutterRightVerticalEdge = 9, 24
    ds.ShutterUpperHorizontalEdge, ds.ShutterLowerHorizontalEdge = 9, 24
    ds.ShutterPresentationValue = 0x4000
    shown = rendered(part10(ds))
    assert (shown[0] == 0x40).all()
    assert (shown[:, 31] == 0x40).all()
