"""Where the images of a study are, for graphics that are given in the patient.

Image coordinates are (column, row) with their origin at the outer corner of the first
pixel, whose centre is (0.5, 0.5), as in SCOORD and GSPS (PS3.3 C.18.6.1.2, C.10.5).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pacs.domain.attributes import Attributes, text
from pacs.rendering.volume import Plane
from pacs.rendering.volume_attributes import describe

#: A point this near to the plane of an image lies in it, whatever the distance of
#: planes is (mm).
NEAR: Final = 0.5


@dataclass(frozen=True, slots=True)
class ImageAt:
    """A frame of an image of the study, and its plane."""

    instance: str
    frame: int
    plane: Plane


@dataclass(frozen=True, slots=True)
class _Series:
    """Planes of one series in one frame of reference, with what finds them fast."""

    images: tuple[ImageAt, ...]
    positions: NDArray[np.float64]
    normals: NDArray[np.float64]
    reach: float


class ImagePlanes:
    """The planes of all images of a study.

    Parameters
    ----------
    series : iterable of sequence of mapping
        The attributes of the images of each series, in the DICOM JSON model.
    """

    def __init__(self, series: Iterable[Sequence[Attributes]]) -> None:
        self._by_image: dict[tuple[str, int], ImageAt] = {}
        self._by_frame_of_reference: dict[str, list[_Series]] = defaultdict(list)
        for one in series:
            self._add(one)

    def _add(self, series: Sequence[Attributes]) -> None:
        found: dict[str, list[ImageAt]] = defaultdict(list)
        uids = [text(one, "00080018") for one in series]
        for plane in describe(series).planes:
            image = ImageAt(uids[plane.instance], plane.frame_number, plane)
            self._by_image[image.instance, image.frame] = image
            found[plane.kind[0]].append(image)
        for frame_of_reference, images in found.items():
            positions = np.array([image.plane.position for image in images])
            normals = np.array(
                [np.cross(image.plane.right, image.plane.down) for image in images]
            )
            along = np.sort(positions @ normals[0])
            steps = np.diff(along)
            steps = steps[steps > 1e-3]
            usual = float(np.median(steps)) if steps.size else 0.0
            self._by_frame_of_reference[frame_of_reference].append(
                _Series(tuple(images), positions, normals, max(NEAR, usual / 2 + 1e-3))
            )

    def image(self, instance: str, frame: int = 1) -> ImageAt | None:
        """Return a frame of an image, if the study has it and it has a plane."""
        return self._by_image.get((instance, frame))

    def through(
        self, points: NDArray[np.float64], frame_of_reference: str
    ) -> list[ImageAt]:
        """Return, of each series, the image in whose plane all points lie.

        Parameters
        ----------
        points : ndarray, shape (n, 3), mm
        """
        found = []
        for series in self._by_frame_of_reference.get(frame_of_reference, ()):
            middle = points.mean(axis=0)
            away = np.abs(((middle - series.positions) * series.normals).sum(axis=1))
            nearest = int(np.argmin(away))
            normal = series.normals[nearest]
            spread = np.abs((points - series.positions[nearest]) @ normal).max()
            if spread <= series.reach:
                found.append(series.images[nearest])
        return found

    def matching(self, plane: Plane, frame_of_reference: str) -> ImageAt | None:
        """Return an image whose pixels are where those of `plane` are."""
        corner = np.array([plane.position])
        for image in self.through(corner, frame_of_reference):
            other = image.plane
            same = (
                (other.rows, other.columns) == (plane.rows, plane.columns)
                and np.allclose(other.spacing, plane.spacing, rtol=1e-3)
                and np.allclose(other.right, plane.right, atol=2e-3)
                and np.allclose(other.down, plane.down, atol=2e-3)
            )
            beside = np.linalg.norm(np.array(other.position) - corner[0])
            if same and beside <= max(NEAR, min(plane.spacing)):
                return image
        return None


def in_image(image: ImageAt, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return points in mm, shape (n, 3), in image coordinates, shape (n, 2)."""
    plane = image.plane
    away = points - np.array(plane.position)
    columns = away @ np.array(plane.right) / plane.spacing[1] + 0.5
    rows = away @ np.array(plane.down) / plane.spacing[0] + 0.5
    return np.stack((columns, rows), axis=1)
