"""Pictures as files: JPEG, PNG, JPEG 2000, animated GIF, and their colour profiles."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

from PIL import Image, ImageCms

from pacs.rendering.header import Header
from pacs.rendering.parameters import JP2, JPEG, PNG

ICC_PROFILE: Final = 0x00282000
OPTICAL_PATH: Final = 0x00480105
#: A larger profile is none.
MAX_PROFILE: Final = 4 << 20
#: JPEG from this quality on keeps all of the colour.
FULL_COLOUR: Final = 90

_FORMATS: Final[dict[str, str]] = {JPEG: "JPEG", PNG: "PNG", JP2: "JPEG2000"}


def encode(
    picture: Image.Image, media_type: str, quality: int, profile: bytes = b""
) -> bytes:
    """Return a picture as a file.

    Parameters
    ----------
    quality : int
        1 to 100, of JPEG only.
    profile : bytes
        ICC profile to embed, if any.
    """
    options: dict[str, Any] = {"icc_profile": profile} if profile else {}
    if media_type == JPEG:
        options["quality"] = quality
        if picture.mode == "RGB" and quality >= FULL_COLOUR:
            options["subsampling"] = 0
    elif media_type == PNG:
        options["compress_level"] = 3
    elif media_type == JP2:
        options["irreversible"] = False
    out = io.BytesIO()
    picture.save(out, _FORMATS[media_type], **options)
    return out.getvalue()


def encode_animation(pictures: Sequence[Image.Image], milliseconds: int) -> bytes:
    """Return pictures as one GIF that repeats for ever."""
    out = io.BytesIO()
    first, *others = pictures
    first.save(
        out,
        "GIF",
        save_all=True,
        append_images=others,
        duration=milliseconds,
        loop=0,
    )
    return out.getvalue()


def declared_profile(header: Header) -> bytes:
    """Return the ICC profile of an image, from its optical path too; empty without."""
    for place in (header, header.first(OPTICAL_PATH)):
        if place is not None and ICC_PROFILE in place:
            raw = place.raw(ICC_PROFILE)
            return raw if 128 < len(raw) <= MAX_PROFILE else b""
    return b""


def with_profile(
    picture: Image.Image, header: Header, wanted: str
) -> tuple[Image.Image, bytes]:
    """Return a picture in the wanted colour space, and the profile to embed.

    Parameters
    ----------
    wanted : str
        ``no``: none; ``yes``: the image's own, else sRGB; or ``srgb``, ``adobergb``,
        ``rommrgb`` (PS3.18 8.3.5.1.5). Grey has none.
    """
    if wanted == "no" or picture.mode != "RGB":
        return picture, b""
    own = declared_profile(header)
    if wanted == "yes":
        return picture, own or _profile("srgb")
    target = _profile(wanted)
    try:
        converted = _converted(picture, own or _profile("srgb"), target)
    except ImageCms.PyCMSError:
        # Tolerates: a profile that is none; most cameras mean sRGB.
        converted = _converted(picture, _profile("srgb"), target)
    return converted, target


def _converted(picture: Image.Image, source: bytes, target: bytes) -> Image.Image:
    found = ImageCms.profileToProfile(
        picture,
        io.BytesIO(source),
        io.BytesIO(target),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
    )
    return found or picture


@cache
def _profile(name: str) -> bytes:
    if name == "srgb":
        return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return _matrix_profile(*_SPACES[name])


_Matrix = tuple[tuple[float, float, float], ...]
#: Name, red, green and blue (XYZ under D50), gamma (Adobe RGB (1998) 4.3, ISO 22028-2).
_SPACES: Final[dict[str, tuple[str, _Matrix, float]]] = {
    "adobergb": (
        "Adobe RGB (1998) compatible",
        (
            (0.60974, 0.31111, 0.01947),
            (0.20528, 0.62567, 0.06087),
            (0.14919, 0.06322, 0.74457),
        ),
        563 / 256,
    ),
    "rommrgb": (
        "ROMM RGB",
        ((0.79767, 0.28804, 0.0), (0.13519, 0.71188, 0.0), (0.03134, 0.00008, 0.82491)),
        1.8,
    ),
}
_D50: Final = (0.9642, 1.0, 0.8249)


def _matrix_profile(name: str, colours: _Matrix, gamma: float) -> bytes:
    """Return a display profile of three colours and one gamma (ICC.1:2001-04)."""
    text = name.encode("ascii") + b"\0"
    curve = b"curv" + struct.pack(">III", 0, 1, round(gamma * 256) << 16)
    description = (
        b"desc" + struct.pack(">II", 0, len(text)) + text + bytes(4 + 4 + 2 + 1 + 67)
    )
    tags = {
        b"desc": description,
        b"cprt": b"text" + bytes(4) + b"public domain\0",
        b"wtpt": _xyz(_D50),
        **dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(_xyz, colours), strict=True)),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    }
    table, data = struct.pack(">I", len(tags)), b""
    begin = 128 + 4 + 12 * len(tags)
    for tag, value in tags.items():
        table += tag + struct.pack(">II", begin + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    size = begin + len(data)
    head = struct.pack(">I4sI", size, b"lcms", 0x02400000) + b"mntrRGB XYZ "
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp"
    head += bytes(28) + _xyz(_D50)[8:20]
    return head + bytes(128 - len(head)) + table + data


def _xyz(values: tuple[float, ...]) -> bytes:
    fixed = struct.pack(">3i", *(round(value * 65_536) for value in values))
    return b"XYZ " + bytes(4) + fixed
