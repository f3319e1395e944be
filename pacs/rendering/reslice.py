"""Planes and slabs through a volume: MPR, MIP, MinIP and average.

A plane is sampled where its pixels are: there is no intermediate volume. Values between
voxels are interpolated linearly, or taken from the nearest; the half voxel around the
outermost centres belongs to the volume, as it does to an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from pacs.rendering.volume import Grid, Vector
from storage.kernel.errors import InvalidParameter

Projection = Literal["mip", "minip", "average"]
Interpolation = Literal["linear", "nearest"]
Preset = Literal["axial", "coronal", "sagittal"]
Voxels = NDArray[np.int16] | NDArray[np.float32]
Floats = NDArray[np.float32]
#: Called now and then; raises when nobody waits for the picture any more.
Check = Callable[[], None]

#: Rows of a picture that are sampled together: what fits a processor's cache.
_POINTS: Final = 1 << 16
#: Right and down of a picture, as a radiologist sees it, in patient coordinates:
#: x to the patient's left, y to the back, z to the head (PS3.3 C.7.6.2.1.1).
PRESETS: Final[dict[Preset, tuple[Vector, Vector]]] = {
    "axial": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)),
    "coronal": ((1.0, 0.0, 0.0), (0.0, 0.0, -1.0)),
    "sagittal": ((0.0, 1.0, 0.0), (0.0, 0.0, -1.0)),
}


@dataclass(frozen=True, slots=True)
class Picture:
    """Where the pixels of a picture are.

    Attributes
    ----------
    origin : tuple of float, mm
        Centre of the first pixel, patient coordinates.
    right, down : tuple of float
        Unit vectors of increasing columns, and of increasing rows.
    spacing : tuple of float, mm
        Between rows, between columns.
    """

    origin: Vector
    right: Vector
    down: Vector
    spacing: tuple[float, float]
    rows: int
    columns: int

    @property
    def normal(self) -> NDArray[np.float64]:
        return np.cross(self.right, self.down)


@dataclass(frozen=True, slots=True)
class Slab:
    """Several parallel pictures, seen as one.

    Attributes
    ----------
    thickness : float, mm
        From the first sample to the last; the picture lies in its middle.
    step : float, mm
        The largest distance between samples.
    """

    thickness: float
    projection: Projection
    step: float

    def depths(self) -> NDArray[np.float64]:
        """Return the places of the samples along the normal, mm; an odd number."""
        half = max(1, math.ceil(self.thickness / 2 / self.step))
        return np.linspace(-self.thickness / 2, self.thickness / 2, 2 * half + 1)


@dataclass(frozen=True, slots=True)
class Plain:
    """Values of a picture, and which of them lie in the volume.

    Attributes
    ----------
    values : ndarray of float32, shape (rows, columns)
        In the unit of the volume; 0 outside.
    inside : ndarray of bool, shape (rows, columns)
    """

    values: Floats
    inside: NDArray[np.bool_]


class Sampler:
    """Reads a volume between its voxels.

    Parameters
    ----------
    voxels : ndarray, shape (planes, rows, columns)
    grid : Grid
        Where they are.
    gaps : sequence of (float, float)
        Offsets between which nothing is known.
    """

    def __init__(
        self,
        voxels: Voxels,
        grid: Grid,
        gaps: tuple[tuple[float, float], ...] = (),
        interpolation: Interpolation = "linear",
    ) -> None:
        self.grid = grid
        self._flat = np.ascontiguousarray(voxels).reshape(-1)
        self._inverse = np.linalg.inv(grid.matrix())
        self._offsets = np.array(grid.offsets)
        self._gaps = gaps
        self._nearest = interpolation == "nearest"

    def index(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return points in mm, shape (..., 3), as (plane, row, column)."""
        found: NDArray[np.float64] = (
            points - np.array(self.grid.origin)
        ) @ self._inverse.T
        found[..., 0] = self._plane(found[..., 0])
        return found

    def _plane(self, offset: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return fractional plane numbers of offsets in mm."""
        offsets, usual = self._offsets, self.grid.usual_distance
        if self.grid.regular:
            return np.asarray(offset / usual)
        last = len(offsets) - 1
        plane = np.interp(offset, offsets, np.arange(len(offsets)))
        # Beyond the ends np.interp stands still: go on at the usual distance.
        before, behind = offset < offsets[0], offset > offsets[-1]
        plane[before] = (offset[before] - offsets[0]) / usual
        plane[behind] = last + (offset[behind] - offsets[-1]) / usual
        return np.asarray(plane)

    def sample(self, index: NDArray[np.float64]) -> tuple[Floats, NDArray[np.bool_]]:
        """Return the values at fractional indices, shape (n, 3), and which are known.

        Values outside are those of the border.
        """
        n_planes, n_rows, n_columns = self.grid.shape
        k, j, i = index[:, 0], index[:, 1], index[:, 2]
        inside = (k >= -0.5) & (k <= n_planes - 0.5)
        inside &= (j >= -0.5) & (j <= n_rows - 0.5)
        inside &= (i >= -0.5) & (i <= n_columns - 0.5)
        if self._gaps:
            inside &= ~self._in_gap(k)
        k = np.clip(k, 0, n_planes - 1)
        j = np.clip(j, 0, n_rows - 1)
        i = np.clip(i, 0, n_columns - 1)
        if self._nearest:
            at = np.rint(k).astype(np.intp) * n_rows + np.rint(j).astype(np.intp)
            at = at * n_columns + np.rint(i).astype(np.intp)
            return self._flat[at].astype(np.float32), inside
        return self._linear(k, j, i), inside

    def plane(self, offset: float) -> tuple[Floats, bool]:
        """Return a plane parallel to the stored ones, and whether it lies in a gap."""
        n_planes = self.grid.shape[0]
        at = self._plane(np.array([offset]))
        k = min(max(float(at[0]), 0.0), n_planes - 1.0)
        k0 = min(int(k), n_planes - 2)
        stored = self._flat.reshape(self.grid.shape)
        low = stored[k0].astype(np.float32)
        high = stored[k0 + 1].astype(np.float32)
        gap = bool(self._gaps) and bool(self._in_gap(at)[0])
        return low + np.float32(k - k0) * (high - low), gap

    def _linear(
        self,
        k: NDArray[np.float64],
        j: NDArray[np.float64],
        i: NDArray[np.float64],
    ) -> Floats:
        n_planes, n_rows, n_columns = self.grid.shape
        # The last voxel is reached as the upper neighbour of the one before it.
        k0 = np.minimum(k.astype(np.intp), n_planes - 2)
        j0 = np.minimum(j.astype(np.intp), n_rows - 2)
        i0 = np.minimum(i.astype(np.intp), n_columns - 2)
        fk = (k - k0).astype(np.float32)
        fj = (j - j0).astype(np.float32)
        fi = (i - i0).astype(np.float32)
        base = (k0 * n_rows + j0) * n_columns + i0
        flat, row, plane = self._flat, n_columns, n_rows * n_columns

        def along_row(offset: int) -> Floats:
            low = flat.take(base + offset).astype(np.float32, copy=False)
            high = flat.take(base + (offset + 1)).astype(np.float32, copy=False)
            return low + fi * (high - low)

        near = along_row(0)
        near += fj * (along_row(row) - near)
        far = along_row(plane)
        far += fj * (along_row(plane + row) - far)
        near += fk * (far - near)
        return near

    def _in_gap(self, plane: NDArray[np.float64]) -> NDArray[np.bool_]:
        within = np.zeros(plane.shape, np.bool_)
        for low, _ in self._gaps:
            k = int(np.searchsorted(self._offsets, low + 1e-6)) - 1
            # Half a usual distance around each plane is that plane's own.
            reach = self.grid.usual_distance / 2
            width = float(self._offsets[k + 1] - self._offsets[k])
            within |= (plane > k + reach / width) & (plane < k + 1 - reach / width)
        return within


def render(
    sampler: Sampler,
    picture: Picture,
    slab: Slab | None = None,
    *,
    check: Check = lambda: None,
) -> Plain:
    """Return the values of a picture through the volume.

    Parameters
    ----------
    slab : Slab, optional
        Samples of it that lie outside the volume do not count.
    """
    values = np.zeros((picture.rows, picture.columns), np.float32)
    inside = np.zeros(values.shape, np.bool_)
    depths = np.zeros(1) if slab is None else slab.depths()
    mode: Projection = "average" if slab is None else slab.projection
    for rows, points in _strips(picture):
        check()
        n = len(points)
        total = np.zeros(n, np.float32) if mode == "average" else None
        best: Floats = np.full(n, -np.inf if mode == "mip" else np.inf, np.float32)
        count = np.zeros(n, np.int32)
        for depth in depths:
            found, known = sampler.sample(
                sampler.index(points + picture.normal * depth)
            )
            count += known
            if total is not None:
                total += np.where(known, found, np.float32(0))
            elif mode == "mip":
                np.maximum(best, np.where(known, found, -np.inf), out=best)
            else:
                np.minimum(best, np.where(known, found, np.inf), out=best)
        seen = count > 0
        if total is not None:
            best = np.asarray(total / np.maximum(count, 1), np.float32)
        shape = (-1, picture.columns)
        values[rows] = np.where(seen, best, np.float32(0)).reshape(shape)
        inside[rows] = seen.reshape(shape)
    return Plain(values, inside)


def _strips(picture: Picture) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Yield some rows of a picture at a time, and the points of their pixels (mm)."""
    right = np.array(picture.right) * picture.spacing[1]
    down = np.array(picture.down) * picture.spacing[0]
    across = np.arange(picture.columns)[:, None] * right
    height = max(1, _POINTS // picture.columns)
    for first in range(0, picture.rows, height):
        rows = np.arange(first, min(first + height, picture.rows))
        starts = np.array(picture.origin) + rows[:, None] * down
        points = (starts[:, None, :] + across[None, :, :]).reshape(-1, 3)
        yield slice(int(rows[0]), int(rows[-1]) + 1), points


def orthonormal(right: Vector, down: Vector) -> tuple[Vector, Vector]:
    """Return the directions of a plane as unit vectors.

    Raises
    ------
    InvalidParameter
        One has no length, or they are not at right angles.
    """
    found = []
    for name, vector in (("right", right), ("down", down)):
        length = math.hypot(*vector)
        if not math.isfinite(length) or length < 1e-6:
            raise InvalidParameter(name, "is no direction")
        found.append(np.array(vector) / length)
    if abs(float(np.dot(found[0], found[1]))) > 1e-3:
        raise InvalidParameter("plane", "right and down are not at right angles")
    # Exactly so, whatever was rounded on the way here.
    found[1] -= found[0] * np.dot(found[0], found[1])
    found[1] /= np.linalg.norm(found[1])
    a, b = (tuple(float(one) for one in vector) for vector in found)
    return (a[0], a[1], a[2]), (b[0], b[1], b[2])


def covering(
    grid: Grid,
    right: Vector,
    down: Vector,
    *,
    through: Vector | None = None,
    spacing: tuple[float, float] | None = None,
    rows: int | None = None,
    columns: int | None = None,
) -> Picture:
    """Return the picture in a direction that shows the whole volume.

    Parameters
    ----------
    through : tuple of float, mm, optional
        A point of the plane; else the middle of the volume.
    spacing : tuple of float, mm, optional
        Else the smallest distance of voxels, or what `rows` and `columns` need.
    rows, columns : int, optional
        The picture's size; it is centred on the volume.
    """
    centre = grid.centre() if through is None else np.array(through)
    axes = np.array([down, right])
    normal = np.cross(right, down)
    seen = grid.corners() @ axes.T
    low, high = seen.min(axis=0), seen.max(axis=0)
    extent = high - low
    if spacing is None:
        fine = min(grid.spacing)
        if rows and columns:
            fine = float(max(extent[0] / rows, extent[1] / columns))
        spacing = (fine, fine)
    size = [
        given or max(1, round(float(length) / step))
        for given, length, step in zip((rows, columns), extent, spacing, strict=True)
    ]
    middle = (low + high) / 2
    first = middle - (np.array(size) - 1) / 2 * np.array(spacing)
    origin = axes.T @ first + normal * float(np.dot(normal, centre))
    x, y, z = (float(one) for one in origin)
    return Picture((x, y, z), right, down, spacing, size[0], size[1])
