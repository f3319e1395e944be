"""Volume rendering: rays through a volume, coloured by its values.

Parallel rays are followed from front to back, all rays of a strip of the picture one
step at a time. Blocks of the volume in which the preset sees nothing are passed over,
and a ray ends when almost nothing behind it could be seen. Surfaces are lit from the
viewer (Phong); the normal is the gradient of the values.

Own code and not VTK: VTK 9.7 draws off-screen here too, faster, but adds 565 MB to an
installation and wants EGL or Mesa libraries on the host, which slim images lack. What
is needed here, still pictures for browsers without a GPU, numpy makes in a second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pacs.rendering.reslice import Check, Floats, Sampler, Voxels
from pacs.rendering.volume import Grid
from storage.kernel.errors import InvalidParameter

#: Opacity that no ray needs to go beyond.
_OPAQUE: Final = 0.97
#: Entries of a transfer function's table.
_LEVELS: Final = 1024
#: Voxels along an edge of a block that is passed over when it is empty.
_BLOCK: Final = 8
#: Steps of a ray between two looks at the blocks; less than a block long.
_LEAP: Final = 4
#: Rays that are followed together: what fits a processor's cache.
_RAYS: Final = 1 << 14
#: Share of the light that is lost on the way through the volume: far things are
#: darker than near ones.
_DIMMED: Final = 0.65
#: Samples that add less to a pixel are not lit.
_LIT: Final = 0.02
#: Planes of a volume that is made regular.
_MAX_PLANES: Final = 1024
_AMBIENT, _DIFFUSE, _SPECULAR, _SHININESS = 0.25, 0.7, 0.25, 12.0


@dataclass(frozen=True, slots=True)
class TransferFunction:
    """What each value looks like.

    Attributes
    ----------
    unit : str
        Unit of the values; empty: fractions of the volume's own range, from its 1st
        to its 99.5th percentile.
    points : tuple of (value, opacity of 1 mm, red, green, blue)
        Values increasing, the rest from 0 to 1; between them it is linear.
    """

    unit: str
    points: tuple[tuple[float, float, float, float, float], ...]


PRESETS: Final[Mapping[str, TransferFunction]] = {
    "bone": TransferFunction(
        "HU",
        (
            (190.0, 0.0, 0.62, 0.36, 0.26),
            (260.0, 0.08, 0.80, 0.58, 0.42),
            (400.0, 0.55, 0.95, 0.86, 0.72),
            (1500.0, 0.9, 1.0, 1.0, 0.97),
        ),
    ),
    "lung": TransferFunction(
        "HU",
        (
            (-950.0, 0.0, 0.35, 0.15, 0.15),
            (-800.0, 0.004, 0.60, 0.30, 0.28),
            (-650.0, 0.03, 0.85, 0.50, 0.42),
            (-450.0, 0.12, 0.95, 0.70, 0.55),
            (-250.0, 0.0, 0.95, 0.70, 0.55),
        ),
    ),
    "vessel": TransferFunction(
        "HU",
        (
            (120.0, 0.0, 0.55, 0.10, 0.08),
            (180.0, 0.15, 0.80, 0.18, 0.12),
            (300.0, 0.5, 0.95, 0.40, 0.25),
            (600.0, 0.8, 1.0, 0.90, 0.75),
        ),
    ),
    "soft": TransferFunction(
        "HU",
        (
            (-350.0, 0.0, 0.75, 0.50, 0.40),
            (-150.0, 0.25, 0.90, 0.68, 0.55),
            (60.0, 0.5, 0.90, 0.60, 0.50),
            (300.0, 0.9, 0.98, 0.92, 0.82),
        ),
    ),
    "surface": TransferFunction(
        "",
        (
            (0.10, 0.0, 0.55, 0.45, 0.40),
            (0.22, 0.20, 0.80, 0.65, 0.55),
            (0.60, 0.60, 0.95, 0.85, 0.75),
            (1.00, 0.90, 1.0, 1.0, 0.95),
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class Camera:
    """From where a volume is looked at, without perspective.

    Attributes
    ----------
    azimuth, elevation : float, degrees
        0, 0 looks from the front with the head up; azimuth turns towards the
        patient's left, elevation lifts the viewer.
    zoom : float
        1: the whole volume fits into the picture.
    """

    azimuth: float = 0.0
    elevation: float = 0.0
    zoom: float = 1.0
    rows: int = 512
    columns: int = 512

    def axes(self) -> tuple[NDArray[np.float64], ...]:
        """Return right, down and forward of the picture, patient coordinates."""
        a, e = math.radians(self.azimuth), math.radians(self.elevation)
        forward = np.array(
            [-math.sin(a) * math.cos(e), math.cos(a) * math.cos(e), -math.sin(e)]
        )
        right = np.array([math.cos(a), math.sin(a), 0.0])
        return right, np.cross(forward, right), forward


def function_for(name: str, unit: str) -> TransferFunction:
    """Return the preset of that name.

    Raises
    ------
    InvalidParameter
        There is none, or it is made for other units.
    """
    found = PRESETS.get(name)
    if found is None:
        raise InvalidParameter("preset", f"is none of {', '.join(PRESETS)}")
    if found.unit and found.unit != unit:
        has = f"are in {unit}" if unit else "have no unit"
        raise InvalidParameter(
            "preset", f"{name} is made for {found.unit}; the values here {has}"
        )
    return found


def spread(voxels: Voxels) -> tuple[float, float]:
    """Return the 1st and 99.5th percentile of a volume, from a sample of it."""
    flat = voxels.reshape(-1)
    some = flat[:: max(1, flat.size // 500_000)]
    low, high = np.percentile(some, (1.0, 99.5))
    return float(low), float(max(high, low + 1e-6))


def render(
    voxels: Voxels,
    grid: Grid,
    function: TransferFunction,
    camera: Camera,
    *,
    step: float = 1.0,
    check: Check = lambda: None,
) -> NDArray[np.uint8]:
    """Return a picture of a volume, shape (rows, columns, 3), black around it.

    Parameters
    ----------
    grid : Grid
        A regular one; `regular` makes it of any other.
    step : float
        Distance of samples along a ray, in smallest voxel distances.
    """
    table = _Table.of(function, spread(voxels))
    rays = _Rays.of(grid, camera, step)
    field = _Field(voxels, grid)
    blocks = _Blocks(voxels, table)
    picture = np.zeros((camera.rows * camera.columns, 3), np.float32)
    for first in range(0, len(picture), _RAYS):
        check()
        chosen = np.arange(first, min(first + _RAYS, len(picture)))
        picture[chosen] = _follow(field, table, rays, blocks, chosen)
    shown = np.rint(np.clip(picture, 0.0, 1.0) * 255).astype(np.uint8)
    return shown.reshape(camera.rows, camera.columns, 3)


@dataclass(frozen=True, slots=True)
class _Table:
    """A transfer function, looked up."""

    low: float
    scale: float
    opacity: Floats
    colour: Floats
    above: float
    """Smallest value that can be seen."""
    below: float
    """Largest value that can be seen."""

    @classmethod
    def of(cls, function: TransferFunction, range_: tuple[float, float]) -> _Table:
        points = np.array(function.points, np.float64)
        at = points[:, 0]
        if not function.unit:
            at = range_[0] + at * (range_[1] - range_[0])
        levels = np.linspace(at[0], at[-1], _LEVELS)
        opacity = np.interp(levels, at, points[:, 1])
        colour = np.stack([np.interp(levels, at, points[:, n]) for n in (2, 3, 4)], 1)
        # Below the first point nothing is seen; above the last, what the last says.
        below = math.inf if points[-1, 1] > 0 else float(at[-1])
        return cls(
            float(at[0]),
            (_LEVELS - 1) / float(at[-1] - at[0]),
            opacity.astype(np.float32),
            colour.astype(np.float32),
            float(at[0]),
            below,
        )

    def level(self, values: Floats) -> NDArray[np.intp]:
        scaled = (values - np.float32(self.low)) * np.float32(self.scale)
        np.clip(scaled, 0, _LEVELS - 1, out=scaled)
        return scaled.astype(np.intp)


@dataclass(frozen=True, slots=True)
class _Rays:
    """Parallel rays of a picture, as (plane, row, column) of the volume."""

    start: NDArray[np.float64]
    right: NDArray[np.float64]
    down: NDArray[np.float64]
    forward: NDArray[np.float64]
    """One step along a ray."""
    columns: int
    towards: NDArray[np.float64]
    """Its direction in patient coordinates."""
    step: float
    """Its length, mm."""
    n_steps: int

    @classmethod
    def of(cls, grid: Grid, camera: Camera, step: float) -> _Rays:
        right, down, forward = camera.axes()
        centre = grid.centre()
        corners = grid.corners() - centre
        # The same scale from every side, so that nothing jumps while it turns.
        around = 2 * float(np.linalg.norm(corners, axis=1).max())
        pixel = around / min(camera.columns, camera.rows) / camera.zoom
        depth = float(np.ptp(corners @ forward))
        length = min(grid.spacing) * step
        start = (
            centre
            - forward * depth / 2
            - right * pixel * (camera.columns - 1) / 2
            - down * pixel * (camera.rows - 1) / 2
        )
        to_index = np.linalg.inv(grid.matrix())
        to_index[0] /= grid.usual_distance
        return cls(
            to_index @ (start - np.array(grid.origin)),
            to_index @ (right * pixel),
            to_index @ (down * pixel),
            to_index @ (forward * length),
            camera.columns,
            forward,
            length,
            math.ceil(depth / length) + 1,
        )

    def starts(self, chosen: NDArray[np.intp]) -> Floats:
        """Return where rays begin, shape (3, n)."""
        row, column = np.divmod(chosen, self.columns)
        found = self.start[:, None] + self.down[:, None] * row
        found += self.right[:, None] * column
        return np.asarray(found, np.float32)


class _Field:
    """Values and gradients between voxels, for points within the volume."""

    def __init__(self, voxels: Voxels, grid: Grid) -> None:
        self._flat = np.ascontiguousarray(voxels).reshape(-1)
        n_planes, n_rows, n_columns = voxels.shape
        self.last = np.array(
            [[n_planes - 1], [n_rows - 1], [n_columns - 1]], np.float32
        )
        self._plane, self._row = n_rows * n_columns, n_columns
        to_index = np.linalg.inv(grid.matrix())
        to_index[0] /= grid.usual_distance
        #: Gradients by voxel become gradients by mm.
        self._to_mm = to_index.T.astype(np.float32)

    def values(self, index: Floats) -> Floats:
        """Return the values at points, shape (3, n)."""
        index = np.clip(index, 0, self.last)
        low = np.floor(np.minimum(index, self.last - 1))
        fk, fj, fi = index - low
        k, j, i = low.astype(np.int32)
        base = k * self._plane + j * self._row + i
        flat, row, plane = self._flat, self._row, self._plane

        def along_row(offset: int) -> Floats:
            first = flat.take(base + offset).astype(np.float32, copy=False)
            second = flat.take(base + (offset + 1)).astype(np.float32, copy=False)
            second = second - first
            second *= fi
            second += first
            return np.asarray(second, np.float32)

        near = along_row(0)
        near += fj * (along_row(row) - near)
        far = along_row(plane)
        far += fj * (along_row(plane + row) - far)
        near += fk * (far - near)
        return np.asarray(near, np.float32)

    def gradients(self, index: Floats) -> Floats:
        """Return the gradients at points by mm, shape (3, n), over one voxel."""
        found = np.empty(index.shape, np.float32)
        for axis in range(3):
            aside = index.copy()
            aside[axis] += 1
            found[axis] = self.values(aside)
            aside[axis] -= 2
            found[axis] -= self.values(aside)
        return np.asarray(self._to_mm @ found)


class _Blocks:
    """Which blocks of the volume hold anything that the table shows."""

    def __init__(self, voxels: Voxels, table: _Table) -> None:
        layers = []
        # A layer of blocks at a time: the whole volume once more would not fit.
        for first in range(0, voxels.shape[0], _BLOCK):
            some = voxels[first : first + _BLOCK]
            layer = ((some > table.above) & (some < table.below)).any(axis=0)
            for axis, size in enumerate(layer.shape):
                starts = np.arange(0, size, _BLOCK)
                layer = np.logical_or.reduceat(layer, starts, axis=axis)
            layers.append(layer)
        seen = np.stack(layers)
        # What is looked at from the middle of a leap may lie in the next block.
        for axis in range(3):
            grown = seen.copy()
            lower, upper = [slice(None)] * 3, [slice(None)] * 3
            lower[axis], upper[axis] = slice(None, -1), slice(1, None)
            grown[tuple(lower)] |= seen[tuple(upper)]
            grown[tuple(upper)] |= seen[tuple(lower)]
            seen = grown
        self._filled = seen.reshape(-1)
        self._shape = seen.shape
        self._bounds = voxels.shape

    def holds(self, index: Floats) -> NDArray[np.bool_]:
        """Tell which points, shape (3, n), may show something within a leap."""
        inside = np.ones(index.shape[1], np.bool_)
        at = np.zeros(index.shape[1], np.int32)
        for axis, size in enumerate(self._bounds):
            along = index[axis]
            inside &= (along > -_LEAP) & (along < size - 1 + _LEAP)
            block = np.clip(along, 0, size - 1).astype(np.int32) // _BLOCK
            at = at * self._shape[axis] + block
        found: NDArray[np.bool_] = inside & self._filled[at]
        return found


def _follow(
    field: _Field,
    table: _Table,
    rays: _Rays,
    blocks: _Blocks,
    chosen: NDArray[np.intp],
) -> Floats:
    """Return the colours of some rays, shape (n, 3)."""
    colour = np.zeros((len(chosen), 3), np.float32)
    through = np.ones(len(chosen), np.float32)
    starts = rays.starts(chosen)
    forward = rays.forward.astype(np.float32)[:, None]
    enter, leave = _within(starts, rays.forward, field.last)
    # Opacities are those of 1 mm.
    alphas = 1 - np.power(1 - table.opacity, np.float32(rays.step))
    alive = np.flatnonzero(enter <= leave)
    for leap in range(0, rays.n_steps, _LEAP):
        middle = starts[:, alive] + forward * np.float32(leap + (_LEAP - 1) / 2)
        active = alive[blocks.holds(middle)]
        if not len(active):
            continue
        begin, first, last = starts[:, active], enter[active], leave[active]
        for n in range(leap, leap + _LEAP):
            index = begin + forward * np.float32(n)
            level = table.level(field.values(index))
            alpha = alphas[level]
            shown = np.flatnonzero((alpha > 0) & (first <= n) & (last >= n))
            if not len(shown):
                continue
            at, alpha = active[shown], alpha[shown]
            weight = alpha * through[at]
            lit = table.colour[level[shown]]
            strong = np.flatnonzero(weight > _LIT)
            if len(strong):
                lit[strong] = _lit(field, index[:, shown[strong]], rays, lit[strong])
            colour[at] += (weight * np.float32(1 - _DIMMED * n / rays.n_steps))[
                :, None
            ] * lit
            through[at] *= 1 - alpha
        alive = alive[through[alive] > 1 - _OPAQUE]
        if not len(alive):
            break
    return colour


def _within(
    starts: Floats, forward: NDArray[np.float64], last: Floats
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return between which steps each ray is in the volume, its border included."""
    enter = np.zeros(starts.shape[1])
    leave = np.full(starts.shape[1], np.inf)
    for axis in range(3):
        low = -0.5 - starts[axis].astype(np.float64)
        high = float(last[axis, 0]) + 0.5 - starts[axis].astype(np.float64)
        step = float(forward[axis])
        if abs(step) < 1e-9:
            # Along this axis the ray stays where it is: within, or never.
            leave[(low > 0) | (high < 0)] = -1.0
            continue
        ends = np.sort(np.stack((low / step, high / step)), axis=0)
        np.maximum(enter, ends[0], out=enter)
        np.minimum(leave, ends[1], out=leave)
    return enter, leave


def _lit(field: _Field, index: Floats, rays: _Rays, colour: Floats) -> Floats:
    """Return colours under a light at the viewer."""
    gradient = field.gradients(index)
    length = np.sqrt(np.einsum("ij,ij->j", gradient, gradient))
    towards = np.abs(rays.towards.astype(np.float32) @ gradient)
    # Both sides of a surface are lit; where there is none, all light arrives.
    cosine = np.where(length > 0, towards / np.maximum(length, 1e-6), 1.0)[:, None]
    diffuse = _AMBIENT + _DIFFUSE * cosine
    return np.asarray(
        colour * diffuse + _SPECULAR * cosine**_SHININESS, dtype=np.float32
    )


def regular(sampler: Sampler) -> tuple[Voxels, Grid]:
    """Return an irregular volume, sampled at its smallest distance of planes.

    Voxels in gaps, of which nothing is known, have the least value there is.
    """
    grid = sampler.grid
    usual = max(float(np.diff(grid.offsets).min()), grid.offsets[-1] / _MAX_PLANES)
    offsets = np.linspace(0.0, grid.offsets[-1], 1 + round(grid.offsets[-1] / usual))
    made = replace(
        grid,
        shape=(len(offsets), *grid.shape[1:]),
        offsets=tuple(float(one) for one in offsets),
        regular=True,
    )
    voxels = np.empty(made.shape, np.float32)
    unknown = np.zeros(len(offsets), np.bool_)
    for k, offset in enumerate(offsets):
        voxels[k], unknown[k] = sampler.plane(float(offset))
    if unknown.any():
        voxels[unknown] = voxels[~unknown].min()
    return voxels, made
