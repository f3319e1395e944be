"""Where an image lies in its picture: regions, turns, aspects (PS3.18 8.3.5.1.3)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset

from pacs.rendering.geometry import (
    Box,
    Placement,
    View,
    checked_area,
    pixel_aspect,
    placement_of,
)
from pacs.rendering.parameters import PNG, Region, Viewport, Wanted
from storage.kernel.errors import InvalidParameter, MalformedObject
from tests.support.datasets import ct_slice, part10
from tests.support.pictures import header, rendered

CHART = np.arange(6 * 4, dtype=np.uint8).reshape(4, 6)
WHOLE = Box(0, 0, 6, 4)


def placed(**more: object) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    turned = more.get("rotation", 0) in {90, 270}
    size = (4, 6) if turned else (6, 4)
    placement = Placement(WHOLE, *size, **more)  # type: ignore[arg-type]
    return np.asarray(placement.apply(Image.fromarray(CHART)))


def test_turns_are_clockwise_and_come_before_flips() -> None:
    assert (placed() == CHART).all()
    assert (placed(rotation=90) == np.rot90(CHART, -1)).all()
    assert (placed(rotation=180) == CHART[::-1, ::-1]).all()
    assert (placed(rotation=270) == np.rot90(CHART)).all()
    assert (placed(rotation=90, flip_x=True) == np.rot90(CHART, -1)[:, ::-1]).all()
    assert (placed(flip_y=True) == CHART[::-1]).all()


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("flips", [(False, False), (True, False), (True, True)])
def test_points_go_where_their_pixels_go(
    rotation: int, flips: tuple[bool, bool]
) -> None:
    shown = placed(rotation=rotation, flip_x=flips[0], flip_y=flips[1])
    size = (4, 6) if rotation % 180 else (6, 4)
    placement = Placement(
        WHOLE, *size, rotation=rotation, flip_x=flips[0], flip_y=flips[1]
    )
    for row, column in np.ndindex(4, 6):
        x, y = placement.point(column + 0.5, row + 0.5)
        assert shown[int(y), int(x)] == CHART[row, column]


def test_what_lies_outside_the_image_is_background() -> None:
    placement = Placement(Box(-2, -1, 8, 5), 10, 6)
    shown = np.asarray(placement.apply(Image.fromarray(CHART), 99))
    assert (shown[1:5, 2:8] == CHART).all()
    assert (shown[0] == 99).all()
    assert (shown[:, :2] == 99).all()
    nothing = Placement(Box(10, 10, 20, 20), 5, 5).apply(Image.fromarray(CHART), 7)
    assert (np.asarray(nothing) == 7).all()


def aspect(**values: object) -> float:
    ds = Dataset()
    for name, value in values.items():
        setattr(ds, name, value)
    return pixel_aspect(header(ds))


def test_pixels_that_are_not_square() -> None:
    assert aspect() == 1
    assert aspect(PixelSpacing=[2, 1]) == 2
    assert aspect(PixelAspectRatio=[1, 2]) == 0.5
    assert aspect(ImagerPixelSpacing=[1, 4]) == 0.25
    assert aspect(PixelSpacing=[0.7, 0.701]) == 1
    # What no detector has is not believed.
    for spacing in ([0, 1], [1, 0], [-1, 1], [1, 1e9], [1]):
        assert aspect(PixelSpacing=spacing) == 1


def test_the_shorter_side_of_a_pixel_is_stretched() -> None:
    ds = ct_slice(size=32, PixelSpacing=[2, 1])
    assert rendered(part10(ds)).shape == (64, 32)
    ds.PixelSpacing = [1, 2]
    assert rendered(part10(ds)).shape == (32, 64)
    shown = rendered(part10(ds), Wanted(PNG, viewport=Viewport(32, 32)))
    assert shown.shape == (16, 32)


@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    fit=st.tuples(st.integers(1, 4000), st.integers(1, 4000)),
    ratio=st.sampled_from([0.05, 0.5, 1, 2.5, 20]),
)
def test_a_picture_fits_and_is_never_larger_than_allowed(
    width: int, height: int, fit: tuple[int, int], ratio: float
) -> None:
    view = View(Box(0, 0, width, height), ratio)
    wanted = Wanted(PNG, viewport=Viewport(*fit), max_pixels=1_000_000)
    placement = placement_of(view, wanted)
    assert 1 <= placement.width <= fit[0] or placement.width == 1
    assert 1 <= placement.height <= fit[1] or placement.height == 1
    plain = placement_of(view, Wanted(PNG, max_pixels=10_000))
    assert plain.width * plain.height <= 10_000 * 1.1 + max(plain.width, plain.height)


def test_no_side_is_longer_than_a_file_can_have() -> None:
    long = placement_of(View(Box(0, 0, 65_535, 2)), Wanted(PNG))
    assert (long.width, long.height) == (65_500, 2)


def test_regions_of_both_kinds() -> None:
    view = View(Box(0, 0, 100, 50))
    part = placement_of(view, Wanted(PNG, viewport=Viewport(10, 10, 20, 10, -20, 20)))
    assert part.box == Box(20, 10, 40, 30)
    assert (part.flip_x, part.flip_y, part.width, part.height) == (True, False, 10, 10)
    rest = placement_of(view, Wanted(PNG, viewport=Viewport(10, 10, 20, 10)))
    assert rest.box == Box(20, 10, 100, 50)
    share = placement_of(view, Wanted(PNG, region=Region(0.5, 0, 1, 0.5)))
    assert share.box == Box(50, 0, 100, 25)
    for outside in (
        Viewport(1, 1, 100, 0),
        Viewport(1, 1, 0, 0, 101, 1),
        Viewport(1, 1, 60, 0, -50, 1),
    ):
        with pytest.raises(InvalidParameter):
            placement_of(view, Wanted(PNG, viewport=outside))


def test_areas_without_size_or_reason_are_refused() -> None:
    assert checked_area(Box(-10, -10, 20, 20), 10, 10) == Box(-10, -10, 20, 20)
    for box in (
        Box(5, 5, 5, 9),
        Box(5, 5, 9, 4),
        Box(0, 0, 1e6, 1),
        Box(-1e9, 0, 1, 1),
    ):
        with pytest.raises(MalformedObject):
            checked_area(box, 10, 10)
