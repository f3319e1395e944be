"""Every lossless syntax into every other: the pixels are those of another decoder too.

Objects of the corpus are rewritten in each syntax that is encoded here. What was
written is read back by our decoder, and by one of another make: GDCM for JPEG, JPEG-LS
and JPEG 2000, OpenJPEG for HTJ2K, pydicom's own for RLE.
"""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from openjpeg.utils import decode as openjpeg_decode
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.pixels import get_decoder
from pydicom.uid import UID

from pacs.imaging import syntaxes
from pacs.imaging.codecs import DecoderPool, DecodeSpec
from pacs.imaging.dataset import scan
from pacs.imaging.encoders import (
    DEFLATED_FRAMES,
    ENCAPSULATED_UNCOMPRESSED,
    ENCODERS,
    is_encodable,
)
from pacs.imaging.part10 import file_meta, read_file_meta
from pacs.imaging.transcode import to_syntax
from storage.kernel.errors import ImagingError, UnsupportedTransferSyntax
from storage.kernel.limits import Limits
from tests.support.corpus import CORPUS, files, needs_corpus

EXPLICIT = syntaxes.EXPLICIT_VR_LE
pytestmark = needs_corpus


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    made = DecoderPool(Limits())
    yield made
    made.close()


def sources() -> list[Path]:
    """Return the objects with pixels in lossless syntaxes, one of each kind."""
    found = files("syntaxes") + files("objects") + files("chest-ct/lidc-idri-0003")[:1]
    return [
        path
        for path in found + files("bone-dr")[:2] + files("chest-dr")[-2:]
        if _kind(path) is not None
    ]


@cache
def _kind(path: Path) -> str | None:
    data = path.read_bytes()
    try:
        meta = read_file_meta(data, accept_without_preamble=True)
        if meta is None:
            return None
        uid = meta.transfer_syntax_uid
        body = memoryview(data)[meta.dataset_offset :]
        if syntaxes.get(uid).lossy or not syntaxes.get(uid).decodes:
            return None
        if syntaxes.get(uid).deflated or len(data) > 3_000_000:
            return None
        found = scan(body, 0, len(body), uid, Limits())
    except ImagingError:
        return None
    described = found.unsigned(0x00280010) and found.pixel is not None
    return uid if described else None


def converted(path: Path, target: str, pool: DecoderPool) -> Dataset:
    data = path.read_bytes()
    meta = read_file_meta(data, accept_without_preamble=True)
    assert meta is not None
    body = to_syntax(
        memoryview(data)[meta.dataset_offset :],
        meta.transfer_syntax_uid,
        target,
        pool,
        Limits(),
    )
    head = file_meta("1.2.3", "1.2.3", target)
    ds = pydicom.dcmread(io.BytesIO(head + body))
    assert len(body) % 2 == 0
    return ds


def frames(ds: Dataset) -> list[bytes]:
    n_frames = int(ds.get("NumberOfFrames", 1) or 1)
    return list(generate_frames(ds.PixelData, number_of_frames=n_frames))


def native(ds: Dataset) -> np.ndarray[Any, Any]:
    """Return native samples, colour by pixel, one frame after the other."""
    bits, samples = ds.BitsAllocated, ds.get("SamplesPerPixel", 1)
    n_frames = int(ds.get("NumberOfFrames", 1) or 1)
    kind = f"<{'i' if ds.get('PixelRepresentation', 0) else 'u'}{bits // 8}"
    total = n_frames * ds.Rows * ds.Columns * samples
    flat = np.frombuffer(ds.PixelData, kind)[:total]
    if samples == 1:
        return flat.reshape(n_frames, ds.Rows, ds.Columns)
    if ds.PlanarConfiguration:
        planes = flat.reshape(n_frames, samples, ds.Rows, ds.Columns)
        return np.moveaxis(planes, 1, -1)
    return flat.reshape(n_frames, ds.Rows, ds.Columns, samples)


def by_ours(ds: Dataset, target: str, pool: DecoderPool) -> Iterator[bytes]:
    spec = DecodeSpec(
        ds.Rows,
        ds.Columns,
        ds.get("SamplesPerPixel", 1),
        ds.BitsAllocated,
        ds.get("BitsStored", ds.BitsAllocated),
        signed=bool(ds.get("PixelRepresentation", 0)),
        photometric=ds.PhotometricInterpretation,
        planar=ds.get("PlanarConfiguration", 0) or 0,
    )
    for frame in frames(ds):
        yield pool.decode(frame, target, spec)


def by_another(ds: Dataset, target: str) -> np.ndarray[Any, Any]:
    """Return the samples as a decoder of another make reads them."""
    if ENCODERS[target] == "htj2k":
        return np.stack([openjpeg_decode(frame) for frame in frames(ds)])
    if ds.BitsAllocated == 8:
        # GDCM ends the process over fewer stored bits; the code stream knows them.
        ds.BitsStored, ds.HighBit = 8, 7
    # Raw: colours stay what they are; the plug-in names the decoder.
    other = "pydicom" if ENCODERS[target] == "rle" else "gdcm"
    array, _ = get_decoder(UID(target)).as_array(ds, raw=True, decoding_plugin=other)
    return array if int(ds.get("NumberOfFrames", 1) or 1) > 1 else array[np.newaxis]


@pytest.mark.parametrize("target", ENCODERS)
@pytest.mark.parametrize(
    "path", sources() if CORPUS.is_dir() else [], ids=lambda path: path.stem
)
def test_pixels_are_the_same_in_every_lossless_syntax(
    path: Path, target: str, pool: DecoderPool
) -> None:
    plain = converted(path, EXPLICIT, pool)
    samples = plain.get("SamplesPerPixel", 1)
    bits = plain.get("BitsAllocated", 0)
    floats = "PixelData" not in plain
    subsampled = plain.get("PhotometricInterpretation") == "YBR_FULL_422"
    encodable = is_encodable(target, bits_allocated=bits, samples=samples)
    if floats or subsampled or not encodable or _kind(path) == target:
        if _kind(path) != target:
            with pytest.raises(UnsupportedTransferSyntax):
                converted(path, target, pool)
        return

    made = converted(path, target, pool)

    for keyword in ("Rows", "Columns", "BitsStored", "PixelRepresentation"):
        assert made.get(keyword) == plain.get(keyword)
    if target in {ENCAPSULATED_UNCOMPRESSED, DEFLATED_FRAMES}:
        ours = b"".join(by_ours(made, target, pool))
        if (made.Rows * made.Columns * bits) % 8 == 0:
            assert ours == plain.PixelData[: len(ours)]
        if target == DEFLATED_FRAMES:
            other = b"".join(
                zlib.decompressobj(-15).decompress(frame) for frame in frames(made)
            )
            assert other == ours
        return
    expected = native(plain)
    assert b"".join(by_ours(made, target, pool)) == expected.tobytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other_samples = by_another(made, target)
    assert np.array_equal(other_samples.reshape(expected.shape), expected)
