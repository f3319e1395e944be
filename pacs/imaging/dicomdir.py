"""A DICOMDIR: the directory of a File-set (PS3.3 Annex F, PS3.10 8).

Records are encoded as they are added and only linked at the end, so that what is held
for an object is the few hundred bytes that the directory takes. Which keys a record
has is pydicom's table (`pydicom.fileset.DIRECTORY_RECORDERS`).
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.filebase import DicomBytesIO
from pydicom.fileset import DIRECTORY_RECORDERS
from pydicom.fileset import _four_level_record_type as record_type_of
from pydicom.filewriter import write_dataset
from pydicom.uid import MediaStorageDirectoryStorage, generate_uid

from pacs.imaging.part10 import file_meta
from pacs.imaging.syntaxes import EXPLICIT_VR_LE
from storage.kernel.errors import MalformedObject

_ITEM: Final = struct.Struct("<HHI")
_UL: Final = struct.Struct("<HH2sHI")
#: Where values lie in an item: its elements are in order and of fixed lengths.
_NEXT: Final = 16
_LOWER: Final = 38
_UTF8: Final = "ISO_IR 192"
_IN_USE: Final = 0xFFFF


@dataclass(slots=True)
class _Record:
    """One directory record, encoded but for its links, and those below it."""

    item: bytearray = field(default_factory=bytearray)
    below: dict[Hashable, _Record] = field(default_factory=dict)

    def all(self) -> Iterator[_Record]:
        """Yield the records below this one, each before its own."""
        for one in self.below.values():
            yield one
            yield from one.all()


class Directory:
    """Collects the objects of a File-set and encodes their directory."""

    def __init__(self) -> None:
        self._root = _Record()

    def add(
        self, head: bytes, file_id: Sequence[str], *, scope: Hashable = None
    ) -> None:
        """List an object.

        Parameters
        ----------
        head : bytes
            A Part-10 file, up to its pixel data at least.
        file_id : sequence of str
            Components of its Referenced File ID (0004,1500).
        scope : hashable
            Keeps patients apart that have one Patient ID.

        Raises
        ------
        MalformedObject
            It cannot be listed: a key of its record is missing.
        """
        # Tolerates: values that break the rules of their VR.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                ds = dcmread(io.BytesIO(head), stop_before_pixels=True)
                self._add(ds, file_id, scope)
            except (
                InvalidDicomError, ValueError, TypeError, KeyError, AttributeError,
                EOFError, OSError, NotImplementedError, struct.error,
            ) as error:  # fmt: skip
                raise MalformedObject("cannot be listed in a DICOMDIR") from error

    def _add(self, ds: Dataset, file_id: Sequence[str], scope: Hashable) -> None:
        leaf = record_type_of(ds)
        # An object without a Patient ID is somebody's of whom no more is known.
        ds.PatientID = ds.get("PatientID") or "UNKNOWN"
        ds.StudyID = ds.get("StudyID") or "0"
        ds.StudyDate = ds.get("StudyDate") or "19000101"
        ds.StudyTime = ds.get("StudyTime") or "000000"
        if ds.get("SeriesNumber") is None:
            ds.SeriesNumber = 0
        if ds.get("InstanceNumber") is None:
            ds.InstanceNumber = 0
        path = (
            ("PATIENT", (scope, ds.PatientID, ds.get("IssuerOfPatientID"))),
            ("STUDY", ds.StudyInstanceUID),
            ("SERIES", ds.SeriesInstanceUID),
            (leaf, ds.SOPInstanceUID),
        )
        # All are made before any is kept: one that fails leaves nothing behind.
        made = [(key, self._encoded(ds, kind, file_id)) for kind, key in path]
        here = self._root
        for key, item in made:
            here = here.below.setdefault(key, _Record(item))

    def _encoded(self, ds: Dataset, kind: str, file_id: Sequence[str]) -> bytearray:
        record = DIRECTORY_RECORDERS[kind](ds)
        record.OffsetOfTheNextDirectoryRecord = 0
        record.RecordInUseFlag = _IN_USE
        record.OffsetOfReferencedLowerLevelDirectoryEntity = 0
        record.DirectoryRecordType = kind
        if kind not in {"PATIENT", "STUDY", "SERIES"}:
            record.ReferencedFileID = list(file_id)
            record.ReferencedSOPClassUIDInFile = ds.SOPClassUID
            record.ReferencedSOPInstanceUIDInFile = ds.SOPInstanceUID
            record.ReferencedTransferSyntaxUIDInFile = ds.file_meta.TransferSyntaxUID
        record.SpecificCharacterSet = _UTF8
        out = DicomBytesIO()
        out.is_little_endian, out.is_implicit_VR = True, False
        write_dataset(out, record, parent_encoding="utf8")
        body = out.getvalue()
        return bytearray(_ITEM.pack(0xFFFE, 0xE000, len(body)) + body)

    def encode(self) -> bytes:
        """Return the DICOMDIR, a Part-10 file in Explicit VR Little Endian."""
        uid = generate_uid(prefix=None)
        head = file_meta(MediaStorageDirectoryStorage, uid, EXPLICIT_VR_LE)
        # File-set ID, empty; offsets of the root; consistency; the sequence.
        fixed = 8 + 12 + 12 + 10 + 12
        records = list(self._root.all())
        places: dict[int, int] = {}
        position = len(head) + fixed
        for one in records:
            places[id(one)] = position
            position += len(one.item)
        for parent in (self._root, *records):
            children = list(parent.below.values())
            for one, following in pairwise(children):
                struct.pack_into("<I", one.item, _NEXT, places[id(following)])
            if children and parent is not self._root:
                struct.pack_into("<I", parent.item, _LOWER, places[id(children[0])])
        roots = list(self._root.below.values())
        first = places[id(roots[0])] if roots else 0
        last = places[id(roots[-1])] if roots else 0
        body = b"".join(bytes(one.item) for one in records)
        return b"".join(
            (
                head,
                struct.pack("<HH2sH", 0x0004, 0x1130, b"CS", 0),
                _UL.pack(0x0004, 0x1200, b"UL", 4, first),
                _UL.pack(0x0004, 0x1202, b"UL", 4, last),
                struct.pack("<HH2sHH", 0x0004, 0x1212, b"US", 2, 0),
                struct.pack("<HH2sxxI", 0x0004, 0x1220, b"SQ", len(body)),
                body,
            )
        )
