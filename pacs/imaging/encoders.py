"""Encoding frames without loss, in worker processes (`pacs.imaging.pool`).

Every code stream is decoded and compared with what went in before it leaves the
worker: a codec that loses a bit fails the job, and nobody gets its result. What each
codec is given, and why:

* JPEG Lossless is first-order prediction, selection value 1, which is valid under both
  of its transfer syntaxes. The sign of samples is no business of JPEG and JPEG-LS:
  signed ones are written as bit patterns of all allocated bits.
* JPEG 2000 and HTJ2K get the sign, the precision of Bits Stored where the samples keep
  within it, and the reversible colour transform for RGB.
* HTJ2K is written once, for three transfer syntaxes: resolutions outermost (RPCL), each
  in a tile-part of its own and listed by TLM, so that a prefix of the bytes is a
  smaller picture. `check_rpcl` looks at the markers before `.202` is claimed.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pacs.imaging.codestream import SHAPES
from storage.kernel.errors import MalformedObject, UnsupportedTransferSyntax

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Samples = NDArray[np.generic]

_P: Final = "1.2.840.10008.1.2"
ENCAPSULATED_UNCOMPRESSED: Final = f"{_P}.1.98"
DEFLATED_FRAMES: Final = f"{_P}.8.1"
HTJ2K_LOSSLESS: Final = f"{_P}.4.201"
HTJ2K_LOSSLESS_RPCL: Final = f"{_P}.4.202"

#: Which codec writes which transfer syntax; empty: none is needed.
ENCODERS: Final = {
    ENCAPSULATED_UNCOMPRESSED: "",
    f"{_P}.4.57": "jpeg",
    f"{_P}.4.70": "jpeg",
    f"{_P}.4.80": "jpegls",
    f"{_P}.4.90": "jpeg2k",
    HTJ2K_LOSSLESS: "htj2k",
    HTJ2K_LOSSLESS_RPCL: "htj2k",
    f"{_P}.5": "rle",
    DEFLATED_FRAMES: "",
}
#: Codecs with a reversible colour transform (PS3.3 C.7.6.3.1.2).
_TRANSFORMING: Final = frozenset(("jpeg2k", "htj2k"))
#: Bits Allocated that each codec takes; RLE those of RT Dose too (PS3.5 8.2).
_BITS: Final = {
    "": frozenset((1, 8, 16, 32, 64)),
    "rle": frozenset((8, 16, 32)),
    "jpeg": frozenset((8, 16)),
    "jpegls": frozenset((8, 16)),
    "jpeg2k": frozenset((8, 16)),
    "htj2k": frozenset((8, 16)),
}
#: The smallest resolution is no larger than this (PS3.5 A.4.12).
_SMALLEST: Final = 64
_MIN_LEVELS: Final = 5


class Lossy(ValueError):
    """What was encoded does not decode to the same samples."""


def is_encodable(
    transfer_syntax_uid: str, *, bits_allocated: int, samples: int
) -> bool:
    """Tell whether frames of such samples can be written in a transfer syntax."""
    codec = ENCODERS.get(transfer_syntax_uid)
    if codec is None or bits_allocated not in _BITS[codec]:
        return False
    return samples in {1, 3}


def encoded_photometric(transfer_syntax_uid: str, photometric: str) -> str:
    """Return Photometric Interpretation of frames once encoded.

    Parameters
    ----------
    photometric : str
        Of the native frames.
    """
    if photometric == "RGB" and ENCODERS[transfer_syntax_uid] in _TRANSFORMING:
        return "YBR_RCT"
    return photometric


@dataclass(frozen=True, slots=True)
class EncodeSpec:
    """What native samples are, for whoever encodes them.

    Attributes
    ----------
    planar : bool
        Colour comes by plane; it is encoded by pixel (PS3.5 8.2).
    """

    rows: int
    columns: int
    samples: int
    bits_allocated: int
    bits_stored: int
    signed: bool
    photometric: str
    planar: bool = False

    def arguments(self) -> dict[str, Any]:
        """Return the plain values of a job."""
        return {name: getattr(self, name) for name in self.__slots__}

    def array(self, data: bytes | bytearray | memoryview) -> Samples:
        """Return native little endian samples: rows, columns and any colours.

        Raises
        ------
        MalformedObject
            They are too few.
        """
        import numpy as np

        kind = "i" if self.signed else "u"
        pixels = self.rows * self.columns * self.samples
        if len(data) * 8 < pixels * self.bits_allocated:
            raise MalformedObject("a frame is too short")
        flat = np.frombuffer(data, f"<{kind}{self.bits_allocated // 8}", pixels)
        if self.samples == 1:
            return flat.reshape(self.rows, self.columns)
        if self.planar:
            planes = flat.reshape(self.samples, self.rows, self.columns)
            return np.ascontiguousarray(np.moveaxis(planes, 0, -1))
        return flat.reshape(self.rows, self.columns, self.samples)


def deflated(data: bytes) -> bytes:
    """Return one native frame deflated (PS3.5 A.4.13)."""
    packer = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def encode_frame(
    arguments: dict[str, Any], payloads: list[bytearray]
) -> tuple[dict[str, Any], bytes]:
    """Encode the frame that is the only payload; a job's handler.

    Arguments: `transfer_syntax_uid`; `spec`, those of an `EncodeSpec`; `decode`, those
    of `pacs.imaging.decoder.decode` when the payload is a code stream itself, or None.

    Raises
    ------
    Lossy, MalformedObject
    UnsupportedTransferSyntax
        No codec takes such samples.
    """
    from pacs.imaging import decoder

    (data,) = payloads
    spec = EncodeSpec(**arguments["spec"])
    how = arguments["decode"]
    native = data if how is None else decoder.decode(data=data, **how).tobytes()
    target = str(arguments["transfer_syntax_uid"])
    return {}, encode(target, spec.array(native), spec)


def encode(transfer_syntax_uid: str, samples: Samples, spec: EncodeSpec) -> bytes:
    """Return a code stream that has been decoded and compared.

    Parameters
    ----------
    samples : array of integers, (rows, columns) or (rows, columns, 3)
        As `EncodeSpec.array` returns them.
    """
    codec = ENCODERS[transfer_syntax_uid]
    if not codec or not is_encodable(
        transfer_syntax_uid, bits_allocated=spec.bits_allocated, samples=spec.samples
    ):
        raise UnsupportedTransferSyntax("no encoder for such samples")
    encoded = _encoded(codec, samples, spec)
    _compare(codec, encoded, samples, spec)
    if transfer_syntax_uid == HTJ2K_LOSSLESS_RPCL:
        check_rpcl(encoded)
    return encoded


def _encoded(codec: str, samples: Samples, spec: EncodeSpec) -> bytes:
    import imagecodecs
    import numpy as np

    unsigned = np.dtype(f"<u{spec.bits_allocated // 8}")
    if codec == "rle":
        return _rle(np.ascontiguousarray(samples).view(unsigned))
    if codec == "jpegls":
        # The library guesses how much room noise needs, and too little.
        room = bytearray(2 * samples.nbytes + 1024)
        return bytes(
            imagecodecs.jpegls_encode(samples.view(unsigned), level=0, out=room)
        )
    precision = _precision(samples, spec)
    if codec == "jpeg":
        # Signs are patterns of all bits. The library takes up to eight bits as bytes.
        bits = spec.bits_allocated if spec.signed else max(2, precision)
        patterns = samples.view(unsigned)
        return bytes(
            imagecodecs.jpeg8_encode(
                patterns.astype(np.uint8) if bits <= 8 else patterns,
                lossless=True,
                predictor=1,
                bitspersample=bits,
            )
        )
    transformed = spec.photometric == "RGB"
    if codec == "jpeg2k":
        return bytes(
            imagecodecs.jpeg2k_encode(
                samples,
                level=0,
                codecformat="j2k",
                reversible=True,
                mct=transformed,
                bitspersample=precision,
                numthreads=1,
            )
        )
    return _htj2k(samples, spec, precision, transformed=transformed)


def _precision(samples: Samples, spec: EncodeSpec) -> int:
    """Return the bits that hold every sample: those stored, or all allocated."""
    import numpy as np

    stored = spec.bits_stored
    if not 1 <= stored < spec.bits_allocated or not samples.size:
        return spec.bits_allocated
    low, high = int(np.min(samples)), int(np.max(samples))
    bound = 1 << (stored - spec.signed)
    if high < bound and low >= (-bound if spec.signed else 0):
        return stored
    # Overlays in unused bits, and the like: nothing is thrown away.
    return spec.bits_allocated


def _htj2k(
    samples: Samples, spec: EncodeSpec, precision: int, *, transformed: bool
) -> bytes:
    import imagecodecs
    import numpy as np

    longest = max(spec.rows, spec.columns)
    levels = max(_MIN_LEVELS, (-(-longest // _SMALLEST) - 1).bit_length())
    lowered = precision < spec.bits_allocated
    if lowered and not spec.signed:
        # The library takes the precision from the type of the array. Unsigned samples
        # are shifted down by half their range before coding (ISO/IEC 15444-1 G.1): done
        # here, with the true range, they are signed and the library shifts no more.
        half = 1 << (precision - 1)
        samples = (samples.astype(np.int32) - half).astype(
            f"<i{spec.bits_allocated // 8}"
        )
    encoded = imagecodecs.htj2k_encode(
        samples,
        reversible=True,
        rgb=transformed if spec.samples == 3 else None,
        resolutions=levels,
        tlm=True,
        tilepart=1,
    )
    if not lowered:
        return bytes(encoded)
    # What the samples are is said in SIZ only; how they are coded stays as it is.
    patched = bytearray(encoded)
    (n,) = struct.unpack_from(">H", patched, 40)
    for i in range(n):
        patched[42 + 3 * i] = (precision - 1) | (0x80 if spec.signed else 0)
    return bytes(patched)


def _rle(samples: Samples) -> bytes:
    """Return an RLE frame: a segment for each byte of a sample (PS3.5 G)."""
    import imagecodecs
    import numpy as np

    rows, columns = samples.shape[:2]
    size = samples.itemsize
    octets = samples.view(np.uint8).reshape(rows, columns, -1)
    segments = []
    for i in range(octets.shape[2]):
        # The high byte of a sample comes first, and no run goes on in the next row.
        at = i - i % size + size - 1 - i % size
        plane = octets[:, :, at].copy()
        segment = bytes(imagecodecs.packbits_encode(plane, axis=-1))
        segments.append(segment + bytes(len(segment) % 2))
    offsets, position = [], 64
    for segment in segments:
        offsets.append(position)
        position += len(segment)
    head = [len(segments), *offsets, *[0] * (15 - len(offsets))]
    return struct.pack("<16I", *head) + b"".join(segments)


def _compare(codec: str, encoded: bytes, samples: Samples, spec: EncodeSpec) -> None:
    """Decode what was encoded.

    Raises
    ------
    Lossy
        It is not what went in.
    """
    from pacs.imaging import decoder

    flags = decoder.SIGNED if spec.signed else 0
    if codec == "jpeg" and spec.samples == 3:
        flags |= decoder.AS_STORED
    decoded = decoder.decode(
        codec,
        encoded,
        rows=spec.rows,
        columns=spec.columns,
        samples=spec.samples,
        bits_allocated=spec.bits_allocated,
        precision=SHAPES[codec](encoded).precision,
        flags=flags,
    )
    if decoded.tobytes() != samples.tobytes():
        raise Lossy(f"{codec} did not keep every sample")


_SIZ, _COD, _TLM, _SOT, _SOD = 0xFF51, 0xFF52, 0xFF55, 0xFF90, 0xFF93
_RPCL: Final = 2


def _segments(encoded: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the marker segments of a main header (ISO/IEC 15444-1 A.2)."""
    position = 2
    while position + 4 <= len(encoded):
        marker, length = struct.unpack_from(">HH", encoded, position)
        if marker in {_SOT, _SOD} or length < 2:
            return
        yield marker, encoded[position + 4 : position + 2 + length]
        position += 2 + length


def check_rpcl(encoded: bytes) -> None:
    """Check what HTJ2K Lossless RPCL promises beyond HTJ2K (PS3.5 A.4.12).

    Raises
    ------
    UnsupportedTransferSyntax
        Another progression order, no TLM marker segment, several tiles, or too few
        resolutions.
    """
    found = dict(_segments(encoded))
    cod, siz = found.get(_COD, b""), found.get(_SIZ, b"")
    if len(cod) < 6 or len(siz) < 36 or cod[1] != _RPCL or _TLM not in found:
        raise UnsupportedTransferSyntax("the code stream is not in RPCL order")
    width, height, left, top, tile_w, tile_h = struct.unpack_from(">6I", siz, 2)
    if tile_w < width - left or tile_h < height - top:
        raise UnsupportedTransferSyntax("the code stream has several tiles")
    if max(width - left, height - top) > _SMALLEST << cod[5]:
        raise UnsupportedTransferSyntax("the code stream has too few resolutions")


def resolution_offsets(head: bytes, length: int) -> list[int]:
    """Return how many bytes hold each resolution, the smallest first.

    A prefix of so many bytes of an HTJ2K code stream with a tile-part for each
    resolution, as ours are, decodes to that resolution. Empty when its tile-parts are
    not listed (ISO/IEC 15444-1 A.7.1), or are not as many as its resolutions.

    Parameters
    ----------
    head : bytes
        The main header, at least.
    length : int
        Of the code stream.
    """
    start = 2
    lengths: list[int] = []
    n_resolutions = 0
    for marker, body in _segments(head):
        start += 4 + len(body)
        if marker == _COD and len(body) > 5 and body[1] == _RPCL:
            n_resolutions = body[5] + 1
        if marker != _TLM or len(body) < 2:
            continue
        of_index, wide = body[1] >> 4 & 3, body[1] >> 6 & 1
        step = of_index + (4 if wide else 2)
        lengths += [
            int.from_bytes(body[at + of_index : at + step], "big")
            for at in range(2, len(body) - step + 1, step)
        ]
    offsets = []
    for one in lengths:
        start += one
        offsets.append(start)
    whole = len(lengths) == n_resolutions and start <= length
    return offsets if whole else []
