"""Encoding: every sample survives, and a code stream is what its syntax says."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from itertools import product
from typing import Any

import imagecodecs
import numpy as np
import pytest

from pacs.imaging.codecs import DecoderPool, DecodeSpec, decoded_photometric
from pacs.imaging.codestream import jpeg2000_shape, jpeg_shape
from pacs.imaging.encoders import (
    DEFLATED_FRAMES,
    ENCAPSULATED_UNCOMPRESSED,
    ENCODERS,
    HTJ2K_LOSSLESS,
    HTJ2K_LOSSLESS_RPCL,
    EncodeSpec,
    Lossy,
    check_rpcl,
    encode,
    encoded_photometric,
    is_encodable,
    resolution_offsets,
)
from pacs.imaging.recode import encoded_frame, native_frames, recoded_photometric
from storage.kernel.errors import (
    MalformedObject,
    TooLarge,
    UnsupportedTransferSyntax,
)
from storage.kernel.limits import Limits

EXPLICIT = "1.2.840.10008.1.2.1"
JPEG_SV1, JPEG_LS = "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.80"
JPEG_2000, RLE = "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.5"
CODED = [uid for uid, codec in ENCODERS.items() if codec]


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    made = DecoderPool(Limits())
    yield made
    made.close()


def noise(spec: EncodeSpec, bits: int, seed: int = 1) -> np.ndarray[Any, Any]:
    """Return samples over all of what `bits` bits can hold."""
    low = -(1 << (bits - 1)) if spec.signed else 0
    shape = (spec.rows, spec.columns) + ((3,) if spec.samples == 3 else ())
    made = np.random.default_rng(seed).integers(low, low + (1 << bits), shape)
    made.flat[0], made.flat[-1] = low, low + (1 << bits) - 1
    return made.astype(f"<{'i' if spec.signed else 'u'}{spec.bits_allocated // 8}")


def spec_of(one: EncodeSpec, **changed: Any) -> DecodeSpec:
    values = one.arguments() | changed
    del values["planar"]
    return DecodeSpec(**values)


SHAPES = [(1, 1), (1, 7), (9, 1), (33, 70)]
DEPTHS = [(8, 8), (8, 6), (16, 16), (16, 12), (16, 5), (32, 32)]


@pytest.mark.parametrize("uid", CODED)
@pytest.mark.parametrize(("allocated", "stored"), DEPTHS)
def test_every_sample_survives(
    uid: str, allocated: int, stored: int, pool: DecoderPool
) -> None:
    if not is_encodable(uid, bits_allocated=allocated, samples=1):
        spec = EncodeSpec(1, 1, 1, allocated, stored, False, "MONOCHROME2")
        with pytest.raises(UnsupportedTransferSyntax):
            encode(uid, np.zeros((1, 1), np.uint8), spec)
        return
    for (rows, columns), signed, colour in product(
        SHAPES, (False, True), ("MONOCHROME2", "RGB", "YBR_FULL")
    ):
        samples = 1 if colour == "MONOCHROME2" else 3
        spec = EncodeSpec(rows, columns, samples, allocated, stored, signed, colour)
        array = noise(spec, stored)

        encoded = encode(uid, array, spec)

        # As a receiver would: with the attributes of the encoded object.
        attributes = spec_of(spec, photometric=encoded_photometric(uid, colour))
        assert pool.decode(encoded, uid, attributes) == array.tobytes()
        assert decoded_photometric(uid, attributes) == colour


@pytest.mark.parametrize("uid", CODED)
def test_samples_beyond_bits_stored_survive(uid: str, pool: DecoderPool) -> None:
    # Overlays in the high bits (PS3.5 8.1.2) must not be masked away.
    spec = EncodeSpec(16, 16, 1, 16, 10, False, "MONOCHROME2")
    array = noise(spec, 16)

    encoded = encode(uid, array, spec)

    assert pool.decode(encoded, uid, spec_of(spec)) == array.tobytes()


def test_precision_is_that_of_the_samples() -> None:
    for signed in (False, True):
        spec = EncodeSpec(32, 32, 1, 16, 12, signed, "MONOCHROME2")
        array = noise(spec, 12)
        for uid in (JPEG_2000, HTJ2K_LOSSLESS):
            encoded = encode(uid, array, spec)
            assert jpeg2000_shape(encoded).precision == 12
            assert bool(encoded[42] & 0x80) == signed
            # OpenJPEG reads what OpenJPH wrote, sign and range included.
            other = imagecodecs.jpeg2k_decode(encoded)
            assert np.array_equal(other, array)
    for allocated, stored in ((16, 12), (16, 9), (16, 8), (16, 5), (8, 7), (8, 8)):
        spec = EncodeSpec(32, 32, 1, allocated, stored, False, "MONOCHROME2")
        encoded = encode(JPEG_SV1, noise(spec, stored), spec)
        assert jpeg_shape(encoded).precision == stored


def test_jpeg_lossless_is_first_order_prediction() -> None:
    spec = EncodeSpec(8, 8, 1, 16, 12, False, "MONOCHROME2")

    encoded = encode(JPEG_SV1, noise(spec, 12), spec)

    assert jpeg_shape(encoded).lossless
    scan = encoded.index(b"\xff\xda")
    assert encoded[scan + 7] == 1  # Ss, the selection value (ISO/IEC 10918-1 H.2)


def test_rle_rows_are_encoded_on_their_own() -> None:
    spec = EncodeSpec(4, 300, 1, 16, 16, False, "MONOCHROME2")
    encoded = encode(RLE, np.full((4, 300), 0x0102, np.uint16), spec)

    n, first, second, *rest = struct.unpack_from("<16I", encoded)
    assert (n, first, rest) == (2, 64, [0] * 13)
    # Runs of at most 128: three for each row, none over its end (PS3.5 G.3.1).
    assert encoded[first:second] == b"\x81\x01\x81\x01\xd5\x01" * 4
    assert encoded[second:] == b"\x81\x02\x81\x02\xd5\x02" * 4


@pytest.mark.parametrize(
    ("rows", "columns", "levels"), [(64, 64, 5), (512, 512, 5), (4096, 100, 6)]
)
def test_htj2k_rpcl_is_what_it_claims(rows: int, columns: int, levels: int) -> None:
    spec = EncodeSpec(rows, columns, 1, 16, 12, False, "MONOCHROME2")

    encoded = encode(HTJ2K_LOSSLESS_RPCL, noise(spec, 12), spec)

    check_rpcl(encoded)
    offsets = resolution_offsets(encoded[:4096], len(encoded))
    assert len(offsets) == levels + 1
    assert offsets == sorted(offsets)
    assert len(encoded) - offsets[-1] == 2  # the end of code stream marker


def test_a_prefix_is_a_smaller_picture() -> None:
    spec = EncodeSpec(128, 96, 1, 16, 12, False, "MONOCHROME2")
    encoded = encode(HTJ2K_LOSSLESS_RPCL, noise(spec, 12), spec)

    offsets = resolution_offsets(encoded, len(encoded))

    for i, end in enumerate(offsets):
        skipped = len(offsets) - 1 - i
        small = imagecodecs.htj2k_decode(encoded[:end], skipres=skipped)
        whole = imagecodecs.htj2k_decode(encoded, skipres=skipped)
        assert np.array_equal(small, whole)


def test_other_orders_are_not_rpcl() -> None:
    image = np.zeros((200, 200), np.uint16)
    plain = imagecodecs.htj2k_encode(image, reversible=True)  # no TLM
    tiled = imagecodecs.htj2k_encode(
        image, reversible=True, tlm=True, tilepart=1, tile=(64, 64)
    )
    shallow = imagecodecs.htj2k_encode(
        image, reversible=True, tlm=True, tilepart=1, resolutions=1
    )
    lrcp = imagecodecs.jpeg2k_encode(image, codecformat="j2k", level=0)

    for encoded in (plain, tiled, shallow, lrcp, b"", b"\xff\x4f"):
        with pytest.raises(UnsupportedTransferSyntax):
            check_rpcl(bytes(encoded))
        assert resolution_offsets(b"", 0) == []


def test_a_codec_that_loses_a_bit_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = EncodeSpec(8, 8, 1, 8, 8, False, "MONOCHROME2")

    def near(array: np.ndarray[Any, Any], **_: Any) -> bytes:
        changed = array.copy()
        changed[0, 0] ^= 1
        return bytes(encode_jpegls(changed))

    encode_jpegls = imagecodecs.jpegls_encode
    monkeypatch.setattr(imagecodecs, "jpegls_encode", near)

    with pytest.raises(Lossy):
        encode(JPEG_LS, noise(spec, 8), spec)


def test_colour_by_plane_is_encoded_by_pixel(pool: DecoderPool) -> None:
    planes = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
    spec = DecodeSpec(4, 5, 3, 8, 8, photometric="RGB", planar=1)

    for uid in CODED:
        encoded = encoded_frame(planes.tobytes(), EXPLICIT, uid, spec, pool)
        attributes = DecodeSpec(
            4, 5, 3, 8, 8, photometric=recoded_photometric(EXPLICIT, uid, spec)
        )
        assert pool.decode(encoded, uid, attributes) == (
            np.moveaxis(planes, 0, -1).tobytes()
        )


def test_code_streams_are_encoded_again_in_one_job(pool: DecoderPool) -> None:
    spec = EncodeSpec(40, 30, 1, 16, 12, True, "MONOCHROME2")
    array = noise(spec, 12)
    for source, target in product(CODED, repeat=2):
        if source == target:
            continue
        stored = encode(source, array, spec)

        made = encoded_frame(stored, source, target, spec_of(spec), pool)

        assert pool.decode(made, target, spec_of(spec)) == array.tobytes()


def test_frames_are_wrapped_and_deflated_without_a_codec(pool: DecoderPool) -> None:
    spec = DecodeSpec(3, 5, 1, 1, 1)
    frame = bytes([0xFF, 0x7F])

    assert encoded_frame(
        frame, EXPLICIT, ENCAPSULATED_UNCOMPRESSED, spec, pool
    ) == frame  # fmt: skip
    deflated = encoded_frame(frame, EXPLICIT, DEFLATED_FRAMES, spec, pool)
    assert zlib.decompress(deflated, -zlib.MAX_WBITS) == frame
    assert pool.decode(deflated, DEFLATED_FRAMES, spec) == frame


def test_frames_that_end_within_a_byte_are_parted() -> None:
    spec = DecodeSpec(3, 3, 1, 1, 1)
    bits = np.random.default_rng(1).integers(0, 2, (5, 9)).astype(np.uint8)
    value = np.packbits(bits.ravel(), bitorder="little").tobytes()

    frames = list(native_frames(memoryview(value), spec, 5))

    for frame, expected in zip(frames, bits, strict=True):
        found = np.unpackbits(np.frombuffer(frame, np.uint8), bitorder="little")
        assert found[:9].tolist() == expected.tolist()
    with pytest.raises(MalformedObject):
        list(native_frames(memoryview(value), spec, 6))


def test_what_cannot_be_encoded_says_so(pool: DecoderPool) -> None:
    grey = DecodeSpec(2, 2, 1, 16, 16)
    subsampled = DecodeSpec(2, 2, 3, 8, 8, photometric="YBR_FULL_422")
    video = "1.2.840.10008.1.2.4.102"
    for stored, target, spec in (
        (EXPLICIT, video, grey),
        (video, JPEG_LS, grey),
        (EXPLICIT, JPEG_LS, subsampled),
        (EXPLICIT, JPEG_LS, DecodeSpec(2, 2, 1, 32, 32)),
        (EXPLICIT, RLE, DecodeSpec(8, 8, 1, 1, 1)),
        (EXPLICIT, JPEG_2000, DecodeSpec(2, 2, 4, 8, 8)),
    ):
        with pytest.raises(UnsupportedTransferSyntax):
            encoded_frame(bytes(32), stored, target, spec, pool)
    with pytest.raises(MalformedObject):
        encoded_frame(bytes(7), EXPLICIT, JPEG_LS, grey, pool)
    with pytest.raises(MalformedObject):
        encoded_frame(b"\xff\xd8nothing", JPEG_LS, JPEG_2000, grey, pool)


def test_an_encoder_is_bounded() -> None:
    pool = DecoderPool(Limits(inflated_bytes=1024))
    try:
        with pytest.raises(TooLarge):
            encoded_frame(
                bytes(2048), EXPLICIT, JPEG_LS, DecodeSpec(32, 32, 1, 16, 16), pool
            )
    finally:
        pool.close()
