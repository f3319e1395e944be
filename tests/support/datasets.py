"""Synthetic data sets: small, different on demand, the same for the same arguments."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MRImageStorage,
)

from storage.kernel.uids import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME

#: Syntaxes that `part10` can write without a codec.
NATIVE_SYNTAXES = (
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
)
_CLASSES = {"CT": CTImageStorage, "MR": MRImageStorage}


def uid(*numbers: int) -> str:
    """Return a UID of ours for tests, the same for the same numbers."""
    return ".".join(["1.2.826.0.1.3680043.10.1999", *map(str, numbers)])


def ct_slice(
    *,
    seed: int = 1,
    series: int = 1,
    number: int = 1,
    size: int = 32,
    modality: str = "CT",
    **values: Any,
) -> Dataset:
    """Return one image of series `series` of the study `seed`.

    Parameters
    ----------
    size : int
        Rows and columns, of 16 bits.
    **values
        More attributes by keyword; ``None`` removes one.
    """
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.SOPClassUID = _CLASSES[modality]
    ds.SOPInstanceUID = uid(seed, series, number)
    ds.StudyDate = f"2024{seed % 12 + 1:02}{seed % 28 + 1:02}"
    ds.StudyTime = f"{seed % 24:02}3000"
    ds.AccessionNumber = f"ACC{seed}"
    ds.Modality = modality
    ds.ReferringPhysicianName = "Zhao^Min=赵^敏"
    ds.StudyDescription = f"study {seed}"
    ds.SeriesDescription = f"series {series}"
    ds.PatientName = f"Test{seed}^Case=测试^{seed}"
    ds.PatientID = f"PID{seed}"
    ds.PatientBirthDate = "19700101"
    ds.PatientSex = "O"
    ds.StudyInstanceUID = uid(seed)
    ds.SeriesInstanceUID = uid(seed, series)
    ds.StudyID = str(seed)
    ds.SeriesNumber = series
    ds.InstanceNumber = number
    ds.ImagePositionPatient = [0, 0, number]
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.FrameOfReferenceUID = uid(seed, 0)
    ds.PixelSpacing = [1, 1]
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows = ds.Columns = size
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.PixelRepresentation = 0
    ds.RescaleIntercept, ds.RescaleSlope = -1024, 1
    made = np.random.default_rng((seed, series, number))
    ds.PixelData = made.integers(0, 4096, (size, size), dtype="<u2").tobytes()
    ds["PixelData"].VR = "OW"
    for keyword, value in values.items():
        if value is not None:
            setattr(ds, keyword, value)
        elif keyword in ds:
            delattr(ds, keyword)
    return ds


def a_study(
    *,
    seed: int = 1,
    modality: str = "CT",
    n_series: int = 1,
    n_instances: int = 3,
    size: int = 32,
    **values: Any,
) -> list[Dataset]:
    """Return a study of `n_series` series with `n_instances` images each."""
    return [
        ct_slice(
            seed=seed,
            series=series,
            number=number,
            size=size,
            modality=modality,
            **values,
        )
        for series in range(1, n_series + 1)
        for number in range(1, n_instances + 1)
    ]


def part10(ds: Dataset, syntax: str = ExplicitVRLittleEndian) -> bytes:
    """Return `ds` as a Part 10 file in one of `NATIVE_SYNTAXES` (PS3.10 §7)."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ds.SOPClassUID
    meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    meta.TransferSyntaxUID = UID(syntax)
    meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
    meta.ImplementationVersionName = IMPLEMENTATION_VERSION_NAME
    copy = Dataset(ds)
    copy.file_meta = meta
    made = io.BytesIO()
    copy.save_as(made, enforce_file_format=True)
    return made.getvalue()


def dataset_bytes(file: bytes) -> bytes:
    """Return what follows the File Meta Information of a Part 10 file."""
    length = int.from_bytes(file[140:144], "little")  # (0002,0000), explicit VR
    return file[144 + length :]
