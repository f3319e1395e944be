"""Whole objects in a ZIP archive, as a stream (PS3.18 8.7.3.3.2, Supplement 211).

Each object is an entry under a File ID of PS3.10 8.2: ``DICOM/ST000001/SE000001/
IM000001``, the numbers in presentation order. No name comes from an object, so that
none can leave the folder that an archive is unpacked to. Nothing is written to disk and
no more than a chunk is held: entries are deflated without being compressed (pixels are
compressed already, or dense) and followed by their size, so that readers of streams can
take the archive too.

Beside the objects lie ``DICOMDIR``, which lists what can be listed (PS3.3 Annex F), and
``README.TXT``, which says which UID each file is. Both come last: they are written from
what has passed by.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Final, cast

from pacs.domain.study import ByteStream, StoredInstance
from pacs.imaging.dicomdir import Directory
from pacs.services.sources import CHUNK
from storage.kernel.errors import MalformedObject

README: Final = "README.TXT"
DICOMDIR: Final = "DICOMDIR"
#: Of more objects no directory is made: it is held until the archive ends.
MAX_LISTED: Final = 50_000


class _Sink:
    """Takes what an archive writes until it is picked up; it cannot be sought."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        self._size += len(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing: what is written is here already."""

    def taken(self, at_least: int = 0) -> Iterator[bytes]:
        """Yield what has been written since, if it is enough."""
        if self._size > at_least:
            joined = b"".join(self._parts)
            self._parts, self._size = [], 0
            yield joined


@dataclass(frozen=True, slots=True)
class Entry:
    """One object on its way into an archive."""

    name: str
    instance: StoredInstance


def entries(found: Iterable[StoredInstance]) -> list[Entry]:
    """Return a File ID for each object, in the given order.

    Objects of the same UID in several tenants are different files.
    """
    studies: dict[tuple[str, str], int] = {}
    series: dict[tuple[str, str, str], int] = {}
    counts: dict[tuple[str, str, str], int] = {}
    per_study: dict[tuple[str, str], int] = {}
    made = []
    for one in found:
        study = (one.tenant, one.study_instance_uid)
        of = (*study, one.series_instance_uid)
        n_study = studies.setdefault(study, len(studies) + 1)
        if of not in series:
            per_study[study] = per_study.get(study, 0) + 1
            series[of] = per_study[study]
        counts[of] = counts.get(of, 0) + 1
        made.append(
            Entry(f"DICOM/ST{n_study:06d}/SE{series[of]:06d}/IM{counts[of]:06d}", one)
        )
    return made


def archive(listed: Sequence[Entry], opened: Iterable[ByteStream]) -> Iterator[bytes]:
    """Yield a ZIP archive of the entries; each is opened when its turn comes.

    Parameters
    ----------
    opened : iterable of ByteStream
        The Part-10 object of each entry, in the same order.
    """
    sink = _Sink()
    lines = ["File\tSOP Instance UID\tTransfer Syntax UID"]
    directory = Directory() if len(listed) <= MAX_LISTED else None
    with zipfile.ZipFile(
        # It is written to, and nothing else.
        cast("IO[bytes]", sink),
        "w",
        zipfile.ZIP_DEFLATED,
        allowZip64=True,
        compresslevel=0,
    ) as made:
        for entry, stream in zip(listed, opened, strict=True):
            large = stream.length > _LARGE
            head = b""
            with made.open(entry.name, "w", force_zip64=large) as file:
                for chunk in stream.chunks:
                    head = head or chunk
                    file.write(chunk)
                    yield from sink.taken(CHUNK // 2)
            note = ""
            if directory is None or not _list(directory, entry, head):
                note = "\tnot in DICOMDIR"
            uid = entry.instance.sop_instance_uid
            lines.append(f"{entry.name}\t{uid}\t{stream.transfer_syntax_uid}{note}")
        if directory is not None:
            made.writestr(DICOMDIR, directory.encode())
        text = "\r\n".join((*lines, "")).encode("ascii", "replace")
        made.writestr(README, text)
    yield from sink.taken()


def _list(directory: Directory, entry: Entry, head: bytes) -> bool:
    """Put an object into the directory; False when it lacks what that needs."""
    try:
        directory.add(head, entry.name.split("/"), scope=entry.instance.tenant)
    except MalformedObject:
        return False
    return True


#: From here on an entry says its size in 64 bits; a deflated one is a little longer.
_LARGE: Final = 0xF0000000
