"""One frame as an array of stored values (PS3.3 C.7.6.3, PS3.5 8.1, 8.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pacs.imaging import codecs, syntaxes
from pacs.imaging.codecs import (
    BITS_ALLOCATED,
    BITS_STORED,
    CODECS,
    COLUMNS,
    PHOTOMETRIC,
    PIXEL_REPRESENTATION,
    PLANAR,
    ROWS,
    SAMPLES,
    DecodeSpec,
)
from pacs.imaging.decoder import decode
from pacs.rendering.header import Header
from storage.kernel.errors import MalformedObject, TooLarge, UnsupportedTransferSyntax

Array = NDArray[Any]

HIGH_BIT: Final = 0x00280102
PIXEL_DATA: Final = 0x7FE00010
FLOAT_PIXELS: Final = 0x7FE00008
DOUBLE_PIXELS: Final = 0x7FE00009
#: Two pixels of these share their chrominance: four samples (PS3.3 C.7.6.3.1.2).
SUBSAMPLED: Final = frozenset(("YBR_FULL_422", "YBR_PARTIAL_422"))


@dataclass(frozen=True, slots=True)
class Frame:
    """The samples of one frame, as allocated.

    Attributes
    ----------
    raw : array, shape (rows, columns) or (rows, columns, 3)
        Unsigned, with whatever lies in bits that are not stored; or floating point.
    bits_stored, shift : int
        A sample is ``raw >> shift``, of which the lowest `bits_stored` count.
    photometric : str
        Of the samples now: decoders turn some colours into RGB.
    """

    raw: Array
    bits_stored: int
    shift: int
    signed: bool
    photometric: str

    @property
    def is_float(self) -> bool:
        return self.raw.dtype.kind == "f"

    @property
    def is_colour(self) -> bool:
        return self.raw.ndim == 3

    def values(self, raw: Array) -> Array:
        """Return samples as numbers: bits that are not stored masked, signs extended.

        Parameters
        ----------
        raw : array
            `raw` of this frame, or part of it, or anything of its form.
        """
        if self.is_float:
            return raw
        size = 8 * raw.dtype.itemsize
        if not self.signed and not self.shift and self.bits_stored == size:
            return raw
        up = size - self.bits_stored - self.shift
        kind = np.dtype(f"{'i' if self.signed else 'u'}{raw.dtype.itemsize}")
        moved: Array = (raw << up).view(kind) >> (size - self.bits_stored)
        return moved


def spec_of(header: Header) -> DecodeSpec:
    """Return what the header says about each frame.

    Raises
    ------
    MalformedObject
    """
    bits = header.whole(BITS_ALLOCATED)
    return DecodeSpec(
        rows=header.whole(ROWS),
        columns=header.whole(COLUMNS),
        samples=header.whole(SAMPLES, 1),
        bits_allocated=bits,
        bits_stored=header.whole(BITS_STORED, bits) or bits,
        signed=header.whole(PIXEL_REPRESENTATION) == 1,
        photometric=header.code(PHOTOMETRIC),
        planar=header.whole(PLANAR),
    )


def read_frame(
    header: Header,
    data: bytearray,
    transfer_syntax_uid: str,
    max_bytes: int,
    *,
    pixel_tag: int = PIXEL_DATA,
    words: bool = False,
) -> Frame:
    """Decode the bytes of one frame.

    Parameters
    ----------
    data : bytearray
        As stored: native samples or one code stream.
    max_bytes : int
        A frame that decodes to more is refused before that.
    pixel_tag : int
        Float and Double Float Pixel Data have no sign and no photometry.
    words : bool
        Native samples of a byte lie in OW (swapped in pairs in big endian).

    Raises
    ------
    MalformedObject, TooLarge, UnsupportedTransferSyntax
    """
    if pixel_tag in {FLOAT_PIXELS, DOUBLE_PIXELS}:
        return _float_frame(header, data, transfer_syntax_uid, pixel_tag)
    spec = spec_of(header)
    if spec.frame_bytes > max_bytes:
        raise TooLarge("inflated_bytes", max_bytes)
    if spec.samples == 4:
        raise UnsupportedTransferSyntax("four samples per pixel are retired")
    if not 1 <= spec.bits_stored <= spec.bits_allocated:
        raise MalformedObject("more bits stored than allocated", BITS_STORED)
    syntax = syntaxes.get(transfer_syntax_uid)
    photometric = codecs.decoded_photometric(transfer_syntax_uid, spec)
    if syntax.encapsulated:
        raw = _decoded(data, transfer_syntax_uid, spec)
    else:
        order = "<" if syntax.little_endian else ">"
        raw = _native(data, spec, order, words=words)
    high_bit = header.whole(HIGH_BIT, spec.bits_stored - 1)
    shift = max(0, high_bit + 1 - spec.bits_stored)
    if shift + spec.bits_stored > spec.bits_allocated:
        raise MalformedObject("the high bit lies outside", HIGH_BIT)
    return Frame(
        np.ascontiguousarray(raw), spec.bits_stored, shift, spec.signed, photometric
    )


def _decoded(data: bytearray, transfer_syntax_uid: str, spec: DecodeSpec) -> Array:
    codec = CODECS.get(transfer_syntax_uid)
    if codec is None:
        plain = codecs.unwrapped(data, transfer_syntax_uid, spec)
        return _native(plain, spec, "<", words=False)
    arguments = codecs.decode_arguments(codec, data, spec)
    array = np.ascontiguousarray(decode(data=data, **arguments))
    # RLE comes as bytes of samples, the others as numbers that may have signs.
    flat = array.reshape(-1).view(f"<u{spec.bits_allocated // 8}")
    shape = (spec.rows, spec.columns)
    return flat.reshape(shape if spec.samples == 1 else (*shape, spec.samples))


def _native(
    data: bytes | bytearray, spec: DecodeSpec, order: str, *, words: bool
) -> Array:
    """Return native samples, colour by pixel."""
    bits = spec.bits_allocated
    if spec.photometric in SUBSAMPLED and spec.samples == 3 and bits == 8:
        subsampled = _subsampled(data, spec)
        if subsampled is not None:
            return subsampled
    if len(data) < spec.frame_bytes:
        raise MalformedObject("a frame is too short", PIXEL_DATA)
    shape: tuple[int, ...] = (spec.rows, spec.columns)
    if spec.samples > 1:
        shape = (spec.samples, *shape) if spec.planar else (*shape, spec.samples)
    n = spec.rows * spec.columns * spec.samples
    if bits == 1:
        packed = np.frombuffer(data, np.uint8, spec.frame_bytes)
        flat: Array = np.unpackbits(packed, bitorder="little")[:n]
    else:
        if bits == 8 and words and order == ">":
            data = _swapped(data, n)
        flat = np.frombuffer(data, f"{order}u{bits // 8}", n)
        flat = flat.astype(flat.dtype.newbyteorder("<"), copy=False)
    array = flat.reshape(shape)
    return np.moveaxis(array, 0, -1) if spec.samples > 1 and spec.planar else array


def _swapped(data: bytes | bytearray, n: int) -> bytes:
    """Return `n` samples of a byte that lie in words of the other order.

    Raises
    ------
    UnsupportedTransferSyntax
        The last of them lies in a word whose other half is not there.
    """
    whole = n + n % 2
    if len(data) < whole:
        raise UnsupportedTransferSyntax("a frame that ends within a word")
    return np.frombuffer(data, ">u2", whole // 2).astype("<u2").tobytes()[:n]


def _subsampled(data: bytes | bytearray, spec: DecodeSpec) -> Array | None:
    """Return pixels of which pairs share Cb and Cr: Y Y Cb Cr.

    None: there are as many bytes as without, so they do not.
    """
    pixels = spec.rows * spec.columns
    if len(data) >= 3 * pixels or pixels % 2:
        return None
    if len(data) < 2 * pixels:
        raise MalformedObject("a frame is too short", PIXEL_DATA)
    pairs = np.frombuffer(data, np.uint8, 2 * pixels).reshape(-1, 4)
    out = np.empty((pixels // 2, 2, 3), np.uint8)
    out[:, :, 0] = pairs[:, :2]
    out[:, :, 1:] = pairs[:, None, 2:]
    return out.reshape(spec.rows, spec.columns, 3)


def _float_frame(
    header: Header, data: bytearray, transfer_syntax_uid: str, pixel_tag: int
) -> Frame:
    rows, columns = header.whole(ROWS), header.whole(COLUMNS)
    size = 4 if pixel_tag == FLOAT_PIXELS else 8
    if rows < 1 or columns < 1 or len(data) < rows * columns * size:
        raise MalformedObject("a frame is too short", pixel_tag)
    order = "<" if syntaxes.get(transfer_syntax_uid).little_endian else ">"
    flat = np.frombuffer(data, f"{order}f{size}", rows * columns)
    array = flat.reshape(rows, columns).astype(np.float64)
    return Frame(array, 8 * size, 0, signed=True, photometric="MONOCHROME2")
