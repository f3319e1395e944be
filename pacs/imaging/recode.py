"""One frame in another form: decoded to native samples, or encoded without loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
from storage.kernel.limits import KIB, MIB

ENCODE_FRAME: Final = "pacs.imaging.encoders:encode_frame"
#: Small frames go to a process together: so many, or so many bytes decoded.
BATCH_FRAMES: Final = 256
BATCH_BYTES: Final = 1 * MIB


def native_frame(
    data: bytes | Callable[[], bytes],
    stored: str,
    spec: DecodeSpec,
    decoders: DecoderPool,
) -> bytes:
    """Return one stored frame as native little endian samples.

    Parameters
    ----------
    data : bytes, or callable
        A callable reads it, once a process is free where one is needed.

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
    data = data() if callable(data) else data
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
    data: bytes | Callable[[], bytes],
    stored: str,
    target: str,
    spec: DecodeSpec,
    decoders: DecoderPool,
) -> bytes:
    """Return one stored frame as `target` encodes it; samples stay what they are.

    A code stream is decoded and encoded again within one job. `data` is as
    `native_frame` takes it.

    Raises
    ------
    MalformedObject, TooLarge, DependencyDown
    UnsupportedTransferSyntax
        Such samples cannot be written in `target`.
    """
    _check(stored, target, spec, decoders)
    codec = ENCODERS[target]
    if not codec:
        native = native_frame(data, stored, spec, decoders)
        return deflated(native) if target == DEFLATED_FRAMES else native

    def made() -> Job:
        found = data() if callable(data) else data
        payload, arguments = _work(found, stored, target, spec, decoders)
        return Job(ENCODE_FRAME, arguments, (payload,), answer_bytes=_most_bytes(spec))

    with decoders.counted(f"{codec}.encode"):
        return decoders.ask(made if callable(data) else made()).body


def encoded_frames(
    frames: Sequence[bytes],
    stored: str,
    target: str,
    spec: DecodeSpec,
    decoders: DecoderPool,
) -> list[bytes]:
    """Return several small frames as `encoded_frame` does, in one job for all."""
    codec = ENCODERS[target]
    if not codec or len(frames) == 1:
        return [encoded_frame(one, stored, target, spec, decoders) for one in frames]
    _check(stored, target, spec, decoders)
    work = [_work(one, stored, target, spec, decoders) for one in frames]
    job = Job(
        ENCODE_FRAME,
        payloads=[payload for payload, _ in work],
        answer_bytes=_most_bytes(spec) * len(frames),
        label=f"{codec}.encode",
    )
    return decoders.run_each(job, [arguments for _, arguments in work])


def batches(frames: Iterable[bytes], spec: DecodeSpec) -> Iterator[list[bytes]]:
    """Yield frames in groups that are worth a job: a large one is alone."""
    batch: list[bytes] = []
    size = 0
    for frame in frames:
        batch.append(frame)
        size += max(len(frame), spec.frame_bytes)
        if len(batch) == BATCH_FRAMES or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _check(stored: str, target: str, spec: DecodeSpec, decoders: DecoderPool) -> None:
    check_encodable(stored, target, spec)
    if spec.frame_bytes > decoders.limits.inflated_bytes:
        raise TooLarge("inflated_bytes", decoders.limits.inflated_bytes)


def _most_bytes(spec: DecodeSpec) -> int:
    # Noise grows a little; more is no encoding of this frame.
    return 2 * spec.frame_bytes + 64 * KIB


def _work(
    data: bytes, stored: str, target: str, spec: DecodeSpec, decoders: DecoderPool
) -> tuple[Buffer, dict[str, Any]]:
    """Return payload and arguments of a job that encodes one frame."""
    payload: Buffer = data
    how: dict[str, Any] | None = None
    if stored in CODECS:
        how = decode_arguments(CODECS[stored], data, spec)
    else:
        # No process is needed for these.
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
    return payload, {
        "transfer_syntax_uid": target,
        "spec": samples.arguments(),
        "decode": how,
    }


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
