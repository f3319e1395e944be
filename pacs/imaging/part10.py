"""Part-10 files: the preamble and File Meta Information (PS3.10 7.1)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pacs.imaging import syntaxes
from pacs.imaging.encoding import LONG_VRS, Buffer
from storage.kernel.errors import MalformedObject
from storage.kernel.uids import (
    IMPLEMENTATION_CLASS_UID,
    IMPLEMENTATION_VERSION_NAME,
)

PREAMBLE = 128
#: File Meta Information longer than this is not one.
MAX_FILE_META = 64 * 1024

_HEAD = struct.Struct("<HH2sH")
_U32 = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class FileMeta:
    """What File Meta Information says, and where the data set begins.

    A UID is empty when its element is missing.
    """

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    dataset_offset: int


def _element(number: int, vr: bytes, value: bytes) -> bytes:
    value += (b"" if vr == b"OB" else b" " if vr == b"SH" else b"\0") * (len(value) & 1)
    if vr == b"OB":
        return struct.pack("<HH2sxxI", 2, number, vr, len(value)) + value
    return struct.pack("<HH2sH", 2, number, vr, len(value)) + value


_TAIL = _element(0x12, b"UI", IMPLEMENTATION_CLASS_UID.encode()) + _element(
    0x13, b"SH", IMPLEMENTATION_VERSION_NAME.encode()
)


def file_meta(
    sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str
) -> bytes:
    """Return 128 zero bytes, ``DICM`` and our own File Meta Information.

    The preamble is always zero: what a sender hid there is never served
    (PS3.10 7.5).
    """
    body = (
        _element(1, b"OB", b"\0\1")
        + _element(2, b"UI", sop_class_uid.encode("ascii", "replace"))
        + _element(3, b"UI", sop_instance_uid.encode("ascii", "replace"))
        + _element(0x10, b"UI", transfer_syntax_uid.encode("ascii", "replace"))
        + _TAIL
    )
    length = struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(body))
    return bytes(PREAMBLE) + b"DICM" + length + body


def read_file_meta(
    buffer: Buffer, *, complete: bool = True, accept_without_preamble: bool = False
) -> FileMeta | None:
    """Read File Meta Information at the start of `buffer`.

    Parameters
    ----------
    complete : bool
        False while more bytes may follow: returns None instead of raising when
        the buffer ends too early.
    accept_without_preamble : bool
        Take a bare data set for Implicit or Explicit VR Little Endian, as its
        first element looks.

    Raises
    ------
    MalformedObject
        It is not a Part-10 file, or its File Meta Information is broken or lacks
        Transfer Syntax UID (0002,0010).
    """
    size = len(buffer)
    if size < PREAMBLE + 4:
        if not complete:
            return None
        if not (accept_without_preamble and size):
            raise MalformedObject("not a DICOM file: too short for a preamble")
    if bytes(buffer[PREAMBLE : PREAMBLE + 4]) != b"DICM":
        if accept_without_preamble:
            return _bare(buffer)
        raise MalformedObject("not a DICOM file: no DICM after the preamble")
    return _read_elements(buffer, PREAMBLE + 4, complete=complete)


def _read_elements(buffer: Buffer, position: int, *, complete: bool) -> FileMeta | None:
    """Read group 0002; it ends where the group does, whatever its length says.

    Tolerates: a missing or wrong File Meta Information Group Length (0002,0000).
    """
    size = len(buffer)
    values: dict[int, bytes] = {}
    declared_end = -1
    while not (position in {size, declared_end} and position + 8 > size and values):
        if position + 8 > size:
            _check_more_may_come(size, complete=complete)
            return None
        group, number, vr, length = _HEAD.unpack_from(buffer, position)
        if group != 2:
            break
        if not (vr.isalpha() and vr.isupper()):
            raise MalformedObject("File Meta is not Explicit VR", group << 16 | number)
        value = position + 8
        if vr in LONG_VRS:
            if position + 12 > size:
                _check_more_may_come(size, complete=complete)
                return None
            length = _U32.unpack_from(buffer, position + 8)[0]
            value = position + 12
        if value + length > PREAMBLE + MAX_FILE_META:
            raise MalformedObject("File Meta Information is too long", 0x00020000)
        if value + length > size:
            _check_more_may_come(size, complete=complete)
            return None
        values.setdefault(number, bytes(buffer[value : value + length]))
        position = value + length
        if number == 0 and length == 4:
            declared_end = position + _U32.unpack(values[0])[0]
    if position == size and position != declared_end and not complete:
        return None
    uid = _text(values.get(0x10, b""))
    if not uid:
        raise MalformedObject("Transfer Syntax UID is missing", 0x00020010)
    return FileMeta(_text(values.get(2, b"")), _text(values.get(3, b"")), uid, position)


def _check_more_may_come(size: int, *, complete: bool) -> None:
    if complete or size > PREAMBLE + MAX_FILE_META:
        raise MalformedObject("File Meta Information is cut off", 0x00020000)


def _text(raw: bytes) -> str:
    return raw.decode("ascii", "replace").rstrip("\0 ")


def _bare(buffer: Buffer) -> FileMeta:
    """Describe a data set that comes without File Meta (import only)."""
    if len(buffer) < 8:
        raise MalformedObject("not a DICOM data set")
    group, _, vr, _ = _HEAD.unpack_from(buffer, 0)
    if group == 2:
        found = _read_elements(buffer, 0, complete=True)
        if found is not None:
            return found
    if group not in {0x0008, 0x0004}:
        raise MalformedObject("not a DICOM data set")
    explicit = vr.isalpha() and vr.isupper()
    uid = syntaxes.EXPLICIT_VR_LE if explicit else syntaxes.IMPLICIT_VR_LE
    return FileMeta("", "", uid, 0)
