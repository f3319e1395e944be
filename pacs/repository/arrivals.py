"""An arriving instance as the index takes it in, and what became of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from storage.kernel.errors import ImagingError
from storage.kernel.types import PendingDigest
from storage.packs.format import Location


class Written(StrEnum):
    """What the index made of a row."""

    ADDED = "added"
    DUPLICATE = "duplicate"
    REPLACED = "replaced"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class ParentKey:
    """What decides which patient, study and series an instance belongs to."""

    tenant: str
    issuer: str
    patient_id: str
    study_instance_uid: str
    series_instance_uid: str


@dataclass(slots=True)
class InstanceRow:
    """Everything about one instance that the index keeps.

    `parents` gives the column values of patient, study and series; it is only
    called when one of them is new, because decoding them is dear.
    """

    key: ParentKey
    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    modality: str
    instance_number: int | None
    rows: int | None
    columns: int | None
    bits_allocated: int | None
    samples: int | None
    number_of_frames: int | None
    computing: bytes | PendingDigest
    dataset_offset: int
    header_end: int
    pixel_offset: int | None
    object_length: int
    flags: int
    origin: str
    received_us: int
    parents: Callable[[], Parents]
    frame_table: bytes | None = None
    location: Location | None = None
    pack_kind: str = "log"
    replace: bool = False
    replaced_keep_us: int = 0
    written: Written | None = None
    kept_digest: bytes = b""
    error: ImagingError | None = None

    @property
    def digest(self) -> bytes:
        """SHA-256 of the data set bytes; waits until it has been computed."""
        if not isinstance(self.computing, bytes):
            self.computing = self.computing.digest()
        return self.computing

    def shift(self, head_length: int) -> None:
        """Make offsets count from the object, `head_length` before the data set."""
        self.dataset_offset += head_length
        self.header_end += head_length
        self.object_length += head_length
        if self.pixel_offset is not None:
            self.pixel_offset += head_length


@dataclass(frozen=True, slots=True)
class Parents:
    """Column values for rows that do not exist yet."""

    patient: dict[str, Any]
    study: dict[str, Any]
    series: dict[str, Any]
