"""One frame in another form: decoded to native samples, or encoded without loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from pacs.imaging import syntaxes
from pacs.imaging.codecs import (
    CODECS,
    DecoderPool,
    DecodeSpec,
    decode_arguments,
    decoded_photometric,
    is_planar,
)
from pacs.imaging.dicomjson import little_endian
from pacs.imaging.encoders import (
    DEFLATED_FRAMES,
    ENCODERS,
    EncodeSpec,
    deflated,
    encoded_photometric,
    is_encodable,
)
from pacs.imaging.encoding import Buffer
from pacs.imaging.pool import Job
from storage.kernel.errors import (
    MalformedObject,
    TooLarge,
    UnsupportedTransferSyntax,
)
from storage.kernel.limits import KIB

ENCODE_FRAME: Final = "pacs.imaging.encoders:encode_frame"


def native_frame(
    data: bytes, stored: str, spec: DecodeSpec, decoders: DecoderPool
) -> bytes:
    """Return one stored frame as native little endian samples.

    Raises
    ------
    MalformedObject, TooLarge, DependencyDown
        See `DecoderPool`.
    UnsupportedTransferSyntax
        There is no decoder, or the frame shares words with its neighbours.
    """
    syntax = syntaxes.get(stored)
    if syntax.encapsulated:
        return decoders.decode(data, stored, spec)
    if syntax.little_endian:
        return data
    if spec.bits_allocated > 8:
        vr = {16: b"OW", 32: b"OL", 64: b"OV"}[spec.bits_allocated]
        # Samples of more than a word are swapped as a whole (PS3.5 7.3).
        return bytes(little_endian(data, vr, "big"))
    if not spec.words:
        return data
    if len(data) % 2:
        raise UnsupportedTransferSyntax("a frame that ends within a word")
    return bytes(little_endian(data, b"OW", "big"))


def encoded_frame(
    data: bytes, stored: str, target: str, spec: DecodeSpec, decoders: DecoderPool
) -> bytes:
    """Return one stored frame as `target` encodes it; samples stay what they are.

    A code stream is decoded and encoded again within one job.

    Raises
    ------
    MalformedObject, TooLarge, DependencyDown
    UnsupportedTransferSyntax
        Such samples cannot be written in `target`.
    """
    check_encodable(stored, target, spec)
    if spec.frame_bytes > decoders.limits.inflated_bytes:
        raise TooLarge("inflated_bytes", decoders.limits.inflated_bytes)
    codec = ENCODERS[target]
    if not codec:
        native = native_frame(data, stored, spec, decoders)
        return deflated(native) if target == DEFLATED_FRAMES else native
    payload: Buffer = data
    how: dict[str, Any] | None = None
    if stored in CODECS:
        how = decode_arguments(CODECS[stored], data, spec)
    else:
        payload = native_frame(data, stored, spec, decoders)
    samples = EncodeSpec(
        rows=spec.rows,
        columns=spec.columns,
        samples=spec.samples,
        bits_allocated=spec.bits_allocated,
        bits_stored=spec.bits_stored,
        signed=spec.signed,
        photometric=decoded_photometric(stored, spec),
        planar=is_planar(stored, spec),
    )
    arguments = {
        "transfer_syntax_uid": target,
        "spec": samples.arguments(),
        "decode": how,
    }
    return decoders.run(
        Job(
            ENCODE_FRAME,
            arguments,
            (payload,),
            # Noise grows a little; more is no encoding of this frame.
            answer_bytes=2 * spec.frame_bytes + 64 * KIB,
            label=f"{codec}.encode",
        )
    ).body


def check_encodable(stored: str, target: str, spec: DecodeSpec) -> None:
    """Check that frames of such samples can be encoded in `target`.

    Raises
    ------
    UnsupportedTransferSyntax
    """
    syntax = syntaxes.get(stored)
    if not syntax.decodes or not is_encodable(
        target, bits_allocated=spec.bits_allocated, samples=spec.samples
    ):
        raise UnsupportedTransferSyntax(f"cannot convert {stored} to {target}")
    if not syntax.encapsulated and spec.photometric == "YBR_FULL_422":
        # Two samples for each pixel: to encode them is to change them.
        raise UnsupportedTransferSyntax("native YBR_FULL_422 is sent as it is")


def recoded_photometric(stored: str, target: str, spec: DecodeSpec) -> str:
    """Return Photometric Interpretation of frames that went from one to the other."""
    native = decoded_photometric(stored, spec)
    return encoded_photometric(target, native) if target in ENCODERS else native


def is_recoded_planar(stored: str, target: str, spec: DecodeSpec) -> bool:
    """Tell whether such frames are colour by plane."""
    return is_planar(stored, spec) and not ENCODERS.get(target)


def native_frames(
    value: memoryview, spec: DecodeSpec, n_frames: int
) -> Iterator[bytes]:
    """Yield the frames of native Pixel Data, also where they end within a byte.

    Raises
    ------
    MalformedObject
        Frames are missing.
    """
    if spec.frame_bits * n_frames > 8 * len(value):
        raise MalformedObject("frames are missing")
    for i in range(n_frames):
        start = i * spec.frame_bits
        stop = start + spec.frame_bits
        whole = bytes(value[start // 8 : -(-stop // 8)])
        yield _bits(whole, start % 8, spec.frame_bits) if spec.frame_bits % 8 else whole


def _bits(data: bytes, skipped: int, n: int) -> bytes:
    """Return `n` bits of packed 1-bit data, the first ones in front (PS3.5 8.1.1)."""
    import numpy as np

    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    return np.packbits(bits[skipped : skipped + n], bitorder="little").tobytes()
