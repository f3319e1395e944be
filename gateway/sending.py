"""Sending files or stored instances to a peer once, with a few attempts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pacs.dimse.client import RemoteAssociation, Wanted
from pacs.dimse.deliver import deliver, fate_of
from pacs.dimse.send import Source, T
from pacs.domain.study import ByteStream
from pacs.imaging.codecs import DecoderPool
from pacs.imaging.part10 import MAX_FILE_META, PREAMBLE, read_file_meta
from pacs.imaging.transcode import can_convert, to_syntax
from pacs.services.forwarding import Fate
from storage.kernel.errors import (
    DependencyDown,
    InvalidInput,
    NotFound,
    TooLarge,
    Unavailable,
)
from storage.kernel.limits import MIB, Limits

#: Attempts to reach a peer that fails or is short of something, and the first pause.
ATTEMPTS = 4
PAUSE_SECONDS = 1.0
CHUNK = 1 * MIB


@dataclass(frozen=True, slots=True)
class FileInstance:
    """A Part-10 file to send."""

    path: Path
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    dataset_offset: int
    size: int
    study_instance_uid: str = ""


@dataclass(frozen=True, slots=True)
class FileSource:
    """Reads files to send, converting where the peer needs it."""

    decoders: DecoderPool
    limits: Limits

    def can_send_as(self, instance: FileInstance, transfer_syntax_uid: str) -> bool:
        """Tell whether the file can leave in that transfer syntax."""
        stored = instance.transfer_syntax_uid
        return stored == transfer_syntax_uid or can_convert(stored, transfer_syntax_uid)

    def dataset(self, instance: FileInstance, transfer_syntax_uid: str) -> ByteStream:
        """Return the data set of the file."""
        stored = instance.transfer_syntax_uid
        length = instance.size - instance.dataset_offset
        if transfer_syntax_uid == stored:
            return ByteStream(length, _chunks(instance), stored)
        if length > self.limits.inflated_bytes:
            raise TooLarge("inflated_bytes", self.limits.inflated_bytes)
        body = to_syntax(
            b"".join(_chunks(instance)),
            stored,
            transfer_syntax_uid,
            self.decoders,
            self.limits,
        )
        return ByteStream(
            len(body), iter((body,)), transfer_syntax_uid, transcoded=True
        )


def _chunks(instance: FileInstance) -> Iterator[bytes]:
    try:
        with instance.path.open("rb") as stream:
            stream.seek(instance.dataset_offset)
            while chunk := stream.read(CHUNK):
                yield chunk
    except OSError as error:
        raise Unavailable(f"{instance.path}: {error.strerror}") from error


def files_to_send(
    paths: Iterable[Path], skipped: Callable[[Path], None]
) -> Iterator[FileInstance]:
    """Yield the DICOM files among files and folders, in order of their paths.

    Raises
    ------
    NotFound
        One of `paths` does not exist.
    """
    for given in paths:
        if not given.exists():
            raise NotFound(f"no such file: {given}")
        for path in sorted(_walk(given)) if given.is_dir() else (given,):
            found = _described(path)
            if found is None:
                skipped(path)
            else:
                yield found


def _walk(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)


def _described(path: Path) -> FileInstance | None:
    try:
        with path.open("rb") as stream:
            head = stream.read(PREAMBLE + MAX_FILE_META)
        meta = read_file_meta(head)
        size = path.stat().st_size
    except (OSError, InvalidInput):
        return None
    if meta is None or not (meta.sop_class_uid and meta.sop_instance_uid):
        return None
    return FileInstance(
        path,
        meta.sop_class_uid,
        meta.sop_instance_uid,
        meta.transfer_syntax_uid,
        meta.dataset_offset,
        size,
        _study_of(path),
    )


def _study_of(path: Path) -> str:
    """Return the Study Instance UID (0020,000D) of a file; empty: none can be read."""
    from pydicom import dcmread

    try:
        ds = dcmread(path, stop_before_pixels=True, specific_tags=[0x0020000D])
        return str(ds.get("StudyInstanceUID", ""))[:64]
    except Exception:  # noqa: BLE001  # whatever a file holds, it may be sent
        return ""


@dataclass(slots=True)
class SendReport:
    """What became of the instances.

    Attributes
    ----------
    failed : list of (SOP Instance UID, reason)
    """

    sent: int = 0
    noted: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)

    def count(self, sop_instance_uid: str, fate: Fate, reason: str) -> None:
        """Note one instance."""
        if fate in {Fate.STORED, Fate.NOTED}:
            self.sent += 1
            self.noted += fate is Fate.NOTED
        else:
            self.failed.append((sop_instance_uid, reason))


def send_with_attempts(
    source: Source[T],
    open_association: Callable[[Sequence[Wanted]], RemoteAssociation],
    instances: Sequence[T],
    *,
    told: Callable[[T, Fate, str], None],
) -> SendReport:
    """Send `instances`; try again what may pass, with pauses that double.

    Parameters
    ----------
    told : callable
        Called with each instance once it is known what became of it.
    """
    report = SendReport()
    undone = dict(enumerate(instances))
    numbers = {id(one): number for number, one in undone.items()}
    reasons: dict[int, str] = {}

    def done(instance: T, status: int | None, reason: str) -> None:
        fate = fate_of(status, reason)
        why = reason or f"status {status:04X}"
        number = numbers[id(instance)]
        if fate is Fate.RETRY:
            reasons[number] = why
            return
        del undone[number]
        report.count(instance.sop_instance_uid, fate, why)
        told(instance, fate, why)

    failure = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
        try:
            deliver(
                source,
                open_association,
                list(undone.values()),
                done=done,
                proceed=lambda: True,
            )
        except DependencyDown as error:
            failure = str(error)
        if not undone:
            return report
    for number, one in undone.items():
        why = reasons.get(number, failure)
        report.count(one.sop_instance_uid, Fate.RETRY, why)
        told(one, Fate.RETRY, why)
    return report
