"""Decoding: codecs against what was encoded; decoders that die, hang, bloat."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from pydicom.pixels.encoders.native import _encode_frame  # RLE, PS3.5 Annex G

from pacs.imaging import worker
from pacs.imaging.codecs import (
    CODECS,
    DEFLATED_FRAMES,
    ENCAPSULATED_UNCOMPRESSED,
    DecoderPool,
    DecodeSpec,
    decoded_photometric,
)
from pacs.imaging.pool import _Process
from storage.kernel.errors import (
    DependencyDown,
    MalformedObject,
    TooLarge,
    UnsupportedTransferSyntax,
)
from storage.kernel.limits import MIB, Limits
from tests.support.process import is_running
from tests.support.waiting import wait_until

PIXEL_DATA = 0x7FE00010
JPEG = "1.2.840.10008.1.2.4."
RLE = "1.2.840.10008.1.2.5"


@pytest.fixture
def pool() -> Iterator[DecoderPool]:
    made = DecoderPool(Limits())
    yield made
    made.close()


def noise(shape: tuple[int, ...], bits: int, seed: int = 1) -> np.ndarray[Any, Any]:
    """Return smooth noise of `bits` bits, which codecs can compress."""
    made = np.random.default_rng(seed)
    ramp = np.indices(shape)[:2].sum(0) * (2**bits // (4 * shape[0]))
    values = ramp + made.integers(0, 2 ** max(1, bits - 3), shape)
    made_of: type[np.unsignedinteger[Any]] = np.uint8 if bits <= 8 else np.uint16
    noisy: np.ndarray[Any, Any] = (values % 2**bits).astype(made_of)
    return noisy


def grey(bits: int) -> tuple[np.ndarray[Any, Any], DecodeSpec]:
    return noise((48, 33), bits), DecodeSpec(48, 33, 1, 8 if bits <= 8 else 16, bits)


def rgb() -> tuple[np.ndarray[Any, Any], DecodeSpec]:
    array = np.stack([noise((40, 31), 8, seed) for seed in (1, 2, 3)], axis=-1)
    return array, DecodeSpec(40, 31, 3, 8, 8, photometric="RGB")


def rle(array: np.ndarray[Any, Any]) -> bytes:
    """Encode RLE with one PackBits segment for each byte of a sample."""
    planes = array.reshape(*array.shape[:2], -1)
    segments = []
    for sample in range(planes.shape[2]):
        plane = np.ascontiguousarray(planes[:, :, sample])
        raw = plane.astype(plane.dtype.newbyteorder(">")).tobytes()
        for byte in range(plane.itemsize):
            packed = imagecodecs.packbits_encode(raw[byte :: plane.itemsize])
            segments.append(packed + b"\0" * (len(packed) % 2))
    offsets = [64]
    for segment in segments[:-1]:
        offsets.append(offsets[-1] + len(segment))
    offsets += [0] * (15 - len(offsets))
    return struct.pack("<16I", len(segments), *offsets) + b"".join(segments)


def deflate(array: np.ndarray[Any, Any]) -> bytes:
    deflater = zlib.compressobj(wbits=-15)
    return deflater.compress(array.tobytes()) + deflater.flush()


LOSSLESS: list[tuple[str, Callable[[Any], bytes]]] = [
    (JPEG + "57", lambda a: imagecodecs.jpeg8_encode(a, lossless=True)),
    (JPEG + "70", lambda a: imagecodecs.jpeg8_encode(a, lossless=True)),
    (JPEG + "80", imagecodecs.jpegls_encode),
    (
        JPEG + "90",
        lambda a: imagecodecs.jpeg2k_encode(a, codecformat="j2k", reversible=True),
    ),
    (
        JPEG + "90",
        lambda a: imagecodecs.jpeg2k_encode(a, codecformat="jp2", reversible=True),
    ),
    (JPEG + "201", lambda a: imagecodecs.htj2k_encode(a, reversible=True)),
    (JPEG + "202", lambda a: imagecodecs.htj2k_encode(a, reversible=True)),
    (JPEG + "110", lambda a: imagecodecs.jpegxl_encode(a, lossless=True)),
    (
        JPEG + "110",
        lambda a: imagecodecs.jpegxl_encode(a, lossless=True, usecontainer=True),
    ),
    (RLE, rle),
    (DEFLATED_FRAMES, deflate),
    (ENCAPSULATED_UNCOMPRESSED, lambda a: a.tobytes()),
]


@pytest.mark.parametrize(("syntax", "encode"), LOSSLESS)
@pytest.mark.parametrize("made", [grey(8), grey(12), grey(16), rgb()])
def test_a_lossless_frame_comes_back_as_it_was(
    pool: DecoderPool,
    syntax: str,
    encode: Callable[[Any], bytes],
    made: tuple[np.ndarray[Any, Any], DecodeSpec],
) -> None:
    array, spec = made
    assert pool.decode(encode(array), syntax, spec) == array.tobytes()


@pytest.mark.parametrize(
    ("syntax", "encode", "bits"),
    [
        (JPEG + "50", imagecodecs.jpeg8_encode, 8),
        (JPEG + "51", lambda a: imagecodecs.jpeg8_encode(a, bitspersample=12), 12),
        (JPEG + "81", lambda a: imagecodecs.jpegls_encode(a, level=2), 12),
        (JPEG + "91", lambda a: imagecodecs.jpeg2k_encode(a, level=90), 12),
        (JPEG + "112", lambda a: imagecodecs.jpegxl_encode(a, level=95), 8),
    ],
)
def test_a_lossy_frame_comes_back_much_as_it_was(
    pool: DecoderPool, syntax: str, encode: Callable[[Any], bytes], bits: int
) -> None:
    ramp = np.add.outer(np.arange(64), np.arange(32)) * (2 ** (bits - 1) // 96)
    array = ramp.astype(np.uint8 if bits == 8 else np.uint16)
    spec = DecodeSpec(64, 32, 1, 8 if bits == 8 else 16, bits)
    decoded = np.frombuffer(pool.decode(encode(array), syntax, spec), array.dtype)
    assert np.abs(decoded.reshape(64, 32).astype(int) - array).max() <= 2**bits / 50


def test_lossy_htj2k_stays_within_black_and_white(pool: DecoderPool) -> None:
    array = np.zeros((64, 64), np.uint8)
    array[::5] = array[:, ::7] = 255
    encoded = imagecodecs.htj2k_encode(array, reversible=False)
    spec = DecodeSpec(64, 64, 1, 8, 8)
    decoded = np.frombuffer(pool.decode(encoded, JPEG + "203", spec), np.uint8)
    error = np.abs(decoded.reshape(64, 64).astype(int) - array)
    # Rounding round the range would be an error of 255.
    assert error.max() < 32


def test_rle_of_another_encoder_is_read(pool: DecoderPool) -> None:
    array, spec = grey(16)

    class Asked:
        rows, columns, samples_per_pixel, bits_allocated = 48, 33, 1, 16
        photometric_interpretation = "MONOCHROME2"
        planar_configuration = 0
        transfer_syntax = RLE

        @staticmethod
        def get_option(name: str, default: Any = None) -> Any:
            return {"byteorder": "<"}.get(name, default)

    runner: Any = Asked()
    encoded = bytes(_encode_frame(array.astype("<u2").tobytes(), runner))
    assert pool.decode(encoded, RLE, spec) == array.astype("<u2").tobytes()


def test_signs_are_extended_from_the_precision_of_the_code_stream(
    pool: DecoderPool,
) -> None:
    signed = np.arange(-2048, 2048, dtype=np.int16).reshape(64, 64)
    stored = (signed & 0x0FFF).astype(np.uint16)
    spec = DecodeSpec(64, 64, 1, 16, 12, signed=True)
    encoded = imagecodecs.jpeg2k_encode(
        stored, codecformat="j2k", reversible=True, bitspersample=12
    )
    assert pool.decode(encoded, JPEG + "90", spec) == signed.astype("<i2").tobytes()


def test_a_narrow_code_stream_fills_the_allocated_bits(pool: DecoderPool) -> None:
    array, _ = grey(8)
    spec = DecodeSpec(48, 33, 1, 16, 8)
    decoded = pool.decode(imagecodecs.jpegls_encode(array), JPEG + "80", spec)
    assert decoded == array.astype("<u2").tobytes()


def test_rgb_without_colour_markers_is_not_transformed(pool: DecoderPool) -> None:
    array, spec = rgb()
    encoded = imagecodecs.jpeg8_encode(
        array, level=98, colorspace="rgb", outcolorspace="rgb"
    )
    # Cut out what tells decoders that these are no YCbCr components (APP14).
    start = encoded.index(b"\xff\xee")
    length = int.from_bytes(encoded[start + 2 : start + 4], "big")
    bare = encoded[:start] + encoded[start + 2 + length :]
    decoded = np.frombuffer(pool.decode(bare, JPEG + "50", spec), np.uint8)
    assert np.abs(decoded.reshape(array.shape).astype(int) - array).mean() < 4


@pytest.mark.parametrize(
    ("syntax", "stored", "decoded"),
    [
        (JPEG + "50", "YBR_FULL_422", "RGB"),
        (JPEG + "70", "RGB", "RGB"),
        (JPEG + "70", "YBR_FULL", "YBR_FULL"),
        (JPEG + "80", "YBR_FULL", "YBR_FULL"),
        (JPEG + "90", "YBR_RCT", "RGB"),
        (JPEG + "91", "YBR_ICT", "RGB"),
        (JPEG + "111", "YBR_FULL_422", "RGB"),
        (JPEG + "110", "RGB", "RGB"),
        (RLE, "YBR_FULL", "YBR_FULL"),
    ],
)
def test_photometric_interpretation_follows_the_decoder(
    syntax: str, stored: str, decoded: str
) -> None:
    spec = DecodeSpec(2, 2, 3, 8, 8, photometric=stored)
    assert decoded_photometric(syntax, spec) == decoded


def test_a_20_code_stream_of_another_size_is_refused_before_decoding(
    pool: DecoderPool,
) -> None:
    array, spec = grey(8)
    for syntax, encode in LOSSLESS[:9]:
        small = encode(np.ascontiguousarray(array[:24]))
        with pytest.raises(MalformedObject, match="attributes say 33 x 48") as caught:
            pool.decode(small, syntax, spec)
        assert caught.value.tag == PIXEL_DATA
    assert pool.pids() == []


def huge_jpeg() -> bytes:
    encoded = bytearray(imagecodecs.jpeg8_encode(np.zeros((16, 16), np.uint8)))
    frame = encoded.index(b"\xff\xc0")
    encoded[frame + 5 : frame + 9] = struct.pack(">HH", 65_500, 65_500)
    return bytes(encoded)


def huge_tiles() -> bytes:
    encoded = bytearray(
        imagecodecs.jpeg2k_encode(np.zeros((16, 16), np.uint8), codecformat="j2k")
    )
    size = encoded.index(b"\xff\x51")
    # XTsiz and YTsiz of one: as many tiles as pixels.
    encoded[size + 6 : size + 14] = struct.pack(">II", 60_000, 60_000)
    encoded[size + 22 : size + 30] = struct.pack(">II", 1, 1)
    return bytes(encoded)


def many_components() -> bytes:
    encoded = bytearray(
        imagecodecs.jpeg2k_encode(np.zeros((16, 16), np.uint8), codecformat="j2k")
    )
    size = encoded.index(b"\xff\x51")
    encoded[size + 38 : size + 40] = struct.pack(">H", 16_384)
    return bytes(encoded)


@pytest.mark.parametrize(
    ("syntax", "data"),
    [
        (JPEG + "50", huge_jpeg()),
        (JPEG + "90", huge_tiles()),
        (JPEG + "201", huge_tiles()),
        (JPEG + "90", many_components()),
        (JPEG + "50", b""),
        (JPEG + "50", b"\xff\xd8"),
        (JPEG + "50", b"\xff\xd8\xff\xda\0\2"),
        (JPEG + "80", b"\xff\xd8\xff\xf7\0\4\0\0"),
        (JPEG + "90", b"\xff\x4f\xff\x51" + bytes(30)),
        (JPEG + "90", b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0\0\0\4jp2c" * 3),
        (JPEG + "110", b"\xff\x0a"),
        (JPEG + "110", b"\0\0\0\x0cJXL \r\n\x87\n"),
        (DEFLATED_FRAMES, b"\xff\xff\xff"),
        (DEFLATED_FRAMES, deflate(np.zeros(10, np.uint8))),
        (ENCAPSULATED_UNCOMPRESSED, bytes(255)),
    ],
)
def test_a_broken_header_needs_no_process(
    pool: DecoderPool, syntax: str, data: bytes
) -> None:
    with pytest.raises(MalformedObject):
        pool.decode(data, syntax, DecodeSpec(16, 16, 1, 8, 8))
    assert pool.pids() == []


@pytest.mark.parametrize(
    "header",
    [
        (0,),
        (16, *range(64, 79)),
        (1, 65),
        (1, 64 + 500),
        (2, 64, 4_000_000_000),
        (2, 64, 60),
    ],
)
def test_a19_rle_segments_outside_the_frame_are_refused(
    pool: DecoderPool, header: tuple[int, ...]
) -> None:
    head = struct.pack("<16I", *(header + (0,) * 16)[:16])
    with pytest.raises(MalformedObject):
        pool.decode(head + bytes(64), RLE, DecodeSpec(8, 8, 1, 8, 8))


def test_a19_rle_that_is_too_short_is_never_filled_up(pool: DecoderPool) -> None:
    with pytest.raises(MalformedObject, match="too short"):
        pool.decode(rle(noise((8, 7), 8)), RLE, DecodeSpec(8, 8, 1, 8, 8))


@pytest.mark.parametrize(("syntax", "encode"), LOSSLESS[:10])
def test_cut_code_streams_are_refused_or_decode(
    pool: DecoderPool, syntax: str, encode: Callable[[Any], bytes]
) -> None:
    array, spec = grey(8)
    encoded = encode(array)
    for part in (10, 40, 75, 95):
        try:
            decoded = pool.decode(encoded[: len(encoded) * part // 100], syntax, spec)
        except MalformedObject:
            continue
        # Some codecs give what they have got so far: all of it, or nothing.
        assert len(decoded) == spec.frame_bytes


@pytest.mark.parametrize(("syntax", "encode"), LOSSLESS[:10])
def test_a21_flipped_bytes_cost_one_request_at_most(
    pool: DecoderPool, syntax: str, encode: Callable[[Any], bytes]
) -> None:
    array, spec = grey(8)
    encoded = encode(array)
    made = np.random.default_rng(21)
    for _ in range(60):
        broken = bytearray(encoded)
        for place in made.integers(0, len(broken), 4):
            broken[place] ^= int(made.integers(1, 256))
        try:
            decoded = pool.decode(broken, syntax, spec)
        except (MalformedObject, DependencyDown, TooLarge):
            continue
        assert len(decoded) == spec.frame_bytes
    assert pool.decode(encoded, syntax, spec) == array.tobytes()


def test_a21_a_decoder_that_dies_costs_one_request(pool: DecoderPool) -> None:
    array, spec = grey(8)
    encoded = imagecodecs.jpegls_encode(array)
    pool.decode(encoded, JPEG + "80", spec)
    (victim,) = pool.pids()
    os.kill(victim, signal.SIGSTOP)
    caught: list[BaseException] = []

    def ask() -> None:
        try:
            pool.decode(encoded, JPEG + "80", spec)
        except DependencyDown as error:
            caught.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: pool.pids() == [], "the decoder to be taken")
    os.kill(victim, signal.SIGKILL)
    thread.join()
    assert "died" in str(caught[0])
    assert pool.decode(encoded, JPEG + "80", spec) == array.tobytes()


def test_a_decoder_that_died_idle_is_replaced(pool: DecoderPool) -> None:
    array, spec = grey(8)
    encoded = imagecodecs.jpegls_encode(array)
    pool.decode(encoded, JPEG + "80", spec)
    (victim,) = pool.pids()
    os.kill(victim, signal.SIGKILL)
    os.waitid(os.P_PID, victim, os.WEXITED | os.WNOWAIT)
    assert pool.decode(encoded, JPEG + "80", spec) == array.tobytes()
    assert pool.pids() != [victim]


def test_a21_a_decoder_that_hangs_is_killed() -> None:
    pool = DecoderPool(Limits(decode_seconds=0.2))
    array, spec = grey(8)
    encoded = imagecodecs.jpegls_encode(array)
    pool.decode(encoded, JPEG + "80", spec)
    (victim,) = pool.pids()
    os.kill(victim, signal.SIGSTOP)
    with pytest.raises(DependencyDown, match="took over"):
        pool.decode(encoded, JPEG + "80", spec)
    assert not is_running(victim)
    assert pool.decode(encoded, JPEG + "80", spec) == array.tobytes()
    pool.close()


def test_a21_memory_of_a_decoder_is_bounded() -> None:
    pool = DecoderPool(Limits(decode_bytes=8 * MIB))
    big = np.zeros((4000, 4000), np.uint16)
    encoded = imagecodecs.jpeg2k_encode(big, codecformat="j2k", reversible=True)
    with pytest.raises((TooLarge, MalformedObject)):
        pool.decode(encoded, JPEG + "90", DecodeSpec(4000, 4000))
    array, spec = grey(8)
    decoded = pool.decode(imagecodecs.jpegls_encode(array), JPEG + "80", spec)
    assert decoded == array.tobytes()
    pool.close()


def test_a13_a_frame_larger_than_the_limit_is_refused_unseen() -> None:
    pool = DecoderPool(Limits(inflated_bytes=MIB))
    with pytest.raises(TooLarge) as caught:
        pool.decode(b"", ENCAPSULATED_UNCOMPRESSED, DecodeSpec(65_535, 65_535, 3))
    assert caught.value.limit == "inflated_bytes"
    pool.close()


def test_more_requests_than_may_wait_are_told_to_come_back() -> None:
    pool = DecoderPool(Limits(decode_seconds=60), max_waiting=1)
    array, spec = grey(8)
    encoded = imagecodecs.jpegls_encode(array)
    pool.decode(encoded, JPEG + "80", spec)
    (stopped,) = pool.pids()
    os.kill(stopped, signal.SIGSTOP)
    answers: list[bytes] = []

    def ask() -> None:
        answers.append(pool.decode(encoded, JPEG + "80", spec))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    threads[0].start()
    wait_until(lambda: pool.pids() == [], "the decoder to be taken")
    threads[1].start()
    wait_until(lambda: pool._waiting == 1, "one to wait")  # noqa: SLF001
    with pytest.raises(DependencyDown, match="busy"):
        pool.decode(encoded, JPEG + "80", spec)
    os.kill(stopped, signal.SIGCONT)
    for thread in threads:
        thread.join()
    assert answers == [array.tobytes()] * 2
    pool.close()


def test_many_threads_share_few_processes() -> None:
    pool = DecoderPool(Limits(), processes=2)
    arrays = [noise((32, 32), 12, seed) for seed in range(40)]
    spec = DecodeSpec(32, 32, 1, 16, 12)
    answers: dict[int, bytes] = {}

    def ask(i: int) -> None:
        encoded = imagecodecs.jpegls_encode(arrays[i])
        answers[i] = pool.decode(encoded, JPEG + "80", spec)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {i: array.tobytes() for i, array in enumerate(arrays)}
    assert 1 <= len(pool.pids()) <= 2
    pool.close()


def test_idle_decoders_are_ended() -> None:
    pool = DecoderPool(Limits(), idle_seconds=0.05)
    array, spec = grey(8)
    encoded = imagecodecs.jpegls_encode(array)
    for _ in range(2):
        assert pool.decode(encoded, JPEG + "80", spec) == array.tobytes()
        wait_until(lambda: pool.pids() == [], "idle decoders to end")
    pool.close()


def test_decoders_are_told_no_settings(
    pool: DecoderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUYING_DATABASE__URL", "postgresql://u:secret@h/d")
    array, spec = grey(8)
    pool.decode(imagecodecs.jpegls_encode(array), JPEG + "80", spec)
    (pid,) = pool.pids()

    told = Path(f"/proc/{pid}/environ").read_bytes()

    assert b"OMP_NUM_THREADS=1" in told
    assert b"HUYING_" not in told


@pytest.mark.parametrize(
    ("outcome", "head", "length"),
    [
        (worker.DONE, b"{}", 1 << 40),
        (worker.REFUSED, b"{}", 1 << 40),
        (worker.DONE, b"{}", 1),
        (worker.DONE, b"[]", 0),
        (worker.DONE, b"no JSON", 0),
        (worker.DONE, bytes(1 << 20), 0),
    ],
)
def test_an_answer_of_impossible_length_or_form_is_not_believed(
    pool: DecoderPool,
    monkeypatch: pytest.MonkeyPatch,
    outcome: int,
    head: bytes,
    length: int,
) -> None:
    answer = iter([worker.ANSWER.pack(outcome, len(head), length), head, b"?" * 9])
    monkeypatch.setattr(
        _Process,
        "_receive",
        lambda _self, size, _deadline: bytearray(next(answer)[:size]),
    )
    array, spec = grey(8)

    with pytest.raises(DependencyDown, match="nonsense"):
        pool.decode(imagecodecs.jpegls_encode(array), JPEG + "80", spec)


def test_nothing_is_decoded_after_close(pool: DecoderPool) -> None:
    array, spec = grey(8)
    encoded = imagecodecs.jpegls_encode(array)
    pool.decode(encoded, JPEG + "80", spec)
    (pid,) = pool.pids()
    pool.close()
    assert not is_running(pid)
    with pytest.raises(DependencyDown):
        pool.decode(encoded, JPEG + "80", spec)


def test_decoders_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    program = """
import imagecodecs, numpy, os, signal, sys
from pacs.imaging.codecs import DecoderPool, DecodeSpec
from storage.kernel.limits import Limits
pool = DecoderPool(Limits())
data = imagecodecs.jpegls_encode(numpy.zeros((8, 8), numpy.uint8))
pool.decode(data, "1.2.840.10008.1.2.4.80", DecodeSpec(8, 8, 1, 8, 8))
print(pool.pids()[0], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, check=False
    )
    assert done.returncode == -signal.SIGKILL
    wait_until(lambda: not is_running(int(done.stdout)), "the decoder to end")


def test_every_request_is_counted_with_its_end() -> None:
    seen: list[tuple[str, str]] = []

    class Observer:
        def decoded(self, codec: str, outcome: str, seconds: float) -> None:
            assert seconds >= 0
            seen.append((codec, outcome))

    pool = DecoderPool(Limits(), observer=Observer())
    array, spec = grey(8)
    encoded = imagecodecs.jpegls_encode(array)
    pool.decode(encoded, JPEG + "80", spec)
    with pytest.raises(MalformedObject):
        pool.decode(encoded[:40], JPEG + "80", spec)
    (victim,) = pool.pids()
    pool.close()
    with pytest.raises(DependencyDown):
        pool.decode(encoded, JPEG + "80", spec)
    assert not is_running(victim)
    assert seen == [
        ("jpegls", "decoded"), ("jpegls", "input.malformed"),
        ("jpegls", "unavailable.dependency"),
    ]  # fmt: skip


def test_what_has_no_decoder_is_refused(pool: DecoderPool) -> None:
    for syntax in (JPEG + "100", JPEG + "92", "1.2.840.10008.1.2.1", "1.2.3"):
        assert syntax not in CODECS
        with pytest.raises(UnsupportedTransferSyntax):
            pool.decode(bytes(512), syntax, DecodeSpec(16, 16))


@pytest.mark.parametrize(
    ("values", "tag"),
    [
        ({"rows": 0}, 0x00280010),
        ({"columns": 70_000}, 0x00280011),
        ({"samples": 2}, 0x00280002),
        ({"bits_allocated": 99}, 0x00280100),
    ],
)
def test_impossible_attributes_are_named(values: dict[str, int], tag: int) -> None:
    with pytest.raises(MalformedObject) as caught:
        DecodeSpec(**{"rows": 1, "columns": 1, **values})  # type: ignore[arg-type]
    assert caught.value.tag == tag
