"""Volumes in shared memory: read once, kept for a while, never more than allowed."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pacs.domain.study import StoredInstance
from pacs.imaging import syntaxes
from pacs.rendering.volume import NotAVolume, Plane
from pacs.rendering.volume_attributes import Samples
from pacs.rendering.volume_tasks import Caller, SharedBytes
from pacs.services.retrieve import RetrieveService
from pacs.services.volumes_views import PADDED, VolumeFacts
from storage.kernel.errors import Cancelled, DependencyDown, NotFound, TooLarge
from storage.kernel.limits import Limits
from storage.kernel.types import Actor

#: How often a caller that waits is asked whether it is still there.
LOOK_SECONDS: Final = 0.1

Key = tuple[str, str, int]
"""Entity tag of a series' metadata, its UID, and which of its stacks."""


class Gate:
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
                check(deadline, caller)
        finally:
            with self._lock:
                self._waiting -= 1
        try:
            yield
        finally:
            self._room.release()


class SharedVolume:
    """Voxels in shared memory."""

    def __init__(self, dtype: str, n_bytes: int) -> None:
        self.dtype = dtype
        self.n_bytes = n_bytes
        self.memory = SharedBytes(n_bytes)


class VolumeCache:
    """Volumes by content, and the reading of those that are not here yet.

    Parameters
    ----------
    n_bytes : int
        Of all volumes that are kept, and being read.
    """

    def __init__(self, retrieve: RetrieveService, limits: Limits, n_bytes: int) -> None:
        self._retrieve = retrieve
        self._limits = limits
        self._cache_bytes = n_bytes
        self._ready = threading.Condition()
        self._kept: OrderedDict[Key, SharedVolume] = OrderedDict()
        self._reading: dict[Key, int] = {}

    def n_bytes(self) -> int:
        """Return how many bytes of volumes are kept."""
        with self._ready:
            return sum(volume.n_bytes for volume in self._kept.values())

    def has_room(self, key: Key, n_bytes: int) -> bool:
        """Tell whether a volume is here, or fits beside what is."""
        with self._ready:
            used = sum(volume.n_bytes for volume in self._kept.values())
            used += sum(self._reading.values())
            return key in self._kept or used + n_bytes <= self._cache_bytes

    def clear(self) -> None:
        """Let go of all volumes."""
        with self._ready:
            self._kept.clear()

    def volume(
        self,
        actor: Actor,
        study_uid: str,
        series_uid: str,
        key: Key,
        facts: VolumeFacts,
        caller: Caller | None,
    ) -> SharedVolume:
        """Return a volume that is kept, or read it; one thread reads each.

        Raises
        ------
        TooLarge, NotFound, NotAVolume, DependencyDown, Cancelled
        """
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
                check(deadline, caller)
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
            check(deadline, caller)
            data = source.read(0, source.length)
            padded |= _place(voxels[k], data, plane, form)
        return padded


def check(deadline: float, caller: Caller | None) -> None:
    """Raise when nobody waits any more, or for too long."""
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
    plane_of[empty] = PADDED if whole else np.nan
    return True


def _fill_padding(voxels: NDArray[Any]) -> None:
    """Give samples that stand for no value the least value there is."""
    for_none = voxels == PADDED if voxels.dtype.kind == "i" else np.isnan(voxels)
    known = voxels[~for_none]
    voxels[for_none] = known.min() if known.size else 0
