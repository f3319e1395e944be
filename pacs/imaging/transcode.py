"""Rewriting a data set in another transfer syntax (PS3.5 A.1, A.2, A.4).

One pass of the walker over the stored bytes. Frames are decoded, or encoded without
loss, one after another into the result, and the attributes that describe them follow:
Photometric Interpretation, Planar Configuration; offset tables and group lengths are
left out, since what they count has changed. Lossy Image Compression stays what it was.
Icons are native wherever they come from.

Sequences are written with undefined lengths, which need no second pass.
"""

from __future__ import annotations

import io
import re
import struct
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from typing import IO, Final, Literal

from pacs.imaging import syntaxes
from pacs.imaging.codecs import (
    BITS_ALLOCATED,
    PHOTOMETRIC,
    PIXEL_REPRESENTATION,
    PLANAR,
    DecoderPool,
    DecodeSpec,
)
from pacs.imaging.dataset import Scan, inflate, scan
from pacs.imaging.dicomjson import effective_vr, little_endian
from pacs.imaging.encoders import ENCODERS
from pacs.imaging.encoding import (
    ELEMENT,
    EXPLICIT_LITTLE,
    FRAGMENTS,
    ITEM_START,
    ITEM_STOP,
    LONG_VRS,
    PIXEL_DATA,
    SEQUENCE,
    SEQUENCE_STOP,
    SHORT_VRS,
    Buffer,
    Encoding,
    Event,
    encoding_of,
    read_fragments,
    walk_dataset,
)
from pacs.imaging.frames import FrameTable, frame_ranges
from pacs.imaging.recode import (
    batches,
    check_encodable,
    encoded_frames,
    is_recoded_planar,
    native_frames,
    recoded_photometric,
)
from storage.kernel.errors import (
    DependencyDown,
    MalformedObject,
    TooLarge,
    UnsupportedTransferSyntax,
)
from storage.kernel.limits import Limits

_NATIVE: Final = frozenset((syntaxes.IMPLICIT_VR_LE, syntaxes.EXPLICIT_VR_LE))
_TARGETS: Final = _NATIVE | ENCODERS.keys()
#: Describe encapsulated Pixel Data and mean nothing without it (PS3.5 A.4.1).
_OFFSET_TABLES: Final = frozenset((0x7FE00001, 0x7FE00002, 0x7FE00003))
#: Groups of command sets and File Meta Information.
_FOREIGN: Final = frozenset((0x0000, 0x0002))
_PIXEL_GROUP: Final = 0x0028
NUMBER_OF_FRAMES: Final = 0x00280008
_COUNT: Final = re.compile(r"[0-9]{1,9}\Z")
_MAX_CODE_STRING: Final = 16
_Order = Literal["little", "big"]
_SEQUENCE_END: Final = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
_ITEM_START: Final = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
_ITEM_END: Final = struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
_UNDEFINED: Final = 0xFFFFFFFF
_KNOWN: Final = SHORT_VRS | LONG_VRS
#: The longest value of a VR with a two-byte length.
_MAX_SHORT: Final = 0xFFFE


def can_convert(stored: str, target: str) -> bool:
    """Tell whether objects in `stored` can be rewritten in `target`.

    Whether a codec takes their samples is another question: `check_encodable`.
    """
    if target not in _TARGETS or not syntaxes.is_known(stored):
        return False
    return syntaxes.get(stored).decodes


def to_syntax(
    data: Buffer, stored: str, target: str, decoders: DecoderPool, limits: Limits
) -> bytes:
    """Return a data set, stored in one transfer syntax, in another; see `rewrite`."""
    out = io.BytesIO()
    rewrite(out, data, stored, target, decoders, limits)
    return out.getvalue()


def rewrite(
    out: IO[bytes],
    data: Buffer,
    stored: str,
    target: str,
    decoders: DecoderPool,
    limits: Limits,
    check: Callable[[], None] = lambda: None,
) -> int:
    """Write a data set, stored in one transfer syntax, in another; return its length.

    Parameters
    ----------
    out : binary file
        Can be written anywhere; written from where it stands.
    data : bytes-like
        The data set as stored, without File Meta.
    target : str
        Explicit or Implicit VR Little Endian, or one of `encoders.ENCODERS`.
    check : callable
        Called again and again; raises when nobody waits any more.

    Raises
    ------
    MalformedObject
    TooLarge
        More than `inflated_bytes` or `conversion_frames`.
    DependencyDown
        It took longer than `conversion_seconds`; see `DecoderPool` too.
    UnsupportedTransferSyntax
        There is no decoder or encoder for such frames.
    """
    if not can_convert(stored, target):
        raise UnsupportedTransferSyntax(f"cannot convert {stored} to {target}")
    if syntaxes.get(stored).deflated:
        data = inflate(data, limits)
    began = out.tell()
    written = 0
    rewriter = _Rewriter(data, stored, target, decoders, limits, check)
    for part in rewriter.parts():
        out.write(part)
        written += len(part)
        if written > limits.inflated_bytes:
            raise TooLarge("inflated_bytes", limits.inflated_bytes)
    for position, late in rewriter.late:
        out.seek(began + position)
        out.write(late)
    out.seek(began + written)
    return written


class _Scope:
    """One data set: the top level, or an item.

    Attributes
    ----------
    order : "little" or "big"
        Byte order of its values.
    spec : DecodeSpec or None
        How its Pixel Data is decoded, when that is encapsulated.
    signed : bool
        Pixel Representation is 1.
    bits : int
        Bits Allocated.
    target : str
        What its frames become.
    """

    __slots__ = ("bits", "order", "signed", "spec", "target")

    def __init__(
        self,
        order: _Order,
        spec: DecodeSpec | None,
        *,
        signed: bool,
        target: str = syntaxes.EXPLICIT_VR_LE,
    ) -> None:
        self.order = order
        self.spec = spec
        self.signed = signed
        self.bits = 16
        self.target = target


class _Rewriter:
    def __init__(
        self,
        data: Buffer,
        stored: str,
        target: str,
        decoders: DecoderPool,
        limits: Limits,
        check: Callable[[], None],
    ) -> None:
        #: Where something is to be written over at last, and what.
        self.late: list[tuple[int, bytes]] = []
        self._position = 0
        self._check = check
        self._deadline = time.monotonic() + limits.conversion_seconds
        self._data = memoryview(data)
        self._stored = stored
        self._target = target
        self._explicit = target != syntaxes.IMPLICIT_VR_LE
        self._decoders = decoders
        self._limits = limits
        self._encoding: Encoding = encoding_of(syntaxes.get(stored))
        self._found: Scan = scan(data, 0, len(data), stored, limits)
        pixel = self._found.pixel
        self._icons: dict[int, DecodeSpec] = {}
        self._spec: DecodeSpec | None = None
        encoding = pixel is not None and target in ENCODERS
        if pixel is not None and (pixel.encapsulated or encoding):
            self._spec = DecodeSpec.from_scan(self._found)
        if encoding and self._spec is not None:
            if pixel is not None and pixel.tag != PIXEL_DATA:
                raise UnsupportedTransferSyntax("there is no encoder for floats")
            check_encodable(stored, target, self._spec)
        if syntaxes.get(stored).encapsulated:
            self._icons = self._nested_specs()

    def _walk(self) -> Iterator[Event]:
        return walk_dataset(
            self._data, 0, len(self._data), self._encoding, self._limits
        )

    def _nested_specs(self) -> dict[int, DecodeSpec]:
        """Describe the icons that are encapsulated too, by where their items begin.

        Such a Pixel Data element is a single frame (PS3.3 C.7.6.1.1.6).
        """
        specs: dict[int, DecodeSpec] = {}
        items: list[tuple[int, dict[int, bytes]]] = []
        for kind, tag, _, begin, stop in self._walk():
            if kind == ITEM_START:
                items.append((begin, {}))
            elif kind == ITEM_STOP:
                items.pop()
            elif items and kind == ELEMENT and tag >> 16 == _PIXEL_GROUP:
                if stop - begin <= _MAX_CODE_STRING:
                    items[-1][1].setdefault(tag, bytes(self._data[begin:stop]))
            elif items and kind == FRAGMENTS:
                specs[items[-1][0]] = DecodeSpec.from_values(items[-1][1], "little")
        return specs

    def parts(self) -> Iterator[Buffer]:
        """Yield the new data set in pieces."""
        for part in self._parts():
            self._go_on()
            yield part
            self._position += len(part)

    def _go_on(self) -> None:
        """See that somebody waits, and not for too long."""
        self._check()
        if time.monotonic() > self._deadline:
            seconds = self._limits.conversion_seconds
            raise DependencyDown(f"converting took over {seconds:g} s")

    def _parts(self) -> Iterator[Buffer]:
        signed = self._found.unsigned(PIXEL_REPRESENTATION) == 1
        scope = _Scope(
            self._encoding.order, self._spec, signed=signed, target=self._target
        )
        outer: list[_Scope] = []
        #: Depth inside a sequence that is left out.
        skipping = 0
        for kind, tag, vr, begin, stop in self._walk():
            if skipping:
                skipping += (kind == SEQUENCE) - (kind == SEQUENCE_STOP)
            elif kind == ELEMENT:
                yield from self._element(scope, tag, vr, begin, stop)
            elif kind == SEQUENCE:
                if tag >> 16 in _FOREIGN:
                    skipping = 1
                    continue
                yield self._head(tag, b"SQ", _UNDEFINED)
                outer.append(scope)
                order = "little" if vr == b"UN" else scope.order
                scope = _Scope(order, None, signed=scope.signed)
            elif kind == ITEM_START:
                yield _ITEM_START
                outer.append(scope)
                spec = self._icons.get(begin)
                scope = _Scope(scope.order, spec, signed=scope.signed)
            elif kind == FRAGMENTS:
                yield from self._fragments(scope, begin, stop, top=not outer)
            else:
                yield _ITEM_END if kind == ITEM_STOP else _SEQUENCE_END
                scope = outer.pop()

    def _head(self, tag: int, vr: bytes, length: int) -> bytes:
        group, number = tag >> 16, tag & 0xFFFF
        if not self._explicit:
            return struct.pack("<HHI", group, number, length)
        if vr in SHORT_VRS:
            return struct.pack("<HH2sH", group, number, vr, length)
        return struct.pack("<HH2sxxI", group, number, vr, length)

    def _element(
        self, scope: _Scope, tag: int, vr: bytes, begin: int, stop: int
    ) -> Iterator[Buffer]:
        if tag >> 16 in _FOREIGN or not tag & 0xFFFF:
            return
        if scope.spec is not None and tag in _OFFSET_TABLES:
            return
        if tag == PIXEL_DATA and scope.target in ENCODERS and scope.spec is not None:
            yield from self._encapsulate(scope, vr, begin, stop)
            return
        length = stop - begin
        known = vr if vr in _KNOWN else b"UN"
        if not vr:
            known = self._implied_vr(scope, tag, length)
        value: Buffer = self._data[begin:stop]
        if tag == PIXEL_REPRESENTATION and length == 2:
            scope.signed = int.from_bytes(value, scope.order) == 1
        elif tag == BITS_ALLOCATED and length == 2:
            scope.bits = int.from_bytes(value, scope.order)
        value = little_endian(value, known, scope.order)
        if scope.spec is not None:
            value = _described(self._stored, scope.target, scope.spec, tag, value)
        if len(value) > _MAX_SHORT and known in SHORT_VRS:
            # PS3.5 6.2.2: too long for its VR's length field.
            known = b"UN"
        yield self._head(tag, known, len(value) + len(value) % 2)
        yield value
        if len(value) % 2:
            yield b" " if known in _TEXT else b"\0"

    def _implied_vr(self, scope: _Scope, tag: int, length: int) -> bytes:
        """Return the VR of an element that comes without (PS3.5 A.1, A.2)."""
        if tag == PIXEL_DATA:
            return b"OB" if scope.bits <= 8 else b"OW"
        return effective_vr(tag, b"", length, signed=scope.signed)

    def _fragments(
        self, scope: _Scope, begin: int, stop: int, *, top: bool
    ) -> Iterator[Buffer]:
        """Decode encapsulated Pixel Data, or encode it in another way."""
        spec, frames = scope.spec, 1
        if spec is None:
            raise MalformedObject("encapsulated data outside an item", PIXEL_DATA)
        if top:
            frames = self._n_frames()
            table = frame_ranges(self._found, frames)
        else:
            table = self._icon(begin, stop)
        if len(table) < frames:
            raise MalformedObject("frames are missing", PIXEL_DATA)
        stored = (self._stored_frame(table, i + 1) for i in range(frames))
        if scope.target in ENCODERS:
            yield from self._encoded(stored, frames, self._stored, spec, scope.target)
            return
        total = -(-spec.frame_bits * frames // 8)
        if total > min(self._limits.inflated_bytes, 0xFFFFFFFE):
            raise TooLarge("inflated_bytes", self._limits.inflated_bytes)
        vr = b"OW" if spec.bits_allocated > 8 else b"OB"
        yield self._head(PIXEL_DATA, vr, total + total % 2)
        decoded = self._decoded(stored, spec)
        yield from _joined_bits(decoded, spec) if spec.frame_bits % 8 else decoded
        if total % 2:
            yield b"\0"

    def _decoded(self, stored: Iterator[bytes], spec: DecodeSpec) -> Iterator[bytes]:
        for batch in batches(stored, spec):
            self._go_on()
            yield from self._decoders.decode_each(batch, self._stored, spec)

    def _n_frames(self) -> int:
        declared = self._found.text(NUMBER_OF_FRAMES)
        frames = int(declared) or 1 if _COUNT.match(declared) else 1
        if frames > self._limits.conversion_frames:
            raise TooLarge("conversion_frames", self._limits.conversion_frames)
        return frames

    def _stored_frame(self, table: FrameTable, number: int) -> bytes:
        return b"".join(
            self._data[offset : offset + length]
            for offset, length in table.ranges(number)
        )

    def _encapsulate(
        self, scope: _Scope, vr: bytes, begin: int, stop: int
    ) -> Iterator[Buffer]:
        """Encode native Pixel Data of the data set itself."""
        spec = scope.spec
        if spec is None:
            raise MalformedObject("no frame size", PIXEL_DATA)
        known = vr or self._implied_vr(scope, PIXEL_DATA, stop - begin)
        if known == b"OW" and spec.bits_allocated > 16:
            # Samples of more than a word are swapped as a whole (PS3.5 7.3).
            known = {32: b"OL", 64: b"OV"}[spec.bits_allocated]
        # Swapped before it is parted: a frame may end within a word.
        value = memoryview(little_endian(self._data[begin:stop], known, scope.order))
        n_frames = self._n_frames()
        frames = native_frames(value, spec, n_frames)
        native = syntaxes.EXPLICIT_VR_LE
        yield from self._encoded(frames, n_frames, native, spec, scope.target)

    def _encoded(
        self,
        frames: Iterator[bytes],
        n_frames: int,
        stored: str,
        spec: DecodeSpec,
        target: str,
    ) -> Iterator[Buffer]:
        """Yield Pixel Data with one fragment for each frame (PS3.5 A.4)."""
        yield self._head(PIXEL_DATA, b"OB", _UNDEFINED)
        # Bound: a table that might not say where the last frame is says nothing.
        listed = n_frames if spec.frame_bytes * n_frames <= _UNDEFINED // 2 else 0
        yield struct.pack("<HHI", 0xFFFE, 0xE000, 4 * listed)
        table_at = self._position
        yield bytes(4 * listed)
        offsets = array("I")
        total = 0
        for batch in batches(frames, spec):
            self._go_on()
            for one in encoded_frames(batch, stored, target, spec, self._decoders):
                length = len(one) + len(one) % 2
                if listed and total > _UNDEFINED:
                    raise TooLarge("inflated_bytes", self._limits.inflated_bytes)
                if listed:
                    offsets.append(total)
                total += length + 8
                yield struct.pack("<HHI", 0xFFFE, 0xE000, length)
                yield one + bytes(length - len(one))
        if sys.byteorder == "big":
            offsets.byteswap()
        self.late.append((table_at, offsets.tobytes()))
        yield _SEQUENCE_END

    def _icon(self, begin: int, stop: int) -> FrameTable:
        found = read_fragments(
            self._data, begin, stop, EXPLICIT_LITTLE, self._limits, PIXEL_DATA
        )
        return FrameTable.of_one_frame(found.places)


_TEXT: Final = SHORT_VRS - frozenset(b"AT FL FD SL SS UI UL US".split()) | {
    b"UC", b"UR", b"UT",
}  # fmt: skip


def _described(
    stored: str, target: str, spec: DecodeSpec, tag: int, value: Buffer
) -> Buffer:
    """Return the value of an attribute that describes converted frames."""
    if tag == PHOTOMETRIC:
        text = recoded_photometric(stored, target, spec).encode("ascii", "replace")
        return text + b" " * (len(text) % 2)
    if tag == PLANAR and len(value) == 2:
        return b"\1\0" if is_recoded_planar(stored, target, spec) else b"\0\0"
    return value


def _joined_bits(frames: Iterator[bytes], spec: DecodeSpec) -> Iterator[bytes]:
    """Pack frames of single bits that do not end with a byte (PS3.5 8.1.1)."""
    import numpy as np

    rest = np.zeros(0, np.uint8)
    for frame in frames:
        bits = np.unpackbits(np.frombuffer(frame, np.uint8), bitorder="little")
        bits = np.concatenate((rest, bits[: spec.frame_bits]))
        whole = bits.size // 8 * 8
        yield np.packbits(bits[:whole], bitorder="little").tobytes()
        rest = bits[whole:]
    if rest.size:
        yield np.packbits(rest, bitorder="little").tobytes()
