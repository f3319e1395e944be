"""Planes and slabs, against SimpleITK and against values computed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813  its own name for it
from numpy.typing import NDArray

from pacs.rendering.reslice import (
    PRESETS,
    Picture,
    Preset,
    Projection,
    Sampler,
    Slab,
    covering,
    orthonormal,
    render,
)
from pacs.rendering.volume import Stack, stack_planes
from storage.kernel.errors import InvalidParameter
from tests.support.volumes import ORIENTATIONS, Phantom


def sampler_of(phantom: Phantom, values: NDArray[Any] | None = None) -> Sampler:
    stack = phantom.stack()
    voxels = phantom.voxels() if values is None else values
    return Sampler(voxels, stack.grid, stack.gaps)


def by_itk(phantom: Phantom, picture: Picture, *, nearest: bool = False) -> Any:
    """Return the picture as SimpleITK draws it."""
    image: Any = sitk.GetImageFromArray(phantom.voxels().astype(np.float32))
    right, down, normal = phantom.axes
    image.SetOrigin([float(one) for one in phantom.position(0)])
    planes, rows, columns = phantom.spacing
    image.SetSpacing((columns, rows, planes))
    image.SetDirection(np.stack((right, down, normal), 1).reshape(-1).tolist())
    direction = np.stack((picture.right, picture.down, picture.normal), 1)
    library: Any = sitk
    drawn = library.Resample(
        image,
        (picture.columns, picture.rows, 1),
        library.Transform(),
        sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear,
        [float(one) for one in picture.origin],
        (picture.spacing[1], picture.spacing[0], 1.0),
        direction.reshape(-1).tolist(),
        -5000.0,
    )
    return sitk.GetArrayFromImage(drawn)[0]


@pytest.mark.parametrize("plane", [*PRESETS, "oblique"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_planes_equal_those_of_another_program(orientation: str, plane: str) -> None:
    phantom = Phantom(orientation)
    sampler = sampler_of(phantom)
    if plane in PRESETS:
        right, down = PRESETS[plane]
    else:
        right, down = orthonormal((0.9, 0.3, -0.2), (0.2, -0.4, 0.3))
    # Off the voxels, so that nothing is decided by a last bit.
    through = phantom.centre() + np.array([0.31, -0.17, 0.23])
    picture = covering(
        sampler.grid, right, down, through=tuple(through), spacing=(0.9, 1.1)
    )

    mine = render(sampler, picture)
    other = by_itk(phantom, picture)

    inside = mine.inside & (other > -4999)
    assert inside.mean() > 0.2
    # Both call the same pixels outside, but for a rounding at the very border.
    assert (mine.inside != (other > -4999)).mean() < 0.01
    assert np.abs(mine.values - other)[inside].max() < 0.05
    assert mine.values[inside].max() > 250


def test_the_nearest_voxel_is_that_of_another_program() -> None:
    phantom = Phantom("oblique")
    stack = phantom.stack()
    sampler = Sampler(phantom.voxels(), stack.grid, (), "nearest")
    through = tuple(phantom.centre() + 0.1234)
    picture = covering(stack.grid, *PRESETS["coronal"], through=through, spacing=(1, 1))

    mine = render(sampler, picture)
    other = by_itk(phantom, picture, nearest=True)

    inside = mine.inside & (other > -4999)
    assert (mine.values[inside] != other[inside]).mean() < 0.005


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_sphere_is_where_it_was_put(orientation: str, preset: Preset) -> None:
    """Its picture is a disc of its radius around its centre, in every direction."""
    offset, radius, value = (6.0, -4.0, 5.0), 8.0, 500.0
    phantom = Phantom(
        orientation,
        shape=(40, 50, 60),
        spacing=(1.6, 1.1, 0.9),
        spheres=((offset, radius, value),),
    )
    sampler = sampler_of(phantom)
    middle = phantom.centre() + np.array(offset)
    right, down = PRESETS[preset]
    picture = covering(
        sampler.grid, right, down, through=tuple(middle), spacing=(0.5, 0.5)
    )

    plain = render(sampler, picture)

    bright = np.argwhere(plain.inside & (plain.values > (value + phantom.air) / 2))
    centre = np.array(picture.origin)
    centre = centre + np.array(down) * bright[:, 0].mean() * 0.5
    centre = centre + np.array(right) * bright[:, 1].mean() * 0.5
    assert centre == pytest.approx(middle, abs=0.4)
    assert len(bright) * 0.25 == pytest.approx(np.pi * radius**2, rel=0.06)


@pytest.mark.parametrize("shear", [0.0, 0.8])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_linear_field_is_reproduced_exactly(orientation: str, shear: float) -> None:
    """Also where the gantry is tilted and where planes are not evenly apart."""
    phantom = Phantom(orientation, shear=shear)
    keep = [k for k in range(phantom.shape[0]) if k not in {3, 4, 11}]
    slope = np.array([3.0, -2.0, 1.5])
    field = (phantom.points() @ slope + 40)[keep].astype(np.float32)
    stack = stack_planes([phantom.planes()[k] for k in keep])
    # Without its gaps: what is asked for here is where the planes are.
    sampler = Sampler(field, stack.grid)
    right, down = orthonormal((0.7, 0.1, 0.7), (-0.1, 0.7, 0.0))
    picture = covering(stack.grid, right, down, spacing=(1.3, 1.3))

    plain = render(sampler, picture)

    rows, columns = np.meshgrid(
        np.arange(picture.rows), np.arange(picture.columns), indexing="ij"
    )
    points = (
        np.array(picture.origin)
        + rows[..., None] * np.array(down) * 1.3
        + columns[..., None] * np.array(right) * 1.3
    )
    index = sampler.index(points.reshape(-1, 3)).reshape(*rows.shape, 3)
    last = np.array(stack.grid.shape) - 1
    within = ((index >= 0) & (index <= last)).all(axis=-1)
    assert within.mean() > 0.15
    assert np.abs(plain.values - (points @ slope + 40))[within].max() < 0.02


def test_nothing_is_interpolated_across_a_gap() -> None:
    phantom = Phantom()
    keep = [k for k in range(20) if k not in {9, 10}]
    stack = stack_planes([phantom.planes()[k] for k in keep])
    sampler = Sampler(phantom.voxels()[keep], stack.grid, stack.gaps)
    picture = covering(stack.grid, *PRESETS["coronal"], spacing=(1.0, 1.0))

    plain = render(sampler, picture)

    z = picture.origin[2] - np.arange(picture.rows)
    lost = (z > phantom.position(8)[2] + 1.5) & (z < phantom.position(11)[2] - 1.5)
    assert lost.sum() == 6
    assert not plain.inside[lost].any()
    assert plain.inside[~lost].all()


@pytest.mark.parametrize(
    ("mode", "by_hand"), [("mip", np.max), ("minip", np.min), ("average", np.mean)]
)
def test_slabs_are_what_they_are_called(mode: Projection, by_hand: Any) -> None:
    phantom = Phantom(spacing=(2.0, 1.0, 1.0))
    voxels = np.random.default_rng(5).integers(-1000, 1000, phantom.shape, np.int16)
    sampler = sampler_of(phantom, voxels)
    x, y, z = (float(one) for one in phantom.position(10))
    picture = Picture((x, y, z), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 1.0), 32, 40)

    # Five planes: from 8 to 12, a sample on each.
    plain = render(sampler, picture, Slab(8.0, mode, 2.0))

    assert plain.inside.all()
    assert plain.values == pytest.approx(by_hand(voxels[8:13], axis=0), abs=0.01)


def test_samples_beside_the_volume_do_not_count() -> None:
    phantom = Phantom(spacing=(2.0, 1.0, 1.0))
    voxels = np.full(phantom.shape, 100, np.int16)
    sampler = sampler_of(phantom, voxels)
    x, y, z = (float(one) for one in phantom.position(0))
    picture = Picture((x, y, z), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 1.0), 32, 40)

    averages = render(sampler, picture, Slab(40.0, "average", 1.0))
    least = render(sampler, picture, Slab(40.0, "minip", 1.0))

    assert (averages.values == 100).all()
    assert (least.values == 100).all()


def test_a_slab_has_its_picture_in_its_middle_and_its_step_at_most() -> None:
    depths = Slab(7.0, "mip", 0.8).depths()

    assert depths[0] == -3.5
    assert depths[-1] == 3.5
    assert depths[len(depths) // 2] == 0
    assert np.diff(depths).max() <= 0.8


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_picture_covers_the_volume_in_the_size_that_was_asked_for(
    orientation: str,
) -> None:
    grid = Phantom(orientation).stack().grid
    right, down = PRESETS["sagittal"]

    picture = covering(grid, right, down, rows=100, columns=80)

    corners = (grid.corners() - np.array(picture.origin)) @ np.array([down, right]).T
    pixels = corners / np.array(picture.spacing)
    assert (picture.rows, picture.columns) == (100, 80)
    assert pixels.min(axis=0).min() >= -0.51
    assert (pixels.max(axis=0) <= np.array([99.51, 79.51])).all()


@pytest.mark.parametrize(
    ("right", "down"),
    [
        ((0.0, 0.0, 0.0), (0.0, 1.0, 0.0)),
        ((1.0, 0.0, 0.0), (1.0, 0.0, 0.0)),
        ((1.0, 0.0, 0.0), (0.5, 1.0, 0.0)),
        ((float("nan"), 0.0, 0.0), (0.0, 1.0, 0.0)),
        ((float("inf"), 0.0, 0.0), (0.0, 1.0, 0.0)),
    ],
)
def test_directions_that_are_none_are_refused(right: Any, down: Any) -> None:
    with pytest.raises(InvalidParameter):
        orthonormal(right, down)


def test_a_check_that_raises_stops_the_picture() -> None:
    phantom = Phantom()
    sampler = sampler_of(phantom)
    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) > 2:
            raise InterruptedError

    picture = covering(sampler.grid, *PRESETS["axial"], spacing=(0.05, 0.05))
    with pytest.raises(InterruptedError):
        render(sampler, picture, check=check)
    assert len(calls) == 3


def test_the_stack_of_a_phantom_is_what_the_tests_take_it_for() -> None:
    stack: Stack = Phantom("oblique").stack()

    assert stack.grid.along == pytest.approx(Phantom("oblique").axes[2])
