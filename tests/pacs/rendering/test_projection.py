"""Volume renderings, by what can be known of them: outlines, sides, colours."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pacs.rendering import projection
from pacs.rendering.projection import PRESETS, Camera, function_for, regular
from pacs.rendering.reslice import Sampler
from pacs.rendering.volume import stack_planes
from storage.kernel.errors import InvalidParameter
from tests.support.volumes import ORIENTATIONS, Phantom

BALL = Phantom(
    shape=(48, 60, 64), spacing=(1.5, 1.0, 1.0), spheres=(((0, 0, 0), 18.0, 800.0),)
)


def drawn(phantom: Phantom, camera: Camera, preset: str = "bone") -> NDArray[np.uint8]:
    grid = phantom.stack().grid
    return projection.render(phantom.voxels(), grid, PRESETS[preset], camera)


def scale(phantom: Phantom, camera: Camera) -> float:
    """Return the millimetres of a pixel, as `Camera.zoom` says them."""
    corners = phantom.stack().grid.corners()
    around = 2 * np.linalg.norm(corners - corners.mean(axis=0), axis=1).max()
    return float(around / min(camera.rows, camera.columns) / camera.zoom)


@pytest.mark.parametrize("view", [(0, 0), (90, 0), (37, 20), (0, 90), (180, -30)])
def test_a_ball_is_round_from_every_side(view: tuple[float, float]) -> None:
    camera = Camera(*view, zoom=1.0, rows=160, columns=200)

    outline = drawn(BALL, camera).max(axis=2) > 20

    at = np.argwhere(outline)
    area = len(at) * scale(BALL, camera) ** 2
    assert area == pytest.approx(np.pi * 18**2, rel=0.06)
    assert at.mean(axis=0) == pytest.approx((79.5, 99.5), abs=1.0)
    height, width = np.ptp(at, axis=0) + 1
    assert height == pytest.approx(width, abs=3)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_left_is_right_of_the_picture_and_the_head_is_up(orientation: str) -> None:
    """Seen from the front, as a doctor sees a patient, however it was acquired."""
    phantom = Phantom(
        orientation,
        shape=(44, 44, 44),
        spacing=(1.0, 1.0, 1.0),
        spheres=(((12.0, 0.0, 12.0), 5.0, 900.0),),
    )

    front = np.argwhere(drawn(phantom, Camera(rows=120, columns=120)).max(axis=2) > 20)
    back = np.argwhere(
        drawn(phantom, Camera(180, rows=120, columns=120)).max(axis=2) > 20
    )

    assert front[:, 0].mean() < 50
    assert front[:, 1].mean() > 70
    assert back[:, 0].mean() < 50
    assert back[:, 1].mean() < 50


def test_turning_to_the_left_brings_the_left_side_forward() -> None:
    """At 90 degrees the viewer stands at the patient's left and sees it from there."""
    phantom = Phantom(
        shape=(44, 44, 44),
        spacing=(1.0, 1.0, 1.0),
        # The near one, at the left, hides the far one for who stands there.
        spheres=(((14.0, 0.0, 0.0), 4.0, 180.0), ((-14.0, 0.0, 0.0), 4.0, 1500.0)),
    )
    camera = Camera(90, rows=120, columns=120)
    middle = drawn(phantom, camera)[60, 60].astype(int)
    other = drawn(phantom, Camera(-90, rows=120, columns=120))[60, 60].astype(int)

    # 180 HU is dim and reddish in this preset, 1500 HU bright and white.
    assert other.sum() > middle.sum()


def test_zoom_enlarges() -> None:
    small = (drawn(BALL, Camera(rows=120, columns=120)).max(axis=2) > 20).sum()
    large = (
        drawn(BALL, Camera(zoom=1.5, rows=120, columns=120)).max(axis=2) > 20
    ).sum()

    assert large / small == pytest.approx(2.25, rel=0.08)


def test_uneven_planes_give_the_same_outline() -> None:
    keep = [k for k in range(48) if k not in {5, 6, 41}]
    stack = stack_planes([BALL.planes()[k] for k in keep])
    sampler = Sampler(BALL.voxels()[keep], stack.grid, stack.gaps)
    voxels, grid = regular(sampler)
    camera = Camera(30, 10, rows=140, columns=140)

    outline = projection.render(voxels, grid, PRESETS["bone"], camera).max(axis=2) > 20

    assert grid.regular
    area = outline.sum() * scale(BALL, camera) ** 2
    assert area == pytest.approx(np.pi * 18**2, rel=0.06)


def test_what_is_missing_is_not_drawn() -> None:
    keep = [k for k in range(48) if not 20 <= k < 28]
    stack = stack_planes([BALL.planes()[k] for k in keep])
    voxels, grid = regular(Sampler(BALL.voxels()[keep], stack.grid, stack.gaps))

    shown = projection.render(
        voxels, grid, PRESETS["bone"], Camera(rows=99, columns=99)
    )

    assert shown[49, 49].max() == 0
    assert (shown.max(axis=2) > 20).any()


def test_air_alone_is_black() -> None:
    phantom = Phantom(spheres=())

    assert drawn(phantom, Camera(rows=32, columns=32)).max() == 0


def test_values_without_a_unit_are_drawn_by_their_own_range() -> None:
    voxels = (BALL.voxels().astype(np.float32) + 1000) * 0.37
    grid = BALL.stack().grid
    camera = Camera(rows=120, columns=120)

    shown = projection.render(voxels, grid, PRESETS["surface"], camera)

    area = (shown.max(axis=2) > 20).sum() * scale(BALL, camera) ** 2
    assert area == pytest.approx(np.pi * 18**2, rel=0.1)


@pytest.mark.parametrize("name", [n for n, f in PRESETS.items() if f.unit])
@pytest.mark.parametrize("unit", ["", "BQML"])
def test_presets_for_hounsfield_units_take_no_others(name: str, unit: str) -> None:
    with pytest.raises(InvalidParameter, match="made for HU"):
        function_for(name, unit)
    assert function_for(name, "HU") is PRESETS[name]


def test_an_unknown_preset_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(InvalidParameter, match="bone, lung, vessel, soft, surface"):
        function_for("x-ray", "HU")
