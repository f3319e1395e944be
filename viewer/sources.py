"""What the viewer's endpoints ask of the archive: Protocols, and the values they pass.

The application wires them. Values are small and frozen; lengths are millimetres,
positions patient coordinates (PS3.3 C.7.6.2.1.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from storage.kernel.types import Actor

Vector = tuple[float, float, float]
Form = Literal["stored", "raw", "htj2k"]


@dataclass(frozen=True, slots=True)
class VolumeSummary:
    """What a series is as a volume.

    Attributes
    ----------
    size : tuple of int
        Columns, rows, planes.
    spacing : tuple of float
        Between columns, rows, planes.
    origin : tuple of float
        Centre of the first pixel of the first plane.
    right, down, along : tuple of float
        Unit vectors of increasing columns, rows and planes.
    stacks : int
        Volumes at the same positions (phases, echoes).
    gaps : tuple of (float, float)
        Distances from the first plane between which planes are missing.
    tilt : float
        Degrees between `along` and the planes' normal.
    bounds : tuple of Vector
        Least and largest coordinates of the volume's corners.
    unit : str
        Of the values: ``HU``, ``BQML`` …; empty: none is known.
    window : tuple of float or None
        Centre and width that the images ask for.
    """

    size: tuple[int, int, int]
    spacing: Vector
    origin: Vector
    right: Vector
    down: Vector
    along: Vector
    bounds: tuple[Vector, Vector]
    frame_of_reference: str
    unit: str
    stacks: int
    regular: bool
    tilt: float
    gaps: tuple[tuple[float, float], ...]
    issues: tuple[str, ...]
    window: tuple[float, float] | None
    bytes: int


@dataclass(frozen=True, slots=True)
class ImageRef:
    """A frame of a stored image."""

    instance: str
    frame: int = 1


@dataclass(frozen=True, slots=True)
class Referenced:
    """An object that another one speaks of."""

    series: str
    instance: str
    frames: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class KeyObject:
    """A Key Object Selection document (PS3.3 A.35.4)."""

    series: str
    instance: str
    title: Mapping[str, str] | None
    description: str
    images: tuple[Referenced, ...]


@dataclass(frozen=True, slots=True)
class SeriesFacts:
    """One series of a manifest.

    Attributes
    ----------
    kind : str
        ``image``, ``seg``, ``sr``, ``pr``, ``rtstruct``, ``ko``, ``document`` …
    transfer_syntaxes : tuple of str
        In which its pixels are stored.
    volume : VolumeSummary or None
    not_a_volume : str
        Why there is no volume.
    """

    series: str
    number: int | None
    modality: str
    description: str
    body_part: str
    laterality: str
    kind: str
    n_instances: int
    n_frames: int
    size_bytes: int
    sop_classes: tuple[str, ...]
    transfer_syntaxes: tuple[str, ...]
    encoding: Literal["raw", "htj2k", "stored", "none"]
    rows: int | None
    columns: int | None
    equal_sizes: bool
    first: ImageRef | None
    middle: ImageRef | None
    volume: VolumeSummary | None
    not_a_volume: str


@dataclass(frozen=True, slots=True)
class Prior:
    """An earlier study of the same patient.

    Attributes
    ----------
    match : tuple of str
        What makes it comparable: ``body_part``, ``modality``.
    """

    study: str
    date: str
    description: str
    modalities: tuple[str, ...]
    body_parts: tuple[str, ...]
    match: tuple[str, ...]
    n_series: int


@dataclass(frozen=True, slots=True)
class StudyFacts:
    """A study as a viewer needs it before the first image."""

    study: str
    tenant: str
    date: str | None
    time: str | None
    description: str
    accession: str
    patient_id: str
    patient_name: str
    birth_date: str | None
    sex: str
    modalities: tuple[str, ...]
    series: tuple[SeriesFacts, ...]
    key_objects: tuple[KeyObject, ...]
    priors: tuple[Prior, ...]


class StudyCatalogue(Protocol):
    """Knows the studies an actor may see."""

    def facts(self, actor: Actor, study_uid: str) -> StudyFacts:
        """Return what there is to show of a study.

        Raises
        ------
        NotFound
        """
        ...


@dataclass(frozen=True, slots=True)
class FramePlace:
    """One frame of a stream.

    Attributes
    ----------
    instance, syntax : int
        Places in the lists of the stream.
    length : int or None
        Bytes, when they are known before the frame is read.
    reduced : bool
        Rows and columns are fewer than the image has.
    """

    instance: int
    frame_number: int
    syntax: int
    rows: int
    columns: int
    length: int | None
    reduced: bool = False


@dataclass(frozen=True, slots=True)
class SeriesFrames:
    """The frames of a series in the order they are sent.

    Attributes
    ----------
    version : str
        Names the content: another one for other frames or another order.
    handle : object
        What the source itself knows them by.
    """

    study: str
    series: str
    version: str
    instances: Sequence[str]
    syntaxes: Sequence[str]
    places: Sequence[FramePlace]
    handle: object = None


class FrameSource(Protocol):
    """Reads the frames of whole series."""

    def frames(
        self, actor: Actor, series_uid: str, *, form: Form, order: str, level: int
    ) -> SeriesFrames:
        """Return which frames a series has.

        Raises
        ------
        NotFound
        """
        ...

    def read(self, frames: SeriesFrames, position: int) -> tuple[int, Iterator[bytes]]:
        """Return length and bytes of one of them."""
        ...


@dataclass(frozen=True, slots=True)
class SeriesRef:
    """A series, and which of its volumes."""

    study: str
    series: str
    stack: int = 0


@dataclass(frozen=True, slots=True)
class PlaneView:
    """An MPR picture, or a slab with `thickness`; None: chosen to show everything."""

    preset: Literal["axial", "coronal", "sagittal"] | None = None
    right: Vector | None = None
    down: Vector | None = None
    origin: Vector | None = None
    through: Vector | None = None
    position: float | None = None
    spacing: tuple[float, float] | None = None
    rows: int | None = None
    columns: int | None = None
    thickness: float | None = None
    projection: Literal["mip", "minip", "average"] = "mip"
    interpolation: Literal["linear", "nearest"] = "linear"
    window: tuple[float, float] | None = None
    invert: bool = False
    format: str = "png"
    quality: int = 85


@dataclass(frozen=True, slots=True)
class ProjectionView:
    """A volume rendering."""

    preset: str
    azimuth: float
    elevation: float
    zoom: float
    rows: int
    columns: int
    step: float
    format: str
    quality: int


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture as a file or as samples, and what it shows."""

    body: bytes
    media_type: str
    facts: Mapping[str, Any]


class Caller(Protocol):
    """Who waits for a picture."""

    def leave(self) -> None:
        """Say that nobody waits any more."""
        ...


class PixelSource(Protocol):
    """Frames and volumes as pictures and arrays, with geometry and units."""

    def caller(self) -> Caller:
        """Return a new one."""
        ...

    def volume(self, actor: Actor, ref: SeriesRef) -> VolumeSummary:
        """Return what a series is as a volume.

        Raises
        ------
        NotFound
        InvalidInput
            It is none; the message says why.
        """
        ...

    def plane(
        self, actor: Actor, ref: SeriesRef, view: PlaneView, caller: Caller
    ) -> Picture:
        """Draw a plane or a slab."""
        ...

    def projection(
        self, actor: Actor, ref: SeriesRef, view: ProjectionView, caller: Caller
    ) -> Picture:
        """Draw a volume rendering."""
        ...


class OverlaySource(Protocol):
    """Graphics and masks as plain JSON."""

    def version(self, actor: Actor, study_uid: str, series_uid: str | None) -> str:
        """Return what names the present content of `overlays`.

        Raises
        ------
        NotFound
        """
        ...

    def overlays(self, actor: Actor, study_uid: str, series_uid: str | None) -> bytes:
        """Return the JSON document of all overlays of a study, or of one series."""
        ...


class Warmer(Protocol):
    """Reads what is likely to be asked for."""

    def warm(self, actor: Actor, study_uid: str, series_uid: str) -> bool:
        """Begin to read a series; False when too much is under way already."""
        ...
