"""Bytes of hostile and odd data sets, element by element."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping

from pacs.imaging.part10 import file_meta

IMPLICIT = "1.2.840.10008.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"
BIG = "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
JPEG = "1.2.840.10008.1.2.4.50"
JPEG_LS = "1.2.840.10008.1.2.4.80"
JPEG_2000 = "1.2.840.10008.1.2.4.90"
HTJ2K = "1.2.840.10008.1.2.4.201"
RLE = "1.2.840.10008.1.2.5"
CT = "1.2.840.10008.5.1.4.1.1.2"

CLASS_UID, INSTANCE_UID = 0x00080016, 0x00080018
STUDY_UID, SERIES_UID = 0x0020000D, 0x0020000E
PATIENT_ID, PATIENT_NAME, CHARSET = 0x00100020, 0x00100010, 0x00080005
ROWS, COLUMNS, BITS_ALLOCATED, FRAMES = 0x00280010, 0x00280011, 0x00280100, 0x00280008
PIXEL_DATA = 0x7FE00010

ITEM_END = struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
SEQUENCE_END = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
UNDEFINED = 0xFFFFFFFF

LONG = frozenset(("OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR",
                  "UT", "UV"))  # fmt: skip
Values = Mapping[int, tuple[str, bytes]]


def element(tag: int, vr: str, value: bytes = b"", length: int | None = None) -> bytes:
    """Return an Explicit VR Little Endian element; `length` may lie."""
    group, number = tag >> 16, tag & 0xFFFF
    size = len(value) if length is None else length
    if vr in LONG:
        return struct.pack("<HH2sxxI", group, number, vr.encode(), size) + value
    return struct.pack("<HH2sH", group, number, vr.encode(), size) + value


def implicit(tag: int, value: bytes = b"", length: int | None = None) -> bytes:
    size = len(value) if length is None else length
    return struct.pack("<HHI", tag >> 16, tag & 0xFFFF, size) + value


def item(value: bytes = b"", length: int | None = None) -> bytes:
    size = len(value) if length is None else length
    return struct.pack("<HHI", 0xFFFE, 0xE000, size) + value


def us(*numbers: int) -> tuple[str, bytes]:
    return "US", struct.pack(f"<{len(numbers)}H", *numbers)


def nested(depth: int, *, undefined: bool = False) -> bytes:
    """Return a sequence that holds itself, `depth` sequences in all."""
    tag = 0x00081140
    if undefined:
        opening = element(tag, "SQ", length=UNDEFINED) + item(length=UNDEFINED)
        return opening * depth + (ITEM_END + SEQUENCE_END) * depth
    # From the inside out: 12 bytes of element and 8 of item around each.
    parts = []
    size = 0
    for _ in range(depth):
        parts.append(element(tag, "SQ", length=size + 8) + item(length=size))
        size += 20
    return b"".join(reversed(parts))


def deflated(body: bytes) -> bytes:
    deflater = zlib.compressobj(9, wbits=-15)
    return deflater.compress(body) + deflater.flush()


class Objects:
    """Makes objects of one study of one patient; another seed, another patient."""

    def __init__(self, seed: int = 1) -> None:
        root = f"1.2.826.0.1.3680043.10.1999.19.{seed}"
        self.study_uid = root
        self.series_uid = f"{root}.1"
        self.instance_uid = f"{root}.1.1"
        self.patient_id = f"BAD{seed}"
        #: A small image that nothing is wrong with.
        self.base: Values = {
            CLASS_UID: ("UI", CT.encode() + b"\0"),
            INSTANCE_UID: ("UI", self.instance_uid.encode()),
            0x00080020: ("DA", b"20240102"),
            0x00080060: ("CS", b"CT"),
            PATIENT_NAME: ("PN", b"Case^Bad"),
            PATIENT_ID: ("LO", self.patient_id.encode()),
            STUDY_UID: ("UI", self.study_uid.encode()),
            SERIES_UID: ("UI", self.series_uid.encode()),
            0x00200013: ("IS", b"1 "),
            0x00280002: us(1),
            0x00280004: ("CS", b"MONOCHROME2 "),
            ROWS: us(4),
            COLUMNS: us(6),
            BITS_ALLOCATED: us(16),
            0x00280101: us(16),
            0x00280102: us(15),
            0x00280103: us(0),
            PIXEL_DATA: ("OW", bytes(range(48))),
        }

    def _values(self, values: Values | None) -> dict[int, tuple[str, bytes]]:
        made = {**self.base, **(values or {})}
        return {tag: made[tag] for tag in sorted(made)}

    def dataset(
        self,
        values: Values | None = None,
        *,
        without: Iterable[int] = (),
        tail: bytes = b"",
    ) -> bytes:
        """Return the base with `values` changed or added, in the order of tags."""
        left_out = frozenset(without)
        return (
            b"".join(
                element(tag, *one)
                for tag, one in self._values(values).items()
                if tag not in left_out
            )
            + tail
        )

    def implicit_dataset(self, values: Values | None = None) -> bytes:
        return b"".join(
            implicit(tag, value) for tag, (_, value) in self._values(values).items()
        )

    def encapsulated(
        self,
        fragments: Iterable[bytes],
        values: Values | None = None,
        *,
        table: bytes = b"",
        end: bytes = SEQUENCE_END,
    ) -> bytes:
        """Return the base with encapsulated Pixel Data."""
        body = self.dataset(values, without=(PIXEL_DATA,))
        body += element(PIXEL_DATA, "OB", length=UNDEFINED) + item(table)
        return body + b"".join(item(fragment) for fragment in fragments) + end

    def file(
        self,
        body: bytes,
        syntax: str = EXPLICIT,
        *,
        class_uid: str = CT,
        instance_uid: str | None = None,
        preamble: bytes = b"",
    ) -> bytes:
        """Return a Part-10 file around a data set."""
        named = self.instance_uid if instance_uid is None else instance_uid
        head = file_meta(class_uid, named, syntax)
        return preamble + head[len(preamble) :] + body

    def good(self) -> bytes:
        """Return a file that nothing is wrong with."""
        return self.file(self.dataset())
