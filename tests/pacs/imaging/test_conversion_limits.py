"""What converting one object may cost, and when it stops."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from pacs.imaging import syntaxes
from pacs.imaging.codecs import DecoderPool
from pacs.imaging.part10 import file_meta
from pacs.imaging.recode import BATCH_FRAMES
from pacs.imaging.transcode import rewrite, to_syntax
from storage.kernel.errors import Cancelled, DependencyDown, TooLarge
from storage.kernel.limits import Limits
from tests.support.datasets import ct_slice

EXPLICIT = syntaxes.EXPLICIT_VR_LE
HTJ2K = "1.2.840.10008.1.2.4.202"
RLE = "1.2.840.10008.1.2.5"


class Counted:
    """An observer that counts jobs."""

    def __init__(self) -> None:
        self.jobs = 0

    def decoded(self, codec: str, outcome: str, seconds: float) -> None:
        self.jobs += 1


@pytest.fixture(scope="module")
def counted() -> Counted:
    return Counted()


@pytest.fixture(scope="module")
def pool(counted: Counted) -> Iterator[DecoderPool]:
    made = DecoderPool(Limits(), observer=counted)
    yield made
    made.close()


def tiny(frames: int) -> tuple[Dataset, Any]:
    """Return an object of many frames of 1 x 2 pixels, and its samples."""
    samples = np.arange(2 * frames, dtype="<u2") % 4096
    ds = ct_slice(Rows=1, Columns=2, NumberOfFrames=frames, PixelData=samples.tobytes())
    ds.PixelRepresentation = 0
    return ds, samples


def raw(ds: Dataset) -> bytes:
    out = DicomBytesIO()
    out.is_little_endian, out.is_implicit_VR = True, False
    write_dataset(out, ds)
    return out.getvalue()


def test_many_tiny_frames_are_few_jobs_and_every_sample_stays(
    pool: DecoderPool, counted: Counted
) -> None:
    ds, samples = tiny(1000)
    before = counted.jobs

    body = to_syntax(raw(ds), EXPLICIT, HTJ2K, pool, Limits())

    assert counted.jobs - before == -(-1000 // BATCH_FRAMES)
    encoded = pydicom.dcmread(io.BytesIO(file_meta("1.2", "1.2", HTJ2K) + body))
    frames = list(generate_frames(encoded.PixelData, number_of_frames=1000))
    decoded = [imagecodecs.htj2k_decode(one).ravel() for one in frames]
    assert (np.concatenate(decoded) == samples).all()

    back = to_syntax(body, HTJ2K, EXPLICIT, pool, Limits())
    assert counted.jobs - before == 2 * -(-1000 // BATCH_FRAMES)
    native = pydicom.dcmread(io.BytesIO(file_meta("1.2", "1.2", EXPLICIT) + back))
    assert native.PixelData == samples.tobytes()


def test_one_bad_frame_among_tiny_ones_is_told(pool: DecoderPool) -> None:
    ds, samples = tiny(3)
    good = imagecodecs.htj2k_encode(samples[:2].reshape(1, 2), reversible=True)
    ds.PixelData = encapsulate([bytes(good), bytes(good[:30]), bytes(good)])
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True

    with pytest.raises(Exception, match="code stream"):
        to_syntax(raw(ds), HTJ2K, EXPLICIT, pool, Limits())


@pytest.mark.parametrize("target", [HTJ2K, RLE])
def test_more_frames_than_allowed_are_refused_before_any_job(
    pool: DecoderPool, counted: Counted, target: str
) -> None:
    ds, _ = tiny(101)
    before = counted.jobs

    with pytest.raises(TooLarge) as caught:
        to_syntax(raw(ds), EXPLICIT, target, pool, Limits(conversion_frames=100))

    assert (caught.value.limit, caught.value.allowed) == ("conversion_frames", 100)
    assert counted.jobs == before


def test_a_conversion_that_takes_too_long_is_given_up(
    pool: DecoderPool, counted: Counted
) -> None:
    ds, _ = tiny(1000)
    before = counted.jobs

    with pytest.raises(DependencyDown, match="converting took over"):
        to_syntax(raw(ds), EXPLICIT, HTJ2K, pool, Limits(conversion_seconds=1e-9))

    assert counted.jobs == before


def test_nothing_is_converted_once_nobody_waits(
    pool: DecoderPool, counted: Counted
) -> None:
    ds, _ = tiny(2000)
    before = counted.jobs

    def check() -> None:
        if counted.jobs - before == 2:
            raise Cancelled("the client has left")

    with pytest.raises(Cancelled):
        rewrite(io.BytesIO(), raw(ds), EXPLICIT, HTJ2K, pool, Limits(), check)

    assert counted.jobs - before == 2
