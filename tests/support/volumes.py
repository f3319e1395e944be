"""Phantoms: series of CT images of spheres whose places and values are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from pacs.rendering.volume import Plane, Stack, stack_planes
from tests.support.datasets import ct_slice

#: Right and down of the images of each acquisition.
ORIENTATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "axial": ((1, 0, 0), (0, 1, 0)),
    "feet first": ((-1, 0, 0), (0, 1, 0)),
    "prone": ((-1, 0, 0), (0, -1, 0)),
    "sagittal": ((0, 1, 0), (0, 0, -1)),
    "coronal": ((1, 0, 0), (0, 0, -1)),
    "oblique": ((0.8, 0.6, 0.0), (-0.36, 0.48, 0.8)),
}


@dataclass(frozen=True, slots=True)
class Phantom:
    """A box of voxels with spheres in it.

    Attributes
    ----------
    spacing : tuple of float, mm
        Of planes, rows, columns.
    shear : float
        Millimetres that each plane is moved down: a tilted gantry.
    """

    orientation: str = "axial"
    shape: tuple[int, int, int] = (20, 32, 40)
    spacing: tuple[float, float, float] = (3.0, 1.5, 1.25)
    origin: tuple[float, float, float] = (-30.0, 12.0, 100.0)
    shear: float = 0.0
    air: float = -1000.0
    #: (offset from the middle in mm, radius in mm, value)
    spheres: tuple[tuple[tuple[float, float, float], float, float], ...] = (
        ((0.0, 0.0, 0.0), 9.0, 300.0),
        ((10.0, -6.0, 8.0), 5.0, 1000.0),
    )

    @property
    def axes(self) -> tuple[NDArray[np.float64], ...]:
        """Return right, down and normal."""
        right, down = (np.array(one, float) for one in ORIENTATIONS[self.orientation])
        return right, down, np.cross(right, down)

    def position(self, k: float, j: float = 0, i: float = 0) -> NDArray[np.float64]:
        """Return the centre of a voxel, mm."""
        right, down, normal = self.axes
        found = np.array(self.origin) + normal * (k * self.spacing[0])
        found = found + down * (j * self.spacing[1] + k * self.shear)
        return np.asarray(found + right * (i * self.spacing[2]))

    def points(self) -> NDArray[np.float64]:
        """Return the centres of all voxels, shape (planes, rows, columns, 3)."""
        k, j, i = np.indices(self.shape)[..., None]
        right, down, normal = self.axes
        return np.asarray(
            np.array(self.origin)
            + normal * (k * self.spacing[0])
            + down * (j * self.spacing[1] + k * self.shear)
            + right * (i * self.spacing[2])
        )

    def centre(self) -> NDArray[np.float64]:
        return self.position(*((np.array(self.shape) - 1) / 2))

    def voxels(self) -> NDArray[np.int16]:
        """Return the values, in Hounsfield units."""
        values = np.full(self.shape, self.air)
        points = self.points()
        for offset, radius, value in self.spheres:
            away = np.linalg.norm(points - self.centre() - np.array(offset), axis=-1)
            values[away <= radius] = value
        return values.astype(np.int16)

    def planes(self, order: Sequence[int] | None = None) -> list[Plane]:
        """Return the planes, in any order of instances."""
        right, down, _ = self.axes
        numbers = range(self.shape[0]) if order is None else order
        return [
            Plane(
                instance,
                1,
                tuple(self.position(k)),
                tuple(right),
                tuple(down),
                self.spacing[1:],
                *self.shape[1:],
            )
            for instance, k in enumerate(numbers)
        ]

    def stack(self) -> Stack:
        return stack_planes(self.planes())

    def datasets(
        self, *, seed: int = 1, series: int = 1, shuffled: bool = True, **values: Any
    ) -> list[Dataset]:
        """Return the images; their Instance Numbers follow no order in space."""
        voxels = self.voxels()
        right, down, _ = self.axes
        order = list(range(self.shape[0]))
        if shuffled:
            np.random.default_rng(3).shuffle(order)
        made = []
        for number, k in enumerate(order, start=1):
            pixels = (voxels[k].astype(np.int32) + 1024).astype("<u2")
            ds = ct_slice(seed=seed, series=series, number=number)
            ds.Rows, ds.Columns = self.shape[1:]
            ds.PixelSpacing = list(self.spacing[1:])
            ds.ImagePositionPatient = [f"{one:.6f}" for one in self.position(k)]
            ds.ImageOrientationPatient = [f"{one:.6f}" for one in (*right, *down)]
            ds.RescaleType = "HU"
            ds.WindowCenter, ds.WindowWidth = "40", "400"
            ds.BodyPartExamined = "CHEST"
            ds.PixelData = pixels.tobytes()
            for keyword, value in values.items():
                setattr(ds, keyword, value)
            made.append(ds)
        return made
