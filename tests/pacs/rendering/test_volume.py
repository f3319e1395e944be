"""How planes stack up: order, gaps, doubles, tilt, and what makes no volume."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pacs.rendering.volume import MAX_ORIENTATIONS, NotAVolume, stack_planes
from pacs.rendering.volume_attributes import describe, is_whole, value_range
from tests.support.volumes import ORIENTATIONS, Phantom


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_planes_are_sorted_along_their_normal_whatever_their_order(
    orientation: str,
) -> None:
    phantom = Phantom(orientation)
    order = np.random.default_rng(1).permutation(phantom.shape[0]).tolist()

    stack = stack_planes(phantom.planes(order))

    assert [order[plane.instance] for plane in stack.planes] == sorted(order)
    assert stack.grid.shape == phantom.shape
    assert stack.grid.spacing == pytest.approx(phantom.spacing)
    assert stack.grid.origin == pytest.approx(phantom.position(0))
    assert stack.grid.regular
    assert not stack.issues


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_grid_puts_every_voxel_where_its_image_has_it(orientation: str) -> None:
    phantom = Phantom(orientation)
    grid = phantom.stack().grid

    index = np.array([7 * phantom.spacing[0], 5, 11])

    assert np.array(grid.origin) + grid.matrix() @ index == pytest.approx(
        phantom.position(7, 5, 11)
    )
    assert grid.centre() == pytest.approx(phantom.centre())


def test_a_missing_plane_is_a_gap_with_its_place() -> None:
    planes = Phantom().planes()
    del planes[8]

    stack = stack_planes(planes)

    (gap,) = stack.gaps
    assert gap == pytest.approx((21.0, 27.0))
    assert "planes are missing in 1 places" in stack.issues
    assert not stack.grid.regular


def test_uneven_distances_are_no_gap_but_are_said() -> None:
    planes = Phantom().planes()
    x, y, z = planes[5].position
    planes[5] = replace(planes[5], position=(x, y, z + 0.5))

    stack = stack_planes(planes)

    assert not stack.gaps
    assert stack.issues == ("the distance between planes varies",)


def test_one_image_twice_is_left_out_once() -> None:
    planes = Phantom().planes()
    planes.append(replace(planes[3], instance=99))

    stack = stack_planes(planes)

    assert stack.of == 1
    assert [plane.instance for plane in stack.planes] == list(range(20))
    assert "1 images at positions that are taken are left out" in stack.issues


def test_phases_are_stacks_of_their_own_in_the_order_of_their_rank() -> None:
    first = [replace(plane, rank=(2.0,)) for plane in Phantom().planes()]
    second = [
        replace(plane, rank=(1.0,), instance=100 + plane.instance) for plane in first
    ]

    stacks = [stack_planes([*first, *second], index=index) for index in (0, 1)]

    assert [stack.of for stack in stacks] == [2, 2]
    assert [stack.planes[0].instance for stack in stacks] == [100, 0]
    with pytest.raises(NotAVolume, match="stack 2 does not exist"):
        stack_planes([*first, *second], index=2)


def test_localizers_and_other_sizes_are_counted_and_left_out() -> None:
    planes = Phantom().planes()
    sagittal = Phantom("sagittal", shape=(2, 32, 40)).planes()
    larger = replace(planes[0], rows=64, instance=50)

    stack = stack_planes([*sagittal, *planes, larger])

    assert len(stack.planes) == 20
    assert stack.issues[0].startswith("3 images of other size")


def test_images_of_another_frame_of_reference_are_not_stacked() -> None:
    planes = [
        replace(plane, kind=("1.2.3" if number < 12 else "1.2.4",))
        for number, plane in enumerate(Phantom().planes())
    ]

    assert len(stack_planes(planes).planes) == 12


def test_a_tilted_gantry_makes_a_sheared_grid() -> None:
    phantom = Phantom(shear=0.8)

    stack = phantom.stack()

    assert stack.tilt == pytest.approx(np.degrees(np.arctan2(0.8, 3.0)))
    assert stack.issues == ("planes are tilted by 14.9 degrees",)
    index = np.array([stack.grid.offsets[9], 3, 4])
    found = np.array(stack.grid.origin) + stack.grid.matrix() @ index
    assert found == pytest.approx(phantom.position(9, 3, 4))


def test_planes_that_lie_on_no_line_are_refused() -> None:
    planes = Phantom().planes()
    x, y, z = planes[9].position
    planes[9] = replace(planes[9], position=(x + 20, y, z))

    with pytest.raises(NotAVolume, match=r"20\.0 mm beside it"):
        stack_planes(planes)


def test_a_fan_of_planes_is_refused_before_it_costs_much() -> None:
    planes = []
    for number in range(MAX_ORIENTATIONS + 1):
        turn = number * 0.02
        planes.append(
            replace(
                Phantom().planes()[0],
                right=(np.cos(turn), np.sin(turn), 0.0),
                down=(-np.sin(turn), np.cos(turn), 0.0),
            )
        )

    with pytest.raises(NotAVolume, match="orientations"):
        stack_planes(planes)


@pytest.mark.parametrize(
    ("count", "message"), [(0, "no image"), (1, "only 1"), (2, "only 2")]
)
def test_too_few_planes_are_no_volume(count: int, message: str) -> None:
    with pytest.raises(NotAVolume, match=message):
        stack_planes(Phantom().planes()[:count])


def element(vr: str, *values: Any) -> dict[str, Any]:
    return {"vr": vr, "Value": list(values)}


def image(**changed: Any) -> dict[str, Any]:
    """Return the attributes of an image in the DICOM JSON model."""
    return {
        "00080016": element("UI", "1.2.840.10008.5.1.4.1.1.2"),
        "00080018": element("UI", "1.2.3"),
        "00200032": element("DS", 1, 2, 3),
        "00200037": element("DS", 1, 0, 0, 0, 1, 0),
        "00280002": element("US", 1),
        "00280004": element("CS", "MONOCHROME2"),
        "00280010": element("US", 8),
        "00280011": element("US", 9),
        "00280030": element("DS", 0.5, 0.25),
        "00280100": element("US", 16),
        "00280101": element("US", 12),
        "00280102": element("US", 11),
        "00280103": element("US", 0),
        "00281052": element("DS", "-1024.0000000000000001"),
        "00281053": element("DS", 1),
        **changed,
    }


def test_attributes_become_a_plane_with_its_rescale() -> None:
    found = describe([image()])

    (plane,) = found.planes
    assert plane.position == (1.0, 2.0, 3.0)
    assert plane.spacing == (0.5, 0.25)
    assert (plane.rows, plane.columns) == (8, 9)
    assert (plane.slope, plane.intercept) == (1.0, -1024.0)
    assert found.unit == "HU"
    assert is_whole(found.planes)
    assert value_range(found, found.planes) == (-1024.0, 3071.0)


@pytest.mark.parametrize(
    ("tag", "value"),
    [
        ("00200032", element("DS", "NaN", 0, 0)),
        ("00200032", element("DS", 0, 0)),
        ("00200032", element("DS", 1e30, 0, 0)),
        ("00200037", element("DS", 0, 0, 0, 0, 0, 0)),
        ("00200037", element("DS", 1, 0, 0, 1, 0, 0)),
        ("00200037", element("DS", "a", 0, 0, 0, 1, 0)),
        ("00280030", element("DS", 0, 1)),
        ("00280030", element("DS", -1, 1)),
        ("00280030", {"vr": "DS"}),
        ("00280010", element("US", 0)),
        ("00280010", element("UN", "x")),
        ("00280100", element("US", 12)),
        ("00280101", element("US", 17)),
        ("00280002", element("US", 3)),
        ("00280004", element("CS", "PALETTE COLOR")),
        ("00280008", element("IS", 5)),
        ("00281053", element("DS", "1e300")),
        ("00281052", element("DS", "-1e300")),
    ],
)
def test_images_with_impossible_attributes_have_no_place(
    tag: str, value: dict[str, Any]
) -> None:
    assert describe([image(**{tag: value})]).planes == ()


def test_a_unit_is_never_made_up() -> None:
    mr = element("UI", "1.2.840.10008.5.1.4.1.1.4")
    pet = image(
        **{"00080016": element("UI", "1.2.3"), "00541001": element("CS", "BQML")}
    )
    localizer = image(**{"00080008": element("CS", "ORIGINAL", "PRIMARY", "LOCALIZER")})

    units = [
        describe([one]).unit
        for one in (
            image(**{"00080016": mr}),
            pet,
            localizer,
            image(**{"00281054": element("LO", "US")}),
            image(**{"00281054": element("LO", "MGML")}),
        )
    ]

    assert units == ["", "BQML", "", "HU", "MGML"]


def test_frames_of_enhanced_images_take_their_groups_or_the_shared_ones() -> None:
    per_frame = [
        {
            "00209113": element("SQ", {"00200032": element("DS", 0, 0, 2.5 * number)}),
            "00209111": element("SQ", {"00209056": element("SH", "1")}),
        }
        for number in (2, 0, 1)
    ]
    shared = {
        "00209116": element("SQ", {"00200037": element("DS", 1, 0, 0, 0, 1, 0)}),
        "00289110": element("SQ", {"00280030": element("DS", 0.7, 0.7)}),
        "00289145": element(
            "SQ",
            {
                "00281052": element("DS", -1000),
                "00281053": element("DS", 2),
                "00281054": element("LO", "HU"),
            },
        ),
        "00289132": element(
            "SQ", {"00281050": element("DS", 50), "00281051": element("DS", 350)}
        ),
    }
    enhanced = image(
        **{"52009230": element("SQ", *per_frame), "52009229": element("SQ", shared)}
    )

    found = describe([enhanced])
    stack = stack_planes(found.planes)

    assert [plane.frame_number for plane in stack.planes] == [2, 3, 1]
    assert {plane.slope for plane in stack.planes} == {2.0}
    assert found.unit == "HU"
    assert found.window == (50.0, 350.0)
