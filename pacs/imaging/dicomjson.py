"""The DICOM JSON model straight from bytes (PS3.18 Annex F).

One pass of the walker, one list of text fragments, no objects in between: this
builds the metadata of every instance of a series.

Decisions where the standard leaves room, or data breaks its rules:

* DS and IS become JSON numbers when their text is a decimal number of at most 16
  significant digits, with all its digits; anything else stays a string (F.2.3).
* SV and UV beyond 2**53 are strings, so that no reader rounds them.
* NaN and infinities of FL and FD are the strings "NaN", "Infinity", "-Infinity".
* A value whose length does not fit its VR is given as UN with its bytes.
* Text above 64 KiB and binary values above `inline_limit` are BulkDataURI; Pixel
  Data always is.
* UN of a standard tag that is no sequence is read by its dictionary VR (PS3.5 6.2.2).
* Group lengths and groups below 0004 are left out; of a repeated tag the first wins.
* Specific Character Set is ISO_IR 192 when one was declared (F.1).
"""

from __future__ import annotations

import re
import struct
from array import array
from base64 import b64encode
from collections.abc import Callable
from json.encoder import encode_basestring
from math import isfinite
from typing import Final

from pacs.imaging import syntaxes
from pacs.imaging.charset import Charset, decoder
from pacs.imaging.dictionary import OB_OR_OW, US_OR_OW, US_OR_SS, vr_of
from pacs.imaging.encoding import (
    ELEMENT,
    FRAGMENTS,
    ITEM_START,
    ITEM_STOP,
    LONG_VRS,
    PIXEL_DATA,
    SEQUENCE,
    SEQUENCE_STOP,
    SHORT_VRS,
    Buffer,
    Encoding,
    encoding_of,
    read_fragments,
    walk_dataset,
)
from storage.kernel.errors import InvalidParameter, NotFound
from storage.kernel.limits import KIB, Limits

#: Binary values up to this many bytes are written into the JSON.
INLINE_LIMIT: Final = 1 * KIB
#: Text and numbers up to this many bytes are.
TEXT_LIMIT: Final = 64 * KIB

SPECIFIC_CHARACTER_SET: Final = 0x00080005
PIXEL_REPRESENTATION: Final = 0x00280103
_PIXEL_TAGS = frozenset((PIXEL_DATA, 0x7FE00008, 0x7FE00009))
_DEFAULTS = Limits()

#: Binary VRs and the size of what is swapped between byte orders (PS3.5 7.3).
_BINARY = {
    b"OB": 1, b"OD": 8, b"OF": 4, b"OL": 4, b"OV": 8, b"OW": 2, b"UN": 1,
}  # fmt: skip
#: Numeric VRs: the struct code of one value.
_NUMBERS = {
    b"FD": "d", b"FL": "f", b"SL": "i", b"SS": "h", b"SV": "q",
    b"UL": "I", b"US": "H", b"UV": "Q",
}  # fmt: skip
_SIZES = {vr: struct.calcsize(f"={code}") for vr, code in _NUMBERS.items()}
_KNOWN = SHORT_VRS | LONG_VRS
#: VRs with one value, in which a backslash is a character (PS3.5 6.2).
_SINGLE_TEXT = frozenset((b"LT", b"ST", b"UT", b"UR"))
_NUMBER_TEXT = frozenset((b"DS", b"IS"))

#: A number that JSON can take over as it is.
_PLAIN = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?\Z")
_DECIMAL = re.compile(r"([+-]?)([0-9]*)(?:\.([0-9]*))?(?:[eE]([+-]?[0-9]{1,3}))?\Z")
_INTEGER = re.compile(r"[+-]?[0-9]{1,15}\Z")
_PATH = re.compile(r"[0-9A-Fa-f]{8}(?:/[1-9][0-9]{0,8}/[0-9A-Fa-f]{8})*\Z")


def instance_json(
    buffer: Buffer,
    start: int,
    end: int,
    transfer_syntax_uid: str,
    *,
    bulkdata_prefix: str,
    inline_limit: int = INLINE_LIMIT,
    limits: Limits = _DEFAULTS,
) -> bytes:
    """Return a data set as one JSON object in UTF-8.

    Parameters
    ----------
    buffer : bytes-like
        ``buffer[start:end]`` is the data set, inflated if it was deflated.
    bulkdata_prefix : str
        What comes before ``/<path>`` in a BulkDataURI; the path is that of
        `value_at`.

    Raises
    ------
    MalformedObject, TooLarge
        The bytes are no data set in this transfer syntax.
    """
    encoding = encoding_of(syntaxes.get(transfer_syntax_uid))
    writer = _Writer(buffer, bulkdata_prefix, inline_limit)
    pieces, path = writer.pieces, writer.path
    scope = _Scope(decoder(b""), encoding.order)
    outer: list[_Scope] = []
    for kind, tag, vr, begin, stop in walk_dataset(
        buffer, start, end, encoding, limits
    ):
        if kind == ELEMENT:
            if scope.admits(tag):
                writer.element(scope, tag, vr, begin, stop)
        elif kind == SEQUENCE:
            outer.append(scope)
            silent = not scope.admits(tag)
            if not silent:
                pieces.append(f'{scope.comma()}"{tag:08X}":{{"vr":"SQ"')
            scope = scope.inner(silent=silent)
            if vr == b"UN":
                scope.order = "little"
            path.append(f"{tag:08X}")
        elif kind == ITEM_START:
            scope.items += 1
            if not scope.silent:
                pieces.append(",{" if scope.items > 1 else ',"Value":[{')
            path.append(str(scope.items))
            outer.append(scope)
            scope = scope.inner(silent=scope.silent)
        elif kind == FRAGMENTS:
            if scope.admits(tag):
                writer.bulk(scope, tag, b"OB")
        else:
            closed, scope = scope, outer.pop()
            path.pop()
            if closed.silent:
                continue
            if kind == ITEM_STOP:
                pieces.append("}")
            else:
                pieces.append("]}" if closed.items else "}")
    return ("{" + "".join(pieces) + "}").encode()


class _Scope:
    """What holds inside one data set, sequence or item.

    Attributes
    ----------
    charset : Charset
        An item without Specific Character Set has that of what encloses it.
    signed : bool
        Pixel Representation (0028,0103), which decides between US and SS.
    silent : bool
        Inside something that is left out.
    items : int
        Of a sequence, so far.
    """

    __slots__ = ("charset", "items", "order", "seen", "signed", "silent")

    def __init__(
        self,
        charset: Charset,
        order: str,
        *,
        signed: bool = False,
        silent: bool = False,
    ) -> None:
        self.charset = charset
        self.order = order
        self.signed = signed
        self.silent = silent
        self.items = 0
        self.seen: set[int] = set()

    def inner(self, *, silent: bool) -> _Scope:
        return _Scope(self.charset, self.order, signed=self.signed, silent=silent)

    def comma(self) -> str:
        """Return what separates the member of the tag just admitted."""
        return "," if len(self.seen) > 1 else ""

    def admits(self, tag: int) -> bool:
        """Tell whether an element is written: not a group length, not a repetition."""
        if self.silent or tag < 0x00040000 or not tag & 0xFFFF or tag in self.seen:
            return False
        self.seen.add(tag)
        return True


class _Writer:
    """Appends members of a JSON object to a list of text."""

    def __init__(self, buffer: Buffer, prefix: str, inline_limit: int) -> None:
        self.pieces: list[str] = []
        self.path: list[str] = []
        self._buffer = buffer
        self._prefix = encode_basestring(prefix)[:-1]
        self._inline_limit = inline_limit

    def element(
        self, scope: _Scope, tag: int, vr: bytes, begin: int, stop: int
    ) -> None:
        """Write one element that is no sequence."""
        length = stop - begin
        if vr not in _KNOWN or vr == b"UN":
            vr = effective_vr(tag, vr, length, signed=scope.signed)
        if vr in _BINARY:
            if tag in _PIXEL_TAGS and length:
                self.bulk(scope, tag, vr)
            else:
                self._binary(scope, tag, vr, begin, stop)
            return
        if length > TEXT_LIMIT:
            self.bulk(scope, tag, vr)
            return
        raw = bytes(self._buffer[begin:stop])
        if vr in _NUMBERS:
            size = _SIZES[vr]
            if length % size:
                self._binary(scope, tag, b"UN", begin, stop)
                return
            value = _numbers(raw, vr, scope.order)
            if tag == PIXEL_REPRESENTATION:
                scope.signed = value == "1"
        elif vr == b"AT":
            if length % 4:
                self._binary(scope, tag, b"UN", begin, stop)
                return
            value = _tags(raw, scope.order)
        else:
            if tag == SPECIFIC_CHARACTER_SET:
                scope.charset = decoder(raw)
                if not scope.charset.is_default:
                    raw = b"ISO_IR 192"
            text = scope.charset.decode(raw, vr.decode())
            if vr == b"PN":
                value = _names(text)
            elif vr in _SINGLE_TEXT:
                text = text.rstrip(" \0")
                value = encode_basestring(text) if text else ""
            else:
                value = _texts(text, vr)
        name = f'{scope.comma()}"{tag:08X}":{{"vr":"{vr.decode()}"'
        self.pieces.append(f'{name},"Value":[{value}]}}' if value else name + "}")

    def bulk(self, scope: _Scope, tag: int, vr: bytes) -> None:
        """Write an element by reference."""
        path = "/".join((*self.path, f"{tag:08X}"))
        self.pieces.append(
            f'{scope.comma()}"{tag:08X}":{{"vr":"{vr.decode()}",'
            f'"BulkDataURI":{self._prefix}/{path}"}}'
        )

    def _binary(
        self, scope: _Scope, tag: int, vr: bytes, begin: int, stop: int
    ) -> None:
        if stop - begin > self._inline_limit:
            self.bulk(scope, tag, vr)
            return
        name = f'{scope.comma()}"{tag:08X}":{{"vr":"{vr.decode()}"'
        if begin == stop:
            self.pieces.append(name + "}")
            return
        raw = little_endian(bytes(self._buffer[begin:stop]), vr, scope.order)
        self.pieces.append(f'{name},"InlineBinary":"{b64encode(raw).decode()}"}}')


def effective_vr(tag: int, vr: bytes, length: int, *, signed: bool) -> bytes:
    """Return the VR of an element that has none, UN, or one that is unknown.

    The choices of the dictionary follow PS3.5 A.1: by Pixel Representation, and OW
    for what may be bytes or words in implicit VR.
    """
    known = vr_of(tag)
    if known == US_OR_SS:
        return b"SS" if signed else b"US"
    if known == US_OR_OW:
        return b"US" if length <= 2 else b"OW"
    if known == OB_OR_OW:
        return b"OW"
    if vr and known == b"SQ":
        return b"UN"
    # Implicit VR text where the dictionary has a sequence: the walker left it unread.
    return b"UN" if known == b"SQ" else known


def little_endian(raw: Buffer, vr: bytes, order: str) -> Buffer:
    """Return a value in little endian, swapped by the unit of its VR (PS3.5 7.3).

    A trailing part of a unit stays as it is.
    """
    size = _BINARY.get(vr) or _SIZES.get(vr) or (2 if vr == b"AT" else 1)
    if order == "little" or size == 1:
        return raw
    whole = len(raw) - len(raw) % size
    units = array(_UNITS[size], bytes(raw[:whole]))
    units.byteswap()
    return units.tobytes() + bytes(raw[whole:])


_UNITS = {2: "H", 4: "I", 8: "Q"}


def _numbers(raw: bytes, vr: bytes, order: str) -> str:
    code = _NUMBERS[vr]
    mark = "<" if order == "little" else ">"
    values = struct.unpack(f"{mark}{len(raw) // _SIZES[vr]}{code}", raw)
    if code in "fd":
        return ",".join(
            repr(v) if isfinite(v) else _NOT_FINITE[repr(v)] for v in values
        )
    if code in "qQ":
        return ",".join(str(v) if abs(v) <= 2**53 else f'"{v}"' for v in values)
    return ",".join(map(str, values))


_NOT_FINITE = {"nan": '"NaN"', "inf": '"Infinity"', "-inf": '"-Infinity"'}


def _tags(raw: bytes, order: str) -> str:
    mark = "<" if order == "little" else ">"
    words = struct.unpack(f"{mark}{len(raw) // 2}H", raw)
    return ",".join(
        f'"{group:04X}{element:04X}"'
        for group, element in zip(words[::2], words[1::2], strict=True)
    )


def _names(text: str) -> str:
    """Return person names as objects of component groups (F.2.2)."""
    text = text.rstrip(" \0")
    if not text:
        return ""
    names = []
    for name in text.split("\\"):
        groups = [
            f'"{label}":{encode_basestring(group)}'
            for label, raw in zip(_GROUPS, name.split("="), strict=False)
            if (group := raw.strip(" \0"))
        ]
        names.append("{" + ",".join(groups) + "}" if groups else "null")
    return ",".join(names)


_GROUPS = ("Alphabetic", "Ideographic", "Phonetic")


def _texts(text: str, vr: bytes) -> str:
    if vr in _NUMBER_TEXT:
        write: Callable[[str], str] = _decimal if vr == b"DS" else _integer
    else:
        write = encode_basestring
    if "\\" not in text:
        text = text.strip(" \0")
        return write(text) if text else ""
    values = [value.strip(" \0") for value in text.split("\\")]
    return ",".join(write(value) if value else "null" for value in values)


def _decimal(text: str) -> str:
    """Return a DS value as a JSON number, or as a string when that changed it."""
    if len(text) <= 16 and _PLAIN.match(text):
        return text
    match = _DECIMAL.match(text)
    if match is None or not (match[2] or match[3]):
        return encode_basestring(text)
    sign, whole, fraction, exponent = match.groups("")
    significant = (whole + fraction).strip("0")
    magnitude = abs(float(text))
    if len(significant) > 16 or not isfinite(magnitude):
        return encode_basestring(text)
    if significant and magnitude < _SMALLEST:
        return encode_basestring(text)
    number = ("-" if sign == "-" else "") + (whole.lstrip("0") or "0")
    if fraction:
        number += "." + fraction
    return number + ("e" + exponent if exponent else "")


#: Below this a binary number loses digits.
_SMALLEST = 2.3e-308


def _integer(text: str) -> str:
    """Return an IS value as a JSON number, or as a string when it is none."""
    return str(int(text)) if _INTEGER.match(text) else encode_basestring(text)


def value_at(
    buffer: Buffer,
    start: int,
    end: int,
    transfer_syntax_uid: str,
    path: str,
    *,
    limits: Limits = _DEFAULTS,
) -> tuple[str, Buffer]:
    """Return VR and value, in little endian, of the element at `path`.

    Parameters
    ----------
    path : str
        ``<tag>`` or ``<tag>/<item>/<tag>`` …; tags as eight hexadecimal digits,
        items from 1.

    Raises
    ------
    InvalidParameter
        `path` is none.
    NotFound
        No such element, it has no bytes, or it is encapsulated Pixel Data of more
        than one frame, which is retrieved frame by frame.
    MalformedObject, TooLarge
    """
    if not _PATH.match(path):
        raise InvalidParameter("path", "not a path of tags and items")
    wanted = [
        int(part, 16) if i % 2 == 0 else int(part)
        for i, part in enumerate(path.split("/"))
    ]
    encoding = encoding_of(syntaxes.get(transfer_syntax_uid))
    scope = _Scope(decoder(b""), encoding.order)
    place: list[int] = []
    items: list[int] = []
    orders = [encoding.order]
    for kind, tag, vr, begin, stop in walk_dataset(
        buffer, start, end, encoding, limits
    ):
        if kind == SEQUENCE:
            place.append(tag)
            items.append(0)
            orders.append("little" if vr == b"UN" else orders[-1])
        elif kind == ITEM_START:
            items[-1] += 1
            place.append(items[-1])
        elif kind == ITEM_STOP:
            place.pop()
        elif kind == SEQUENCE_STOP:
            place.pop()
            items.pop()
            orders.pop()
        else:
            if tag == PIXEL_REPRESENTATION:
                scope.signed = bytes(buffer[begin:stop]).strip(b"\0") == b"\1"
            if tag != wanted[-1] or [*place, tag] != wanted:
                continue
            if begin == stop:
                break
            if kind == FRAGMENTS:
                return "OB", _one_frame(buffer, begin, stop, encoding, limits)
            known = vr
            if vr not in _KNOWN or vr == b"UN":
                known = effective_vr(tag, vr, stop - begin, signed=scope.signed)
            value = memoryview(buffer)[begin:stop]
            return known.decode(), little_endian(value, known, orders[-1])
    raise NotFound("no such element, or it is empty")


def _one_frame(
    buffer: Buffer, begin: int, stop: int, encoding: Encoding, limits: Limits
) -> Buffer:
    """Return the fragments of a single frame joined, without their item headers."""
    found = read_fragments(buffer, begin, stop, encoding, limits, PIXEL_DATA)
    places = found.places
    if found.offset_table[1] > 4:
        raise NotFound("multi-frame pixel data is retrieved frame by frame")
    view = memoryview(buffer)
    if len(places) == 2:
        return view[places[0] : places[0] + places[1]]
    return b"".join(
        view[offset : offset + length]
        for offset, length in zip(places[::2], places[1::2], strict=True)
    )
