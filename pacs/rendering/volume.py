"""Volumes: how the planes of a series stack up, and where their voxels are.

Planes are sorted along their common normal, never by Instance Number (PS3.3
C.7.6.2.1.1). What a series lacks for a volume is said, not repaired:

* planes that are not parallel, or of other sizes, spacings or frames of reference, are
  left out; the largest stack that remains is used and the rest is counted;
* several planes at each position (phases, echoes) are stacks of their own, chosen by
  number; single planes at a position that is taken are left out;
* a gap is a distance of more than one and a half times the usual one: nothing is
  interpolated across it;
* a tilted gantry moves each plane sideways by the same amount: the grid is a sheared
  one, and sampling it needs no resampling before;
* planes whose centres lie on no line are no volume.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from storage.kernel.errors import InvalidInput

Vector = tuple[float, float, float]

#: A volume has at least so many planes.
MIN_PLANES: Final = 3
#: Direction cosines that differ by less are equal; vendors write 4 to 6 digits.
COSINE: Final = 2e-3
#: Two positions this near, along the normal or beside it, are one (mm).
SAME_PLACE: Final = 1e-2
#: Distances that differ from the usual one by this share are equal to it.
REGULAR: Final = 0.02
#: Orientations of the images of one series; more is no stack, but a fan.
MAX_ORIENTATIONS: Final = 64
#: A distance of so many usual ones is a gap.
GAP: Final = 1.5


class NotAVolume(InvalidInput):
    """The images of a series do not make a volume; the message says why."""

    code = "input.not_a_volume"


@dataclass(frozen=True, slots=True)
class Plane:
    """One frame of a series, as its attributes place it.

    Attributes
    ----------
    instance : int
        Which of the series' instances, from 0.
    frame_number : int
        From 1.
    position : tuple of float, mm
        Image Position (Patient): centre of the first pixel.
    right, down : tuple of float
        Direction cosines of increasing columns, and of increasing rows.
    spacing : tuple of float, mm
        Pixel Spacing: between rows, between columns.
    slope, intercept : float
        Of the modality rescale.
    rank : tuple
        Orders planes at one position: phases, echoes, acquisitions.
    kind : tuple
        Planes of different kinds are never stacked together.
    """

    instance: int
    frame_number: int
    position: Vector
    right: Vector
    down: Vector
    spacing: tuple[float, float]
    rows: int
    columns: int
    slope: float = 1.0
    intercept: float = 0.0
    rank: tuple[float, ...] = ()
    kind: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the voxels of a stack of planes are (all in mm, patient coordinates).

    The centre of voxel (k, j, i) is ``origin + offsets[k] * along + j * row_step +
    i * column_step``. `along` leaves the planes' normal when the gantry is tilted.

    Attributes
    ----------
    shape : tuple of int
        Planes, rows, columns.
    offsets : tuple of float, mm
        Increasing, from 0; one for each plane.
    regular : bool
        All distances are equal.
    """

    shape: tuple[int, int, int]
    origin: Vector
    column_step: Vector
    row_step: Vector
    along: Vector
    offsets: tuple[float, ...]
    regular: bool = True

    @property
    def usual_distance(self) -> float:
        """Return the median distance between planes, mm."""
        return float(np.median(np.diff(self.offsets)))

    @property
    def spacing(self) -> Vector:
        """Return the distance of voxels along planes, rows and columns, mm."""
        return (
            self.usual_distance,
            float(np.linalg.norm(self.row_step)),
            float(np.linalg.norm(self.column_step)),
        )

    def matrix(self) -> NDArray[np.float64]:
        """Return the 3x3 matrix from (offset mm, row, column) to mm."""
        return np.array([self.along, self.row_step, self.column_step]).T

    def corners(self) -> NDArray[np.float64]:
        """Return the outer corners of the outer voxels, shape (8, 3), mm."""
        half = self.usual_distance / 2
        ends = (
            (-half, self.offsets[-1] + half),
            (-0.5, self.shape[1] - 0.5),
            (-0.5, self.shape[2] - 0.5),
        )
        index = np.array(np.meshgrid(*ends, indexing="ij")).reshape(3, 8)
        return np.asarray(self.origin + (self.matrix() @ index).T)

    def centre(self) -> NDArray[np.float64]:
        """Return the middle of the volume, mm."""
        return np.asarray(self.corners().mean(axis=0))


@dataclass(frozen=True, slots=True)
class Stack:
    """A grid, the planes that fill it from the first to the last, and what is odd.

    Attributes
    ----------
    index, of : int
        Which of the stacks at the same positions this is, and how many there are.
    issues : tuple of str
        Sentences about what was left out, or is not as it should be.
    gaps : tuple of (float, float)
        Offsets (mm) between which planes are missing.
    tilt : float, degrees
        Between the normal of the planes and the line of their centres.
    """

    grid: Grid
    planes: tuple[Plane, ...]
    index: int = 0
    of: int = 1
    issues: tuple[str, ...] = ()
    gaps: tuple[tuple[float, float], ...] = ()
    tilt: float = 0.0


@dataclass(slots=True)
class _Group:
    """Parallel planes of one size, and their places along the normal."""

    normal: NDArray[np.float64]
    planes: list[Plane] = field(default_factory=list)


def stack_planes(planes: Sequence[Plane], *, index: int = 0) -> Stack:
    """Find the volume in the planes of a series.

    Parameters
    ----------
    index : int
        Which stack, where several share the same positions (phases, echoes).

    Raises
    ------
    NotAVolume
    """
    if not planes:
        raise NotAVolume("no image of the series has a position and an orientation")
    groups = _groups(planes)
    group = max(groups, key=lambda one: len(_places(one)))
    issues: list[str] = []
    others = len(planes) - len(group.planes)
    if others:
        issues.append(
            f"{others} images of other size, spacing, orientation or frame of "
            "reference are left out"
        )
    places = _places(group)
    if len(places) < MIN_PLANES:
        raise NotAVolume(f"only {len(places)} parallel images at different positions")
    chosen, of = _one_each(places, index, issues)
    grid, tilt = _grid(chosen, group.normal)
    gaps = _gaps(grid.offsets)
    if tilt > 0.1:
        issues.append(f"planes are tilted by {tilt:.1f} degrees")
    if gaps:
        issues.append(f"planes are missing in {len(gaps)} places")
    if not grid.regular and not gaps:
        issues.append("the distance between planes varies")
    return Stack(grid, tuple(chosen), index, of, tuple(issues), gaps, tilt)


def _groups(planes: Iterable[Plane]) -> list[_Group]:
    found: dict[tuple[object, ...], list[_Group]] = defaultdict(list)
    for plane in planes:
        right, down = np.array(plane.right), np.array(plane.down)
        key = (
            plane.rows,
            plane.columns,
            round(plane.spacing[0], 3),
            round(plane.spacing[1], 3),
            plane.kind,
        )
        for group in found[key]:
            first = group.planes[0]
            off = max(
                np.abs(right - first.right).max(), np.abs(down - first.down).max()
            )
            if off < COSINE:
                group.planes.append(plane)
                break
        else:
            if len(found[key]) >= MAX_ORIENTATIONS:
                raise NotAVolume(f"over {MAX_ORIENTATIONS} orientations")
            normal = np.cross(right, down)
            found[key].append(_Group(normal / np.linalg.norm(normal), [plane]))
    return [group for groups in found.values() for group in groups]


def _places(group: _Group) -> list[list[Plane]]:
    """Return the planes at each place along the normal, in order."""
    at = sorted(
        (
            (float(np.dot(plane.position, group.normal)), plane)
            for plane in group.planes
        ),
        key=lambda pair: pair[0],
    )
    places: list[list[Plane]] = []
    last = -math.inf
    for where, plane in at:
        if where - last > SAME_PLACE:
            places.append([])
            last = where
        places[-1].append(plane)
    return places


def _one_each(
    places: Sequence[Sequence[Plane]], index: int, issues: list[str]
) -> tuple[list[Plane], int]:
    """Choose a plane at each place: of one phase or echo, where all have several."""
    counts = {len(place) for place in places}
    of = counts.pop() if len(counts) == 1 else 1
    if not 0 <= index < of:
        raise NotAVolume(f"stack {index} does not exist: the series has {of}")
    if of > 1:
        issues.append(f"{of} stacks at the same positions")
    left = sum(map(len, places)) - of * len(places)
    if left:
        issues.append(f"{left} images at positions that are taken are left out")
    ordered = [
        sorted(place, key=lambda one: (one.rank, one.instance, one.frame_number))
        for place in places
    ]
    return [place[index] for place in ordered], of


def _grid(planes: Sequence[Plane], normal: NDArray[np.float64]) -> tuple[Grid, float]:
    positions = np.array([plane.position for plane in planes])
    line = positions[-1] - positions[0]
    length = float(np.dot(line, normal))
    along = line / np.linalg.norm(line)
    # The centres must lie on one line, tilted or not.
    heights = (positions - positions[0]) @ normal
    beside = positions - positions[0] - np.outer(heights / length, line)
    first = planes[0]
    allowed = max(0.1, 0.25 * min(first.spacing))
    worst = float(np.linalg.norm(beside, axis=1).max())
    if worst > allowed:
        raise NotAVolume(
            f"the planes are not stacked along a line: one is {worst:.1f} mm beside it"
        )
    offsets = heights / length * np.linalg.norm(line)
    distances = np.diff(offsets)
    usual = float(np.median(distances))
    regular = bool(np.abs(distances - usual).max() <= max(REGULAR * usual, SAME_PLACE))
    if regular:
        offsets = np.linspace(0.0, offsets[-1], len(planes))
    grid = Grid(
        (len(planes), first.rows, first.columns),
        _vector(positions[0]),
        _vector(np.array(first.right) * first.spacing[1]),
        _vector(np.array(first.down) * first.spacing[0]),
        _vector(along),
        tuple(float(one) for one in offsets),
        regular,
    )
    cosine = min(1.0, abs(float(np.dot(along, normal))))
    tilt = math.degrees(math.acos(cosine))
    if tilt > 45:
        raise NotAVolume(f"the planes are tilted by {tilt:.0f} degrees")
    return grid, tilt if tilt > 0.1 else 0.0


def _gaps(offsets: Sequence[float]) -> tuple[tuple[float, float], ...]:
    distances = np.diff(offsets)
    usual = float(np.median(distances))
    return tuple(
        (offsets[k], offsets[k + 1])
        for k in np.flatnonzero(distances > GAP * usual).tolist()
    )


def _vector(values: NDArray[np.float64]) -> Vector:
    x, y, z = (float(value) for value in values)
    return (x, y, z)
