"""What a worker process does with volumes: handlers of `pacs.imaging.worker`.

A volume comes as the path of shared memory, never as bytes; it is mapped only while it
is drawn from. So does the flag by which the caller says that it has left.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final

import numpy as np
import orjson
from numpy.typing import NDArray

from pacs.rendering import projection, reslice, volume_masks
from pacs.rendering.reslice import Plain, Sampler, Voxels
from pacs.rendering.volume import Grid
from pacs.rendering.volume_pictures import encode_colour, encode_grey
from storage.kernel.errors import Cancelled, DependencyDown

#: Names of the handlers.
PLANE: Final = f"{__name__}:draw_plane"
PROJECTION: Final = f"{__name__}:draw_projection"
MASKS: Final = f"{__name__}:pack_masks"

#: Stored value of pixels beside the volume.
OUTSIDE: Final = -32768

Answer = tuple[dict[str, Any], bytes]


class SharedBytes:
    """Memory that other processes can map; given back with the last reference."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        try:
            self._descriptor = os.memfd_create("huying", os.MFD_CLOEXEC)
            weakref.finalize(self, os.close, self._descriptor)
            os.ftruncate(self._descriptor, n_bytes)
        except OSError as error:
            raise DependencyDown("no shared memory") from error

    @property
    def path(self) -> str:
        """Where a process of the same user opens it."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    @contextmanager
    def array(self, dtype: str, shape: tuple[int, ...]) -> Iterator[NDArray[Any]]:
        """Lend the memory for writing; no view of it may be kept."""
        with _mapped(self.path, self.n_bytes, write=True) as mapped:
            array = np.frombuffer(mapped, dtype).reshape(shape)
            try:
                yield array
            finally:
                del array


class Caller:
    """Who waits for an answer, and may leave: seen in this process and in others."""

    def __init__(self) -> None:
        self._flag = SharedBytes(1)
        self.path = self._flag.path
        self._left = False

    def leave(self) -> None:
        """Say that nobody waits any more."""
        self._left = True
        with self._flag.array("u1", (1,)) as flag:
            flag[0] = 1

    def has_left(self) -> bool:
        return self._left


def grid_json(grid: Grid) -> dict[str, Any]:
    """Return a grid as JSON takes it."""
    return {
        "shape": grid.shape,
        "origin": grid.origin,
        "column_step": grid.column_step,
        "row_step": grid.row_step,
        "along": grid.along,
        "offsets": grid.offsets,
        "regular": grid.regular,
    }


def _grid(found: Mapping[str, Any]) -> Grid:
    tuples = {
        name: tuple(value) for name, value in found.items() if isinstance(value, list)
    }
    return Grid(**{**found, **tuples})


@contextmanager
def _mapped(path: str, n_bytes: int, *, write: bool = False) -> Iterator[mmap.mmap]:
    descriptor = os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC)
    try:
        access = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
        mapped = mmap.mmap(descriptor, n_bytes, prot=access)
    finally:
        os.close(descriptor)
    try:
        yield mapped
    finally:
        # After an error, its traceback may hold a view; then the next garbage
        # collection unmaps it.
        with suppress(BufferError):
            mapped.close()


@contextmanager
def _volume(asked: Mapping[str, Any]) -> Iterator[Voxels]:
    shape, dtype = tuple(asked["grid"]["shape"]), np.dtype(asked["dtype"])
    n_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    with _mapped(asked["volume"], n_bytes) as mapped:
        voxels = np.frombuffer(mapped, dtype).reshape(shape)
        try:
            yield voxels
        finally:
            del voxels


@contextmanager
def _watching(asked: Mapping[str, Any]) -> Iterator[reslice.Check]:
    """Yield what raises once the caller has left."""
    if not asked.get("caller"):
        yield lambda: None
        return
    with _mapped(asked["caller"], 1) as flag:

        def check() -> None:
            if flag[0]:
                raise Cancelled("the client has left")

        yield check


def draw_plane(asked: dict[str, Any], _payloads: list[bytearray]) -> Answer:
    """Draw an MPR picture or a slab."""
    picture = reslice.Picture(
        tuple(asked["origin"]),
        tuple(asked["right"]),
        tuple(asked["down"]),
        tuple(asked["spacing"]),
        asked["rows"],
        asked["columns"],
    )
    slab = reslice.Slab(**asked["slab"]) if asked["slab"] else None
    gaps = tuple((low, high) for low, high in asked["gaps"])
    with _volume(asked) as voxels, _watching(asked) as check:
        sampler = Sampler(voxels, _grid(asked["grid"]), gaps, asked["interpolation"])
        plain = reslice.render(sampler, picture, slab, check=check)
        del sampler
    if asked["format"] == "int16":
        return _raw(plain)
    window = asked["window"] or _own_window(plain)
    shown = _windowed(plain, float(window[0]), float(window[1]))
    if asked["inverted"]:
        shown = 255 - shown
    shown[~plain.inside] = 0
    body = encode_grey(shown, asked["format"], asked["quality"])
    return {"window": [float(one) for one in window]}, body


def draw_projection(asked: dict[str, Any], _payloads: list[bytearray]) -> Answer:
    """Draw a volume rendering."""
    grid = _grid(asked["grid"])
    gaps = tuple((low, high) for low, high in asked["gaps"])
    camera = projection.Camera(**asked["camera"])
    function = projection.function_for(asked["preset"], asked["unit"])
    with _volume(asked) as stored, _watching(asked) as check:
        voxels: Voxels = stored
        if not grid.regular:
            voxels, grid = projection.regular(Sampler(voxels, grid, gaps))
        shown = projection.render(
            voxels, grid, function, camera, step=asked["step"], check=check
        )
        del voxels, stored
    return {}, encode_colour(shown, asked["format"], asked["quality"])


def pack_masks(asked: dict[str, Any], payloads: list[bytearray]) -> Answer:
    """Pack frames of a segmentation as runs; see `volume_masks`."""
    return {}, orjson.dumps(volume_masks.pack(asked, bytes(payloads[0])))


def _raw(plain: Plain) -> Answer:
    """Return values as int16 with the slope and intercept that restore them."""
    values, inside = plain.values, plain.inside
    slope, intercept = 1.0, 0.0
    known = values[inside]
    if known.size:
        low, high = float(known.min()), float(known.max())
        if low < -32_767 or high > 32_767:
            slope = (high - low) / 65_534 or 1.0
            intercept = (high + low) / 2
    stored = np.rint((values - intercept) / slope)
    stored[~inside] = OUTSIDE
    facts = {"slope": slope, "intercept": intercept, "outside": OUTSIDE}
    return facts, stored.astype("<i2").tobytes()


def _own_window(plain: Plain) -> tuple[float, float]:
    known = plain.values[plain.inside]
    if not known.size:
        return (0.5, 1.0)
    low, high = np.percentile(known, (0.5, 99.5))
    return (float(low + high) / 2, float(max(1.0, high - low)))


def _windowed(plain: Plain, centre: float, width: float) -> NDArray[np.uint8]:
    """Return display values by the linear VOI function (PS3.3 C.11.2.1.2.1)."""
    span = max(width - 1.0, 1e-6)
    scaled = (plain.values - (centre - 0.5)) / span + 0.5
    shown: NDArray[np.uint8] = np.rint(np.clip(scaled, 0.0, 1.0) * 255).astype(np.uint8)
    return shown
