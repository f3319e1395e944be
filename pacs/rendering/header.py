"""The attributes that pictures are made of, straight from the bytes of a data set.

Read in a worker process, so that a header costs no more than its bytes: nothing is
converted before it is asked for, a value of the wrong form reads as absent, and of
the items of Per-Frame Functional Groups Sequence only that of the wanted frame is
read (PS3.3 C.7.6.16).
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterator
from math import isfinite
from typing import TYPE_CHECKING, Final

from pacs.imaging import syntaxes
from pacs.imaging.charset import Charset, decoder
from pacs.imaging.dicomjson import effective_vr
from pacs.imaging.encoding import (
    ELEMENT,
    ITEM,
    ITEM_START,
    ITEM_STOP,
    SEQUENCE,
    SEQUENCE_END,
    SEQUENCE_STOP,
    Buffer,
    Encoding,
    encoding_of,
    walk_dataset,
    walk_sequence,
)
from storage.kernel.errors import MalformedObject
from storage.kernel.limits import Limits

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SPECIFIC_CHARACTER_SET: Final = 0x00080005
SHARED_GROUPS: Final = 0x52009229
PER_FRAME_GROUPS: Final = 0x52009230
_LIMITS: Final = Limits()
_UNDEFINED: Final = b"\xff\xff\xff\xff"
#: Numeric VRs and the struct code of one value.
_CODES: Final = {
    b"US": "H", b"SS": "h", b"UL": "I", b"SL": "i", b"FL": "f", b"FD": "d",
    b"OW": "H", b"OB": "B", b"OF": "f", b"OD": "d", b"OL": "I",
}  # fmt: skip
#: Values of one element that are read as numbers; polylines are the longest.
MAX_NUMBERS: Final = 1_000_000


_Places = tuple[list[tuple[int, int]], int]
"""Begin and end of each item's content, and where the sequence ends."""

#: Objects whose items' places one process remembers, by digest.
MAX_PLACES: Final = 16
_PLACES: OrderedDict[bytes, _Places] = OrderedDict()


class Item:
    """One data set, or one item of a sequence.

    Attributes
    ----------
    outer : Item or None
        What it lies in: text is decoded by the nearest declared character set.
    """

    __slots__ = ("_charset", "_encoding", "_sequences", "_values", "_view", "outer")

    def __init__(
        self, encoding: Encoding, view: memoryview, outer: Item | None = None
    ) -> None:
        self.outer = outer
        self._view = view
        self._encoding = encoding
        #: VR, begin and end of each value.
        self._values: dict[int, tuple[bytes, int, int]] = {}
        self._sequences: dict[int, list[Item]] = {}
        self._charset: Charset | None = None

    def __contains__(self, tag: int) -> bool:
        return tag in self._values or tag in self._sequences

    def raw(self, tag: int) -> bytes:
        """Return a value's bytes; empty without."""
        found = self._values.get(tag)
        return bytes(self._view[found[1] : found[2]]) if found is not None else b""

    def items(self, tag: int) -> list[Item]:
        """Return the items of a sequence; none without."""
        return self._sequences.get(tag, [])

    def first(self, tag: int) -> Item | None:
        """Return the first item of a sequence."""
        found = self._sequences.get(tag)
        return found[0] if found else None

    def text(self, tag: int, vr: str = "LO") -> str:
        """Return a value as text, decoded, without padding."""
        return self.charset().decode(self.raw(tag), vr).strip(" \0")

    def texts(self, tag: int) -> list[str]:
        """Return the values of a code string or UID element."""
        text = self.raw(tag).decode("ascii", "replace").strip(" \0")
        return [part.strip(" \0") for part in text.split("\\")] if text else []

    def code(self, tag: int) -> str:
        """Return the first value of a code string or UID element."""
        return next(iter(self.texts(tag)), "")

    def numbers(self, tag: int) -> list[float]:
        """Return all values as finite numbers; none if one of them is not."""
        found = self._values.get(tag)
        if found is None:
            return []
        vr, raw = found[0], self.raw(tag)
        if vr in {b"", b"UN"}:
            vr = effective_vr(tag, vr, len(raw), signed=False)
        try:
            numbers = self._numbers(vr, raw)
        except (ValueError, struct.error):
            return []
        return numbers if all(map(isfinite, numbers)) else []

    def _numbers(self, vr: bytes, raw: bytes) -> list[float]:
        code = _CODES.get(vr)
        if code is None and vr not in {b"DS", b"IS"}:
            return []
        if code is None:
            text = raw.decode("ascii").strip(" \0")
            parts = text.split("\\", MAX_NUMBERS) if text else []
            return [float(part.strip(" \0")) for part in parts]
        n = len(raw) // struct.calcsize(code)
        if n > MAX_NUMBERS:
            raise MalformedObject("more numbers than anything has")
        mark = "<" if self._encoding.order == "little" else ">"
        return list(struct.unpack_from(f"{mark}{n}{code}", raw))

    def number(self, tag: int) -> float | None:
        """Return the first value as a number, or None."""
        return next(iter(self.numbers(tag)), None)

    def whole(self, tag: int, default: int = 0) -> int:
        """Return the first value as a whole number."""
        number = self.number(tag)
        return default if number is None else int(number)

    def words(self, tag: int) -> NDArray[np.uint16]:
        """Return a value as 16-bit words, whatever its VR says."""
        import numpy as np

        raw = self.raw(tag)
        order = "<" if self._encoding.order == "little" else ">"
        words = np.frombuffer(raw[: len(raw) // 2 * 2], f"{order}u2")
        return words.astype(np.uint16, copy=False)

    def bytes_in_order(self, tag: int) -> bytes:
        """Return a value of bytes; those in OW of big endian are swapped in pairs."""
        found = self._values.get(tag)
        if found is None:
            return b""
        if self._encoding.order == "little" or found[0] != b"OW":
            return self.raw(tag)
        return self.words(tag).astype("<u2").tobytes()

    def charset(self) -> Charset:
        """Return how text in here is decoded."""
        if self._charset is None:
            if SPECIFIC_CHARACTER_SET in self._values or self.outer is None:
                self._charset = decoder(self.raw(SPECIFIC_CHARACTER_SET))
            else:
                self._charset = self.outer.charset()
        return self._charset

    def _fill(self, start: int, end: int) -> tuple[int, int, Encoding] | None:
        """Read elements; stop at Per-Frame Functional Groups and return where it is.

        Of a repeated tag the first wins.
        """
        current, encoding = self, self._encoding
        values = self._values
        lists: list[list[Item]] = []
        for kind, tag, vr, begin, stop in walk_dataset(
            self._view, start, end, encoding, _LIMITS
        ):
            if kind == ELEMENT:
                if tag not in values:
                    values[tag] = (vr, begin, stop)
                continue
            if kind == SEQUENCE:
                if tag == PER_FRAME_GROUPS and current is self:
                    return begin, stop, _nested(encoding, vr)
                lists.append(current._sequences.setdefault(tag, []))
            elif kind == ITEM_START:
                inner = Item(encoding, self._view, current)
                lists[-1].append(inner)
                current = inner
            elif kind == ITEM_STOP:
                current = current.outer or self
            elif kind == SEQUENCE_STOP:
                lists.pop()
            values = current._values  # noqa: SLF001
        return None


class Header(Item):
    """The attributes of an object as far as one of its frames needs them.

    Attributes
    ----------
    groups : tuple of Item
        Functional groups that hold for the frame, the narrowest first.
    """

    __slots__ = ("groups",)

    def __init__(self, encoding: Encoding, view: memoryview) -> None:
        super().__init__(encoding, view)
        self.groups: tuple[Item, ...] = ()

    def places(self, macro: int) -> Iterator[Item]:
        """Yield where attributes of a macro may be: its functional groups, then here.

        Parameters
        ----------
        macro : int
            Sequence of the functional group that holds them (PS3.3 C.7.6.16.2).
        """
        for group in self.groups:
            found = group.first(macro)
            if found is not None:
                yield found
        yield self


def read_header(
    data: Buffer, transfer_syntax_uid: str, frame_index: int = 0, key: bytes = b""
) -> Header:
    """Return the attributes of a data set, or of its part before the pixels.

    Parameters
    ----------
    transfer_syntax_uid : str
        That the bytes are in; a deflated data set is inflated before.
    frame_index : int
        From 0: whose functional groups are wanted.
    key : bytes, optional
        Names the content: places of items are remembered under it.

    Raises
    ------
    MalformedObject, TooLarge
    """
    view = memoryview(data)
    encoding = encoding_of(syntaxes.get(transfer_syntax_uid))
    header = Header(encoding, view)
    place = header._fill(0, len(view))  # noqa: SLF001
    if place is not None:
        start, stop, inner = place
        item, end = _one_item(header, start, stop, inner, frame_index, key)
        header.groups = tuple(
            group for group in (item, header.first(SHARED_GROUPS)) if group is not None
        )
        header._fill(end, len(view))  # noqa: SLF001
    elif shared := header.first(SHARED_GROUPS):
        header.groups = (shared,)
    return header


def _nested(encoding: Encoding, vr: bytes) -> Encoding:
    # UN of undefined length holds an implicit VR sequence (PS3.5 6.2.2).
    return (
        encoding_of(syntaxes.get(syntaxes.IMPLICIT_VR_LE)) if vr == b"UN" else encoding
    )


def _one_item(
    header: Header, start: int, stop: int, encoding: Encoding, index: int, key: bytes
) -> tuple[Item | None, int]:
    """Return one item of a sequence, and where the element after it begins."""
    view = header._view  # noqa: SLF001
    known = _PLACES.get(key) if key else None
    if known is None:
        known = _jumped(view, start, stop, encoding)
        known = known or _walked(view, start, stop, encoding)
    if key:
        _PLACES[key] = known
        _PLACES.move_to_end(key)
        if len(_PLACES) > MAX_PLACES:
            _PLACES.popitem(last=False)
    bounds, end = known
    if index >= len(bounds):
        return None, end
    first, last = bounds[index]
    item = Item(encoding, view, header)
    item._fill(first, last)  # noqa: SLF001
    return item, end


def _jumped(
    view: memoryview, start: int, stop: int, encoding: Encoding
) -> _Places | None:
    """Find items from length to length; None when one has none."""
    bounds: list[tuple[int, int]] = []
    position = start
    while position + 8 <= stop:
        group, element, length = encoding.tag_length.unpack_from(view, position)
        tag = group << 16 | element
        position += 8
        if tag == SEQUENCE_END:
            break
        if tag != ITEM or position + length > stop:
            return None
        bounds.append((position, position + length))
        position += length
    return bounds, position


def _walked(view: memoryview, start: int, stop: int, encoding: Encoding) -> _Places:
    """Find items by reading all of them."""
    undefined = bytes(view[start - 4 : start]) == _UNDEFINED
    bounds: list[tuple[int, int]] = []
    begin = depth = 0
    position = start
    for kind, _, _, first, last in walk_sequence(
        view, start, stop, encoding, _LIMITS, tag=PER_FRAME_GROUPS, undefined=undefined
    ):
        if kind == SEQUENCE:
            depth += 1
        elif kind == SEQUENCE_STOP:
            depth -= 1
            position = first
        elif depth:
            continue
        elif kind == ITEM_START:
            begin = first
        elif kind == ITEM_STOP:
            # The delimiter behind an item of undefined length is no part of it.
            delimited = bytes(view[begin - 4 : begin]) == _UNDEFINED
            bounds.append((begin, last - 8 if delimited else last))
    return bounds, position
