"""Overlay planes and display shutters (PS3.3 C.9.2, C.7.6.11, C.7.6.15)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pacs.rendering.header import Item
from pacs.rendering.pixels import Frame
from storage.kernel.errors import MalformedObject

Mask = NDArray[np.bool_]

GROUPS: Final = range(0x6000, 0x6020, 2)
#: Element numbers of an overlay plane.
_ROWS, _COLUMNS, _FRAMES = 0x0010, 0x0011, 0x0015
_TYPE, _ORIGIN, _FIRST_FRAME = 0x0040, 0x0050, 0x0051
_ALLOCATED, _POSITION = 0x0100, 0x0102
_ACTIVATION_LAYER, _DATA = 0x1001, 0x3000
GRAPHICS: Final = "G"

SHUTTER_SHAPE: Final = 0x00181600
SHUTTER_OVERLAY_GROUP: Final = 0x00181623
SHUTTER_VALUE: Final = 0x00181622
#: Corners of a polygonal shutter.
MAX_VERTICES: Final = 10_000


def overlay_groups(item: Item) -> Iterator[int]:
    """Yield the groups in which an object declares an overlay plane."""
    for group in GROUPS:
        if group << 16 | _ROWS in item:
            yield group


def overlay_type(item: Item, group: int) -> str:
    """Return Overlay Type (60xx,0040): G for graphics, R for a region of interest."""
    return item.code(group << 16 | _TYPE)


def activation_layer(item: Item, group: int) -> str:
    """Return the graphic layer that a presentation state shows an overlay in."""
    return item.code(group << 16 | _ACTIVATION_LAYER)


def overlay_mask(
    item: Item, group: int, shape: tuple[int, int], index: int, frame: Frame | None
) -> Mask | None:
    """Return where an overlay plane lies on a frame, or None when it does not.

    Parameters
    ----------
    shape : tuple of int
        Rows and columns of the frame; what reaches beyond is cut off.
    index : int
        Of the frame, from 0.
    frame : Frame or None
        Overlays without data of their own lie in its unused bits (retired, PS3.5
        2004); None: those are not drawn.
    """
    base = group << 16
    rows, columns = item.whole(base | _ROWS), item.whole(base | _COLUMNS)
    if rows < 1 or columns < 1:
        return None
    number = _plane(item, base, index)
    if number is None:
        return None
    plane: Mask | None
    if base | _DATA in item:
        plane = _unpacked(item, base, rows, columns, number)
    elif frame is not None and not frame.is_float and frame.raw.ndim == 2:
        plane = _embedded(item, base, frame)
    else:
        plane = None
    return None if plane is None else _placed(plane, _origin(item, base), shape)


def _plane(item: Item, base: int, index: int) -> int | None:
    """Return which plane of a multi-frame overlay lies on a frame."""
    count = item.whole(base | _FRAMES, 1)
    if count <= 1 and base | _FIRST_FRAME not in item:
        return 0
    index -= item.whole(base | _FIRST_FRAME, 1) - 1
    return index if 0 <= index < max(1, count) else None


def _unpacked(
    item: Item, base: int, rows: int, columns: int, index: int
) -> Mask | None:
    data = np.frombuffer(item.bytes_in_order(base | _DATA), np.uint8)
    first = index * rows * columns
    last = first + rows * columns
    if 8 * len(data) < last:
        return None
    bits = np.unpackbits(data[first // 8 : -(-last // 8)], bitorder="little")
    start = first % 8
    flat: Mask = bits[start : start + rows * columns].astype(np.bool_)
    return flat.reshape(rows, columns)


def _embedded(item: Item, base: int, frame: Frame) -> Mask | None:
    position = item.whole(base | _POSITION)
    size = 8 * frame.raw.dtype.itemsize
    stored = range(frame.shift, frame.shift + frame.bits_stored)
    if item.whole(base | _ALLOCATED) <= 1 or position in stored or position >= size:
        return None
    mask: Mask = (frame.raw >> position & 1).astype(np.bool_)
    return mask


def _origin(item: Item, base: int) -> tuple[int, int]:
    """Return row and column of the plane's first pixel, from 0; SS whatever the VR."""
    words = item.words(base | _ORIGIN).view(np.int16)
    row, column = (int(word) for word in words[:2]) if len(words) >= 2 else (1, 1)
    return row - 1, column - 1


def _placed(plane: Mask, origin: tuple[int, int], shape: tuple[int, int]) -> Mask:
    mask = np.zeros(shape, np.bool_)
    (top, left), (rows, columns) = origin, plane.shape
    first, last = max(0, top), min(shape[0], top + rows)
    begin, end = max(0, left), min(shape[1], left + columns)
    if first < last and begin < end:
        mask[first:last, begin:end] = plane[
            first - top : last - top, begin - left : end - left
        ]
    return mask


def shutter_mask(item: Item, shape: tuple[int, int]) -> Mask | None:
    """Return what display shutters leave visible, or None without any.

    Raises
    ------
    MalformedObject
        A shutter without the numbers that say where it is.
    """
    seen: Mask | None = None
    for name in item.texts(SHUTTER_SHAPE):
        maker = _SHUTTERS.get(name)
        one = maker(item, shape) if maker is not None else None
        if one is not None:
            seen = one if seen is None else seen & one
    return seen


def _rectangle(item: Item, shape: tuple[int, int]) -> Mask:
    edges = [
        item.number(tag) for tag in (0x00181602, 0x00181604, 0x00181606, 0x00181608)
    ]
    if None in edges:
        raise MalformedObject("a rectangular shutter without edges", 0x00181602)
    left, right, top, bottom = (int(edge or 0) for edge in edges)
    seen = np.zeros(shape, np.bool_)
    # Edges are numbers of columns and rows, which are inside.
    seen[max(0, top - 1) : max(0, bottom), max(0, left - 1) : max(0, right)] = True
    return seen


def _circle(item: Item, shape: tuple[int, int]) -> Mask:
    center, radius = item.numbers(0x00181610), item.number(0x00181612)
    if len(center) < 2 or radius is None:
        raise MalformedObject("a circular shutter without center or radius", 0x00181610)
    rows, columns = np.ogrid[1 : shape[0] + 1, 1 : shape[1] + 1]
    inside: Mask = (rows - center[0]) ** 2 + (columns - center[1]) ** 2 <= radius**2
    return inside


def _polygon(item: Item, shape: tuple[int, int]) -> Mask:
    from PIL import Image, ImageDraw

    numbers = item.numbers(0x00181620)[: 2 * MAX_VERTICES]
    points = [
        (numbers[i + 1] - 1, numbers[i] - 1) for i in range(0, len(numbers) - 1, 2)
    ]
    if len(points) < 3:
        raise MalformedObject("a polygonal shutter without corners", 0x00181620)
    drawn = Image.new("1", (shape[1], shape[0]))
    ImageDraw.Draw(drawn).polygon(points, fill=1, outline=1)
    return np.asarray(drawn, np.bool_)


_SHUTTERS: Final[dict[str, Any]] = {
    "RECTANGULAR": _rectangle,
    "CIRCULAR": _circle,
    "POLYGONAL": _polygon,
}


def shutter_grey(item: Item) -> int:
    """Return the grey of what a shutter hides: a P-value of 16 bits, as 8."""
    words = item.words(SHUTTER_VALUE)
    return int(words[0]) >> 8 if len(words) else 0


def hide(picture: NDArray[np.uint8], seen: Mask, grey: int) -> NDArray[np.uint8]:
    """Return a grey or colour picture in which what is not seen is grey."""
    shown = picture.copy()
    shown[~seen] = grey
    return shown


def draw(picture: NDArray[np.uint8], mask: Mask, grey: int = 255) -> None:
    """Burn a plane into a grey or colour picture."""
    picture[mask] = grey
