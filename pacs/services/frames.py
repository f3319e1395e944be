"""The frames of stored instances: where they are, and in which forms they can leave."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from pacs.domain.study import StoredInstance
from pacs.imaging import syntaxes
from pacs.imaging.codecs import CODECS, DecoderPool, DecodeSpec, decode_arguments
from pacs.imaging.dataset import Scan, inflate, scan
from pacs.imaging.encoders import ENCODERS, is_encodable
from pacs.imaging.encoding import PIXEL_DATA
from pacs.imaging.frames import FrameTable, frame_ranges
from pacs.imaging.recode import check_encodable, encoded_frame, native_frame
from pacs.repository import locate
from pacs.services.sources import ByteSource, LazyBytes, spliced
from pacs.services.stored import StoredObjects
from storage.db.engine import Database
from storage.kernel.errors import (
    CorruptData,
    Gone,
    TooLarge,
    UnsupportedTransferSyntax,
)
from storage.kernel.limits import Limits

EXPLICIT_LE = syntaxes.EXPLICIT_VR_LE
IMPLICIT_LE = syntaxes.IMPLICIT_VR_LE
BIG_ENDIAN = syntaxes.EXPLICIT_VR_BE


@dataclass(frozen=True, slots=True)
class FrameForm:
    """One frame in one transfer syntax, not read yet.

    Attributes
    ----------
    length : int or None
        Bytes; None when it has to be encoded first.
    open : callable
        Returns its bytes; those that are encoded are encoded now.
    """

    transfer_syntax_uid: str
    length: int | None
    open: Callable[[], ByteSource]

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes, at most 1 MiB at a time."""
        return self.open().chunks()


@dataclass(frozen=True, slots=True)
class _FrameSource:
    """Frame ranges, a reader for them, and the scan when one was needed."""

    table: FrameTable
    read: Callable[[int, int], bytes]
    scan: Scan | None

    def frame(self, parts: Sequence[tuple[int, int]]) -> bytes:
        return b"".join(self.read(offset, length) for offset, length in parts)


@dataclass(frozen=True, slots=True)
class StoredPixels:
    """What a picture of an instance is made of, as stored.

    Attributes
    ----------
    header : bytes
        The data set before the pixels; all of it without any.
    header_syntax, frame_syntax : str
        What header and frames are in; a deflated data set comes inflated.
    pixel_tag : int
        Pixel Data, Float or Double Float Pixel Data; 0 without.
    words : bool
        Native samples of one byte lie in OW.
    table : FrameTable
    read_frame : callable
        Returns the bytes of a frame, by its number from 1.
    """

    header: bytes
    header_syntax: str
    frame_syntax: str
    pixel_tag: int
    words: bool
    table: FrameTable
    read_frame: Callable[[int], bytes]


class Renditions(Protocol):
    """Frames that have been encoded before."""

    def forms(
        self, instance: StoredInstance, numbers: Sequence[int], target: str
    ) -> list[FrameForm] | None:
        """Return frames in `target`; None when there are none of them.

        Opening one raises Gone or CorruptData when it is not what it was.
        """
        ...


class StoredFrames:
    """Finds frames and converts them.

    Parameters
    ----------
    database : Database
    objects : StoredObjects
    decoders : DecoderPool
    limits : Limits
    renditions : Renditions, optional
    """

    def __init__(
        self,
        database: Database,
        objects: StoredObjects,
        decoders: DecoderPool,
        limits: Limits,
        renditions: Renditions | None = None,
    ) -> None:
        self._renditions = renditions
        self._database = database
        self._objects = objects
        self._decoders = decoders
        self._limits = limits

    def can_encode(self, instance: StoredInstance, target: str) -> bool:
        """Tell whether there is an encoder for the frames of an instance."""
        if instance.pixel_offset is None or not is_encodable(
            target,
            bits_allocated=instance.bits_allocated or 0,
            samples=instance.samples or 1,
        ):
            return False
        try:
            spec = self.spec(instance)
            check_encodable(instance.transfer_syntax_uid, target, spec)
        except UnsupportedTransferSyntax:
            return False
        # Float and Double Float Pixel Data are as long as integers (PS3.3 C.7.6.24).
        return spec.bits_allocated <= 16 or self._pixel_tag(instance) == PIXEL_DATA

    def spec(self, instance: StoredInstance) -> DecodeSpec:
        """Return what the attributes say about the frames.

        Raises
        ------
        MalformedObject
        """
        uid = instance.transfer_syntax_uid
        if syntaxes.get(uid).deflated:
            body = inflate(self._objects.dataset(instance), self._limits)
            return DecodeSpec.from_scan(scan(body, 0, len(body), uid, self._limits))
        return DecodeSpec.from_scan(self._header_scan(instance))

    def table(self, instance: StoredInstance) -> FrameTable:
        """Return where the frames are, from the first byte of the data set.

        Empty without pixel data. Of deflated data sets it counts inflated bytes.
        """
        return self._source(instance).table

    def forms(
        self,
        instance: StoredInstance,
        numbers: Sequence[int],
        transfer_syntax_uid: str | None = None,
    ) -> list[FrameForm]:
        """Return frames, as stored, or decoded or encoded when they are opened.

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
        source = self._source(instance)
        stored = instance.transfer_syntax_uid
        syntax = syntaxes.get(stored)
        target = transfer_syntax_uid
        if target == stored or target is None:
            target = stored if syntax.encapsulated else EXPLICIT_LE
        if target not in {stored, EXPLICIT_LE, IMPLICIT_LE, *ENCODERS} or (
            target != stored and not syntax.decodes
        ):
            raise UnsupportedTransferSyntax(f"cannot convert {stored} to {target}")
        ranges = [source.table.ranges(number) for number in numbers]
        plain = syntax.little_endian and not syntax.encapsulated
        if target == stored or (plain and target not in ENCODERS):
            return [
                _form(spliced(source.read, parts, target), target) for parts in ranges
            ]
        spec = DecodeSpec.from_scan(source.scan or self._header_scan(instance))
        if spec.frame_bytes > self._limits.inflated_bytes:
            # Before its length is told: no such frame is ever decoded.
            raise TooLarge("inflated_bytes", self._limits.inflated_bytes)
        if target in ENCODERS:
            check_encodable(stored, target, spec)
            made = [
                partial(self._encoded, source, parts, stored, target, spec)
                for parts in ranges
            ]
            kept = None
            if self._renditions is not None:
                kept = self._renditions.forms(instance, numbers, target)
            if kept is None:
                return [FrameForm(target, None, make) for make in made]
            return [
                FrameForm(target, form.length, partial(_opened, form, make))
                for form, make in zip(kept, made, strict=True)
            ]
        forms = []
        for parts in ranges:
            length = sum(size for _, size in parts)
            if syntax.encapsulated:
                length = spec.frame_bytes
            lazy = LazyBytes(partial(self._native, source, parts, stored, spec), length)
            native = ByteSource(length, lazy.read, EXPLICIT_LE, transcoded=True)
            forms.append(_form(native, EXPLICIT_LE))
        return forms

    def check(self, instance: StoredInstance, number: int) -> None:
        """See that a code stream is what the attributes say, without decoding it.

        Raises
        ------
        NotFound, MalformedObject
        """
        codec = CODECS.get(instance.transfer_syntax_uid)
        if codec is None:
            return
        source = self._source(instance)
        spec = DecodeSpec.from_scan(source.scan or self._header_scan(instance))
        decode_arguments(codec, source.frame(source.table.ranges(number)), spec)

    def pixels(self, instance: StoredInstance) -> StoredPixels:
        """Return what a picture is made of; frames are read one by one.

        Raises
        ------
        MalformedObject, TooLarge
        """
        source = self._source(instance)
        uid = instance.transfer_syntax_uid
        syntax = syntaxes.get(uid)
        if syntax.deflated and source.scan is not None:
            body, begin = source.scan.buffer, source.scan.header_end
            head, uid = bytes(body[:begin]), EXPLICIT_LE
            element = bytes(body[begin : begin + 8])
        else:
            # With the header of the pixel element behind it.
            start = instance.dataset_offset
            stop = instance.pixel_offset or instance.header_end
            data = self._objects.read(instance, start, stop - start)
            cut = instance.header_end - start
            head, element = data[:cut], data[cut : cut + 8]
        order = "<HH" if syntax.little_endian else ">HH"
        tag = 0
        if len(element) == 8:
            group, number = struct.unpack_from(order, element)
            tag = group << 16 | number

        words = syntax.explicit and element[4:6] == b"OW"
        # Samples of one byte in words of the other order: the padding holds the last.
        padded = words and not syntax.little_endian and len(source.table) == 1

        def read_frame(number: int) -> bytes:
            parts = source.table.ranges(number)
            if padded:
                parts = [(at, size + size % 2) for at, size in parts]
            return source.frame(parts)

        return StoredPixels(
            head,
            EXPLICIT_LE if syntax.encapsulated else uid,
            uid,
            tag,
            words,
            source.table,
            read_frame,
        )

    def _native(
        self,
        source: _FrameSource,
        parts: Sequence[tuple[int, int]],
        stored: str,
        spec: DecodeSpec,
    ) -> bytes:
        return native_frame(partial(source.frame, parts), stored, spec, self._decoders)

    def _encoded(
        self,
        source: _FrameSource,
        parts: Sequence[tuple[int, int]],
        stored: str,
        target: str,
        spec: DecodeSpec,
    ) -> ByteSource:
        data = encoded_frame(
            partial(source.frame, parts), stored, target, spec, self._decoders
        )
        return ByteSource.of(data, target, transcoded=True)

    def _source(self, instance: StoredInstance) -> _FrameSource:
        """Find where the frames of an instance are, at the least cost."""
        uid = instance.transfer_syntax_uid
        syntax = syntaxes.get(uid)
        start = instance.dataset_offset
        n_frames = instance.number_of_frames or 1
        if syntax.deflated:
            whole = inflate(self._objects.dataset(instance), self._limits)
            found = scan(whole, 0, len(whole), uid, self._limits)
            return _FrameSource(frame_ranges(found, n_frames), _reader(whole), found)

        def read(offset: int, length: int) -> bytes:
            return self._objects.read(instance, start + offset, length)

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
            body = self._objects.dataset(instance)
            found = scan(body, 0, len(body), uid, self._limits)
            return _FrameSource(frame_ranges(found, n_frames), _reader(body), found)
        length = self.pixel_length(instance)
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
        if uid == BIG_ENDIAN and instance.bits_allocated == 8:
            # Only the element itself says whether bytes are swapped in pairs.
            body = self._objects.dataset(instance)
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

    def pixel_length(self, instance: StoredInstance) -> int:
        """Return the declared length of native Pixel Data, from its element."""
        offset = instance.pixel_offset or 0
        raw = self._objects.read(instance, offset - 4, 4)
        order = ">I" if instance.transfer_syntax_uid == BIG_ENDIAN else "<I"
        declared = int(struct.unpack(order, raw)[0])
        return min(declared, instance.object_length - offset)

    def _pixel_tag(self, instance: StoredInstance) -> int:
        raw = self._objects.read(instance, instance.header_end, 4)
        order = ">HH" if instance.transfer_syntax_uid == BIG_ENDIAN else "<HH"
        group, number = struct.unpack(order, raw)
        return int(group) << 16 | int(number)

    def _header_scan(self, instance: StoredInstance) -> Scan:
        """Scan what lies before Pixel Data."""
        start = instance.dataset_offset
        head = self._objects.read(instance, start, instance.header_end - start)
        uid = instance.transfer_syntax_uid
        if syntaxes.get(uid).encapsulated:
            uid = EXPLICIT_LE
        return scan(head, 0, len(head), uid, self._limits)


def _opened(kept: FrameForm, make: Callable[[], ByteSource]) -> ByteSource:
    """Return a frame that was encoded before, or encode it once more."""
    try:
        return kept.open()
    except (Gone, CorruptData):
        source = make()
        if source.length != kept.length:
            # Its length may have been announced already.
            raise
        return source


def _form(source: ByteSource, target: str) -> FrameForm:
    return FrameForm(target, source.length, lambda: source)


def _reader(body: bytes | memoryview) -> Callable[[int, int], bytes]:
    return lambda offset, length: bytes(body[offset : offset + length])
