"""How elements are laid out in bytes, and one walker over all of them (PS3.5 7).

Whoever reads more than top-level values uses `walk_dataset` or `walk_sequence`, so
that what is tolerated and what is refused has one place:

* unknown two-letter VRs: the long form when the reserved bytes are zero (PS3.5 7.1.2);
* delimiters with a non-zero length, which is ignored;
* an item delimiter at the end of an item of defined length;
* zero bytes after the last element;
* text where an implicit VR dictionary says SQ: it is left unread;
* UN of undefined length holds an Implicit VR Little Endian sequence (PS3.5 6.2.2).

Everything else that breaks the encoding is a `MalformedObject` that names the tag.
The walk keeps its own stack; lengths are checked against what encloses them before
they are used.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from pacs.imaging.dictionary import sequence_tags
from pacs.imaging.syntaxes import TransferSyntax
from storage.kernel.errors import MalformedObject, TooLarge
from storage.kernel.limits import Limits

Buffer = bytes | bytearray | memoryview

UNDEFINED: Final = 0xFFFFFFFF
ITEM: Final = 0xFFFEE000
ITEM_END: Final = 0xFFFEE00D
SEQUENCE_END: Final = 0xFFFEE0DD
PIXEL_DATA: Final = 0x7FE00010

#: VRs with a two-byte length (PS3.5 Table 7.1-2).
SHORT_VRS: Final = frozenset(
    b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split()
)
#: VRs with two reserved bytes and a four-byte length (PS3.5 Table 7.1-1).
LONG_VRS: Final = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())


@dataclass(frozen=True, slots=True)
class Encoding:
    """Header layout of one kind of data set."""

    explicit: bool
    order: Literal["little", "big"]
    head: struct.Struct
    tag_length: struct.Struct
    u32: struct.Struct


def _encoding(*, explicit: bool, order: Literal["little", "big"]) -> Encoding:
    mark = "<" if order == "little" else ">"
    return Encoding(
        explicit,
        order,
        struct.Struct(f"{mark}HH2sH"),
        struct.Struct(f"{mark}HHI"),
        struct.Struct(f"{mark}I"),
    )


EXPLICIT_LITTLE: Final = _encoding(explicit=True, order="little")
IMPLICIT_LITTLE: Final = _encoding(explicit=False, order="little")
EXPLICIT_BIG: Final = _encoding(explicit=True, order="big")


def encoding_of(syntax: TransferSyntax) -> Encoding:
    """Return how data sets of a transfer syntax are laid out, once inflated."""
    if not syntax.explicit:
        return IMPLICIT_LITTLE
    return EXPLICIT_LITTLE if syntax.little_endian else EXPLICIT_BIG


#: Kinds of events.
ELEMENT: Final = 0
FRAGMENTS: Final = 1
SEQUENCE: Final = 2
ITEM_START: Final = 3
ITEM_STOP: Final = 4
SEQUENCE_STOP: Final = 5

Event = tuple[int, int, bytes, int, int]
"""(kind, tag, VR, start, stop). The VR is empty in implicit VR.

`ELEMENT` and `FRAGMENTS`: where the value is; `FRAGMENTS` includes the delimiter.
`SEQUENCE` and `ITEM_START`: where the content begins, and its end or, when the
length is undefined, the end of what encloses it. `ITEM_STOP` and `SEQUENCE_STOP`:
where reading goes on, twice. The tag of item events is that of their sequence.
"""


def walk_dataset(
    buffer: Buffer, start: int, end: int, encoding: Encoding, limits: Limits
) -> Iterator[Event]:
    """Yield every element of a data set, nested ones between their brackets.

    Raises
    ------
    MalformedObject
        The bytes are no data set in this encoding, or nest too deep.
    TooLarge
        More than `elements`.
    """
    # The data set itself is an item without a header.
    return _walk(buffer, start, [(False, end, False, encoding, 0)], limits, 0)


def walk_sequence(
    buffer: Buffer,
    start: int,
    stop: int,
    encoding: Encoding,
    limits: Limits,
    *,
    tag: int,
    undefined: bool,
    counted: int = 0,
) -> Iterator[Event]:
    """Yield the items of a sequence whose value starts at `start`.

    Parameters
    ----------
    stop : int
        End of the value, or of what encloses it when its length is `undefined`.
    counted : int
        Elements of the object that were read before.
    """
    return _walk(
        buffer, start, [(True, stop, undefined, encoding, tag)], limits, counted
    )


def is_long_form(vr: bytes, reserved: int, tag: int) -> bool:
    """Tell whether a VR that is in neither table has the long form (PS3.5 7.1.2).

    Raises
    ------
    MalformedObject
        The two bytes are no VR: the data set is implicit, or broken.
    """
    if not (vr.isalpha() and vr.isupper()):
        raise MalformedObject("no value representation; is it implicit VR?", tag)
    return reserved == 0


def check_padding(buffer: Buffer, start: int, end: int) -> None:
    """Accept zero bytes behind the last element; looks at 64 KiB at a time.

    Raises
    ------
    MalformedObject
        Other bytes are left: too few for an element, or one of group 0000.
    """
    while start < end:
        stop = min(end, start + 65_536)
        if any(bytes(buffer[start:stop]).strip(b"\0")):
            raise MalformedObject("bytes behind the last element", 0x00000000)
        start = stop


def begins_with_item(buffer: Buffer, start: int, stop: int) -> bool:
    """Tell whether an implicit VR value really is a sequence, or empty."""
    return start == stop or (
        stop - start >= 8 and bytes(buffer[start : start + 4]) == b"\xfe\xff\0\xe0"
    )


@dataclass(frozen=True, slots=True)
class Fragments:
    """Encapsulated Pixel Data (PS3.5 A.4).

    Attributes
    ----------
    offset_table : tuple of int
        Offset and length of the Basic Offset Table's value.
    places : array of uint64
        Offset and length of each fragment's value, alternating.
    end : int
        First byte after the sequence delimiter.
    """

    offset_table: tuple[int, int]
    places: array[int]
    end: int


def read_fragments(
    buffer: Buffer, start: int, stop: int, encoding: Encoding, limits: Limits, tag: int
) -> Fragments:
    """Walk the items of encapsulated Pixel Data; touches only their headers."""
    read = encoding.tag_length.unpack_from
    position = start
    places = array("Q")
    table: tuple[int, int] | None = None
    allowed = 2 * limits.elements
    while True:
        if position + 8 > stop:
            raise MalformedObject("pixel data is cut off", tag)
        group, element, length = read(buffer, position)
        kind = group << 16 | element
        position += 8
        if kind == SEQUENCE_END:
            return Fragments(table or (start, 0), places, position)
        if kind != ITEM or length == UNDEFINED:
            raise MalformedObject("no item where a fragment belongs", tag)
        if position + length > stop:
            raise MalformedObject("a fragment is cut off", tag)
        if table is None:
            table = (position, length)
        else:
            places.extend((position, length))
            if len(places) > allowed:
                raise TooLarge("elements", limits.elements)
        position += length


_Frame = tuple[bool, int, bool, Encoding, int]
"""What is open: (is a sequence, stop, of undefined length, encoding, its tag)."""


def _walk(
    buffer: Buffer, position: int, stack: list[_Frame], limits: Limits, count: int
) -> Iterator[Event]:
    depth = len(stack) if stack[0][0] else 0
    max_elements, max_depth = limits.elements, limits.sequence_depth
    known_sequences: frozenset[int] | None = None
    while stack:
        is_sequence, stop, undefined, encoding, owner = stack[-1]
        if position >= stop and not undefined:
            stack.pop()
            if is_sequence:
                depth -= 1
                yield SEQUENCE_STOP, owner, b"", position, position
            elif stack:
                yield ITEM_STOP, owner, b"", position, position
            continue
        if position + 8 > stop:
            if len(stack) == 1 and not is_sequence:
                check_padding(buffer, position, stop)
                return
            raise MalformedObject("cut off in an element header", owner)
        if is_sequence:
            group, element, length = encoding.tag_length.unpack_from(buffer, position)
            tag = group << 16 | element
            position += 8
            if tag == SEQUENCE_END and undefined:
                stack.pop()
                depth -= 1
                yield SEQUENCE_STOP, owner, b"", position, position
                continue
            if tag != ITEM:
                raise MalformedObject("no item where one belongs", owner)
            count += 1
            if count > max_elements:
                raise TooLarge("elements", max_elements)
            inner = stop if length == UNDEFINED else position + length
            if inner > stop:
                raise MalformedObject("an item is longer than its sequence", owner)
            stack.append((False, inner, length == UNDEFINED, encoding, owner))
            yield ITEM_START, owner, b"", position, inner
            continue
        vr = b""
        if encoding.explicit:
            group, element, vr, length = encoding.head.unpack_from(buffer, position)
            tag = group << 16 | element
            value = position + 8
            if vr not in SHORT_VRS and group != 0xFFFE:
                if tag == 0 and len(stack) == 1:
                    check_padding(buffer, position, stop)
                    return
                if vr in LONG_VRS or is_long_form(vr, length, tag):
                    if position + 12 > stop:
                        raise MalformedObject("cut off in an element header", tag)
                    length = encoding.u32.unpack_from(buffer, position + 8)[0]
                    value = position + 12
        else:
            group, element, length = encoding.tag_length.unpack_from(buffer, position)
            tag = group << 16 | element
            value = position + 8
            if tag == 0 and len(stack) == 1:
                check_padding(buffer, position, stop)
                return
        if group == 0xFFFE:
            if tag != ITEM_END or len(stack) == 1:
                raise MalformedObject("a delimiter is misplaced", owner or tag)
            position += 8
            if undefined:
                stack.pop()
                yield ITEM_STOP, owner, b"", position, position
            continue
        count += 1
        if count > max_elements:
            raise TooLarge("elements", max_elements)
        if length == UNDEFINED:
            if tag == PIXEL_DATA:
                found = read_fragments(buffer, value, stop, encoding, limits, tag)
                count += len(found.places) // 2
                position = found.end
                yield FRAGMENTS, tag, vr, value, position
                continue
            if encoding.explicit and vr not in {b"SQ", b"UN"}:
                raise MalformedObject("undefined length is not allowed", tag)
            inner, nested = stop, IMPLICIT_LITTLE if vr == b"UN" else encoding
        else:
            inner = value + length
            if inner > stop:
                raise MalformedObject("longer than what encloses it", tag)
            if vr != b"SQ":
                if known_sequences is None and not encoding.explicit:
                    known_sequences = sequence_tags()
                if (
                    encoding.explicit
                    or known_sequences is None
                    or tag not in known_sequences
                    or not begins_with_item(buffer, value, inner)
                ):
                    position = inner
                    yield ELEMENT, tag, vr, value, inner
                    continue
            nested = encoding
        depth += 1
        if depth > max_depth:
            raise MalformedObject(f"sequences nested deeper than {max_depth}", tag)
        stack.append((True, inner, length == UNDEFINED, nested, tag))
        position = value
        yield SEQUENCE, tag, vr, value, inner
