"""What a code stream says about itself, read before anything is decoded.

A decoder allocates what the code stream declares. So its size is compared with the
attributes of the object first; only headers are read here (ISO/IEC 10918-1 B.2.2,
14495-1 C.2.2, 15444-1 A.5.1, 18181-1 D.2).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from pacs.imaging.encoding import PIXEL_DATA, Buffer
from storage.kernel.errors import MalformedObject


@dataclass(frozen=True, slots=True)
class Shape:
    """Size of an image as its code stream declares it.

    Attributes
    ----------
    precision : int
        Bits of one sample; 0 when the header that was read does not say.
    transformed : bool or None
        JPEG: whether the colour components are YCbCr; None when nothing says so.
    lossless : bool
        JPEG: process 14.
    """

    rows: int
    columns: int
    samples: int
    precision: int = 0
    transformed: bool | None = None
    lossless: bool = False


def _broken(what: str) -> MalformedObject:
    return MalformedObject(f"code stream: {what}", PIXEL_DATA)


#: Start of Frame markers of JPEG processes that exist in DICOM, and of JPEG-LS.
_FRAMES: Final = frozenset((0xC0, 0xC1, 0xC2, 0xC3, 0xF7))
#: Start of Frame markers of hierarchical and arithmetic processes.
_OTHER_FRAMES: Final = frozenset(range(0xC5, 0xD0)) - {0xC8, 0xCC}
#: Markers without a length.
_BARE: Final = frozenset((0x01, *range(0xD0, 0xD9)))


def jpeg_shape(data: Buffer) -> Shape:
    """Read the frame header of a JPEG or JPEG-LS code stream.

    Raises
    ------
    MalformedObject
    """
    size = len(data)
    if bytes(data[:2]) != b"\xff\xd8":
        raise _broken("no start of image")
    position = 2
    transformed: bool | None = None
    while position + 4 <= size:
        if data[position] != 0xFF:
            raise _broken("no marker where one belongs")
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        if marker in _BARE:
            position += 2
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        if length < 2 or position + 2 + length > size:
            raise _broken("a marker segment is cut off")
        body = bytes(data[position + 4 : position + 2 + min(length, 32)])
        if marker in _FRAMES:
            if len(body) < 6:
                raise _broken("the frame header is cut off")
            precision, rows, columns, samples = struct.unpack_from(">BHHB", body)
            return Shape(
                rows, columns, samples, precision, transformed, lossless=marker == 0xC3
            )
        if marker in _OTHER_FRAMES or marker in {0xDA, 0xD9}:
            raise _broken("no frame header of a known process")
        if marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
            transformed = body[11] != 0
        elif marker == 0xE0 and body.startswith(b"JFIF\0") and transformed is None:
            transformed = True
        position += 2 + length
    raise _broken("no frame header")


#: A grid of more tiles than this is an attack (a slide's tile is one frame).
_MAX_TILES: Final = 65_535


def jpeg2000_shape(data: Buffer) -> Shape:
    """Read the SIZ marker segment of a JPEG 2000 or HTJ2K code stream.

    Tolerates: the code stream inside a JP2 file.

    Raises
    ------
    MalformedObject
    """
    start = 0
    if bytes(data[:12]) == b"\0\0\0\x0cjP  \r\n\x87\n":
        start = _box(data, b"jp2c")
    if bytes(data[start : start + 4]) != b"\xff\x4f\xff\x51":
        raise _broken("no start of code stream")
    if len(data) < start + 4 + 41:
        raise _broken("the image and tile size is cut off")
    right, bottom, left, top, tile_w, tile_h, tile_x, tile_y, samples = (
        struct.unpack_from(">8IH", data, start + 8)
    )
    depth, step_x, step_y = struct.unpack_from(">3B", data, start + 42)
    if right <= left or bottom <= top or not tile_w or not tile_h:
        raise _broken("impossible image or tile size")
    if not step_x or not step_y or not samples:
        raise _broken("impossible components")
    across = -(-(right - tile_x) // tile_w)
    down = -(-(bottom - tile_y) // tile_h)
    if across * down > _MAX_TILES:
        raise _broken("too many tiles")
    return Shape(
        -(-bottom // step_y) + -top // step_y,
        -(-right // step_x) + -left // step_x,
        samples,
        (depth & 0x7F) + 1,
    )


def _box(data: Buffer, name: bytes) -> int:
    """Return where the content of the first box `name` begins."""
    position, size = 0, len(data)
    while position + 8 <= size:
        length = int.from_bytes(data[position : position + 4], "big")
        head = 8
        if length == 1:
            length = int.from_bytes(data[position + 8 : position + 16], "big")
            head = 16
        if bytes(data[position + 4 : position + 8]) == name:
            return position + head
        if length < head:
            break
        position += length
    raise _broken("no code stream in its container")


class _Bits:
    """Bits of a JPEG XL header, least significant first."""

    def __init__(self, data: Buffer) -> None:
        self._value = int.from_bytes(data[:24], "little")
        self._left = 8 * min(len(data), 24)

    def take(self, n: int) -> int:
        if n > self._left:
            raise _broken("the size header is cut off")
        taken = self._value & ((1 << n) - 1)
        self._value >>= n
        self._left -= n
        return taken

    def size(self) -> int:
        return 1 + self.take((9, 13, 18, 30)[self.take(2)])


_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def jpegxl_shape(data: Buffer) -> Shape:
    """Read the size header of a JPEG XL code stream, bare or in its container.

    The number of components is further inside and left at 0: not known.

    Raises
    ------
    MalformedObject
    """
    start = 0
    if bytes(data[:12]) == b"\0\0\0\x0cJXL \r\n\x87\n":
        try:
            start = _box(data, b"jxlc")
        except MalformedObject:
            # A partial code stream box begins with its index.
            start = _box(data, b"jxlp") + 4
    if bytes(data[start : start + 2]) != b"\xff\x0a":
        raise _broken("no JPEG XL signature")
    bits = _Bits(data[start + 2 : start + 26])
    small = bits.take(1)
    rows = 8 * (1 + bits.take(5)) if small else bits.size()
    ratio = bits.take(3)
    if ratio:
        numerator, denominator = _RATIOS[ratio - 1]
        columns = rows * numerator // denominator
    else:
        columns = 8 * (1 + bits.take(5)) if small else bits.size()
    return Shape(rows, columns, 0)


def rle_shape(data: Buffer) -> Shape:
    """Check the header of an RLE frame (PS3.5 G.5); only its segments are known.

    Raises
    ------
    MalformedObject
        The segments are not one to fifteen, in order, inside the frame.
    """
    if len(data) < 64:
        raise _broken("the RLE header is cut off")
    n, *offsets = struct.unpack_from("<16I", data)
    if not 1 <= n <= 15:
        raise _broken("not one to fifteen RLE segments")
    bounds = [*offsets[:n], len(data)]
    if bounds[0] != 64 or any(a > b for a, b in pairwise(bounds)):
        raise _broken("RLE segments are out of order or past the end")
    return Shape(0, 0, n)


#: How to read the header of each kind of code stream.
SHAPES: Final[dict[str, Callable[[Buffer], Shape]]] = {
    "jpeg": jpeg_shape,
    "jpegls": jpeg_shape,
    "jpeg2k": jpeg2000_shape,
    "htj2k": jpeg2000_shape,
    "jpegxl": jpegxl_shape,
    "rle": rle_shape,
}
