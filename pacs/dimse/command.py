"""DIMSE command sets, encoded and decoded by hand (PS3.7 6.3, Annex E).

Always Implicit VR Little Endian, group 0000 only, so they need no data set parser.
"""

from __future__ import annotations

import struct
from enum import IntEnum

from pacs.dimse.pdu import AbortReason, ProtocolError

GROUP_LENGTH = 0x0000
AFFECTED_CLASS = 0x0002
REQUESTED_CLASS = 0x0003
FIELD = 0x0100
MESSAGE_ID = 0x0110
RESPONDED_ID = 0x0120
MOVE_DESTINATION = 0x0600
PRIORITY = 0x0700
DATASET_TYPE = 0x0800
STATUS = 0x0900
OFFENDING = 0x0901
COMMENT = 0x0902
AFFECTED_INSTANCE = 0x1000
REQUESTED_INSTANCE = 0x1001
EVENT_TYPE = 0x1002
ACTION_TYPE = 0x1008
REMAINING = 0x1020
COMPLETED = 0x1021
FAILED = 0x1022
WARNING = 0x1023
MOVE_ORIGINATOR_AE = 0x1030
MOVE_ORIGINATOR_ID = 0x1031

NO_DATASET = 0x0101

_HEAD = struct.Struct("<HHI")
_U16 = struct.Struct("<H")
_SHORT = struct.Struct("<HHIH")
_GROUP_LENGTH = struct.Struct("<HHII")
_SHORTS = frozenset(
    (FIELD, MESSAGE_ID, RESPONDED_ID, PRIORITY, DATASET_TYPE, STATUS, EVENT_TYPE,
     ACTION_TYPE, REMAINING, COMPLETED, FAILED, WARNING, MOVE_ORIGINATOR_ID)
)  # fmt: skip
_UIDS = frozenset(
    (AFFECTED_CLASS, REQUESTED_CLASS, AFFECTED_INSTANCE, REQUESTED_INSTANCE)
)


class CommandField(IntEnum):
    """Command Field (0000,0100) values (PS3.7 E.1)."""

    C_STORE_RQ = 0x0001
    C_GET_RQ = 0x0010
    C_FIND_RQ = 0x0020
    C_MOVE_RQ = 0x0021
    C_ECHO_RQ = 0x0030
    N_EVENT_REPORT_RQ = 0x0100
    N_ACTION_RQ = 0x0130
    C_CANCEL_RQ = 0x0FFF


RESPONSE = 0x8000

Value = int | str | bytes


def decode(raw: bytes | bytearray | memoryview) -> dict[int, Value]:
    """Return element number to value; US as int, the rest as stripped text.

    Command Group Length (0000,0000) is there only when it is wrong.

    Raises
    ------
    ProtocolError
        Not a command set.
    """
    values: dict[int, Value] = {}
    position, size = 0, len(raw)
    while position < size:
        if position + 8 > size:
            raise ProtocolError("command set is cut off")
        group, element, length = _HEAD.unpack_from(raw, position)
        start = position + 8
        position = start + length
        if group != 0 or position > size:
            raise ProtocolError("not a command set")
        if element in _SHORTS:
            if length != 2:
                raise ProtocolError("a command element has the wrong length")
            values[element] = _U16.unpack_from(raw, start)[0]
        elif element:
            values[element] = str(raw[start:position], "latin-1").rstrip("\0 ")
        elif raw[start:position] != (size - position).to_bytes(4, "little"):
            values[GROUP_LENGTH] = bytes(raw[start:position])
    if FIELD not in values:
        raise ProtocolError("command field is missing", AbortReason.NOT_SPECIFIED)
    return values


def encode(values: dict[int, Value]) -> bytes:
    """Return the command set with its group length; elements in ascending order."""
    parts = [b""]
    for element in sorted(values):
        value = values[element]
        if isinstance(value, int):
            parts.append(_SHORT.pack(0, element, 2, value))
            continue
        raw = value if isinstance(value, bytes) else value.encode("latin-1", "replace")
        if len(raw) % 2:
            raw += b"\0" if element in _UIDS else b" "
        parts += (_HEAD.pack(0, element, len(raw)), raw)
    parts[0] = _GROUP_LENGTH.pack(0, 0, 4, sum(map(len, parts)))
    return b"".join(parts)


def text(values: dict[int, Value], element: int) -> str:
    """Return a text element, empty when missing."""
    value = values.get(element, "")
    return value if isinstance(value, str) else ""


def number(values: dict[int, Value], element: int, default: int = 0) -> int:
    """Return a US element."""
    value = values.get(element, default)
    return value if isinstance(value, int) else default


def tags(*values: int) -> bytes:
    """Return a value of VR AT: Offending Element (0000,0901)."""
    return b"".join(struct.pack("<HH", tag >> 16, tag & 0xFFFF) for tag in values)


def response(
    request: dict[int, Value], status: int, *, has_dataset: bool = False
) -> dict[int, Value]:
    """Return the response to `request`, ready for more elements (PS3.7 9.3, 10.3)."""
    values: dict[int, Value] = {
        FIELD: number(request, FIELD) | RESPONSE,
        RESPONDED_ID: number(request, MESSAGE_ID),
        DATASET_TYPE: 0x0001 if has_dataset else NO_DATASET,
        STATUS: status,
    }
    uid = text(request, AFFECTED_CLASS) or text(request, REQUESTED_CLASS)
    if uid:
        values[AFFECTED_CLASS] = uid
    instance = text(request, AFFECTED_INSTANCE) or text(request, REQUESTED_INSTANCE)
    if instance:
        values[AFFECTED_INSTANCE] = instance
    return values
