"""Lookup tables, plain and segmented (PS3.3 C.11.1, C.7.6.3.1.5, C.7.9.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pacs.rendering.header import Item
from storage.kernel.errors import MalformedObject

LUT_DESCRIPTOR: Final = 0x00283002
LUT_DATA: Final = 0x00283006
#: Segments of a segmented table; each indirect one may copy many.
MAX_SEGMENTS: Final = 65_536
#: How deep indirect segments may lead: they copy others, never an indirect one.
_DISCRETE, _LINEAR, _INDIRECT = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Lookup:
    """A lookup table.

    Attributes
    ----------
    first : int
        The input that is mapped to the first entry; what is outside is clamped.
    bits : int
        Of an entry.
    entries : array of uint16, shape (n,)
    """

    first: int
    bits: int
    entries: NDArray[np.uint16]

    def __call__(self, values: NDArray[np.floating]) -> NDArray[np.uint16]:
        """Return the entry for each input, by the nearest whole number."""
        index = np.rint(values) - self.first
        clamped = np.clip(index, 0, len(self.entries) - 1).astype(np.intp)
        found: NDArray[np.uint16] = self.entries[clamped]
        return found

    @property
    def maximum(self) -> int:
        """The largest entry that `bits` allow."""
        return (1 << self.bits) - 1


def read_lut(item: Item, *, signed: bool) -> Lookup:
    """Return the table of an item of a LUT sequence.

    Parameters
    ----------
    signed : bool
        What goes in can be negative: so can the first input (PS3.3 C.11.1.1).

    Raises
    ------
    MalformedObject
        The descriptor is wrong, or the data are too short for it.
    """
    entries, first, bits = descriptor(item, LUT_DESCRIPTOR, signed=signed)
    return Lookup(first, bits, _data(item, LUT_DATA, entries, bits))


def descriptor(item: Item, tag: int, *, signed: bool) -> tuple[int, int, int]:
    """Return entries, first input and bits per entry of a descriptor.

    Raises
    ------
    MalformedObject
    """
    words = item.words(tag)
    if len(words) < 3:
        raise MalformedObject("no lookup table descriptor", tag)
    entries, first, bits = (int(word) for word in words[:3])
    # PS3.3 C.11.1.1.1: 65,536 does not fit into the word.
    entries = entries or 65_536
    if signed and first > 0x7FFF:
        first -= 0x10000
    if not 1 <= bits <= 16:
        raise MalformedObject("impossible bits of a lookup table", tag)
    return entries, first, bits


def _data(item: Item, tag: int, entries: int, bits: int) -> NDArray[np.uint16]:
    """Return the entries, from words or from bytes.

    Tolerates: an entry per byte where it fits, whatever the VR.
    """
    raw = item.bytes_in_order(tag)
    if bits <= 8 and entries <= len(raw) < 2 * entries:
        return np.frombuffer(raw, np.uint8)[:entries].astype(np.uint16)
    words = item.words(tag)
    if len(words) < entries:
        raise MalformedObject("a lookup table is shorter than its descriptor", tag)
    return words[:entries]


def read_palette(item: Item, number: int, *, signed: bool) -> Lookup:
    """Return the table of one colour, plain or segmented (PS3.3 C.7.6.3.1.5).

    Tolerates: entries of 8 bits under a descriptor of 16, by their values.

    Parameters
    ----------
    number : int
        1 red, 2 green, 3 blue.

    Raises
    ------
    MalformedObject
    """
    at = 0x00281100 + number
    plain, segmented = 0x00281200 + number, 0x00281220 + number
    entries, first, bits = descriptor(item, at, signed=signed)
    if plain in item:
        data = _data(item, plain, entries, bits)
    elif segmented in item:
        parts = _segments(item, segmented, bits)
        data = expand(parts, entries, wide=bits > 8, tag=segmented)
    else:
        raise MalformedObject("no palette colour data", plain)
    if bits == 16 and len(data) and int(data.max()) <= 0xFF:
        bits = 8
    return Lookup(first, bits, data)


def _segments(item: Item, tag: int, bits: int) -> list[int]:
    if bits <= 8:
        raw = item.bytes_in_order(tag)
        return list(raw)
    return [int(word) for word in item.words(tag)]


def expand(
    segments: list[int], entries: int, *, wide: bool, tag: int = 0
) -> NDArray[np.uint16]:
    """Expand a segmented palette (PS3.3 C.7.9.2).

    Parameters
    ----------
    segments : list of int
        Bytes or words as stored.
    entries : int
        What comes out; more is malformed.
    wide : bool
        Whether they are words.

    Raises
    ------
    MalformedObject
    """
    out: list[int] = []
    starts: list[int] = []
    position = 0
    while position < len(segments):
        # A padding byte at the end is no segment.
        if len(out) == entries and position == len(segments) - 1:
            break
        starts.append(position)
        if len(starts) > MAX_SEGMENTS:
            raise MalformedObject("too many segments of a palette", tag)
        position = _segment(segments, position, out, entries, tag, wide=wide)
    if len(out) != entries:
        raise MalformedObject("a segmented palette of another length", tag)
    return np.array(out, np.uint16)


def _segment(
    segments: list[int],
    position: int,
    out: list[int],
    entries: int,
    tag: int,
    *,
    wide: bool,
    inside: bool = False,
) -> int:
    """Expand the segment at `position`; return where the next one begins."""
    try:
        opcode, length = segments[position], segments[position + 1]
        position += 2
        if opcode == _DISCRETE:
            if position + length > len(segments):
                raise MalformedObject("a palette segment is cut off", tag)
            out += segments[position : position + length]
            position += length
        elif opcode == _LINEAR:
            if not out:
                raise MalformedObject("a palette begins with a linear segment", tag)
            start, end = out[-1], segments[position]
            out += [
                start + round((end - start) * i / length) for i in range(1, length + 1)
            ]
            position += 1
        elif opcode == _INDIRECT and not inside:
            # Offset in bytes: two words, or four bytes, least significant first.
            position = _indirect(
                segments, position, length, out, entries, tag, wide=wide
            )
        else:
            raise MalformedObject("an unknown palette segment", tag)
    except IndexError:
        raise MalformedObject("a palette segment is cut off", tag) from None
    if len(out) > entries:
        raise MalformedObject("a segmented palette longer than its descriptor", tag)
    return position


def _indirect(
    segments: list[int],
    position: int,
    length: int,
    out: list[int],
    entries: int,
    tag: int,
    *,
    wide: bool,
) -> int:
    low, high = segments[position], segments[position + 1]
    if wide:
        offset, position = low | high << 16, position + 2
    else:
        low |= high << 8
        high = segments[position + 2] | segments[position + 3] << 8
        offset, position = low | high << 16, position + 4
    at = offset // 2 if wide else offset
    for _ in range(length):
        at = _segment(segments, at, out, entries, tag, wide=wide, inside=True)
    return position
