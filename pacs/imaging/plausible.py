"""Attributes that cannot be what they should: kept as they are, with status B007.

The object is stored verbatim; the index leaves the column empty, and the answer
names the attribute (PS3.4 B.2.3, PS3.5 6.2).
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pacs.imaging.dataset import PixelElement, Scan

NUMBER_OF_FRAMES: Final = 0x00280008
ROWS: Final = 0x00280010
COLUMNS: Final = 0x00280011
BITS_ALLOCATED: Final = 0x00280100
SAMPLES_PER_PIXEL: Final = 0x00280002

_UNSIGNED_SHORTS = (SAMPLES_PER_PIXEL, ROWS, COLUMNS, BITS_ALLOCATED)

_DATE = re.compile(rb"(\d{4})\.?(0[1-9]|1[0-2])\.?(0[1-9]|[12]\d|3[01])[ \0]*\Z")
_TIME = re.compile(rb"([01]\d|2[0-3])(:?[0-5]\d(:?([0-5]\d|60)(\.\d{1,6})?)?)?[ \0]*\Z")
_DECIMAL = re.compile(rb" *[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})? *\Z")
_INTEGER = re.compile(rb" *[+-]?\d{1,10} *\0?\Z")

#: Decimal strings that place and scale pixels (PS3.3 C.7.6.2, C.11.1).
_DECIMALS = (0x00200032, 0x00200037, 0x00280030, 0x00281052, 0x00281053)
#: The values of a series repeat, so that what was found of one is remembered; of
#: longer ones nothing is, which would be a sender's way to our memory.
_REMEMBERED_BYTES = 256
#: PS3.5 6.2 allows 16 bytes; many write a double in full, which harms nobody.
_DECIMAL_BYTES = 32


def implausible(found: Scan) -> list[tuple[int, str]]:
    """Return (tag, reason) for what deserves a warning in a scanned object."""
    values = found.values
    warnings: list[tuple[int, str]] = []
    for tag in _UNSIGNED_SHORTS:
        raw = values.get(tag)
        if raw and len(raw) != 2:
            warnings.append((tag, "not a 16-bit number"))
    for tag, is_right, reason in _FORMS:
        raw = values.get(tag)
        if not raw or (len(raw) <= _REMEMBERED_BYTES and is_right(raw)):
            continue
        if raw.strip(b" \0"):
            warnings.append((tag, reason))
    for tag in _DECIMALS:
        raw = values.get(tag)
        if not raw:
            continue
        known = _are_decimals if len(raw) <= _REMEMBERED_BYTES else are_decimals
        if not known(raw):
            warnings.append((tag, "not decimal strings"))
    if found.pixel is not None:
        _check_pixels(found, found.pixel, warnings)
    return warnings


@lru_cache(maxsize=1024)
def _is_date(raw: bytes) -> bool:
    return is_calendar_day(raw)


@lru_cache(maxsize=1024)
def _is_time(raw: bytes) -> bool:
    return _TIME.match(raw) is not None


@lru_cache(maxsize=1024)
def _is_integer(raw: bytes) -> bool:
    return _INTEGER.match(raw) is not None


#: (tag, whether a value has its form, what is said of others).
_FORMS = (
    *(
        (tag, _is_date, "not a date")
        for tag in (0x00080020, 0x00080022, 0x00080023, 0x00100030, 0x00400244)
    ),
    *((tag, _is_time, "not a time") for tag in (0x00080030, 0x00080033, 0x00400245)),
    *((tag, _is_integer, "not an integer string") for tag in (0x00200011, 0x00200013)),
)


def is_calendar_day(raw: bytes) -> bool:
    """Tell whether a DA value of the right form is a day that exists."""
    match = _DATE.match(raw)
    if match is None:
        return False
    year, month, day = (int(part) for part in match.groups())
    if day <= 28:
        return True
    if month == 2:
        leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
        return day == 29 and leap
    return day <= 30 or month in {1, 3, 5, 7, 8, 10, 12}


def are_decimals(raw: bytes) -> bool:
    """Tell whether a DS value holds decimal strings, or nothing."""
    values = raw.rstrip(b" \0").split(b"\\")
    if not values[-1] and len(values) == 1:
        return True
    return all(
        len(value) <= _DECIMAL_BYTES and _DECIMAL.match(value) for value in values
    )


_are_decimals = lru_cache(maxsize=1024)(are_decimals)


def _check_pixels(
    found: Scan, pixel: PixelElement, warnings: list[tuple[int, str]]
) -> None:
    """Compare Pixel Data with the attributes that describe it (PS3.3 C.7.6.3)."""
    frames = 1
    raw = found.values.get(NUMBER_OF_FRAMES, b"").strip(b" \0")
    if raw:
        if not _INTEGER.match(raw) or int(raw) < 0:
            warnings.append((NUMBER_OF_FRAMES, "not a number of frames"))
            return
        frames = int(raw)
        if not frames:
            warnings.append((NUMBER_OF_FRAMES, "no frames declared, read as one"))
            frames = 1
    rows, columns = found.unsigned(ROWS), found.unsigned(COLUMNS)
    bits = found.unsigned(BITS_ALLOCATED)
    if rows is None or columns is None or bits is None:
        return
    impossible = [
        tag
        for tag, wrong in (
            (ROWS, not rows), (COLUMNS, not columns),
            (BITS_ALLOCATED, not 1 <= bits <= 64),
        )
        if wrong
    ]  # fmt: skip
    if impossible:
        warnings.extend((tag, "impossible image size") for tag in impossible)
        return
    if pixel.encapsulated:
        if not pixel.fragments:
            warnings.append((pixel.tag, "no frames in pixel data"))
        return
    samples = found.unsigned(SAMPLES_PER_PIXEL) or 1
    if found.values.get(0x00280004, b"").strip(b" \0") == b"YBR_FULL_422":
        samples = 2
    if (rows * columns * frames * bits * samples + 7) // 8 > pixel.length:
        warnings.append((pixel.tag, "shorter than its attributes imply"))
