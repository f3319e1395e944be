"""Giving stored instances back: the only way out for every protocol.

C-MOVE, C-GET, WADO-RS, forwarding and the file route select instances here and
stream their bytes. A reader that loses its pack (sealed, rewritten, deleted
meanwhile) looks the location up once more.
"""

from __future__ import annotations

import gzip
import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import select

from pacs.domain.study import ByteStream, Level, StoredInstance
from pacs.imaging import syntaxes
from pacs.imaging.codecs import DecoderPool, DecodeSpec
from pacs.imaging.dataset import Scan, inflate, scan
from pacs.imaging.dicomjson import instance_json, value_at
from pacs.imaging.frames import FrameTable, frame_ranges
from pacs.imaging.part10 import file_meta
from pacs.imaging.transcode import can_convert, native_frame, to_syntax
from pacs.repository import locate
from pacs.repository.tables import Series, SeriesMetadata
from storage.db.engine import Database
from storage.kernel.errors import (
    Gone,
    NotFound,
    TooLarge,
    UnsupportedTransferSyntax,
)
from storage.kernel.limits import MIB, Limits
from storage.kernel.types import Actor
from storage.packs.reader import PackGone, PackReader

EXPLICIT_LE = "1.2.840.10008.1.2.1"
IMPLICIT_LE = "1.2.840.10008.1.2"
BIG_ENDIAN = "1.2.840.10008.1.2.2"

CHUNK = 1 * MIB
#: Larger metadata bundles are built for each request instead of being kept.
MAX_KEPT_METADATA = 32 * MIB


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame as it leaves."""

    data: bytes
    transfer_syntax_uid: str


@dataclass(frozen=True, slots=True)
class MetadataBody:
    """The metadata of a series: a gzip-compressed JSON array and its entity tag."""

    etag: str
    gzip_body: bytes


@dataclass(frozen=True, slots=True)
class BulkData:
    """The value of one element."""

    vr: str
    mime_type: str
    data: ByteStream


class RetrieveService:
    """Select stored instances and read them.

    Parameters
    ----------
    database : Database
    reader : PackReader
    decoders : DecoderPool
        Bounded worker processes for everything that is not a plain copy.
    limits : Limits
    """

    def __init__(
        self,
        *,
        database: Database,
        reader: PackReader,
        decoders: DecoderPool,
        limits: Limits,
    ) -> None:
        self._database = database
        self._reader = reader
        self._decoders = decoders
        self._limits = limits

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
            Patient ID, Study, Series, SOP Instance UID (PS3.4 C.4.2.1.4.1).
        """
        with self._database.read() as connection:
            return locate.by_keys(
                connection,
                actor,
                patient_ids=keys.get(0x00100020, ()),
                study_uids=keys.get(0x0020000D, ()),
                series_uids=keys.get(0x0020000E, ()) if level != Level.STUDY else (),
                instance_uids=keys.get(0x00080018, ()) if level == Level.IMAGE else (),
            )

    def can_send_as(self, instance: StoredInstance, transfer_syntax_uid: str) -> bool:
        """Tell whether the instance can leave in that transfer syntax."""
        stored = instance.transfer_syntax_uid
        return stored == transfer_syntax_uid or can_convert(stored, transfer_syntax_uid)

    def read_object(self, instance: StoredInstance, offset: int, length: int) -> bytes:
        """Return a range of the Part-10 object exactly as stored."""
        length = max(0, min(length, instance.object_length - offset))
        try:
            return self._read(instance, offset, length)
        except PackGone:
            return self._read(self._again(instance), offset, length)

    def _read(self, instance: StoredInstance, offset: int, length: int) -> bytes:
        return self._reader.read(
            instance.pack_key, instance.object_offset + offset, length
        )

    def _again(self, instance: StoredInstance) -> StoredInstance:
        with self._database.read() as connection:
            found = locate.again(connection, instance)
        if found is None:
            raise Gone("deleted while being read")
        return found

    def _iter_object(
        self, instance: StoredInstance, offset: int, length: int
    ) -> Iterator[bytes]:
        while length > 0:
            chunk = self.read_object(instance, offset, min(CHUNK, length))
            yield chunk
            offset += len(chunk)
            length -= len(chunk)

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
                self._iter_object(instance, 0, instance.object_length),
                stored,
            )
        target = str(transfer_syntax_uid)
        body = self._converted(instance, target)
        head = file_meta(instance.sop_class_uid, instance.sop_instance_uid, target)
        return ByteStream(
            len(head) + len(body), _chunked((head, body)), target, transcoded=True
        )

    def dataset(self, instance: StoredInstance, transfer_syntax_uid: str) -> ByteStream:
        """Return the data set without File Meta, as DIMSE sends it."""
        start = instance.dataset_offset
        if transfer_syntax_uid == instance.transfer_syntax_uid:
            length = instance.object_length - start
            return ByteStream(
                length,
                self._iter_object(instance, start, length),
                transfer_syntax_uid,
            )
        body = self._converted(instance, transfer_syntax_uid)
        return ByteStream(
            len(body), _chunked((body,)), transfer_syntax_uid, transcoded=True
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

    def _dataset_bytes(self, instance: StoredInstance) -> bytes:
        start = instance.dataset_offset
        return self.read_object(instance, start, instance.object_length - start)

    def frame_count(self, instance: StoredInstance) -> int:
        """Return how many frames can be asked for; 0 without pixel data."""
        return len(self._frames(instance).table)

    def frame(
        self,
        instance: StoredInstance,
        number: int,
        transfer_syntax_uid: str | None = None,
    ) -> Frame:
        """Return one frame, as stored or decoded to little endian.

        Parameters
        ----------
        number : int
            From 1.
        transfer_syntax_uid : str, optional
            None for as stored.

        Raises
        ------
        NotFound
            No such frame, or its bytes are not all there.
        UnsupportedTransferSyntax
        """
        source = self._frames(instance)
        data = b"".join(
            source.read(offset, length)
            for offset, length in source.table.ranges(number)
        )
        stored = instance.transfer_syntax_uid
        syntax = syntaxes.get(stored)
        if transfer_syntax_uid in {None, stored} and not syntax.deflated:
            if stored == IMPLICIT_LE:
                return Frame(data, EXPLICIT_LE)
            if stored != BIG_ENDIAN:
                return Frame(data, stored)
        if transfer_syntax_uid not in {None, EXPLICIT_LE, IMPLICIT_LE}:
            raise UnsupportedTransferSyntax(
                f"cannot convert {stored} to {transfer_syntax_uid}"
            )
        found = source.scan or self._header_scan(instance)
        return Frame(
            native_frame(data, stored, DecodeSpec.from_scan(found), self._decoders),
            EXPLICIT_LE,
        )

    def _frames(self, instance: StoredInstance) -> _FrameSource:
        """Find where the frames of an instance are, at the least cost."""
        syntax = syntaxes.get(instance.transfer_syntax_uid)
        start = instance.dataset_offset
        if syntax.deflated:
            body = inflate(memoryview(self._dataset_bytes(instance)), self._limits)
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
            body = self._dataset_bytes(instance)
            found = scan(body, 0, len(body), instance.transfer_syntax_uid, self._limits)
            table = frame_ranges(found, instance.number_of_frames or 1)
            return _FrameSource(table, read, found)
        return _FrameSource(
            FrameTable.native(
                instance.pixel_offset - start,
                self._pixel_length(instance),
                frames=instance.number_of_frames or 1,
                rows=instance.rows,
                columns=instance.columns,
                samples=instance.samples,
                bits_allocated=instance.bits_allocated,
            ),
            read,
            None,
        )

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
            body = inflate(memoryview(self._dataset_bytes(instance)), self._limits)
            return instance_json(body, 0, len(body), syntax_uid, bulkdata_prefix=prefix)
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
        with self._database.read() as connection:
            found = locate.instances(
                connection, actor, study_uid=study_uid, series_uid=series_uid
            )
            if not found:
                raise NotFound("no such series")
            series_pk = found[0].series_pk
            revision = connection.execute(
                select(Series.revision).where(Series.id == series_pk)
            ).scalar_one()
            kept = connection.execute(
                select(SeriesMetadata.etag, SeriesMetadata.gzip_body).where(
                    SeriesMetadata.series_pk == series_pk,
                    SeriesMetadata.revision == revision,
                )
            ).first()
        if kept is not None:
            return MetadataBody(kept[0], kept[1])
        return self._build_metadata(found, series_pk, revision)

    def _build_metadata(
        self, found: Sequence[StoredInstance], series_pk: int, revision: int
    ) -> MetadataBody:
        body = b"[" + b",".join(map(self.metadata, found)) + b"]"
        etag = hashlib.sha256(body).hexdigest()[:32]
        packed = gzip.compress(body, 1, mtime=0)
        if len(packed) <= MAX_KEPT_METADATA:
            with self._database.ingest() as connection:
                connection.execute(
                    SeriesMetadata.__table__.delete().where(  # type: ignore[attr-defined]
                        SeriesMetadata.series_pk == series_pk
                    )
                )
                present = connection.execute(
                    select(Series.id).where(
                        Series.id == series_pk, Series.revision == revision
                    )
                ).first()
                if present is not None:
                    connection.execute(
                        SeriesMetadata.__table__.insert(),  # type: ignore[attr-defined]
                        {
                            "series_pk": series_pk,
                            "revision": revision,
                            "etag": etag,
                            "gzip_body": packed,
                        },
                    )
        return MetadataBody(etag, packed)

    def bulkdata(self, instance: StoredInstance, path: str) -> BulkData:
        """Return the value of the element at `path` (``tag`` or ``tag/item/tag``).

        Raises
        ------
        NotFound
            There is no such element, or it has no bytes.
        """
        offset = instance.pixel_offset
        syntax = syntaxes.get(instance.transfer_syntax_uid)
        native = not (syntax.encapsulated or syntax.deflated)
        if path.upper() == "7FE00010" and offset is not None and native:
            length = self._pixel_length(instance)
            stream = ByteStream(
                length, self._iter_object(instance, offset, length), EXPLICIT_LE
            )
            return BulkData("OW", "application/octet-stream", stream)
        body: bytes | memoryview = self._dataset_bytes(instance)
        if syntax.deflated:
            body = inflate(memoryview(body), self._limits)
        vr, value = value_at(body, 0, len(body), instance.transfer_syntax_uid, path)
        mime = "application/octet-stream"
        if path == "00420011":
            mime = self._document_type(body, instance)
        data = bytes(value)
        return BulkData(
            vr,
            mime,
            ByteStream(len(data), _chunked((data,)), instance.transfer_syntax_uid),
        )

    def _document_type(self, body: bytes | memoryview, instance: StoredInstance) -> str:
        """Return MIME Type of Encapsulated Document (0042,0012) if it is one."""
        found = scan(body, 0, len(body), instance.transfer_syntax_uid, self._limits)
        raw = bytes(found.values.get(0x00420012, b"")).strip(b" \0")
        text = raw.decode("ascii", "replace")
        main, _, sub = text.partition("/")
        legal = main.isalnum() and sub.replace("+", "").replace("-", "").isalnum()
        return text if legal else "application/octet-stream"


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


def _chunked(parts: Iterable[bytes]) -> Iterator[bytes]:
    for part in parts:
        view = memoryview(part)
        for start in range(0, len(view), CHUNK):
            yield bytes(view[start : start + CHUNK])
