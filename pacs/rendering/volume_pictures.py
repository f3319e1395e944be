"""Pictures of volumes as files: PNG, JPEG, WebP."""

from __future__ import annotations

from typing import Final, Literal

import imagecodecs
import numpy as np
from numpy.typing import NDArray

Format = Literal["png", "jpeg", "webp"]

MEDIA_TYPES: Final[dict[str, str]] = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "int16": "application/octet-stream",
}


def encode_grey(pixels: NDArray[np.uint8], form: Format, quality: int) -> bytes:
    """Return a grey picture, shape (rows, columns), as a file."""
    if form == "webp":
        # WebP knows colour only.
        return encode_colour(np.repeat(pixels[:, :, None], 3, axis=2), form, quality)
    if form == "jpeg":
        return bytes(imagecodecs.jpeg8_encode(pixels, level=quality))
    return bytes(imagecodecs.png_encode(pixels, level=3))


def encode_colour(pixels: NDArray[np.uint8], form: Format, quality: int) -> bytes:
    """Return a picture in RGB, shape (rows, columns, 3), as a file."""
    if form == "jpeg":
        return bytes(imagecodecs.jpeg8_encode(pixels, level=quality))
    if form == "webp":
        return bytes(imagecodecs.webp_encode(pixels, level=quality))
    return bytes(imagecodecs.png_encode(pixels, level=3))
