"""Decoding frames in bounded processes (`pacs.imaging.pool`).

When the attributes or the code stream's own header are impossible, or contradict each
other, or the codec refuses it, the caller gets `MalformedObject`.

Frames that are only wrapped or deflated are unwrapped here, without a process.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Final

from pacs.imaging import decoder, syntaxes
from pacs.imaging.codestream import SHAPES, Shape
from pacs.imaging.dataset import Scan
from pacs.imaging.encoding import PIXEL_DATA, Buffer
from pacs.imaging.pool import Job, PoolObserver, WorkerPool
from storage.kernel.errors import (
    DependencyDown,
    MalformedObject,
    TooLarge,
    UnsupportedTransferSyntax,
)

SAMPLES, PHOTOMETRIC, PLANAR = 0x00280002, 0x00280004, 0x00280006
ROWS, COLUMNS = 0x00280010, 0x00280011
BITS_ALLOCATED, BITS_STORED = 0x00280100, 0x00280101
PIXEL_REPRESENTATION = 0x00280103

_JPEG = syntaxes.IMPLICIT_VR_LE + ".4."
ENCAPSULATED_UNCOMPRESSED: Final = "1.2.840.10008.1.2.1.98"
DEFLATED_FRAMES: Final = "1.2.840.10008.1.2.8.1"
#: Which codec reads which transfer syntax.
CODECS: Final = {
    **{_JPEG + n: "jpeg" for n in ("50", "51", "53", "55", "57", "70")},
    **{_JPEG + n: "jpegls" for n in ("80", "81")},
    **{_JPEG + n: "jpeg2k" for n in ("90", "91")},
    **{_JPEG + n: "htj2k" for n in ("201", "202")},
    # What lossy compression carries beyond white or black must be clamped: OpenJPH's
    # binding wraps it round, OpenJPEG does not.
    _JPEG + "203": "jpeg2k",
    **{_JPEG + n: "jpegxl" for n in ("110", "111", "112")},
    "1.2.840.10008.1.2.5": "rle",
}
_JPEG_LOSSLESS = frozenset((_JPEG + "57", _JPEG + "70"))
_JPEGXL_LOSSLESS = _JPEG + "110"

DECODE_FRAME: Final = "pacs.imaging.decoder:decode_frame"
EACH: Final = "pacs.imaging.worker:each"


@dataclass(frozen=True, slots=True)
class DecodeSpec:
    """What the attributes of an object say about each frame (PS3.3 C.7.6.3).

    Attributes
    ----------
    signed : bool
        Pixel Representation (0028,0103) is 1.
    planar : int
        Planar Configuration (0028,0006) of native frames.
    words : bool
        Native samples of one byte lie in OW (swapped in pairs in big endian).
    """

    rows: int
    columns: int
    samples: int = 1
    bits_allocated: int = 16
    bits_stored: int = 16
    signed: bool = False
    photometric: str = "MONOCHROME2"
    planar: int = 0
    words: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= 65_535:
            raise MalformedObject("no frame size", ROWS)
        if not 1 <= self.columns <= 65_535:
            raise MalformedObject("no frame size", COLUMNS)
        if self.samples not in {1, 3, 4}:
            raise MalformedObject("impossible number of samples", SAMPLES)
        if self.bits_allocated not in {1, 8, 16, 32, 64}:
            raise MalformedObject("impossible sample size", BITS_ALLOCATED)

    @classmethod
    def from_scan(cls, found: Scan) -> DecodeSpec:
        """Read the attributes of a scanned object.

        Raises
        ------
        MalformedObject
            They describe no frame.
        """
        pixel = found.pixel
        words = False
        if pixel is not None and not pixel.encapsulated and found.explicit:
            at = found.header_end
            words = bytes(found.buffer[at + 4 : at + 6]) == b"OW"
        return cls.from_values(found.values, found.byte_order, words=words)

    @classmethod
    def from_values(
        cls, values: dict[int, bytes], order: str, *, words: bool = False
    ) -> DecodeSpec:
        """Read the attributes from raw values by tag."""

        def number(tag: int, default: int) -> int:
            raw = values.get(tag, b"")
            if not raw:
                return default
            if len(raw) != 2:
                raise MalformedObject("not a 16-bit number", tag)
            return int.from_bytes(raw, "big" if order == "big" else "little")

        bits = number(BITS_ALLOCATED, 0)
        photometric = values.get(PHOTOMETRIC, b"").decode("ascii", "replace")
        return cls(
            rows=number(ROWS, 0),
            columns=number(COLUMNS, 0),
            samples=number(SAMPLES, 1),
            bits_allocated=bits,
            bits_stored=number(BITS_STORED, bits),
            signed=number(PIXEL_REPRESENTATION, 0) == 1,
            photometric=photometric.strip(" \0"),
            planar=number(PLANAR, 0),
            words=words,
        )

    @property
    def frame_bits(self) -> int:
        return self.rows * self.columns * self.samples * self.bits_allocated

    @property
    def frame_bytes(self) -> int:
        """Bytes of a decoded frame, the last one filled up."""
        return -(-self.frame_bits // 8)


def decoded_photometric(transfer_syntax_uid: str, spec: DecodeSpec) -> str:
    """Return Photometric Interpretation of frames once decoded."""
    codec = CODECS.get(transfer_syntax_uid)
    stored = spec.photometric
    if codec is None or spec.samples != 3:
        return stored
    if codec in {"jpeg2k", "htj2k"}:
        return "RGB" if stored in {"YBR_ICT", "YBR_RCT"} else _full(stored)
    if codec == "jpeg" and transfer_syntax_uid not in _JPEG_LOSSLESS:
        return "RGB"
    if codec == "jpegxl" and transfer_syntax_uid != _JPEGXL_LOSSLESS:
        return "RGB"
    return _full(stored)


def _full(photometric: str) -> str:
    # Decoders give every pixel all its samples.
    return "YBR_FULL" if photometric == "YBR_FULL_422" else photometric


def is_planar(transfer_syntax_uid: str, spec: DecodeSpec) -> bool:
    """Tell whether decoded frames are colour by plane."""
    wrapped = transfer_syntax_uid not in CODECS
    return wrapped and spec.samples > 1 and spec.planar == 1


DecoderObserver = PoolObserver


class DecoderPool(WorkerPool):
    """Worker processes that decode frames; safe for use by many threads."""

    def decode(
        self,
        data: Buffer | Callable[[], Buffer],
        transfer_syntax_uid: str,
        spec: DecodeSpec,
    ) -> bytes:
        """Return one frame as native little endian samples, `frame_bytes` long.

        Colour lies by pixel, unless `is_planar`; what the colours are says
        `decoded_photometric`.

        Parameters
        ----------
        data : bytes-like, or callable
            A callable reads it once a process is free.

        Raises
        ------
        MalformedObject, TooLarge, DependencyDown
        UnsupportedTransferSyntax
            There is no decoder for it.
        """
        if spec.frame_bytes > self._limits.inflated_bytes:
            raise TooLarge("inflated_bytes", self._limits.inflated_bytes)
        codec = CODECS.get(transfer_syntax_uid)
        if codec is None:
            found = data() if callable(data) else data
            return unwrapped(found, transfer_syntax_uid, spec)

        def made() -> Job:
            found = data() if callable(data) else data
            arguments = decode_arguments(codec, found, spec)
            return Job(DECODE_FRAME, arguments, (found,), answer_bytes=spec.frame_bytes)

        with self.counted(codec):
            # A bad header of what is here already needs no process.
            body = self._decoded(made if callable(data) else made())
            if len(body) != spec.frame_bytes:
                raise DependencyDown("the decoder answered nonsense")
            return body

    def decode_each(
        self, frames: Sequence[Buffer], transfer_syntax_uid: str, spec: DecodeSpec
    ) -> list[bytes]:
        """Return several small frames as `decode` does, in one job for all."""
        codec = CODECS.get(transfer_syntax_uid)
        if codec is None or len(frames) == 1:
            return [self.decode(one, transfer_syntax_uid, spec) for one in frames]
        size, total = spec.frame_bytes, spec.frame_bytes * len(frames)
        if total > self._limits.inflated_bytes:
            raise TooLarge("inflated_bytes", self._limits.inflated_bytes)
        with self.counted(codec):
            each = [decode_arguments(codec, one, spec) for one in frames]
            asked = {"handler": DECODE_FRAME, "each": each}
            body = self._decoded(Job(EACH, asked, frames, answer_bytes=total))
            if len(body) != total:
                raise DependencyDown("the decoder answered nonsense")
            return [body[at : at + size] for at in range(0, total, size)]

    def _decoded(self, asked: Job | Callable[[], Job]) -> bytes:
        try:
            return self.ask(asked).body
        except MalformedObject as error:
            if str(error).startswith("code stream"):
                raise
            raise MalformedObject(f"code stream: {error}", PIXEL_DATA) from error

    def run_each(self, job: Job, arguments: Sequence[Mapping[str, Any]]) -> list[bytes]:
        """Do the same for each payload by itself, in one job; return the bodies.

        Parameters
        ----------
        job : Job
            Its handler gets one payload at a time; `answer_bytes` are of all bodies.
        arguments : sequence of mappings
            Of each payload.
        """
        asked = {"handler": job.handler, "each": arguments}
        answer = self.run(replace(job, handler=EACH, arguments=asked))
        lengths = answer.head.get("lengths")
        if (
            not isinstance(lengths, list)
            or not all(isinstance(one, int) and one >= 0 for one in lengths)
            or (len(lengths), sum(lengths)) != (len(arguments), len(answer.body))
        ):
            raise DependencyDown("the decoder answered nonsense")
        ends = accumulate(lengths, initial=0)
        return [answer.body[a:b] for a, b in pairwise(ends)]


def unwrapped(data: Buffer, transfer_syntax_uid: str, spec: DecodeSpec) -> bytes:
    """Return a frame that is only wrapped, or deflated: no codec is needed.

    Raises
    ------
    MalformedObject
    UnsupportedTransferSyntax
        There is no decoder for it.
    """
    if transfer_syntax_uid == ENCAPSULATED_UNCOMPRESSED:
        return _whole(bytes(data[: spec.frame_bytes]), spec)
    if transfer_syntax_uid == DEFLATED_FRAMES:
        return _inflated(data, spec)
    raise UnsupportedTransferSyntax(f"cannot decode {transfer_syntax_uid}")


def decode_arguments(codec: str, data: Buffer, spec: DecodeSpec) -> dict[str, Any]:
    """Return the arguments of `pacs.imaging.decoder.decode` for a code stream.

    Its header is compared with the attributes first: a decoder allocates what the
    code stream declares.

    Raises
    ------
    MalformedObject
        They contradict each other, or the header is broken.
    """
    if spec.bits_allocated % 8:
        raise MalformedObject("impossible sample size", BITS_ALLOCATED)
    shape = _checked(codec, data, spec)
    flags = decoder.SIGNED if spec.signed else 0
    untouched = spec.photometric == "RGB" and not shape.transformed
    if codec == "jpeg" and spec.samples == 3 and (shape.lossless or untouched):
        flags |= decoder.AS_STORED
    return {
        "codec": codec,
        "flags": flags,
        "rows": spec.rows,
        "columns": spec.columns,
        "samples": spec.samples,
        "bits_allocated": spec.bits_allocated,
        "precision": shape.precision,
    }


def _checked(codec: str, data: Buffer, spec: DecodeSpec) -> Shape:
    """Compare what the code stream declares with the attributes, before decoding."""
    shape = SHAPES[codec](data)
    if codec == "rle":
        if shape.samples != spec.samples * spec.bits_allocated // 8:
            raise MalformedObject("code stream: not as many RLE segments", PIXEL_DATA)
        return shape
    if (shape.rows, shape.columns) != (spec.rows, spec.columns):
        raise MalformedObject(
            f"code stream is {shape.columns} x {shape.rows}, "
            f"attributes say {spec.columns} x {spec.rows}",
            PIXEL_DATA,
        )
    if shape.samples and shape.samples != spec.samples:
        raise MalformedObject(
            f"code stream has {shape.samples} components, not {spec.samples}",
            PIXEL_DATA,
        )
    if shape.precision > spec.bits_allocated:
        raise MalformedObject(
            f"code stream has {shape.precision} bits, not {spec.bits_allocated}",
            PIXEL_DATA,
        )
    return shape


def _whole(data: bytes, spec: DecodeSpec) -> bytes:
    if len(data) < spec.frame_bytes:
        raise MalformedObject("a frame is too short", PIXEL_DATA)
    return data


def _inflated(data: Buffer, spec: DecodeSpec) -> bytes:
    """Inflate a frame as far as it should go (PS3.5 A.4.13)."""
    try:
        inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(
            data, spec.frame_bytes
        )
    except zlib.error as error:
        raise MalformedObject("not a deflated frame", PIXEL_DATA) from error
    return _whole(inflated, spec)
