"""Giving stored instances back: the only way out for every protocol.

C-MOVE, C-GET, WADO-RS, forwarding and the file route select instances here and
stream their bytes. Whole objects are compared with their checksums on the way; ranges,
single frames and metadata are not (`pacs.services.stored`).
"""

from __future__ import annotations

import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO

from pacs.domain.study import ByteStream, Level, StoredInstance
from pacs.imaging import syntaxes
from pacs.imaging.codecs import DecoderPool
from pacs.imaging.dataset import inflate, scan
from pacs.imaging.dicomjson import instance_json, value_at
from pacs.imaging.encoders import ENCODERS
from pacs.imaging.frames import FrameTable
from pacs.imaging.part10 import file_meta
from pacs.imaging.transcode import can_convert, rewrite
from pacs.repository import locate
from pacs.services.frames import FrameForm, Renditions, StoredFrames, StoredPixels
from pacs.services.metadata import MetadataBody, SeriesBundles
from pacs.services.sources import ByteSource, Spool
from pacs.services.stored import StoredObjects
from storage.db.engine import Database
from storage.kernel.errors import (
    NotFound,
    TooLarge,
    UnsupportedTransferSyntax,
)
from storage.kernel.limits import Limits
from storage.kernel.types import Actor, Scope
from storage.packs.reader import PackReader

EXPLICIT_LE = "1.2.840.10008.1.2.1"
IMPLICIT_LE = "1.2.840.10008.1.2"
BIG_ENDIAN = "1.2.840.10008.1.2.2"

OCTETS = "application/octet-stream"
#: Locations one process remembers.
MAX_REMEMBERED = 4096


Check = Callable[[], None]
"""Raises when nobody waits any more."""


def _nothing() -> None:
    """Somebody always waits."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame as it leaves."""

    data: bytes
    transfer_syntax_uid: str


@dataclass(frozen=True, slots=True)
class BulkData:
    """The value of one element."""

    vr: str
    mime_type: str
    source: ByteSource


class RetrieveService:
    """Select stored instances and read them.

    Parameters
    ----------
    database : Database
    reader : PackReader
    decoders : DecoderPool
        Bounded worker processes for everything that is not a plain copy.
    limits : Limits
    on_corrupt : callable, optional
        Called when an object is found damaged.
    renditions : Renditions, optional
        Frames that have been encoded before.
    """

    def __init__(
        self,
        *,
        database: Database,
        reader: PackReader,
        decoders: DecoderPool,
        limits: Limits,
        on_corrupt: Callable[[], None] | None = None,
        renditions: Renditions | None = None,
    ) -> None:
        self._database = database
        self._objects = StoredObjects(database, reader, on_corrupt)
        self._decoders = decoders
        self._limits = limits
        self._frames = StoredFrames(
            database, self._objects, decoders, limits, renditions
        )
        self._bundles = SeriesBundles(database, self.metadata, self._frames.table)
        self._remembered: OrderedDict[
            tuple[tuple[str, ...], Scope | None, str, str, str], StoredInstance
        ] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def limits(self) -> Limits:
        """What one request may cost."""
        return self._limits

    def instances(
        self,
        actor: Actor,
        study_uid: str,
        series_uid: str | None = None,
        instance_uid: str | None = None,
    ) -> list[StoredInstance]:
        """Return what the UIDs name together, in presentation order.

        Raises
        ------
        NotFound
            Nothing, or nothing that this actor may know of.
        """
        with self._database.read() as connection:
            found = locate.instances(
                connection,
                actor,
                study_uid=study_uid,
                series_uid=series_uid,
                instance_uid=instance_uid,
            )
        if not found:
            raise NotFound("no such study, series or instance")
        return found

    def instance(
        self, actor: Actor, study_uid: str, series_uid: str, instance_uid: str
    ) -> StoredInstance:
        """Return one instance; the place of one asked for lately is remembered.

        Raises
        ------
        NotFound
        """
        key = (actor.tenants, actor.scope, study_uid, series_uid, instance_uid)
        with self._lock:
            known = self._remembered.get(key)
            if known is not None:
                self._remembered.move_to_end(key)
        if known is not None:
            # A short look by key instead of the joins: it may have been deleted.
            with self._database.read() as connection:
                if locate.is_present(connection, known):
                    return known
        try:
            found = self.instances(actor, study_uid, series_uid, instance_uid)
        except NotFound:
            with self._lock:
                self._remembered.pop(key, None)
            raise
        best = min(found, key=lambda stored: stored.tenant != actor.tenant)
        with self._lock:
            self._remembered[key] = best
            if len(self._remembered) > MAX_REMEMBERED:
                self._remembered.popitem(last=False)
        return best

    def find_instance(self, actor: Actor, sop_instance_uid: str) -> StoredInstance:
        """Return one instance by its UID alone; the actor's own tenant first."""
        with self._database.read() as connection:
            found = locate.instances(connection, actor, instance_uid=sop_instance_uid)
        if not found:
            raise NotFound("no such instance")
        return min(found, key=lambda stored: stored.tenant != actor.tenant)

    def select(
        self, actor: Actor, level: Level, keys: Mapping[int, Sequence[str]]
    ) -> list[StoredInstance]:
        """Return the instances under the unique keys of a retrieve identifier.

        Parameters
        ----------
        keys : mapping of tag to values
            Patient ID and its issuer, Study, Series, SOP Instance UID (PS3.4
            C.4.2.1.4.1).
        """
        with self._database.read() as connection:
            return locate.by_keys(
                connection,
                actor,
                patient_ids=keys.get(0x00100020, ()),
                issuers=keys.get(0x00100021, ()),
                study_uids=keys.get(0x0020000D, ()),
                series_uids=keys.get(0x0020000E, ()) if level != Level.STUDY else (),
                instance_uids=keys.get(0x00080018, ()) if level == Level.IMAGE else (),
            )

    def can_send_as(self, instance: StoredInstance, transfer_syntax_uid: str) -> bool:
        """Tell whether the instance can leave in that transfer syntax."""
        stored = instance.transfer_syntax_uid
        if stored == transfer_syntax_uid:
            return True
        if not can_convert(stored, transfer_syntax_uid):
            return False
        if transfer_syntax_uid not in ENCODERS:
            return True
        return self._frames.can_encode(instance, transfer_syntax_uid)

    def read_object(self, instance: StoredInstance, offset: int, length: int) -> bytes:
        """Return a range of the Part-10 object exactly as stored, unchecked."""
        return self._objects.read(instance, offset, length)

    def part10(
        self,
        instance: StoredInstance,
        transfer_syntax_uid: str | None = None,
        check: Check = _nothing,
    ) -> ByteStream:
        """Return the object as a Part-10 file, as stored or converted.

        Parameters
        ----------
        check : callable
            Raises when nobody waits any more; a conversion stops then.

        Raises
        ------
        UnsupportedTransferSyntax
            It cannot be converted to what is asked for.
        """
        stored = instance.transfer_syntax_uid
        if transfer_syntax_uid in {None, stored}:
            return ByteStream(
                instance.object_length,
                self._objects.chunks(instance),
                stored,
            )
        target = str(transfer_syntax_uid)
        made = self._file_in(instance, target, check)
        return ByteStream(made.length, made.chunks(), target, transcoded=True)

    def _file_in(self, instance: StoredInstance, target: str, check: Check) -> Spool:
        head = file_meta(instance.sop_class_uid, instance.sop_instance_uid, target)
        return self._converted(instance, target, head, check)

    def open_object(
        self,
        instance: StoredInstance,
        transfer_syntax_uid: str | None = None,
        check: Check = _nothing,
    ) -> ByteSource:
        """Return the Part-10 object for reading anywhere; as `part10` otherwise."""
        stored = instance.transfer_syntax_uid
        if transfer_syntax_uid not in {None, stored}:
            target = str(transfer_syntax_uid)
            made = self._file_in(instance, target, check)
            return ByteSource(made.length, made.read, target, transcoded=True)

        def read(offset: int, length: int) -> bytes:
            if (offset, length) == (0, instance.object_length):
                return bytes(self._objects.whole(instance))
            return self.read_object(instance, offset, length)

        return ByteSource(
            instance.object_length,
            read,
            stored,
            whole=partial(self._objects.chunks, instance),
        )

    def dataset(self, instance: StoredInstance, transfer_syntax_uid: str) -> ByteStream:
        """Return the data set without File Meta, as DIMSE sends it."""
        start = instance.dataset_offset
        if transfer_syntax_uid == instance.transfer_syntax_uid:
            return ByteStream(
                instance.object_length - start,
                self._objects.chunks(instance, start),
                transfer_syntax_uid,
            )
        made = self._converted(instance, transfer_syntax_uid, b"", _nothing)
        return ByteStream(
            made.length, made.chunks(), transfer_syntax_uid, transcoded=True
        )

    def _converted(
        self, instance: StoredInstance, target: str, head: bytes, check: Check
    ) -> Spool:
        """Return `head` and the data set in another transfer syntax."""
        if not can_convert(instance.transfer_syntax_uid, target):
            raise UnsupportedTransferSyntax(
                f"cannot convert {instance.transfer_syntax_uid} to {target}"
            )
        if instance.object_length > self._limits.inflated_bytes:
            raise TooLarge("inflated_bytes", self._limits.inflated_bytes)
        made = Spool(self._limits.conversion_memory)

        def write(out: IO[bytes]) -> None:
            out.write(head)
            rewrite(
                out,
                self._dataset_bytes(instance),
                instance.transfer_syntax_uid,
                target,
                self._decoders,
                self._limits,
                check,
            )

        made.fill(write)
        return made

    def _dataset_bytes(self, instance: StoredInstance) -> memoryview:
        return self._objects.dataset(instance)

    def frame_count(self, instance: StoredInstance) -> int:
        """Return how many frames can be asked for; 0 without pixel data."""
        return len(self._frames.table(instance))

    def frame(
        self,
        instance: StoredInstance,
        number: int,
        transfer_syntax_uid: str | None = None,
    ) -> Frame:
        """Return one frame; see `frame_forms`."""
        source = self.open_frame(instance, number, transfer_syntax_uid)
        return Frame(source.read(0, source.length), source.transfer_syntax_uid)

    def open_frame(
        self,
        instance: StoredInstance,
        number: int,
        transfer_syntax_uid: str | None = None,
    ) -> ByteSource:
        """Return one frame; see `frame_forms`."""
        return self.open_frames(instance, (number,), transfer_syntax_uid)[0]

    def open_frames(
        self,
        instance: StoredInstance,
        numbers: Sequence[int],
        transfer_syntax_uid: str | None = None,
    ) -> list[ByteSource]:
        """Return frames, opened; see `frame_forms`."""
        forms = self.frame_forms(instance, numbers, transfer_syntax_uid)
        return [form.open() for form in forms]

    def frame_forms(
        self,
        instance: StoredInstance,
        numbers: Sequence[int],
        transfer_syntax_uid: str | None = None,
    ) -> list[FrameForm]:
        """Return frames, as stored, or decoded or encoded when they are opened.

        See `StoredFrames.forms`.

        Raises
        ------
        NotFound
            No such frame, or its bytes are not all there.
        UnsupportedTransferSyntax
        """
        return self._frames.forms(instance, numbers, transfer_syntax_uid)

    def frame_table(self, instance: StoredInstance) -> FrameTable:
        """Return where the frames are, from the first byte of the data set."""
        return self._frames.table(instance)

    def check_frame(self, instance: StoredInstance, number: int) -> None:
        """See that a code stream is what the attributes say, without decoding it."""
        self._frames.check(instance, number)

    def pixels(self, instance: StoredInstance) -> StoredPixels:
        """Return what a picture of an instance is made of; see `StoredFrames`."""
        return self._frames.pixels(instance)

    def metadata(self, instance: StoredInstance) -> bytes:
        """Return the instance's attributes as one JSON object (PS3.18 Annex F)."""
        start = instance.dataset_offset
        syntax_uid = instance.transfer_syntax_uid
        syntax = syntaxes.get(syntax_uid)
        prefix = bulkdata_prefix(instance)
        if syntax.deflated:
            plain = inflate(self._dataset_bytes(instance), self._limits)
            return instance_json(
                plain, 0, len(plain), syntax_uid, bulkdata_prefix=prefix
            )
        head = self.read_object(instance, start, instance.header_end - start)
        text = instance_json(
            head,
            0,
            len(head),
            EXPLICIT_LE if syntax.encapsulated else syntax_uid,
            bulkdata_prefix=prefix,
        )
        if instance.pixel_offset is None:
            return text
        return self._with_pixel_data(instance, text, prefix)

    def _with_pixel_data(
        self, instance: StoredInstance, text: bytes, prefix: str
    ) -> bytes:
        """Append the member of Pixel Data, whose bytes were not read."""
        offset = instance.pixel_offset or 0
        element = self.read_object(
            instance, instance.header_end, offset - instance.header_end
        )
        group, number = struct.unpack_from(
            ">HH" if instance.transfer_syntax_uid == BIG_ENDIAN else "<HH", element
        )
        implicit = instance.transfer_syntax_uid == IMPLICIT_LE
        vr = "OW" if implicit else element[4:6].decode("ascii", "replace")
        tag = f"{group:04X}{number:04X}"
        member = f'"{tag}":{{"vr":"{vr}","BulkDataURI":"{prefix}/{tag}"}}}}'
        comma = b"," if len(text) > 2 else b""
        return text[:-1] + comma + member.encode()

    def series_metadata(
        self, actor: Actor, study_uid: str, series_uid: str
    ) -> MetadataBody:
        """Return the metadata of a whole series, kept ready while it is unchanged."""
        return self._bundles.series(actor, study_uid, series_uid)

    def study_metadata(
        self, actor: Actor, study_uid: str
    ) -> tuple[str, Iterator[bytes]]:
        """Return entity tag and JSON array of the metadata of a study."""
        return self._bundles.study(actor, study_uid)

    def prepare_metadata(self, study_uid: str, tenant: str) -> int:
        """Make the metadata of a settled study ready; return how many series it has."""
        return self._bundles.prepare(study_uid, tenant)

    def bulkdata(self, instance: StoredInstance, path: str) -> BulkData:
        """Return the value of the element at `path` (``tag`` or ``tag/item/tag``).

        Raises
        ------
        NotFound
            There is no such element, or it has no bytes.
        """
        offset = instance.pixel_offset
        syntax = syntaxes.get(instance.transfer_syntax_uid)
        encoded = syntax.encapsulated or syntax.deflated or not syntax.little_endian
        if path.upper() == "7FE00010" and offset is not None and not encoded:
            return BulkData("OW", OCTETS, self._pixel_source(instance, offset))
        if instance.object_length > self._limits.inflated_bytes:
            raise TooLarge("inflated_bytes", self._limits.inflated_bytes)
        body: bytes | memoryview = self._dataset_bytes(instance)
        if syntax.deflated:
            body = inflate(body, self._limits)
        vr, value = value_at(body, 0, len(body), instance.transfer_syntax_uid, path)
        mime = OCTETS
        if path == "00420011":
            mime = self._document_type(body, instance)
        source = ByteSource.of(
            memoryview(value), instance.transfer_syntax_uid, transcoded=False
        )
        return BulkData(vr, mime, source)

    def _pixel_source(self, instance: StoredInstance, start: int) -> ByteSource:
        def read(offset: int, length: int) -> bytes:
            return self.read_object(instance, start + offset, length)

        return ByteSource(self._frames.pixel_length(instance), read, EXPLICIT_LE)

    def _document_type(self, body: bytes | memoryview, instance: StoredInstance) -> str:
        """Return MIME Type of Encapsulated Document (0042,0012) if it is one."""
        found = scan(body, 0, len(body), instance.transfer_syntax_uid, self._limits)
        raw = bytes(found.values.get(0x00420012, b"")).strip(b" \0")
        text = raw.decode("ascii", "replace")
        main, _, sub = text.partition("/")
        legal = main.isalnum() and sub.replace("+", "").replace("-", "").isalnum()
        return text if legal else OCTETS


def bulkdata_prefix(instance: StoredInstance) -> str:
    """Return the path under which the bulk data of an instance is found."""
    return (
        f"/dicom-web/studies/{instance.study_instance_uid}"
        f"/series/{instance.series_instance_uid}"
        f"/instances/{instance.sop_instance_uid}/bulkdata"
    )
