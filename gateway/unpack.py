"""What an import finds inside containers: ZIP archives and DICOMDIRs.

Both come from outside: names are never used to write, bytes are counted while they
inflate, and nothing a container says about itself is believed before it is checked.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol, Self

from pacs.imaging.dataset import Scan, iter_items, scan
from pacs.imaging.part10 import read_file_meta
from pacs.imaging.syntaxes import EXPLICIT_VR_LE
from storage.kernel.errors import MalformedObject, TooLarge
from storage.kernel.limits import MIB, Limits

#: Media Storage Directory Storage (PS3.4 F.4).
MEDIA_STORAGE_DIRECTORY = "1.2.840.10008.1.3.10"
DIRECTORY_RECORD_SEQUENCE = 0x00041220
RECORD_IN_USE = 0x00041410
REFERENCED_FILE_ID = 0x00041500

#: A DICOMDIR larger than this is refused.
MAX_DICOMDIR = 64 * MIB
#: Central directory bytes for each entry we would accept.
DIRECTORY_BYTES = 128
MAX_NAME = 1024
MAX_NAME_PARTS = 64

_ZIP_MAGIC = (b"PK\3\4", b"PK\5\6")
_DRIVE = re.compile(r"[A-Za-z]:")
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
_ENCRYPTED = 0x1
_LOCAL_HEADER = 30


class Stream(Protocol):
    """Bytes to read once, in a with statement."""

    def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes; fewer do not mean the end, none do."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None: ...


def is_zip(head: bytes) -> bool:
    """Tell whether a file that begins with `head` is a ZIP and not DICOM.

    A DICOM preamble may hold anything, a ZIP's first bytes too (PS3.10 7.5).
    """
    return head.startswith(_ZIP_MAGIC) and head[128:132] != b"DICM"


class _Guarded(io.RawIOBase):
    """A file that gives no more than `allowed` bytes in one read.

    `zipfile` reads the whole central directory at once, as long as it claims to be.
    """

    def __init__(self, raw: BinaryIO, allowed: int) -> None:
        self._raw = raw
        self._allowed: int | None = allowed

    def trust(self) -> None:
        """Lift the guard: from here on reads are bounded by their callers."""
        self._allowed = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        return self._raw.tell()

    def read(self, size: int | None = -1) -> bytes:
        asked = -1 if size is None else size
        if self._allowed is None:
            return self._raw.read(asked)
        bound = self._allowed + 1
        data = self._raw.read(bound if asked < 0 else min(asked, bound))
        if len(data) > self._allowed:
            raise TooLarge("archive_entries", self._allowed // DIRECTORY_BYTES)
        return data


class ZipSource:
    """The entries of one ZIP archive. Entries may be read by several threads.

    Parameters
    ----------
    file : BinaryIO
        Seekable; stays the caller's.

    Raises
    ------
    MalformedObject
        It is not a ZIP archive.
    TooLarge
        More than `archive_entries`.
    """

    def __init__(self, file: BinaryIO, limits: Limits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._inflated = 0
        guarded = _Guarded(file, max(MIB, limits.archive_entries * DIRECTORY_BYTES))
        try:
            self._zip = zipfile.ZipFile(guarded)
        except (zipfile.BadZipFile, struct.error, ValueError, OSError) as error:
            raise MalformedObject("not a readable ZIP archive") from error
        guarded.trust()
        if len(self._zip.infolist()) > limits.archive_entries:
            self._zip.close()
            raise TooLarge("archive_entries", limits.archive_entries)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._zip.close()

    def entries(self) -> Iterator[tuple[zipfile.ZipInfo, str]]:
        """Yield each file entry, sorted by name, with why it is refused or ``""``."""
        infos = self._zip.infolist()
        overlapping = self._overlapping(infos)
        seen: set[str] = set()
        for info in sorted(infos, key=lambda one: one.filename):
            if info.is_dir():
                continue
            reason = _refusal(info)
            if not reason and info.filename in seen:
                reason = "the archive has this name twice"
            if not reason and info.header_offset in overlapping:
                reason = "the entry overlaps another"
            seen.add(info.filename)
            yield info, reason

    def _overlapping(self, infos: list[zipfile.ZipInfo]) -> set[int]:
        """Return the header offsets of entries that share bytes with another."""
        ordered = sorted(infos, key=lambda one: one.header_offset)
        offsets = [info.header_offset for info in ordered]
        found: set[int] = set()
        for info, following in zip(
            ordered, [*offsets[1:], self._zip.start_dir], strict=False
        ):
            end = info.header_offset + _LOCAL_HEADER + info.compress_size
            if end > following:
                found |= {info.header_offset, following}
        return found

    def open(self, info: zipfile.ZipInfo) -> Stream:
        """Open one entry for reading, with its bytes counted."""
        try:
            return _Counted(self._zip.open(info), info.compress_size, self)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            raise MalformedObject("the archive entry cannot be read") from error

    def count(self, n_bytes: int) -> None:
        """Add inflated bytes; raise TooLarge beyond `archive_bytes`."""
        with self._lock:
            self._inflated += n_bytes
            if self._inflated > self._limits.archive_bytes:
                raise TooLarge("archive_bytes", self._limits.archive_bytes)

    @property
    def ratio(self) -> int:
        return self._limits.archive_ratio


class _Counted(io.RawIOBase):
    """An entry being inflated. What its header says of its size counts for nothing."""

    def __init__(self, raw: object, compressed: int, source: ZipSource) -> None:
        self._raw: zipfile.ZipExtFile = raw  # type: ignore[assignment]  # typeshed says IO
        self._source = source
        self._allowed = max(MIB, compressed * source.ratio)
        self._read = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        try:
            data = self._raw.read(MIB if size is None or size < 0 else min(size, MIB))
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise MalformedObject("the archive entry is damaged") from error
        self._read += len(data)
        self._source.count(len(data))
        if self._read > self._allowed:
            raise TooLarge("archive_ratio", self._source.ratio)
        return data

    def close(self) -> None:
        self._raw.close()
        super().close()


def _refusal(info: zipfile.ZipInfo) -> str:
    """Return why an entry is not read, or ``""``."""
    name = info.orig_filename.replace("\\", "/")
    parts = name.split("/")
    checks = (
        ("\0" in name, "NUL in the name"),
        (name.startswith("/") or _DRIVE.match(name), "absolute name"),
        (".." in parts, "the name climbs out of the archive"),
        (len(name) > MAX_NAME or len(parts) > MAX_NAME_PARTS, "name too long"),
        (stat.S_ISLNK(info.external_attr >> 16), "symbolic link"),
        (info.flag_bits & _ENCRYPTED, "encrypted"),
        (info.compress_type not in _METHODS, "unknown compression"),
    )
    return next((reason for failed, reason in checks if failed), "")


def referenced_files(
    dicomdir: Path, limits: Limits
) -> Iterator[tuple[str, Path | None]]:
    """Yield each Referenced File ID of a DICOMDIR and the file it names.

    The records are read in the order they are stored, not by their offsets, so that
    a loop among them has no effect. The path is None when the ID is malformed, leads
    out of the file-set, or names nothing.

    Raises
    ------
    MalformedObject, TooLarge
        It is not a DICOMDIR (PS3.3 F.2).
    """
    with dicomdir.open("rb") as file:
        data = file.read(MAX_DICOMDIR + 1)
    if len(data) > MAX_DICOMDIR:
        raise TooLarge("MAX_DICOMDIR", MAX_DICOMDIR)
    root = dicomdir.parent.resolve()
    seen: set[str] = set()
    for item in iter_items(_records(data, limits), DIRECTORY_RECORD_SEQUENCE):
        raw = item.get(REFERENCED_FILE_ID, b"")
        if not raw.strip(b" \0") or item.get(RECORD_IN_USE) == b"\0\0":
            continue
        file_id = raw.decode("ascii", "replace").strip(" \0")
        if file_id in seen:
            continue
        seen.add(file_id)
        if len(seen) > limits.archive_entries:
            raise TooLarge("archive_entries", limits.archive_entries)
        yield file_id, _inside(root, file_id.split("\\"))


def _records(data: bytes, limits: Limits) -> Scan:
    """Check the data set of a DICOMDIR and find its records."""
    meta = read_file_meta(data)
    if meta is None or meta.sop_class_uid != MEDIA_STORAGE_DIRECTORY:
        raise MalformedObject("not a DICOMDIR", 0x00020002)
    if meta.transfer_syntax_uid != EXPLICIT_VR_LE:
        raise MalformedObject("a DICOMDIR is Explicit VR Little Endian", 0x00020010)
    found = scan(data, meta.dataset_offset, len(data), EXPLICIT_VR_LE, limits)
    position = meta.dataset_offset
    while position + 12 <= len(data):
        group, element, vr, length = struct.unpack_from("<HH2sH", data, position)
        if (group << 16 | element) == DIRECTORY_RECORD_SEQUENCE and vr == b"SQ":
            (length,) = struct.unpack_from("<I", data, position + 8)
            start = position + 12
            end = len(data) if length == 0xFFFFFFFF else start + length
            found.sequences[DIRECTORY_RECORD_SEQUENCE] = (start, end)
            break
        position += 8 + length
    return found


def _inside(root: Path, components: list[str]) -> Path | None:
    """Return the regular file `components` name below `root`, or None."""
    if len(components) > 8 or not all(map(_is_component, components)):
        return None
    found = root
    for part in components:
        # Tolerates: names in lower case, as some systems show those of a disc.
        exact = found / part
        found = exact if exact.exists() else found / part.lower()
    with suppress(OSError):
        resolved = found.resolve(strict=True)
        if resolved.is_relative_to(root) and resolved.is_file():
            return resolved
    return None


def _is_component(part: str) -> bool:
    """Tell whether `part` is one step down a file-set (PS3.10 8.5).

    Tolerates: lower case and more than eight characters, as many discs have them.
    """
    return (
        0 < len(part) <= 64
        and part not in {".", ".."}
        and part.isascii()
        and part.isprintable()
        and "/" not in part
    )
