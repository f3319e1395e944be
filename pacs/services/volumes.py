"""Volumes of stored series, read once and kept in shared memory for a while.

A volume is read by the frames of its series in any transfer syntax, rescaled to values
with a unit, and drawn from by bounded processes that are lent the memory. Whether an
actor may see a series is asked for each request; what is kept is named by content.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import orjson

from pacs.imaging.pool import Answer, Job, PoolObserver, WorkerPool
from pacs.rendering import projection, reslice
from pacs.rendering.volume import NotAVolume
from pacs.rendering.volume_pictures import MEDIA_TYPES
from pacs.rendering.volume_tasks import (
    MASKS,
    PLANE,
    PROJECTION,
    Caller,
    grid_json,
)
from pacs.services.retrieve import RetrieveService
from pacs.services.volumes_cache import Gate, Key, SharedVolume, VolumeCache
from pacs.services.volumes_views import (
    Drawn,
    PlaneRequest,
    ProjectionRequest,
    VolumeFacts,
    facts_of,
    picture_of,
)
from storage.kernel.errors import (
    Cancelled,
    DependencyDown,
    ImagingError,
    NotFound,
    TooLarge,
)
from storage.kernel.limits import Limits
from storage.kernel.types import Actor

__all__ = [
    "Drawn",
    "PlaneRequest",
    "ProjectionRequest",
    "VolumeFacts",
    "VolumeService",
    "one_tenant",
]

#: Geometries one process remembers.
MAX_DESCRIBED: Final = 512
#: Pictures that may wait for a process; more are told to come back.
MAX_WAITING: Final = 16


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
        self._gate = Gate(processes, MAX_WAITING)
        self._limits = limits
        self._cache = VolumeCache(retrieve, limits, cache_bytes)
        self._lock = threading.Lock()
        self._described: OrderedDict[Key, VolumeFacts | NotAVolume] = OrderedDict()

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
    ) -> tuple[Key, VolumeFacts]:
        body = self._retrieve.series_metadata(actor, study_uid, series_uid)
        key = (body.etag, series_uid, stack)
        with self._lock:
            known = self._described.get(key)
            if known is not None:
                self._described.move_to_end(key)
        if known is None:
            try:
                known = facts_of(orjson.loads(b"".join(body.text())), stack)
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
        picture = picture_of(facts, asked)
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
        volume = self._cache.volume(actor, study_uid, series_uid, key, facts, caller)
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
        volume = self._cache.volume(actor, study_uid, series_uid, key, facts, caller)
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
            if not self._cache.has_room(key, facts.n_bytes):
                return False
            self._cache.volume(actor, study_uid, series_uid, key, facts, None)
        except (NotAVolume, NotFound, TooLarge):
            return False
        return True

    def kept(self) -> int:
        """Return how many bytes of volumes are kept."""
        return self._cache.n_bytes()

    def close(self) -> None:
        """End the processes that draw, and let go of all volumes."""
        self._pool.close()
        self._cache.clear()

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
            if isinstance(error, TooLarge) and error.limit == "decode_bytes":
                # The pool's own name for what these processes may have.
                limit = self._limits.render_bytes
                raise TooLarge("render_bytes", limit) from error
            if isinstance(error, DependencyDown):
                raise DependencyDown("the picture was not finished") from error
            raise


def one_tenant(retrieve: RetrieveService, actor: Actor, study_uid: str) -> Actor:
    """Return the actor narrowed to the tenant whose copy of a study it is shown.

    Raises
    ------
    NotFound
        None of several tenants has it.
    """
    if len(actor.tenants) == 1:
        return actor
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
