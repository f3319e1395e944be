"""What travels between the edges and the services: arrivals, answers, locations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from storage.kernel.types import Actor, Digest, PendingDigest, Source

#: Bit of `instance.flags`: Huying made the object (core: settling).
FLAG_OWN = 8


class Level(StrEnum):
    """Query/Retrieve Level (0008,0052)."""

    PATIENT = "PATIENT"
    STUDY = "STUDY"
    SERIES = "SERIES"
    IMAGE = "IMAGE"


class Outcome(StrEnum):
    """What became of an accepted arrival."""

    STORED = "stored"
    DUPLICATE = "duplicate"


class Spool(Protocol):
    """A large data set on its way into a pack of its own."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append data set bytes."""
        ...

    def abort(self) -> None:
        """Leave nothing behind. Harmless when called twice or after accept."""
        ...


@dataclass(frozen=True, slots=True)
class Warned:
    """An attribute that was stored although it deserves a second look.

    Attributes
    ----------
    tag : int
        0xggggeeee.
    reason : str
        Without patient data.
    """

    tag: int
    reason: str


@dataclass(slots=True)
class Arrival:
    """A complete received data set, waiting to be accepted.

    Attributes
    ----------
    dataset : memoryview or Spool
        The data set bytes as received, without File Meta. A memoryview is only
        read until `accept` returns; its buffer may then be used again.
    digest : Digest or PendingDigest
        SHA-256 of these bytes; asked for once they are on their way to the disk.
    claimed_class_uid, claimed_instance_uid : str or None
        From the command set or the File Meta; must agree with the data set.
    study_uid : str or None
        The study the request was addressed to (STOW to ``/studies/{study}``).
    """

    actor: Actor
    source: Source
    transfer_syntax_uid: str
    dataset: memoryview | Spool
    digest: Digest | PendingDigest
    claimed_class_uid: str | None = None
    claimed_instance_uid: str | None = None
    study_uid: str | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """The answer to an arrival that is now durable by the sync policy."""

    outcome: Outcome
    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    warnings: tuple[Warned, ...] = ()


@dataclass(frozen=True, slots=True)
class StoredInstance:
    """One stored object: identity, shape and place.

    Attributes
    ----------
    pk, series_pk : int
        Row keys, for services only.
    pack_key : str
    object_offset, object_length : int
        The Part-10 object within the pack, bytes.
    dataset_offset, header_end, pixel_offset : int
        Within the object: first data set byte, first byte of Pixel Data's element
        (or the end), first byte of its value (None without).
    """

    pk: int
    series_pk: int
    tenant: str
    study_instance_uid: str
    series_instance_uid: str
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    modality: str
    instance_number: int | None
    rows: int | None
    columns: int | None
    bits_allocated: int | None
    samples: int | None
    number_of_frames: int | None
    digest: bytes
    pack_key: str
    record_offset: int
    object_offset: int
    object_length: int
    dataset_offset: int
    header_end: int
    pixel_offset: int | None
    received_us: int


@dataclass(frozen=True, slots=True)
class ByteStream:
    """Bytes of a known length, in chunks of at most 1 MiB.

    `transfer_syntax_uid` says what they are in; `transcoded` whether they are not
    the bytes that were received.
    """

    length: int
    chunks: Iterator[bytes]
    transfer_syntax_uid: str
    transcoded: bool = False


class Ingest(Protocol):
    """The one door for objects that arrive, as its callers see it (core: siblings)."""

    def check(
        self,
        actor: Actor,
        source: Source,
        *,
        sop_class_uid: str,
        sop_instance_uid: str,
        transfer_syntax_uid: str,
    ) -> None:
        """Refuse early what could never be accepted."""
        ...

    def open_spool(
        self,
        actor: Actor,
        source: Source,
        *,
        sop_class_uid: str,
        sop_instance_uid: str,
        transfer_syntax_uid: str,
    ) -> Spool:
        """Start a pack for a data set too large for memory."""
        ...

    def accept(self, arrival: Arrival) -> Accepted:
        """Store one data set durably."""
        ...

    def flush(self) -> None:
        """Make durable what weaker policies left in memory."""
        ...
