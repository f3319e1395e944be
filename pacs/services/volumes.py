"""Volumes of stored series, read once and kept in shared memory for a while.

A volume is read by the frames of its series in any transfer syntax, rescaled to values
with a unit, and drawn from by bounded processes that are lent the memory. Whether an
actor may see a series is asked for each request; what is kept is named by content.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Final

import numpy as np
import orjson
from numpy.typing import NDArray

from pacs.domain.study import StoredInstance
from pacs.imaging import syntaxes
from pacs.imaging.pool import Answer, Job, PoolObserver, WorkerPool
from pacs.rendering import projection, reslice
from pacs.rendering.volume import NotAVolume, Plane, Stack, Vector, stack_planes
from pacs.rendering.volume_attributes import (
    Described,
    Samples,
    describe,
    is_whole,
    value_range,
)
from pacs.rendering.volume_pictures import MEDIA_TYPES
from pacs.rendering.volume_tasks import (
    MASKS,
    PLANE,
    PROJECTION,
    Caller,
    Cancelled,
    SharedBytes,
    grid_json,
)
from pacs.services.retrieve import RetrieveService
from storage.kernel.errors import (
    DependencyDown,
    ImagingError,
    InvalidParameter,
    NotFound,
    TooLarge,
)
from storage.kernel.limits import Limits
from storage.kernel.types import Actor

#: Geometries one process remembers.
MAX_DESCRIBED: Final = 512
#: Pictures that may wait for a process; more are told to come back.
MAX_WAITING: Final = 16
#: How often a caller that waits is asked whether it is still there.
LOOK_SECONDS: Final = 0.1
#: Marks samples that stand for no value while a volume is read.
_PADDED: Final = np.iinfo(np.int16).min


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


class SharedVolume:
    """Voxels in shared memory."""

    def __init__(self, dtype: str, n_bytes: int) -> None:
        self.dtype = dtype
        self.n_bytes = n_bytes
        self.memory = SharedBytes(n_bytes)


class _Gate:
    """Lets so many through at a time; who waits may leave."""

    def __init__(self, places: int, max_waiting: int) -> None:
        self._room = threading.Semaphore(places)
        self._lock = threading.Lock()
        self._waiting = 0
        self._max_waiting = max_waiting

    @contextmanager
    def passed(self, seconds: float, caller: Caller | None) -> Iterator[None]:
        """Wait for a place, and have it while the block runs.

        Raises
        ------
        DependencyDown
            Too many wait, or it took too long.
        Cancelled
        """
        with self._lock:
            if self._waiting >= self._max_waiting:
                raise DependencyDown("too many pictures of volumes are asked for")
            self._waiting += 1
        deadline = time.monotonic() + seconds
        try:
            while not self._room.acquire(timeout=LOOK_SECONDS):
                _check(deadline, caller)
        finally:
            with self._lock:
                self._waiting -= 1
        try:
            yield
        finally:
            self._room.release()


class VolumeService:
    """Describe, read and draw the volumes of stored series.

    Parameters
    ----------
    cache_bytes : int
        Volumes that are kept for the next request.
    processes : int
        That draw, at most.
    """

    def __init__(
        self,
        *,
        retrieve: RetrieveService,
        limits: Limits,
        cache_bytes: int,
        processes: int = 1,
        observer: PoolObserver | None = None,
    ) -> None:
        self._retrieve = retrieve
        self._pool = WorkerPool(
            limits.model_copy(
                update={
                    "decode_seconds": limits.render_seconds,
                    "decode_bytes": limits.render_bytes + limits.volume_bytes,
                }
            ),
            processes=processes,
            observer=observer,
        )
        self._gate = _Gate(processes, MAX_WAITING)
        self._limits = limits
        self._cache_bytes = cache_bytes
        self._lock = threading.Lock()
        self._ready = threading.Condition(self._lock)
        self._kept: OrderedDict[tuple[str, str, int], SharedVolume] = OrderedDict()
        self._reading: dict[tuple[str, str, int], int] = {}
        self._described: OrderedDict[tuple[str, str, int], VolumeFacts | NotAVolume] = (
            OrderedDict()
        )

    def describe(
        self, actor: Actor, study_uid: str, series_uid: str, *, stack: int = 0
    ) -> VolumeFacts:
        """Return what a series is as a volume.

        Raises
        ------
        NotFound
        NotAVolume
            The message says why.
        """
        return self._facts(actor, study_uid, series_uid, stack)[1]

    def _facts(
        self, actor: Actor, study_uid: str, series_uid: str, stack: int
    ) -> tuple[tuple[str, str, int], VolumeFacts]:
        body = self._retrieve.series_metadata(actor, study_uid, series_uid)
        key = (body.etag, series_uid, stack)
        with self._lock:
            known = self._described.get(key)
            if known is not None:
                self._described.move_to_end(key)
        if known is None:
            try:
                known = _describe(orjson.loads(b"".join(body.text())), stack)
            except NotAVolume as error:
                known = error
            with self._lock:
                self._described[key] = known
                if len(self._described) > MAX_DESCRIBED:
                    self._described.popitem(last=False)
        if isinstance(known, NotAVolume):
            raise NotAVolume(str(known))
        return key, known

    def draw_plane(
        self,
        actor: Actor,
        study_uid: str,
        series_uid: str,
        asked: PlaneRequest,
        *,
        stack: int = 0,
        caller: Caller | None = None,
    ) -> Drawn:
        """Draw a plane or a slab through a volume.

        Raises
        ------
        NotFound, NotAVolume, InvalidParameter, TooLarge, DependencyDown, Cancelled
        """
        key, facts = self._facts(actor, study_uid, series_uid, stack)
        picture = _picture(facts, asked)
        slab = None
        n_samples = picture.rows * picture.columns
        if n_samples > self._limits.render_pixels:
            raise TooLarge("render_pixels", self._limits.render_pixels)
        if asked.thickness:
            slab = reslice.Slab(
                asked.thickness, asked.projection, min(facts.stack.grid.spacing)
            )
            # Counted before the depths are made: a thickness can be anything.
            n_samples *= int(min(slab.thickness / slab.step, 1e9)) + 3
        if n_samples > self._limits.render_samples:
            raise TooLarge("render_samples", self._limits.render_samples)
        window = asked.window or facts.described.window
        volume = self._volume(actor, study_uid, series_uid, key, facts, caller)
        answer = self._draw(
            PLANE,
            {
                **_common(facts),
                "origin": picture.origin,
                "right": picture.right,
                "down": picture.down,
                "spacing": picture.spacing,
                "rows": picture.rows,
                "columns": picture.columns,
                "slab": None
                if slab is None
                else {
                    "thickness": slab.thickness,
                    "projection": slab.projection,
                    "step": slab.step,
                },
                "interpolation": asked.interpolation,
                "window": window,
                "inverted": asked.invert != facts.described.inverted,
                "format": asked.format,
                "quality": asked.quality,
            },
            volume,
            caller,
        )
        return Drawn(
            answer.body,
            MEDIA_TYPES[asked.format],
            {
                **answer.head,
                "rows": picture.rows,
                "columns": picture.columns,
                "position": picture.origin,
                "orientation": (*picture.right, *picture.down),
                "spacing": picture.spacing,
                "thickness": asked.thickness or 0.0,
                "unit": facts.described.unit,
            },
        )

    def draw_projection(
        self,
        actor: Actor,
        study_uid: str,
        series_uid: str,
        asked: ProjectionRequest,
        *,
        stack: int = 0,
        caller: Caller | None = None,
    ) -> Drawn:
        """Draw a volume rendering; raises as `draw_plane`."""
        key, facts = self._facts(actor, study_uid, series_uid, stack)
        projection.function_for(asked.preset, facts.described.unit)
        pixels = asked.rows * asked.columns
        if pixels > self._limits.render_pixels:
            raise TooLarge("render_pixels", self._limits.render_pixels)
        grid = facts.stack.grid
        depth = float(np.ptp(grid.corners(), axis=0).max())
        steps = depth / (min(grid.spacing) * asked.step)
        if pixels * steps > self._limits.render_samples:
            raise TooLarge("render_samples", self._limits.render_samples)
        volume = self._volume(actor, study_uid, series_uid, key, facts, caller)
        camera = projection.Camera(
            asked.azimuth, asked.elevation, asked.zoom, asked.rows, asked.columns
        )
        right, down, _ = camera.axes()
        answer = self._draw(
            PROJECTION,
            {
                **_common(facts),
                "camera": {
                    "azimuth": asked.azimuth,
                    "elevation": asked.elevation,
                    "zoom": asked.zoom,
                    "rows": asked.rows,
                    "columns": asked.columns,
                },
                "preset": asked.preset,
                "unit": facts.described.unit,
                "step": asked.step,
                "format": asked.format,
                "quality": asked.quality,
            },
            volume,
            caller,
        )
        return Drawn(
            answer.body,
            MEDIA_TYPES[asked.format],
            {
                "rows": asked.rows,
                "columns": asked.columns,
                "orientation": (*map(float, right), *map(float, down)),
                "unit": facts.described.unit,
            },
        )

    def warm(self, actor: Actor, study_uid: str, series_uid: str) -> bool:
        """Read a volume so that the first picture of it comes at once.

        Returns
        -------
        bool
            False when the series is none, or does not fit beside what is kept.
        """
        try:
            key, facts = self._facts(actor, study_uid, series_uid, 0)
            with self._lock:
                used = sum(one.n_bytes for one in self._kept.values())
                if key not in self._kept and used + facts.n_bytes > self._cache_bytes:
                    return False
            self._volume(actor, study_uid, series_uid, key, facts, None)
        except (NotAVolume, NotFound, TooLarge):
            return False
        return True

    def kept(self) -> int:
        """Return how many bytes of volumes are kept."""
        with self._lock:
            return sum(volume.n_bytes for volume in self._kept.values())

    def close(self) -> None:
        """End the processes that draw, and let go of all volumes."""
        self._pool.close()
        with self._lock:
            self._kept.clear()

    def pids(self) -> list[int]:
        """Return the processes that wait for work."""
        return self._pool.pids()

    def masks(self, asked: Mapping[str, Any], data: bytes) -> list[dict[str, Any]]:
        """Pack frames of a segmentation in a process; see `rendering.volume_masks`."""
        job = Job(MASKS, asked, (data,), label="masks")
        with self._gate.passed(self._limits.render_seconds, None):
            found: list[dict[str, Any]] = orjson.loads(self._pool.run(job).body)
        return found

    def _draw(
        self,
        handler: str,
        asked: Mapping[str, Any],
        volume: SharedVolume,
        caller: Caller | None,
    ) -> Answer:
        arguments = {
            **asked,
            "volume": volume.memory.path,
            "caller": None if caller is None else caller.path,
        }
        job = Job(handler, arguments, label="volume")
        try:
            with self._gate.passed(self._limits.render_seconds, caller):
                return self._pool.run(job)
        except ImagingError as error:
            if caller is not None and caller.has_left():
                raise Cancelled("the client has left") from error
            raise

    def _volume(
        self,
        actor: Actor,
        study_uid: str,
        series_uid: str,
        key: tuple[str, str, int],
        facts: VolumeFacts,
        caller: Caller | None,
    ) -> SharedVolume:
        """Return a volume that is kept, or read it; one thread reads each."""
        if facts.n_bytes > self._limits.volume_bytes:
            raise TooLarge("volume_bytes", self._limits.volume_bytes)
        deadline = time.monotonic() + self._limits.volume_seconds
        with self._ready:
            while True:
                kept = self._kept.get(key)
                if kept is not None:
                    self._kept.move_to_end(key)
                    return kept
                if key not in self._reading and self._make_room(facts.n_bytes):
                    self._reading[key] = facts.n_bytes
                    break
                _check(deadline, caller)
                self._ready.wait(LOOK_SECONDS)
        volume: SharedVolume | None = None
        try:
            volume = self._read(actor, study_uid, series_uid, facts, deadline, caller)
            return volume
        finally:
            with self._ready:
                del self._reading[key]
                if volume is not None:
                    self._kept[key] = volume
                self._ready.notify_all()

    def _make_room(self, n_bytes: int) -> bool:
        """Let go of what was not used lately until `n_bytes` fit; under the lock."""
        used = sum(self._reading.values())
        if used and used + n_bytes > self._cache_bytes:
            return False
        kept = sum(volume.n_bytes for volume in self._kept.values())
        while self._kept and used + kept + n_bytes > self._cache_bytes:
            kept -= self._kept.popitem(last=False)[1].n_bytes
        return True

    def _read(
        self,
        actor: Actor,
        study_uid: str,
        series_uid: str,
        facts: VolumeFacts,
        deadline: float,
        caller: Caller | None,
    ) -> SharedVolume:
        by_uid = {
            one.sop_instance_uid: one
            for one in self._retrieve.instances(actor, study_uid, series_uid)
        }
        volume = SharedVolume(facts.dtype, facts.n_bytes)
        shape = facts.stack.grid.shape
        padded = False
        with volume.memory.array(facts.dtype, shape) as voxels:
            numbered = list(enumerate(facts.stack.planes))
            # Planes of one multi-frame object are opened together.
            for _, group in groupby(numbered, key=lambda pair: pair[1].instance):
                planes = list(group)
                stored = by_uid.get(facts.instances[planes[0][0]])
                if stored is None:
                    raise NotFound("an image of the series has been deleted")
                padded |= self._read_planes(
                    stored, planes, facts, voxels, deadline, caller
                )
            if padded:
                _fill_padding(voxels)
        return volume

    def _read_planes(
        self,
        stored: StoredInstance,
        planes: list[tuple[int, Plane]],
        facts: VolumeFacts,
        voxels: NDArray[Any],
        deadline: float,
        caller: Caller | None,
    ) -> bool:
        form = facts.described.samples[planes[0][1].instance]
        if form is None:
            raise NotAVolume("the images have no grey pixels")
        numbers = [plane.frame_number for _, plane in planes]
        sources = self._retrieve.open_frames(stored, numbers, syntaxes.EXPLICIT_VR_LE)
        padded = False
        for (k, plane), source in zip(planes, sources, strict=True):
            _check(deadline, caller)
            data = source.read(0, source.length)
            padded |= _place(voxels[k], data, plane, form)
        return padded


def one_tenant(retrieve: RetrieveService, actor: Actor, study_uid: str) -> Actor:
    """Return the actor narrowed to the tenant whose copy of a study it is shown.

    Raises
    ------
    NotFound
    """
    tenants = {one.tenant for one in retrieve.instances(actor, study_uid)}
    tenant = next(
        (one for one in (actor.tenant, *actor.tenants) if one in tenants), actor.tenant
    )
    return replace(actor, tenant=tenant, readable=frozenset())


def _common(facts: VolumeFacts) -> dict[str, Any]:
    return {
        "grid": grid_json(facts.stack.grid),
        "gaps": facts.stack.gaps,
        "dtype": facts.dtype,
    }


def _describe(series: list[Mapping[str, Any]], stack: int) -> VolumeFacts:
    described = describe(series)
    found = stack_planes(described.planes, index=stack)
    low, high = value_range(described, found.planes)
    # The least value marks padding, where there is any.
    least = _PADDED + any(form and form.padding for form in described.samples)
    whole = is_whole(found.planes) and low >= least and high <= 32_767
    dtype = "<i2" if whole else "<f4"
    n_voxels = int(np.prod(found.grid.shape, dtype=np.int64))
    uids = [_uid(one) for one in series]
    return VolumeFacts(
        found,
        described,
        dtype,
        n_voxels * np.dtype(dtype).itemsize,
        tuple(uids[plane.instance] for plane in found.planes),
        tuple(plane.frame_number for plane in found.planes),
    )


def _uid(attributes: Mapping[str, Any]) -> str:
    values = attributes.get("00080018", {}).get("Value") or [""]
    return str(values[0])


def _check(deadline: float, caller: Caller | None) -> None:
    if caller is not None and caller.has_left():
        raise Cancelled("the client has left")
    if time.monotonic() > deadline:
        raise DependencyDown("reading the volume took too long")


def _place(plane_of: NDArray[Any], data: bytes, plane: Plane, form: Samples) -> bool:
    """Write the values of a decoded frame; tell whether some stand for no value."""
    kind = "i" if form.signed else "u"
    stored = np.frombuffer(data, f"<{kind}{form.bits_allocated // 8}")
    if stored.size < plane_of.size:
        raise NotAVolume("an image has fewer pixels than its attributes say")
    samples = stored[: plane_of.size].reshape(plane_of.shape)
    if form.bits_stored < form.bits_allocated:
        # Other bits may hold overlays, or signs that were never extended.
        up = form.bits_allocated - 1 - form.high_bit
        down = form.bits_allocated - form.bits_stored
        samples = np.right_shift(np.left_shift(samples, up), down)
    whole = plane_of.dtype.kind == "i"
    if plane.slope == 1 and plane.intercept == 0:
        plane_of[:] = samples
    elif whole:
        wide = samples.astype(np.int32)
        wide *= int(plane.slope)
        wide += int(plane.intercept)
        plane_of[:] = wide
    else:
        plane_of[:] = samples * np.float32(plane.slope) + np.float32(plane.intercept)
    if form.padding is None:
        return False
    low, high = form.padding
    empty = (samples >= low) & (samples <= high)
    if not empty.any():
        return False
    plane_of[empty] = _PADDED if whole else np.nan
    return True


def _fill_padding(voxels: NDArray[Any]) -> None:
    """Give samples that stand for no value the least value there is."""
    for_none = voxels == _PADDED if voxels.dtype.kind == "i" else np.isnan(voxels)
    known = voxels[~for_none]
    voxels[for_none] = known.min() if known.size else 0


def _picture(facts: VolumeFacts, asked: PlaneRequest) -> reslice.Picture:
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
