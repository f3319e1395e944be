"""Volumes of stored series as values: what is asked for, what is known, what comes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from pacs.domain.attributes import text
from pacs.rendering import reslice
from pacs.rendering.volume import Stack, Vector, stack_planes
from pacs.rendering.volume_attributes import (
    Described,
    describe,
    is_whole,
    value_range,
)
from storage.kernel.errors import InvalidParameter

#: Marks samples that stand for no value while a volume of whole numbers is read.
PADDED: Final = int(np.iinfo(np.int16).min)


@dataclass(frozen=True, slots=True)
class VolumeFacts:
    """What a series is as a volume.

    Attributes
    ----------
    instances : tuple of str
        SOP Instance UIDs of the planes, in their order along the normal.
    frames : tuple of int
        Frame numbers beside them.
    """

    stack: Stack
    described: Described
    dtype: str
    n_bytes: int
    instances: tuple[str, ...]
    frames: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PlaneRequest:
    """One MPR picture; None: chosen to show the whole volume.

    Attributes
    ----------
    preset : {"axial", "coronal", "sagittal"} or None
        Else `right` and `down` say how the plane lies.
    origin : tuple of float, mm, optional
        Centre of the first pixel; else the picture is centred on the volume and runs
        through `through` (for a preset also `position`, on its normal).
    spacing : tuple of float, mm, optional
        Between rows, between columns.
    window : tuple of float, optional
        Centre and width; else those of the images.
    """

    preset: reslice.Preset | None = "axial"
    right: Vector | None = None
    down: Vector | None = None
    origin: Vector | None = None
    through: Vector | None = None
    position: float | None = None
    spacing: tuple[float, float] | None = None
    rows: int | None = None
    columns: int | None = None
    thickness: float | None = None
    projection: reslice.Projection = "mip"
    interpolation: reslice.Interpolation = "linear"
    window: tuple[float, float] | None = None
    invert: bool = False
    format: str = "png"
    quality: int = 85


@dataclass(frozen=True, slots=True)
class ProjectionRequest:
    """One volume rendering."""

    preset: str
    azimuth: float = 0.0
    elevation: float = 0.0
    zoom: float = 1.0
    rows: int = 512
    columns: int = 512
    step: float = 1.0
    format: str = "png"
    quality: int = 85


@dataclass(frozen=True, slots=True)
class Drawn:
    """A picture, and what it shows."""

    body: bytes
    media_type: str
    facts: Mapping[str, Any]


def facts_of(series: list[Mapping[str, Any]], stack: int) -> VolumeFacts:
    """Return what the attributes of a series say about its volume.

    Raises
    ------
    NotAVolume
    """
    described = describe(series)
    found = stack_planes(described.planes, index=stack)
    low, high = value_range(described, found.planes)
    # The least value marks padding, where there is any.
    least = PADDED + any(form and form.padding for form in described.samples)
    whole = is_whole(found.planes) and low >= least and high <= 32_767
    dtype = "<i2" if whole else "<f4"
    n_voxels = int(np.prod(found.grid.shape, dtype=np.int64))
    uids = [text(one, "00080018") for one in series]
    return VolumeFacts(
        found,
        described,
        dtype,
        n_voxels * np.dtype(dtype).itemsize,
        tuple(uids[plane.instance] for plane in found.planes),
        tuple(plane.frame_number for plane in found.planes),
    )


def picture_of(facts: VolumeFacts, asked: PlaneRequest) -> reslice.Picture:
    """Return where the pixels of the picture that was asked for are."""
    grid = facts.stack.grid
    if asked.preset is not None:
        right, down = reslice.PRESETS[asked.preset]
    elif asked.right is not None and asked.down is not None:
        right, down = reslice.orthonormal(asked.right, asked.down)
    else:
        raise InvalidParameter("plane", "neither a preset nor right and down")
    through = asked.through
    if through is None and asked.position is not None:
        # Presets look along an axis: the position is a coordinate on it.
        normal = np.abs(np.cross(right, down))
        x, y, z = (float(one) for one in normal * asked.position)
        through = (x, y, z)
    if asked.origin is None:
        return reslice.covering(
            grid,
            right,
            down,
            through=through,
            spacing=asked.spacing,
            rows=asked.rows,
            columns=asked.columns,
        )
    if asked.rows is None or asked.columns is None:
        raise InvalidParameter("plane", "with an origin, width and height are needed")
    fine = min(grid.spacing)
    spacing = asked.spacing or (fine, fine)
    return reslice.Picture(
        asked.origin, right, down, spacing, asked.rows, asked.columns
    )
