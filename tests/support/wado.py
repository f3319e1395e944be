"""The objects that the tests of WADO-RS retrieve, and what they must get."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    MPEG4HP41,
    EncapsulatedPDFStorage,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from pacs.domain.study import Arrival
from pacs.imaging.part10 import read_file_meta
from storage.kernel.types import DEFAULT_TENANT, Actor, Digest, Door, Source, TenantId
from tests.support.datasets import a_study, ct_slice, part10, uid
from tests.support.dicomweb import WebArchive, web_archive
from tests.support.web import Response, request

JSON = "application/dicom+json"
DICOM = 'multipart/related; type="application/dicom"'
OCTETS = 'multipart/related; type="application/octet-stream"'
PDF = b"%PDF-1.4 <script>alert(1)</script>"

STUDY, SERIES, INSTANCE = uid(1), uid(1, 1), uid(1, 1, 1)
IMAGE = f"/studies/{STUDY}/series/{SERIES}/instances/{INSTANCE}"
IMPLICIT, BIG, LSS, JPEG, VIDEO, MULTI, DOC = range(2, 9)


def keep(web: WebArchive, file: bytes, tenant: str = DEFAULT_TENANT) -> None:
    """Put a Part-10 file into the archive."""
    meta = read_file_meta(file)
    assert meta is not None
    data = file[meta.dataset_offset :]
    web.archive.ingest.accept(
        Arrival(
            Actor(TenantId(tenant), "test"),
            Source(Door.WEB),
            meta.transfer_syntax_uid,
            memoryview(data),
            Digest(hashlib.sha256(data).digest()),
        )
    )


def compressed(ds: Dataset, frames: list[bytes], syntax: str) -> bytes:
    ds.PixelData = encapsulate(frames)
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    return part10(ds, syntax)


def document() -> Dataset:
    ds = ct_slice(seed=DOC, PixelData=None, Rows=None, Columns=None)
    ds.SOPClassUID = EncapsulatedPDFStorage
    ds.EncapsulatedDocument = PDF
    ds.MIMETypeOfEncapsulatedDocument = "application/pdf"
    return ds


#: Two RLE frames of 2 by 2 bytes: header of one segment, one literal run of four.
RLE_FRAMES = [
    (1).to_bytes(4, "little") + (64).to_bytes(4, "little") + bytes(56)
    + b"\x03" + bytes(value) + b"\x00"
    for value in ([1, 2, 3, 4], [5, 6, 7, 8])
]  # fmt: skip


def multi_frame() -> Dataset:
    return ct_slice(
        seed=MULTI, size=2, NumberOfFrames=2, BitsAllocated=8, BitsStored=8, HighBit=7
    )


@contextmanager
def wado_archive(folder: Path) -> Iterator[WebArchive]:
    """Serve one object of each kind."""
    with web_archive(folder) as served:
        for ds in a_study(seed=1, n_series=2, n_instances=3):
            keep(served, part10(ds))
        keep(served, part10(ct_slice(seed=IMPLICIT), ImplicitVRLittleEndian))
        keep(served, part10(ct_slice(seed=BIG), ExplicitVRBigEndian))
        keep(served, compressed(ct_slice(seed=LSS), [b"\xff\xd8ls"], JPEGLSLossless))
        keep(served, compressed(ct_slice(seed=JPEG), [b"\xff\xd8jp"], JPEGBaseline8Bit))
        keep(
            served, compressed(ct_slice(seed=VIDEO), [b"video" * 9 + b"\0"], MPEG4HP41)
        )
        keep(served, compressed(multi_frame(), RLE_FRAMES, RLELossless))
        keep(served, part10(document()))
        keep(served, part10(ct_slice(seed=1)), "other")
        keep(served, part10(ct_slice(seed=50)), "other")
        yield served


def get(
    web: WebArchive, path: str, accept: str | None = None, **headers: str
) -> Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if accept is not None:
        named["Accept"] = accept
    return request(web.dicomweb + path, headers=named)


def image(seed: int) -> str:
    return f"/studies/{uid(seed)}/series/{uid(seed, 1)}/instances/{uid(seed, 1, 1)}"


def pixels(seed: int = 1, series: int = 1, number: int = 1) -> bytes:
    return bytes(ct_slice(seed=seed, series=series, number=number).PixelData)


def as_sent(seed: int) -> bytes:
    """Return pixels in little endian; the big endian file was written unswapped."""
    if seed != BIG:
        return pixels(seed)
    return np.frombuffer(pixels(seed), dtype="<u2").byteswap().tobytes()
