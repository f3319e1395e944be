"""Decoding one frame, in a worker process (`pacs.imaging.worker`)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.generic]

#: Flags of a request.
SIGNED: Final = 1
AS_STORED: Final = 2
"""Leave colours as they are in the code stream."""


class Undecodable(ValueError):
    """The code stream is broken or not what the attributes say."""


def decode_frame(
    arguments: dict[str, Any], payloads: list[bytearray]
) -> tuple[dict[str, Any], memoryview]:
    """Decode the code stream that is the only payload; a job's handler.

    The arguments are those of `decode` but `data`; the body of the answer is the
    samples, little endian.
    """
    (data,) = payloads
    return {}, memoryview(decode(data=data, **arguments).tobytes())


def decode(
    codec: str,
    data: bytes | bytearray,
    *,
    rows: int,
    columns: int,
    samples: int,
    bits_allocated: int,
    precision: int,
    flags: int,
) -> Array:
    """Return the samples of a frame, colour by pixel, as little endian needs them."""
    import numpy as np

    if codec == "rle":
        return _rle(data, rows, columns, samples, bits_allocated // 8)
    decoded: Array = np.asarray(_codec(codec, data, flags & AS_STORED))
    wanted = (rows, columns) if samples == 1 else (rows, columns, samples)
    if decoded.shape != wanted:
        raise Undecodable(f"decoded to {decoded.shape}, not {wanted}")
    if decoded.dtype.kind not in "iu":
        raise Undecodable(f"decoded to {decoded.dtype.name}")
    signed = bool(flags & SIGNED)
    if 8 * decoded.itemsize > bits_allocated:
        raise Undecodable(f"{8 * decoded.itemsize} bits, not {bits_allocated}")
    target = np.dtype(f"<{'i' if signed else 'u'}{bits_allocated // 8}")
    if signed and decoded.dtype.kind == "u" and 0 < precision < bits_allocated:
        # Only JPEG 2000 knows signs: elsewhere the samples are bit patterns.
        shift = bits_allocated - precision
        widened: Array = decoded.astype(target)
        return np.right_shift(np.left_shift(widened, shift), shift)
    if not signed and decoded.dtype.kind == "i" and 0 < precision < bits_allocated:
        mask = target.type((1 << precision) - 1)
        masked: Array = np.bitwise_and(decoded.astype(target), mask)
        return masked
    return decoded.astype(target, copy=False)


def _codec(codec: str, data: bytes | bytearray, as_stored: int) -> Any:
    import imagecodecs

    if codec == "jpeg":
        if as_stored:
            return imagecodecs.jpeg8_decode(data, colorspace="rgb", outcolorspace="rgb")
        return imagecodecs.jpeg8_decode(data)
    if codec == "jpegls":
        return imagecodecs.jpegls_decode(data)
    if codec == "jpeg2k":
        return imagecodecs.jpeg2k_decode(data, numthreads=1)
    if codec == "htj2k":
        # Without the colour transform it would give plane after plane.
        return imagecodecs.htj2k_decode(data, planar=False)
    return imagecodecs.jpegxl_decode(data, numthreads=1)


def _rle(
    data: bytes | bytearray, rows: int, columns: int, samples: int, size: int
) -> Array:
    """Decode RLE segments: one per byte of a sample, high byte first (PS3.5 G.2)."""
    import imagecodecs
    import numpy as np

    n, *offsets = struct.unpack_from("<16I", data)
    if n != samples * size:
        raise Undecodable(f"{n} RLE segments, not {samples * size}")
    pixels = rows * columns
    bounds = [*offsets[:n], len(data)]
    out = np.empty((pixels, samples, size), np.uint8)
    for i in range(n):
        # A padded odd segment may decode to a byte more.
        plane = np.frombuffer(
            imagecodecs.packbits_decode(data[bounds[i] : bounds[i + 1]]), np.uint8
        )
        if plane.size < pixels:
            raise Undecodable("an RLE segment is too short")
        out[:, i // size, size - 1 - i % size] = plane[:pixels]
    return out
