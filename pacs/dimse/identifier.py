"""Small data sets of DIMSE messages: identifiers, action and event information.

Never more than `Limits.identifier_bytes` or what the caller has bounded; read through
the one walker of `pacs.imaging.encoding`, written by hand.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from pacs.imaging import syntaxes
from pacs.imaging.dataset import inflate
from pacs.imaging.encoding import (
    ELEMENT,
    ITEM_START,
    ITEM_STOP,
    LONG_VRS,
    SEQUENCE,
    SEQUENCE_STOP,
    Encoding,
    encoding_of,
    walk_dataset,
)
from storage.kernel.errors import MalformedObject
from storage.kernel.limits import Limits

#: Longest value of a VR with a two-byte length.
MAX_SHORT = 0xFFFE

Elements = dict[int, "bytes | list[Elements]"]
"""Tag to raw value, or to the items of a sequence; the first of a tag wins."""

Value = bytes | str | int | Sequence["Item"]
Item = Sequence[tuple[int, bytes, Value]]
"""(tag, VR, value) in ascending order of tags; int is a US."""


def read(raw: bytes, transfer_syntax_uid: str, limits: Limits) -> Elements:
    """Return the elements of a data set, nested as they are.

    Raises
    ------
    MalformedObject, TooLarge
        Too deep, too many elements, or no data set in this transfer syntax.
    """
    syntax = syntaxes.get(transfer_syntax_uid)
    if syntax.deflated:
        raw = inflate(raw, limits)
    top: Elements = {}
    items: list[list[Elements]] = []
    open_items: list[Elements] = [top]
    for kind, tag, _, start, stop in walk_dataset(
        raw, 0, len(raw), encoding_of(syntax), limits
    ):
        if kind == ELEMENT:
            open_items[-1].setdefault(tag, raw[start:stop])
        elif kind == SEQUENCE:
            nested: list[Elements] = []
            open_items[-1].setdefault(tag, nested)
            items.append(nested)
        elif kind == ITEM_START:
            item: Elements = {}
            items[-1].append(item)
            open_items.append(item)
        elif kind == ITEM_STOP:
            open_items.pop()
        elif kind == SEQUENCE_STOP:
            items.pop()
    return top


def text(elements: Elements, tag: int) -> str:
    """Return an ASCII value without padding; empty when missing.

    Raises
    ------
    MalformedObject
        It is a sequence.
    """
    value = elements.get(tag, b"")
    if isinstance(value, list):
        raise MalformedObject("a sequence where a value belongs", tag)
    return value.decode("ascii", "replace").strip(" \0")


def write(elements: Item, transfer_syntax_uid: str) -> bytes:
    """Return the data set, sequences with defined lengths.

    A value too long for its VR's two-byte length is written as UN (PS3.5 6.2.2).
    """
    encoding = encoding_of(syntaxes.get(transfer_syntax_uid))
    return b"".join(_write(elements, encoding))


def _write(elements: Item, encoding: Encoding) -> Iterable[bytes]:
    mark = "<" if encoding.order == "little" else ">"
    for tag, vr, value in elements:
        if isinstance(value, int):
            raw = struct.pack(f"{mark}H", value)
        elif isinstance(value, str):
            raw = value.encode("ascii", "replace")
        elif isinstance(value, bytes):
            raw = value
        else:
            raw = b"".join(_item(item, mark, encoding) for item in value)
        if len(raw) % 2:
            raw += b"\0" if vr == b"UI" else b" "
        group, element = tag >> 16, tag & 0xFFFF
        if not encoding.explicit:
            yield struct.pack(f"{mark}HHI", group, element, len(raw))
        elif vr in LONG_VRS or len(raw) > MAX_SHORT:
            long = vr if vr in LONG_VRS else b"UN"
            yield struct.pack(f"{mark}HH2sxxI", group, element, long, len(raw))
        else:
            yield struct.pack(f"{mark}HH2sH", group, element, vr, len(raw))
        yield raw


def _item(item: Item, mark: str, encoding: Encoding) -> bytes:
    body = b"".join(_write(item, encoding))
    return struct.pack(f"{mark}HHI", 0xFFFE, 0xE000, len(body)) + body
