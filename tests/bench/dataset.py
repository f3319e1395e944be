"""The data of the benchmark: noisy phantoms with about 80 attributes each.

Explicit VR Little Endian, the same for the same seed. Every UID begins with `ROOT`
and a component of four digits that a client replaces, so that each run stores new
instances.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian

ROOT = "2.25.8201"
TAG = "1999"
TAGGED = f"{ROOT}.{TAG}.".encode()
#: The UIDs of a file lie in its first bytes.
UID_BYTES = 4096

CLASSES = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "DX": "1.2.840.10008.5.1.4.1.1.1.1",
}
_SURNAMES = ("Kim", "Lee", "Park", "Smith", "Garcia", "Wang", "Rossi", "Tanaka")
_GIVEN = ("Ana", "Ben", "Chloe", "Daniel", "Eva", "Felix", "Grace", "Hugo")

Image = NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Plan:
    """One kind of series: `studies` of them, `n` instances each."""

    modality: str
    studies: int
    n: int
    size: int


PLANS = {
    "ct": Plan("CT", 1, 300, 512),
    "mr": Plan("MR", 1, 200, 256),
    "dr": Plan("DX", 4, 1, 3000),
    "tiny": Plan("CT", 1000, 1, 16),
}


def folder(cache: Path, name: str) -> Path:
    """Return the folder of one of `PLANS`; its files are made on the first call."""
    made = cache / name
    done = made / "complete"
    if done.exists():
        return made
    plan = PLANS[name]
    rng = np.random.default_rng(len(name))
    base = _phantom(plan.size, rng)
    noise = [rng.normal(0, 12, base.shape).astype(np.float32) for _ in range(3)]
    for study in range(plan.studies):
        parent = made / f"{study // 500:03d}"
        parent.mkdir(parents=True, exist_ok=True)
        for number in range(1, plan.n + 1):
            grain = np.roll(noise[number % 3], (number * 37, number * 11), (0, 1))
            pixels = np.clip(np.roll(base, number // 4, 1) + grain, 0, 4095)
            _write(
                parent / f"{study:05d}-{number:05d}.dcm",
                plan,
                1000 * (len(name) + 1) + study,
                number,
                pixels.astype("<u2"),
            )
    done.touch()
    return made


def _phantom(size: int, rng: np.random.Generator) -> NDArray[np.float32]:
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    image = np.zeros((size, size), np.float32)
    image[(x / 0.8) ** 2 + (y / 0.65) ** 2 < 1] = 1000
    for _ in range(14):
        cx, cy = rng.uniform(-0.5, 0.5, 2)
        a, b = rng.uniform(0.05, 0.3, 2)
        inside = ((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 < 1
        image[inside] += rng.uniform(-400, 800)
    return image


def _write(path: Path, plan: Plan, study: int, number: int, pixels: Image) -> None:
    made = _header(plan, study, number)
    made.PixelData = pixels.tobytes()
    made["PixelData"].VR = "OW"
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = made.SOPClassUID
    meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID(f"{ROOT}.1")
    made.file_meta = meta
    made.save_as(path, enforce_file_format=True)


def _header(plan: Plan, study: int, number: int) -> Dataset:
    day = f"{date(2015, 1, 1) + timedelta(days=study % 3650):%Y%m%d}"
    time = f"{study % 24:02d}{number % 60:02d}00"
    uid = f"{ROOT}.{TAG}.{study}"
    values: dict[str, object] = {
        "SpecificCharacterSet": "ISO_IR 192",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "SOPClassUID": CLASSES[plan.modality],
        "SOPInstanceUID": f"{uid}.1.{number}",
        "AccessionNumber": f"ACC{study:08d}",
        "Modality": plan.modality,
        "Manufacturer": "SYNTHETIC",
        "InstitutionName": "General Hospital",
        "ReferringPhysicianName": "House^Ana^^Dr",
        "StationName": f"{plan.modality}01",
        "StudyDescription": f"{plan.modality} study {study % 50}",
        "SeriesDescription": f"{plan.modality} series",
        "InstitutionalDepartmentName": "Radiology",
        "ManufacturerModelName": "Phantom 9000",
        "PatientName": f"{_SURNAMES[study % 8]}^{_GIVEN[study // 8 % 8]}",
        "PatientID": f"PID{study // 2:07d}",
        "PatientBirthDate": f"19{study % 90 + 10}0{study % 9 + 1}1{study % 9}",
        "PatientSex": "MF"[study // 2 % 2],
        "PatientAge": "045Y",
        "PatientWeight": "72.5",
        "BodyPartExamined": "CHEST",
        "SliceThickness": "1.25",
        "KVP": "120",
        "SoftwareVersions": "1.0",
        "ProtocolName": "Routine",
        "ExposureTime": "500",
        "XRayTubeCurrent": "300",
        "Exposure": "150",
        "FilterType": "BODY",
        "ConvolutionKernel": "STANDARD",
        "PatientPosition": "HFS",
        "StudyInstanceUID": uid,
        "SeriesInstanceUID": f"{uid}.1",
        "StudyID": str(study),
        "SeriesNumber": 1,
        "AcquisitionNumber": 1,
        "InstanceNumber": number,
        "ImagePositionPatient": ["-180.5", "-180.5", f"{number * 1.25:.2f}"],
        "ImageOrientationPatient": ["1", "0", "0", "0", "1", "0"],
        "FrameOfReferenceUID": f"{uid}.1.0",
        "PositionReferenceIndicator": "XY",
        "SliceLocation": f"{number * 1.25:.2f}",
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": plan.size,
        "Columns": plan.size,
        "PixelSpacing": ["0.703125", "0.703125"],
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": 0,
        "WindowCenter": "1064",
        "WindowWidth": "400",
        "RescaleIntercept": "-1024",
        "RescaleSlope": "1",
        "RescaleType": "HU",
        "PerformedProcedureStepID": f"PPS{study}",
        "PerformedProcedureStepDescription": "routine",
        "DistanceSourceToDetector": "949.0",
    }
    for part in ("Study", "Series", "Acquisition", "Content"):
        values[f"{part}Date"] = day
        values[f"{part}Time"] = f"{time}.123000"
    values["PerformedProcedureStepStartDate"] = day
    values["PerformedProcedureStepStartTime"] = time
    made = Dataset()
    for keyword, value in values.items():
        setattr(made, keyword, value)
    code = Dataset()
    code.CodeValue = "R-10206"
    code.CodingSchemeDesignator = "SRT"
    code.CodeMeaning = "procedure"
    made.ProcedureCodeSequence = [code]
    block = made.private_block(0x0009, "SYNTH", create=True)
    for offset in range(1, 12):
        block.add_new(offset, "LO", f"private {offset}")
    return made


def retagged(data: bytes, tag: int) -> bytes:
    """Return a file's or data set's bytes with other UIDs of the same length."""
    new = f"{ROOT}.{tag:04d}.".encode()
    return data[:UID_BYTES].replace(TAGGED, new) + data[UID_BYTES:]
