"""Colour frames as RGB of 8 bits (PS3.3 C.7.6.3.1.2)."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from pacs.rendering.grayscale import Grey
from pacs.rendering.header import Header
from pacs.rendering.lookup import Lookup, read_palette
from pacs.rendering.pixels import Frame
from storage.kernel.errors import MalformedObject, Unsupported

Rgb = NDArray[np.uint8]

PIXEL_PRESENTATION: Final = 0x00089205
RED_DESCRIPTOR: Final = 0x00281101

#: Rows of R, G, B over Y, Cb, Cr; what is subtracted before (CCIR 601-2, ICT).
_FULL: Final = (
    ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0)),
    (0.0, 128.0, 128.0),
)
_PARTIAL: Final = (
    (
        (255 / 219, 0.0, 1.402 * 255 / 224),
        (255 / 219, -0.344136 * 255 / 224, -0.714136 * 255 / 224),
        (255 / 219, 1.772 * 255 / 224, 0.0),
    ),
    (16.0, 128.0, 128.0),
)
_MATRICES: Final = {
    "YBR_FULL": _FULL,
    "YBR_FULL_422": _FULL,
    # Its decoder has undone it, unless the samples came without one.
    "YBR_ICT": _FULL,
    "YBR_PARTIAL_422": _PARTIAL,
    "YBR_PARTIAL_420": _PARTIAL,
}


def ybr_to_rgb(samples: NDArray[np.uint8], photometric: str) -> Rgb:
    """Return RGB of YBR samples of 8 bits.

    Parameters
    ----------
    samples : array, shape (rows, columns, 3)

    Raises
    ------
    Unsupported
        No matrix is known for this photometric interpretation.
    """
    found = _MATRICES.get(photometric)
    if found is None:
        raise Unsupported(f"photometric interpretation {photometric[:16]!r}")
    matrix, offset = found
    centred = samples.astype(np.float32) - np.array(offset, np.float32)
    rgb = centred @ np.array(matrix, np.float32).T
    eight: Rgb = np.clip(np.floor(rgb + 0.5), 0, 255).astype(np.uint8)
    return eight


def colour_frame(frame: Frame) -> Rgb:
    """Return the RGB of a frame of three samples.

    Raises
    ------
    Unsupported
        HSV, ARGB, CMYK, and YBR of more than 8 bits.
    """
    values = frame.values(frame.raw)
    if frame.signed:
        raise MalformedObject("colour with a sign", 0x00280103)
    if frame.bits_stored > 8:
        eight = (values >> (frame.bits_stored - 8)).astype(np.uint8)
    elif frame.bits_stored < 8:
        top = (1 << frame.bits_stored) - 1
        eight = (values.astype(np.uint16) * 255 // top).astype(np.uint8)
    else:
        eight = values.astype(np.uint8, copy=False)
    if frame.photometric in {"RGB", "YBR_RCT"}:
        return eight
    return ybr_to_rgb(eight, frame.photometric)


def palette_of(header: Header, *, signed: bool) -> tuple[Lookup, Lookup, Lookup]:
    """Return the red, green and blue table of an object.

    Raises
    ------
    MalformedObject
        One is missing, too short, or not as long as the others.
    """
    red, green, blue = (
        read_palette(header, number, signed=signed) for number in (1, 2, 3)
    )
    if len({len(one.entries) for one in (red, green, blue)}) > 1:
        raise MalformedObject("palettes of different lengths", RED_DESCRIPTOR)
    return red, green, blue


def through_palette(
    values: NDArray[np.generic], palette: tuple[Lookup, Lookup, Lookup]
) -> Rgb:
    """Return the colours of pixel values; those outside get the nearest entry."""
    index = values.astype(np.float64)
    planes = [(one(index) >> max(0, one.bits - 8)).astype(np.uint8) for one in palette]
    return np.stack(planes, axis=-1)


def palette_frame(header: Header, frame: Frame) -> Rgb:
    """Return the RGB of a PALETTE COLOR frame."""
    palette = palette_of(header, signed=frame.signed)
    if frame.is_float or frame.raw.dtype.itemsize > 2:
        raise Unsupported("palette colour of more than 16 bits")
    size = 1 << 8 * frame.raw.dtype.itemsize
    domain = frame.values(np.arange(size, dtype=frame.raw.dtype))
    return through_palette(domain, palette)[frame.raw]


def supplemented(header: Header, frame: Frame, grey: Grey) -> Rgb | None:
    """Return a grey frame with the colours of its supplemental palette, or None.

    Stored values from the first mapped one on have colours (PS3.3 C.7.6.19).
    """
    if header.code(PIXEL_PRESENTATION) not in {"COLOR", "MIXED"}:
        return None
    if RED_DESCRIPTOR not in header or frame.is_float:
        return None
    palette = palette_of(header, signed=frame.signed)
    values = frame.values(frame.raw)
    coloured = values >= palette[0].first
    if not coloured.any():
        return None
    rgb = np.repeat(grey[..., None], 3, axis=-1)
    rgb[coloured] = through_palette(values[coloured], palette)
    return rgb
