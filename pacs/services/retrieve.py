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

from pacs.domain.study import ByteStream, Level, StoredInstance
from pacs.imaging import syntaxes
from pacs.imaging.codecs import DecoderPool, DecodeSpec
from pacs.imaging.dataset import Scan, inflate, scan
from pacs.imaging.dicomjson import instance_json, value_at
from pacs.imaging.frames import FrameTable, frame_ranges
from pacs.imaging.part10 import file_meta
from pacs.imaging.transcode import can_convert, native_frame, to_syntax
from pacs.repository import locate
from pacs.services.metadata import MetadataBody, SeriesBundles
from pacs.services.sources import ByteSource, LazyBytes, chunked, spliced
from pacs.services.stored import StoredObjects
from storage.db.engine import Database
from storage.kernel.errors import (
    NotFound,
    TooLarge,
    UnsupportedTransferSyntax,
)
from storage.kernel.limits import Limits
from storage.kernel.types import Actor
from storage.packs.reader import PackReader

EXPLICIT_LE = "1.2.840.10008.1.2.1"
IMPLICIT_LE = "1.2.840.10008.1.2"
BIG_ENDIAN = "1.2.840.10008.1.2.2"

OCTETS = "application/octet-stream"
#: Locations one process remembers.
MAX_REMEMBERED = 4096


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
    """

    def __init__(
        self,
        *,
        database: Database,
        reader: PackReader,
        decoders: DecoderPool,
        limits: Limits,
        on_corrupt: Callable[[], None] | None = None,
    ) -> None:
        self._database = database
        self._objects = StoredObjects(database, reader, on_corrupt)
        self._decoders = decoders
        self._limits = limits
        self._bundles = SeriesBundles(database, self.metadata)
        self._remembered: OrderedDict[
            tuple[tuple[str, ...], str, str, str], StoredInstance
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
        key = (actor.tenants, study_uid, series_uid, instance_uid)
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
        return stored == transfer_syntax_uid or can_convert(stored, transfer_syntax_uid)

    def read_object(self, instance: StoredInstance, offset: int, length: int) -> bytes:
        """Return a range of the Part-10 object exactly as stored, unchecked."""
        return self._objects.read(instance, offset, length)

    def part10(
        self, instance: StoredInstance, transfer_syntax_uid: str | None = None
    ) -> ByteStream:
        """Return the object as a Part-10 file, as stored or converted.

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
        body = self._converted(instance, target)
        head = file_meta(instance.sop_class_uid, instance.sop_instance_uid, target)
        return ByteStream(
            len(head) + len(body), chunked((head, body)), target, transcoded=True
        )

    def open_object(
        self, instance: StoredInstance, transfer_syntax_uid: str | None = None
    ) -> ByteSource:
        """Return the Part-10 object for reading anywhere; as `part10` otherwise."""
        stored = instance.transfer_syntax_uid
        if transfer_syntax_uid not in {None, stored}:
            stream = self.part10(instance, transfer_syntax_uid)
            data = b"".join(stream.chunks)
            return ByteSource.of(data, stream.transfer_syntax_uid, transcoded=True)

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
        body = self._converted(instance, transfer_syntax_uid)
        return ByteStream(
            len(body), chunked((body,)), transfer_syntax_uid, transcoded=True
        )

    def _converted(self, instance: StoredInstance, target: str) -> bytes:
        if not can_convert(instance.transfer_syntax_uid, target):
            raise UnsupportedTransferSyntax(
                f"cannot convert {instance.transfer_syntax_uid} to {target}"
            )
        if instance.object_length > self._limits.inflated_bytes:
            raise TooLarge("inflated_bytes", self._limits.inflated_bytes)
        return to_syntax(
            self._dataset_bytes(instance),
            instance.transfer_syntax_uid,
            target,
            self._decoders,
            self._limits,
        )

    def _dataset_bytes(self, instance: StoredInstance) -> memoryview:
        return self._objects.whole(instance, instance.dataset_offset)

    def frame_count(self, instance: StoredInstance) -> int:
        """Return how many frames can be asked for; 0 without pixel data."""
        return len(self._frames(instance).table)

    def frame(
        self,
        instance: StoredInstance,
        number: int,
        transfer_syntax_uid: str | None = None,
    ) -> Frame:
        """Return one frame; see `open_frame`."""
        source = self.open_frame(instance, number, transfer_syntax_uid)
        return Frame(source.read(0, source.length), source.transfer_syntax_uid)

    def open_frame(
        self,
        instance: StoredInstance,
        number: int,
        transfer_syntax_uid: str | None = None,
    ) -> ByteSource:
        """Return one frame; see `open_frames`."""
        return self.open_frames(instance, (number,), transfer_syntax_uid)[0]

    def open_frames(
        self,
        instance: StoredInstance,
        numbers: Sequence[int],
        transfer_syntax_uid: str | None = None,
    ) -> list[ByteSource]:
        """Return frames, as stored or decoded to little endian when they are read.

        Parameters
        ----------
        numbers : sequence of int
            From 1, in any order.
        transfer_syntax_uid : str, optional
            None for as stored; but what is not Explicit VR Little Endian only in its
            data set or its byte order comes in that (PS3.18 8.7.3.5.2).

        Raises
        ------
        NotFound
            No such frame, or its bytes are not all there.
        UnsupportedTransferSyntax
        """
        frames = self._frames(instance)
        stored = instance.transfer_syntax_uid
        syntax = syntaxes.get(stored)
        target = transfer_syntax_uid
        if target == stored or target is None:
            target = stored if syntax.encapsulated else EXPLICIT_LE
        if target not in {stored, EXPLICIT_LE, IMPLICIT_LE} or (
            target != stored and not syntax.decodes
        ):
            raise UnsupportedTransferSyntax(f"cannot convert {stored} to {target}")
        ranges = [frames.table.ranges(number) for number in numbers]
        if target == stored or (syntax.little_endian and not syntax.encapsulated):
            return [spliced(frames.read, parts, target) for parts in ranges]
        spec = DecodeSpec.from_scan(frames.scan or self._header_scan(instance))

        def decoded(parts: list[tuple[int, int]]) -> bytes:
            data = b"".join(frames.read(offset, length) for offset, length in parts)
            return native_frame(data, stored, spec, self._decoders)

        sources = []
        for parts in ranges:
            length = sum(size for _, size in parts)
            if syntax.encapsulated:
                length = spec.frame_bytes
            lazy = LazyBytes(partial(decoded, parts), length)
            sources.append(ByteSource(length, lazy.read, EXPLICIT_LE, transcoded=True))
        return sources

    def _frames(self, instance: StoredInstance) -> _FrameSource:
        """Find where the frames of an instance are, at the least cost."""
        syntax = syntaxes.get(instance.transfer_syntax_uid)
        start = instance.dataset_offset
        body: bytes | memoryview
        if syntax.deflated:
            body = inflate(self._dataset_bytes(instance), self._limits)
            found = scan(body, 0, len(body), instance.transfer_syntax_uid, self._limits)
            return _FrameSource(
                frame_ranges(found, instance.number_of_frames or 1),
                lambda offset, length: bytes(body[offset : offset + length]),
                found,
            )

        def read(offset: int, length: int) -> bytes:
            return self.read_object(instance, start + offset, length)

        if instance.pixel_offset is None:
            return _FrameSource(FrameTable.empty(), read, None)
        if syntax.encapsulated:
            with self._database.read() as connection:
                packed = locate.frame_table(connection, instance)
            if packed is not None:
                return _FrameSource(FrameTable.unpack(packed), read, None)
            if instance.object_length > self._limits.inflated_bytes:
                # Bound: fragments that nobody could tell apart are not searched again.
                return _FrameSource(FrameTable.empty(), read, None)
            body = self._dataset_bytes(instance)
            found = scan(body, 0, len(body), instance.transfer_syntax_uid, self._limits)
            table = frame_ranges(found, instance.number_of_frames or 1)
            return _FrameSource(
                table,
                lambda offset, length: bytes(body[offset : offset + length]),
                found,
            )
        length = self._pixel_length(instance)
        n_frames = instance.number_of_frames or 1
        table = FrameTable.native(
            instance.pixel_offset - start,
            length,
            frames=n_frames,
            rows=instance.rows,
            columns=instance.columns,
            samples=instance.samples,
            bits_allocated=instance.bits_allocated,
            subsampled=self._is_subsampled(instance, length, n_frames),
        )
        if instance.transfer_syntax_uid == BIG_ENDIAN and instance.bits_allocated == 8:
            # Only the element itself says whether bytes are swapped in pairs.
            body = self._dataset_bytes(instance)
            found = scan(body, 0, len(body), BIG_ENDIAN, self._limits)
            return _FrameSource(table, read, found)
        return _FrameSource(table, read, None)

    def _is_subsampled(
        self, instance: StoredInstance, length: int, n_frames: int
    ) -> bool:
        """Tell whether native colour is YBR_FULL_422: two samples for each pixel."""
        if instance.samples != 3 or not instance.rows or not instance.columns:
            return False
        pixels = instance.rows * instance.columns * n_frames
        if length >= 3 * pixels * ((instance.bits_allocated or 8) // 8):
            return False
        return self._header_scan(instance).text(0x00280004) == "YBR_FULL_422"

    def _pixel_length(self, instance: StoredInstance) -> int:
        """Return the declared length of native Pixel Data, from its element."""
        offset = instance.pixel_offset or 0
        raw = self.read_object(instance, offset - 4, 4)
        order = ">I" if instance.transfer_syntax_uid == BIG_ENDIAN else "<I"
        declared = int(struct.unpack(order, raw)[0])
        return min(declared, instance.object_length - offset)

    def _header_scan(self, instance: StoredInstance) -> Scan:
        """Scan what lies before Pixel Data."""
        start = instance.dataset_offset
        head = self.read_object(instance, start, instance.header_end - start)
        syntax = syntaxes.get(instance.transfer_syntax_uid)
        uid = instance.transfer_syntax_uid
        return scan(
            head,
            0,
            len(head),
            EXPLICIT_LE if syntax.encapsulated else uid,
            self._limits,
        )

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

        return ByteSource(self._pixel_length(instance), read, EXPLICIT_LE)

    def _document_type(self, body: bytes | memoryview, instance: StoredInstance) -> str:
        """Return MIME Type of Encapsulated Document (0042,0012) if it is one."""
        found = scan(body, 0, len(body), instance.transfer_syntax_uid, self._limits)
        raw = bytes(found.values.get(0x00420012, b"")).strip(b" \0")
        text = raw.decode("ascii", "replace")
        main, _, sub = text.partition("/")
        legal = main.isalnum() and sub.replace("+", "").replace("-", "").isalnum()
        return text if legal else OCTETS


@dataclass(frozen=True, slots=True)
class _FrameSource:
    """Frame ranges, a reader for them, and the scan when one was needed."""

    table: FrameTable
    read: Callable[[int, int], bytes]
    scan: Scan | None


def bulkdata_prefix(instance: StoredInstance) -> str:
    """Return the path under which the bulk data of an instance is found."""
    return (
        f"/dicom-web/studies/{instance.study_instance_uid}"
        f"/series/{instance.series_instance_uid}"
        f"/instances/{instance.sop_instance_uid}/bulkdata"
    )
