"""Writing matches of a C-FIND as identifiers, many of them fast (PS3.4 C.4.1.1.3).

Element headers are made once for all matches of a request. A match is written in the
character set that the requestor named if all of it fits, else in ISO_IR 192.
"""

from __future__ import annotations

import re
import struct
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from pacs.imaging import charset, syntaxes
from pacs.imaging.encoding import LONG_VRS, encoding_of

SPECIFIC_CHARACTER_SET = 0x00080005
_UTF_8 = "ISO_IR 192"
_TEXT_VRS = frozenset((b"LO", b"LT", b"PN", b"SH", b"ST", b"UC", b"UT"))
_MAX_SHORT = 0xFFFE
#: Sets that an escape sequence designates as G1, where ASCII stays (PS3.5 Annex K, I).
_G1 = {
    "ISO 2022 IR 58": (b"\x1b$)A", "gb2312"),
    "ISO 2022 IR 149": (b"\x1b$)C", "euc_kr"),
}
#: What ends the reach of an escape sequence (PS3.5 6.1.2.5.3).
_PIECES = re.compile(r"([\\^=\r\n\t\f])")


_Encode = Callable[[str, bytes], bytes]
"""Encodes the text of one value of a VR, or raises UnicodeEncodeError."""


@dataclass(frozen=True, slots=True)
class _Key:
    """One element of every match."""

    tag: int
    vr: bytes
    head: bytes
    length: struct.Struct
    long: bool
    pad: bytes
    binary: bool


class MatchWriter:
    """Encodes matches in one transfer syntax.

    Parameters
    ----------
    keys : mapping of int to bytes
        Tag and VR of each element to write, without Specific Character Set.
    constants : mapping of int to str
        Values that are the same in all matches.
    sequence : (int, mapping of int to bytes), optional
        Tag of a sequence with one item, and the elements of that item; it is empty
        when these are.
    terms : tuple of str
        Specific Character Set (0008,0005) as the requestor gave it; empty: none.
    """

    def __init__(
        self,
        keys: Mapping[int, bytes],
        *,
        transfer_syntax_uid: str,
        terms: tuple[str, ...],
        constants: Mapping[int, str],
        sequence: tuple[int, Mapping[int, bytes]] | None = None,
    ) -> None:
        encoding = encoding_of(syntaxes.get(transfer_syntax_uid))
        self._explicit = encoding.explicit
        self._mark = "<" if encoding.order == "little" else ">"
        self._u16 = struct.Struct(f"{self._mark}H")
        self._u32 = struct.Struct(f"{self._mark}I")
        self._tag = struct.Struct(f"{self._mark}HH")
        self._keys = [self._key(tag, keys[tag]) for tag in sorted(keys)]
        self._constants = dict(constants)
        self._sequence = None
        if sequence is not None:
            tag, inner = sequence
            self._sequence = (
                self._key(tag, b"SQ"),
                [self._key(one, inner[one]) for one in sorted(inner)],
            )
        self._charset = self._key(SPECIFIC_CHARACTER_SET, b"CS")
        self._terms = terms if any(terms) else ()

    def write(self, match: Mapping[int, str]) -> bytes:
        """Return one match as a data set."""
        values = {**match, **self._constants}
        try:
            return self._write(values, self._terms, _ascii)
        except UnicodeEncodeError:
            pass
        if self._terms:
            try:
                return self._write(values, self._terms, _encoder(self._terms))
            except UnicodeEncodeError:
                pass
        return self._write(values, (_UTF_8,), _utf_8)

    def _write(
        self, values: Mapping[int, str], terms: tuple[str, ...], encode: _Encode
    ) -> bytes:
        parts: list[bytes] = []
        if terms:
            self._put(parts, self._charset, "\\".join(terms).encode("ascii", "replace"))
        pending = self._sequence
        for key in self._keys:
            if pending is not None and key.tag > pending[0].tag:
                self._put_sequence(parts, pending, values, encode)
                pending = None
            self._put(parts, key, self._raw(key, values.get(key.tag, ""), encode))
        if pending is not None:
            self._put_sequence(parts, pending, values, encode)
        return b"".join(parts)

    def _raw(self, key: _Key, text: str, encode: _Encode) -> bytes:
        if not text:
            return b""
        if key.binary:
            return self._u16.pack(int(text)) if text.isdigit() else b""
        if key.vr in _TEXT_VRS:
            return encode(text, key.vr)
        return text.encode("ascii", "replace")

    def _put(self, parts: list[bytes], key: _Key, raw: bytes) -> None:
        if len(raw) % 2:
            raw += key.pad
        size = len(raw)
        if size > _MAX_SHORT and not key.long:
            # PS3.5 6.2.2, note 3: a value that does not fit is written as UN.
            head = key.head[:4] + b"UN\0\0"
            parts += (head, self._u32.pack(size), raw)
        else:
            parts += (key.head, key.length.pack(size), raw)

    def _put_sequence(
        self,
        parts: list[bytes],
        sequence: tuple[_Key, list[_Key]],
        values: Mapping[int, str],
        encode: _Encode,
    ) -> None:
        key, inner = sequence
        body: list[bytes] = []
        if any(values.get(one.tag) for one in inner):
            for one in inner:
                self._put(body, one, self._raw(one, values.get(one.tag, ""), encode))
            size = sum(map(len, body))
            body.insert(0, self._tag.pack(0xFFFE, 0xE000) + self._u32.pack(size))
        self._put(parts, key, b"".join(body))

    def _key(self, tag: int, vr: bytes) -> _Key:
        head = self._tag.pack(tag >> 16, tag & 0xFFFF)
        long = not self._explicit or vr in LONG_VRS
        if self._explicit:
            head += vr + (b"\0\0" if long else b"")
        return _Key(
            tag,
            vr,
            head,
            self._u32 if long else self._u16,
            long,
            b"\0" if vr == b"UI" else b" ",
            vr == b"US",
        )


def _ascii(text: str, _vr: bytes) -> bytes:
    return text.encode("ascii")


def _utf_8(text: str, _vr: bytes) -> bytes:
    return text.encode("utf-8", "replace")


def _encoder(terms: tuple[str, ...]) -> _Encode:
    """Return an encoder into the requestor's character set."""
    if len(terms) == 1 and not terms[0].startswith("ISO 2022"):
        return partial(_stand_alone, terms[0])
    return partial(_extended, terms)


def _stand_alone(term: str, text: str, _vr: bytes) -> bytes:
    raw = charset.encode(text, term)
    if raw is None:
        raise _does_not_fit(text)
    return raw


def _extended(terms: tuple[str, ...], text: str, vr: bytes) -> bytes:
    """Encode with code extensions; only what reads back the same is sent."""
    try:
        raw = b"".join(
            piece.encode("ascii") if piece.isascii() else _escaped(piece, terms)
            for piece in _PIECES.split(text)
        )
    except (LookupError, UnicodeError, ValueError):
        raise _does_not_fit(text) from None
    back = charset.decoder("\\".join(terms).encode("ascii", "replace"))
    if back.decode(raw, vr.decode()) != text:
        raise _does_not_fit(text)
    return raw


def _escaped(piece: str, terms: tuple[str, ...]) -> bytes:
    for term in terms:
        if term in _G1:
            escape, codec = _G1[term]
            with suppress(UnicodeEncodeError):
                return escape + piece.encode(codec)
    from pydicom.charset import convert_encodings, encode_string

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return encode_string(piece, convert_encodings(list(terms)))


def _does_not_fit(text: str) -> UnicodeEncodeError:
    return UnicodeEncodeError("DICOM", text, 0, len(text), "not in the character set")
