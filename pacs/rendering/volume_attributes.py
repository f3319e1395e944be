"""What the attributes of a series say about the planes of a volume and their values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from pacs.domain.attributes import (
    Attributes,
    item,
    items,
    number,
    numbers,
    text,
    texts,
    whole,
)
from pacs.rendering.volume import NotAVolume, Plane

CT_CLASSES: Final = frozenset(
    f"1.2.840.10008.5.1.4.1.1.{n}" for n in ("2", "2.1", "2.2")
)
#: Frames of one series that are looked at.
MAX_FRAMES: Final = 50_000


@dataclass(frozen=True, slots=True)
class Samples:
    """How the stored samples of an instance become values (PS3.3 C.7.6.3, C.11.1).

    Attributes
    ----------
    padding : tuple of int or None
        Stored values, both inclusive, that stand for no value (0028,0120/0121).
    """

    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    padding: tuple[int, int] | None = None

    @property
    def low(self) -> int:
        """Return the least stored value."""
        return -(1 << (self.bits_stored - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """Return the largest stored value."""
        return (1 << (self.bits_stored - (1 if self.signed else 0))) - 1


@dataclass(frozen=True, slots=True)
class Described:
    """The planes of a series, the form of its samples, and how it is shown.

    Attributes
    ----------
    samples : tuple of Samples or None
        One for each instance; None where it has no grey pixels.
    unit : str
        ``"HU"``, ``"BQML"`` …; empty: no unit.
    window : tuple of float or None
        Centre and width of the middle image.
    inverted : bool
        MONOCHROME1: low values are bright.
    """

    planes: tuple[Plane, ...]
    samples: tuple[Samples | None, ...]
    unit: str = ""
    window: tuple[float, float] | None = None
    inverted: bool = False
    frame_of_reference: str = ""


def describe(series: Sequence[Attributes]) -> Described:
    """Return the planes of a series.

    Parameters
    ----------
    series : sequence of mapping
        The attributes of each instance in the DICOM JSON model.

    Raises
    ------
    NotAVolume
        More frames than one volume may have.
    """
    planes: list[Plane] = []
    samples: list[Samples | None] = []
    for index, attributes in enumerate(series):
        form = _samples(attributes)
        samples.append(form)
        if form is not None:
            planes += _planes(index, attributes)
        if len(planes) > MAX_FRAMES:
            raise NotAVolume(f"more than {MAX_FRAMES} frames")
    shown: Attributes = {}
    if planes:
        shown = series[planes[len(planes) // 2].instance]
    return Described(
        tuple(planes),
        tuple(samples),
        _unit(shown),
        _window(shown),
        text(shown, "00280004") == "MONOCHROME1",
        text(shown, "00200052"),
    )


def planes_of(attributes: Attributes) -> list[Plane]:
    """Return the planes of the frames of one instance, whatever its pixels are."""
    return _planes(0, attributes)


def _samples(attributes: Attributes) -> Samples | None:
    if whole(attributes, "00280002") not in {1, None}:
        return None
    if text(attributes, "00280004") not in {"MONOCHROME1", "MONOCHROME2"}:
        return None
    allocated = whole(attributes, "00280100") or 0
    stored = whole(attributes, "00280101") or allocated
    high = whole(attributes, "00280102")
    high = stored - 1 if high is None else high
    if allocated not in {8, 16, 32} or not 1 <= stored <= high + 1 <= allocated:
        return None
    signed = whole(attributes, "00280103") == 1
    one = whole(attributes, "00280120")
    padding = None
    if one is not None:
        limit = whole(attributes, "00280121")
        other = one if limit is None else limit
        padding = (min(one, other), max(one, other))
    return Samples(allocated, stored, high, signed, padding)


def _planes(index: int, attributes: Attributes) -> list[Plane]:
    """Return what can be placed; frames without a position cannot."""
    rows, columns = whole(attributes, "00280010"), whole(attributes, "00280011")
    if not rows or not columns or rows < 2 or columns < 2:
        return []
    frame = _Frame(index, rows, columns, attributes)
    shared = item(attributes, "52009229")
    per_frame = list(items(attributes, "52009230"))
    if not per_frame and not shared:
        n_frames = whole(attributes, "00280008")
        made = frame.classic() if n_frames in {None, 0, 1} else None
        return [made] if made is not None else []
    found = []
    for number_, own in enumerate(per_frame[:MAX_FRAMES], start=1):
        made = frame.enhanced(number_, own, shared)
        if made is not None:
            found.append(made)
    return found


@dataclass(frozen=True, slots=True)
class _Frame:
    """What all frames of an instance share."""

    index: int
    rows: int
    columns: int
    attributes: Attributes

    def classic(self) -> Plane | None:
        """Return the plane of a single-frame image."""
        found = self.attributes
        order = ("00200100", "00200012", "00180086", "00200013")
        rank = tuple(number(found, tag) or 0.0 for tag in order)
        return self._plane(1, found, found, found, found, rank, ())

    def enhanced(
        self, frame_number: int, own: Attributes, shared: Attributes
    ) -> Plane | None:
        """Return the plane of a frame (PS3.3 C.7.6.16)."""

        def group(tag: str) -> Attributes:
            return item(own, tag) or item(shared, tag)

        content = group("00209111")
        rank = (
            number(content, "00209128") or 0.0,  # Temporal Position Index
            *(numbers(content, "00209157") or ()),  # Dimension Index Values
        )
        kind = (text(content, "00209056"),)  # Stack ID
        return self._plane(
            frame_number,
            group("00209113"),
            group("00209116"),
            group("00289110"),
            group("00289145"),
            rank,
            kind,
        )

    def _plane(
        self,
        frame_number: int,
        position_in: Attributes,
        orientation_in: Attributes,
        measures_in: Attributes,
        rescale_in: Attributes,
        rank: tuple[float, ...],
        kind: tuple[str, ...],
    ) -> Plane | None:
        position = numbers(position_in, "00200032", 3)
        cosines = numbers(orientation_in, "00200037", 6)
        spacing = numbers(measures_in, "00280030", 2)
        if position is None or cosines is None or spacing is None:
            return None
        right, down = np.array(cosines[:3]), np.array(cosines[3:])
        lengths = float(np.linalg.norm(right)), float(np.linalg.norm(down))
        skewed = abs(float(np.dot(right, down))) > 1e-2
        if skewed or any(abs(length - 1) > 1e-2 for length in lengths):
            return None
        if not all(1e-4 < one < 1e3 for one in spacing):
            return None
        if max(map(abs, position)) > 1e6:
            return None
        right, down = right / lengths[0], down / lengths[1]
        slope, intercept = (
            number(rescale_in, "00281053"),
            number(rescale_in, "00281052"),
        )
        # Beyond these no value is left that a picture could show.
        if abs(slope or 1.0) > 1e9 or abs(intercept or 0.0) > 1e12:
            return None
        frame_of_reference = text(self.attributes, "00200052")
        return Plane(
            self.index,
            frame_number,
            (position[0], position[1], position[2]),
            (float(right[0]), float(right[1]), float(right[2])),
            (float(down[0]), float(down[1]), float(down[2])),
            (spacing[0], spacing[1]),
            self.rows,
            self.columns,
            # Tolerates: a slope of zero, which would make every voxel the same.
            slope or 1.0,
            intercept or 0.0,
            rank,
            (frame_of_reference, *kind),
        )


def _unit(attributes: Attributes) -> str:
    """Return the unit of rescaled values; Hounsfield is the default of CT only."""
    group = item(_functional(attributes), "00289145") or attributes
    kind = text(group, "00281054")
    sop_class = text(attributes, "00080016")
    if kind and kind != "US":
        return kind
    if sop_class in CT_CLASSES and "LOCALIZER" not in texts(attributes, "00080008"):
        return "HU" if number(group, "00281052") is not None else ""
    return text(attributes, "00541001")


def _functional(attributes: Attributes) -> Attributes:
    """Return shared and first frame's functional groups together."""
    first = item(attributes, "52009230")
    return {**item(attributes, "52009229"), **first}


def _window(attributes: Attributes) -> tuple[float, float] | None:
    found = item(_functional(attributes), "00289132") or attributes
    centre, width = number(found, "00281050"), number(found, "00281051")
    if centre is None or width is None or width < 1 or not math.isfinite(width):
        return None
    return (centre, width)


def value_range(described: Described, planes: Sequence[Plane]) -> tuple[float, float]:
    """Return bounds of the rescaled values of `planes`."""
    low, high = math.inf, -math.inf
    for plane in planes:
        form = described.samples[plane.instance]
        if form is None:
            continue
        ends = [
            bound * plane.slope + plane.intercept for bound in (form.low, form.high)
        ]
        low, high = min(low, *ends), max(high, *ends)
    return low, high


def is_whole(planes: Sequence[Plane]) -> bool:
    """Tell whether rescaled values are whole numbers."""
    return all(
        plane.slope == int(plane.slope) and plane.intercept == int(plane.intercept)
        for plane in planes
    )
