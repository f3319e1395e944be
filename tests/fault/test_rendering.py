"""Objects that lie about their pixels, asked for as pictures (A13-A21, C18, D11)."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from typing import Any

import imagecodecs
import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import (
    ExplicitVRBigEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)

from storage.kernel.limits import MIB, Limits
from tests.support.datasets import ct_slice, part10, uid
from tests.support.dicomweb import WebArchive, web_archive
from tests.support.wado import compressed, get, image, keep

PNG = "image/png"


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebArchive]:
    limits = Limits(inflated_bytes=64 * MIB, decode_bytes=512 * MIB)
    with web_archive(tmp_path_factory.mktemp("hostile"), limits=limits) as served:
        keep(served, part10(ct_slice(seed=1)))
        yield served


def raw(**values: Any) -> bytes:
    """Return a CT with attributes that pydicom would not write by itself."""
    ds = ct_slice(seed=2)
    for name, value in values.items():
        if value is None:
            delattr(ds, name)
        elif isinstance(value, tuple):
            ds.add_new(ds[name].tag if name in ds else name, *value)
        else:
            setattr(ds, name, value)
    return part10(ds)


def palette(entries: int, length: int) -> bytes:
    ds = ct_slice(
        seed=2, PhotometricInterpretation="PALETTE COLOR", BitsStored=16, HighBit=15
    )
    for number in (1, 2, 3):
        ds.add_new(0x00281100 + number, "US", [entries, 0, 16])
        ds.add_new(0x00281200 + number, "OW", bytes(length))
    return part10(ds)


def wide_jpeg() -> bytes:
    """Return a JPEG that is a hundred times as wide as the attributes say."""
    wide = imagecodecs.jpeg8_encode(np.zeros((32, 3200), np.uint8))
    ds = ct_slice(seed=2, BitsAllocated=8, BitsStored=8, HighBit=7)
    return compressed(ds, [wide + b"\0" * (len(wide) % 2)], JPEGBaseline8Bit)


def rle(header: tuple[int, ...]) -> bytes:
    head = struct.pack("<16I", *(header + (0,) * 16)[:16])
    ds = ct_slice(seed=2, BitsAllocated=8, BitsStored=8, HighBit=7)
    return compressed(ds, [head + bytes(64)], RLELossless)


def huge_tiles() -> bytes:
    encoded = bytearray(
        imagecodecs.jpeg2k_encode(np.zeros((32, 32), np.uint16), codecformat="j2k")
    )
    size = encoded.index(b"\xff\x51")
    encoded[size + 38 : size + 40] = struct.pack(">H", 16_384)
    encoded += b"\0" * (len(encoded) % 2)
    return compressed(ct_slice(seed=2), [bytes(encoded)], JPEG2000Lossless)


#: What is stored, and the statuses that are right for its picture.
CASES: list[tuple[str, Callable[[], bytes], set[int]]] = [
    ("a13_a_frame_of_eight_gigabytes",
     lambda: raw(Rows=65_535, Columns=65_535), {404, 413, 422}),
    ("a13_no_rows", lambda: raw(Rows=0), {404, 406, 422}),
    ("a13_rows_are_missing", lambda: raw(Rows=None), {404, 406, 422}),
    ("a14_rows_are_text", lambda: raw(Rows=("LO", "thirty-two")), {404, 406, 422}),
    ("a14_rows_are_long", lambda: raw(Rows=("UL", 32)), {404, 406, 422}),
    ("a15_pixels_are_short", lambda: raw(PixelData=bytes(100)), {404, 422}),
    ("a16_pixels_are_long", lambda: raw(PixelData=bytes(4096)), {200}),
    ("a17_palettes_are_missing",
     lambda: raw(PhotometricInterpretation="PALETTE COLOR"), {422}),
    ("a17_palettes_are_short", lambda: palette(256, 16), {422}),
    ("a17_indexes_beyond_the_palette", lambda: palette(4, 8), {200}),
    ("a18_no_frames", lambda: raw(NumberOfFrames=0), {200}),
    ("a18_a_billion_frames", lambda: raw(NumberOfFrames=10**9), {200, 404}),
    ("a18_frames_are_negative", lambda: raw(NumberOfFrames=-1), {200, 404}),
    ("a19_rle_segments_past_the_end", lambda: rle((1, 9999)), {422}),
    ("a19_rle_of_sixteen_segments", lambda: rle((16, *range(64, 79))), {422}),
    ("a20_a_jpeg_of_another_size", wide_jpeg, {422}),
    ("a21_absurd_components", huge_tiles, {422, 413, 503}),
    ("c18_bits_that_are_none", lambda: raw(BitsStored=0, HighBit=0), {200, 422}),
    ("c18_more_bits_than_allocated", lambda: raw(BitsStored=99), {422}),
    ("c18_the_high_bit_outside", lambda: raw(HighBit=40), {422}),
    ("c18_five_samples", lambda: raw(SamplesPerPixel=5), {404, 422}),
    ("c18_an_unknown_photometry",
     lambda: raw(PhotometricInterpretation="NOBODY"), {200, 422}),
    ("c18_a_window_of_nothing", lambda: raw(WindowCenter=0, WindowWidth=0), {200}),
    ("c18_a_slope_of_nothing", lambda: raw(RescaleSlope=0), {200}),
    ("c18_spacing_of_nothing", lambda: raw(PixelSpacing=[0, 1]), {200}),
    ("c18_an_absurd_aspect", lambda: raw(PixelAspectRatio=[60_000, 1]), {200}),
    ("c18_big_endian", lambda: part10(ct_slice(seed=2), ExplicitVRBigEndian), {200}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "expected"),
    [pytest.param(make, expected, id=name) for name, make, expected in CASES],
)
def test_c18_pixels_that_lie_cost_their_request_only(
    web: WebArchive, make: Callable[[], bytes], expected: set[int]
) -> None:
    with web.archive.database.write() as connection:
        connection.exec_driver_sql("DELETE FROM instance WHERE sop_instance_uid = ?",
                                   (uid(2, 1, 1),))  # fmt: skip
    keep(web, make())
    for suffix in ("rendered", "thumbnail", "frames/1/rendered", "frames/1/thumbnail"):
        answer = get(web, f"{image(2)}/{suffix}", PNG)
        assert answer.status in expected, answer.body[:300]
        if answer.status == 200:
            shown = Image.open(io.BytesIO(answer.body))
            assert shown.width * shown.height <= web.archive.limits.rendered_pixels
    assert get(web, f"{image(1)}/rendered").status == 200


def slide(size: int) -> Dataset:
    """Return the header of a whole slide whose frames are small tiles."""
    ds = ct_slice(seed=3, size=2, NumberOfFrames=4, BitsAllocated=8, BitsStored=8)
    ds.HighBit, ds.SOPClassUID = 7, "1.2.840.10008.5.1.4.1.1.77.1.6"
    ds.TotalPixelMatrixRows = ds.TotalPixelMatrixColumns = size
    ds.PixelData = bytes(range(16))
    return ds


def test_c18_a_slide_is_shown_by_its_tiles(web: WebArchive) -> None:
    keep(web, part10(slide(60_000)))
    answer = get(web, f"{image(3)}/frames/4/rendered", PNG)
    assert Image.open(io.BytesIO(answer.body)).size == (2, 2)
    assert get(web, f"{image(3)}/thumbnail").status == 200


def test_c18_one_bit_and_signed_pixels_have_pictures(web: WebArchive) -> None:
    bits = np.indices((16, 16)).sum(0) % 2
    ds = ct_slice(seed=4, size=16, BitsAllocated=1, BitsStored=1, HighBit=0)
    ds.PixelRepresentation, ds.PixelSpacing = 0, None
    ds.RescaleIntercept, ds.RescaleSlope = 0, 1
    ds.PixelData = np.packbits(bits.reshape(-1), bitorder="little").tobytes()
    keep(web, part10(ds))
    answer = get(web, f"{image(4)}/rendered", PNG)
    assert (np.asarray(Image.open(io.BytesIO(answer.body))) == 255 * bits).all()


def test_d11_a_deletion_while_pictures_are_asked_for(web: WebArchive) -> None:
    keep(web, part10(ct_slice(seed=5)))
    assert get(web, f"{image(5)}/rendered").status == 200
    with web.archive.database.write() as connection:
        connection.exec_driver_sql(
            "DELETE FROM instance WHERE sop_instance_uid = ?", (uid(5, 1, 1),)
        )
    for suffix in ("rendered", "thumbnail"):
        assert get(web, f"{image(5)}/{suffix}").status == 404
