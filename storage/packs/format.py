"""The record: nothing else knows how instances lie in a pack.

A pack is a 64-byte file header and records that begin at multiples of 8 bytes, all
little endian:

======================  =====================================================
prefix, 32 bytes        magic, version, kind, header length, object length,
                        CRC-32C of prefix and header
header                  compact JSON: tenant, source, times, UIDs
object                  a complete Part-10 object, as it is served
trailer, 56 bytes       magic, CRC-32C of the object, object length, SHA-256 of
                        the data set bytes
padding                 zero bytes to the next multiple of 8
======================  =====================================================
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import orjson
from crc32c import crc32c

from storage.kernel.errors import CorruptData
from storage.kernel.types import PendingDigest

Buffer = bytes | bytearray | memoryview

FILE_HEADER_LENGTH = 64
PREFIX_LENGTH = 32
TRAILER_LENGTH = 56
ALIGNMENT = 8
MAX_HEADER_LENGTH = 64 * 1024

FILE_MAGIC = b"HUYPACK\n"
RECORD_MAGIC = b"HYREC\r\n\0"
TRAILER_MAGIC = b"HYEND\r\n\0"
VERSION = 1

_FILE = struct.Struct("<8sHHI32s16x")
_PREFIX = struct.Struct("<8sHHIQII")
_TRAILER = struct.Struct("<8sIIQ32s")


class Kind(IntEnum):
    """What a record is."""

    OBJECT = 1
    TOMBSTONE = 2


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """What is known about a received object beside its bytes.

    In a tombstone, `sop_instance_uid` with `digest` (hex) name what was deleted and
    `received_us` when: it counts for what was received until then. `origin` is the
    reason. In an object's record `digest` names the content it replaces, if any.
    """

    tenant: str
    door: str
    received_us: int
    transfer_syntax_uid: str
    sop_class_uid: str
    sop_instance_uid: str
    dataset_offset: int
    calling_ae: str = ""
    called_ae: str = ""
    peer: str = ""
    origin: str = "external"
    digest: str = ""

    def described(
        self, *, sop_class_uid: str, sop_instance_uid: str, dataset_offset: int
    ) -> RecordHeader:
        """Return the header with what the data set itself says."""
        return replace(
            self,
            sop_class_uid=sop_class_uid,
            sop_instance_uid=sop_instance_uid,
            dataset_offset=dataset_offset,
        )


_OPTIONAL = ("calling_ae", "called_ae", "peer", "digest")


@dataclass(frozen=True, slots=True)
class Location:
    """Where a record and its object lie; offsets from the start of the pack."""

    pack_key: str
    record_offset: int
    object_offset: int
    object_length: int


@dataclass(frozen=True, slots=True)
class Record:
    """A record to be written: the object in parts, so that nothing is copied."""

    header: RecordHeader
    parts: tuple[Buffer, ...]
    digest: bytes | PendingDigest
    kind: Kind = Kind.OBJECT


@dataclass(frozen=True, slots=True)
class RecordInfo:
    """A whole record found in a pack."""

    kind: Kind
    header: RecordHeader
    location: Location
    digest: bytes
    end: int


@dataclass(frozen=True, slots=True)
class Prefix:
    """The fixed start of a record."""

    kind: Kind
    header_length: int
    object_length: int
    crc: int


def padding(length: int) -> int:
    """Return how many bytes bring `length` to the next multiple of 8."""
    return -length % ALIGNMENT


def record_length(header_length: int, object_length: int) -> int:
    """Return the bytes of a whole record, padding included."""
    whole = PREFIX_LENGTH + header_length + object_length + TRAILER_LENGTH
    return whole + padding(whole)


def encode_file_header(pack_key: str) -> bytes:
    """Return the first 64 bytes of a pack."""
    return _FILE.pack(FILE_MAGIC, VERSION, 0, 0, pack_key.encode("ascii"))


def decode_file_header(raw: bytes) -> str:
    """Return the key of the pack that begins with `raw`.

    Raises
    ------
    CorruptData
    """
    if len(raw) < FILE_HEADER_LENGTH:
        raise CorruptData("not a pack: too short")
    magic, version, _, _, key = _FILE.unpack_from(raw)
    if magic != FILE_MAGIC or version != VERSION:
        raise CorruptData("not a pack of this version")
    return bytes(key).rstrip(b"\0").decode("ascii", "replace")


def encode_header(header: RecordHeader) -> bytes:
    """Return the header's bytes; empty optional fields are left out."""
    fields: dict[str, str | int] = {
        "tenant": header.tenant,
        "door": header.door,
        "received_us": header.received_us,
        "transfer_syntax_uid": header.transfer_syntax_uid,
        "sop_class_uid": header.sop_class_uid,
        "sop_instance_uid": header.sop_instance_uid,
        "dataset_offset": header.dataset_offset,
        "origin": header.origin,
    }
    for name in _OPTIONAL:
        value = getattr(header, name)
        if value:
            fields[name] = value
    return orjson.dumps(fields)


def encode_prefix(kind: Kind, header: bytes, object_length: int) -> bytes:
    """Return the prefix, its checksum covering the header too."""
    bare = _PREFIX.pack(RECORD_MAGIC, VERSION, kind, len(header), object_length, 0, 0)
    crc = crc32c(header, crc32c(bare[:24]))
    return _PREFIX.pack(RECORD_MAGIC, VERSION, kind, len(header), object_length, crc, 0)


def encode_trailer(object_crc: int, object_length: int, digest: bytes) -> bytes:
    """Return the trailer."""
    return _TRAILER.pack(TRAILER_MAGIC, object_crc, 0, object_length, digest)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A record in two pieces: what lies before the trailer, and what makes that.

    The trailer needs the digest, which may still be computed while the rest is
    written.
    """

    record: Record
    start: bytes
    object_length: int

    @property
    def trailer_offset(self) -> int:
        """Where the trailer begins, from the start of the record."""
        return len(self.start) + self.object_length

    @property
    def length(self) -> int:
        """Bytes of the whole record, padding included."""
        whole = self.trailer_offset + TRAILER_LENGTH
        return whole + padding(whole)

    def trailer(self) -> bytes:
        """Return trailer and padding; waits for the digest."""
        digest = self.record.digest
        if not isinstance(digest, bytes):
            digest = digest.digest()
        end = encode_trailer(object_crc(self.record.parts), self.object_length, digest)
        return end + bytes(self.length - self.trailer_offset - len(end))


def encode_record(record: Record) -> Encoded:
    """Return a record ready to be written."""
    header = encode_header(record.header)
    length = sum(map(len, record.parts))
    return Encoded(record, encode_prefix(record.kind, header, length) + header, length)


def decode_prefix(raw: Buffer) -> Prefix | None:
    """Return the prefix in `raw`, or None when there is none."""
    if len(raw) < PREFIX_LENGTH:
        return None
    magic, version, kind, header_length, object_length, crc, _ = _PREFIX.unpack_from(
        raw
    )
    if magic != RECORD_MAGIC or version != VERSION or kind not in (1, 2):
        return None
    if header_length > MAX_HEADER_LENGTH:
        return None
    return Prefix(Kind(kind), header_length, object_length, crc)


def decode_header(raw_prefix: Buffer, raw_header: bytes) -> RecordHeader | None:
    """Return the header when its checksum is right, else None."""
    prefix = decode_prefix(raw_prefix)
    if prefix is None:
        return None
    if crc32c(raw_header, crc32c(bytes(raw_prefix[:24]))) != prefix.crc:
        return None
    try:
        return RecordHeader(**orjson.loads(raw_header))
    except (TypeError, ValueError):
        return None


def decode_trailer(raw: Buffer) -> tuple[int, int, bytes] | None:
    """Return (CRC of the object, its length, digest), or None."""
    if len(raw) < TRAILER_LENGTH:
        return None
    magic, crc, _, length, digest = _TRAILER.unpack_from(raw)
    return (crc, length, digest) if magic == TRAILER_MAGIC else None


def object_crc(parts: Sequence[Buffer]) -> int:
    """Return the CRC-32C over `parts`."""
    crc = 0
    for part in parts:
        crc = crc32c(part, crc)
    return crc


__all__ = [
    "Buffer",
    "Kind",
    "Location",
    "Record",
    "RecordHeader",
    "RecordInfo",
    "decode_file_header",
    "decode_header",
    "decode_prefix",
    "decode_trailer",
    "encode_file_header",
    "encode_header",
    "encode_prefix",
    "encode_record",
    "encode_trailer",
    "object_crc",
    "padding",
    "record_length",
]
