"""Segmentations, reports, presentation states and structure sets over a phantom."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import pack_bits
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    GrayscaleSoftcopyPresentationStateStorage,
    JPEGBaseline8Bit,
    RLELossless,
    RTStructureSetStorage,
    SegmentationStorage,
)

from tests.support.datasets import ct_slice, part10, uid

LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"
COMPREHENSIVE_3D_SR = "1.2.840.10008.5.1.4.1.1.88.34"
DEFLATED_FRAMES = "1.2.840.10008.1.2.8.1"


def item(**values: Any) -> Dataset:
    """Return an item with these attributes."""
    made = Dataset()
    for keyword, value in values.items():
        setattr(made, keyword, Items(value) if isinstance(value, list) and value
                and isinstance(value[0], Dataset) else value)  # fmt: skip
    return made


def code(value: str, meaning: str, scheme: str = "DCM") -> Dataset:
    return item(CodeValue=value, CodingSchemeDesignator=scheme, CodeMeaning=meaning)


def reference(image: Dataset, **more: Any) -> Dataset:
    return item(
        ReferencedSOPClassUID=image.SOPClassUID,
        ReferencedSOPInstanceUID=image.SOPInstanceUID,
        **more,
    )


#: What an object without pixels does not have.
_OF_PIXELS = (
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
    "SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "RescaleIntercept", "RescaleSlope", "PixelData", "ImageType",
)  # fmt: skip


def bare(sop_class: str, *, series: int, modality: str, seed: int = 1) -> Dataset:
    """Return an object of the study `seed` without pixels."""
    made = ct_slice(seed=seed, series=series, number=1)
    for keyword in _OF_PIXELS:
        delattr(made, keyword)
    made.SOPClassUID = UID(sop_class)
    made.SOPInstanceUID = uid(seed, series, 7)
    made.Modality = modality
    return made


def segmentation(
    masks: NDArray[Any],
    images: Sequence[Dataset],
    *,
    kind: str = "BINARY",
    segments: Sequence[int] | None = None,
    named: bool = True,
    series: int = 50,
) -> Dataset:
    """Return a segmentation, a frame for each of `images`.

    Parameters
    ----------
    masks : ndarray, shape (frames, rows, columns)
        Booleans, fractions of 255, or labels.
    named : bool
        Whether frames say which image they were derived from.
    """
    label_map = kind == "LABELMAP"
    made = bare(
        LABEL_MAP if label_map else SegmentationStorage, series=series, modality="SEG"
    )
    frames, made.Rows, made.Columns = masks.shape
    made.NumberOfFrames = frames
    made.SegmentationType = kind
    made.SamplesPerPixel, made.PixelRepresentation = 1, 0
    made.PhotometricInterpretation = "MONOCHROME2"
    bits = 1 if kind == "BINARY" else 8
    made.BitsAllocated = made.BitsStored = bits
    made.HighBit = bits - 1
    made.ContentLabel = "LESION"
    if kind == "FRACTIONAL":
        made.MaximumFractionalValue = 255
        made.SegmentationFractionalType = "PROBABILITY"
    numbers = sorted(set(segments or [1]))
    if label_map:
        numbers = sorted({int(label) for label in np.unique(masks)} - {0})
    made.SegmentSequence = Items(
        item(
            SegmentNumber=number,
            SegmentLabel=f"结节 {number}",
            SegmentAlgorithmType="AUTOMATIC",
            SegmentAlgorithmName="model 1.0",
            SegmentedPropertyCategoryCodeSequence=[code("49755003", "Morph", "SCT")],
            SegmentedPropertyTypeCodeSequence=[code("27925004", "Nodule", "SCT")],
        )
        for number in numbers
    )
    made.SharedFunctionalGroupsSequence = Items(
        [
            item(
                PlaneOrientationSequence=[
                    item(ImageOrientationPatient=images[0].ImageOrientationPatient)
                ],
                PixelMeasuresSequence=[item(PixelSpacing=images[0].PixelSpacing)],
            )
        ]
    )
    made.PerFrameFunctionalGroupsSequence = Items(
        _frame(
            image,
            None if label_map else (segments[n] if segments else 1),
            named=named,
        )
        for n, image in enumerate(images)
    )
    if bits == 1:
        made.PixelData = pack_bits(masks.astype(np.uint8).reshape(-1))
        made["PixelData"].VR = "OB"
    else:
        made.PixelData = masks.astype(np.uint8).tobytes()
        made["PixelData"].VR = "OB"
    if len(made.PixelData) % 2:
        made.PixelData += b"\0"
    return made


def _frame(image: Dataset, segment: int | None, *, named: bool) -> Dataset:
    made = item(
        PlanePositionSequence=[item(ImagePositionPatient=image.ImagePositionPatient)]
    )
    if segment is not None:
        made.SegmentIdentificationSequence = Items(
            [item(ReferencedSegmentNumber=segment)]
        )
    if named:
        made.DerivationImageSequence = Items(
            [item(SourceImageSequence=[reference(image)])]
        )
    return made


def encoded(ds: Dataset, syntax: str) -> bytes:
    """Return a segmentation of 8 bits as RLE, or any one as deflated frames."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ds.SOPClassUID
    meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    meta.TransferSyntaxUID = UID(ExplicitVRLittleEndian)
    made = Dataset(ds)
    made.file_meta = meta
    if syntax == RLELossless:
        made.compress(
            RLELossless, encoding_plugin="pydicom", generate_instance_uid=False
        )
    else:
        # pydicom does not know this syntax: another of the same length stands in.
        meta.TransferSyntaxUID = JPEGBaseline8Bit
        made.PixelData = encapsulate([_deflated(one) for one in _frames(ds)])
        made["PixelData"].VR = "OB"
        made["PixelData"].is_undefined_length = True
    file = io.BytesIO()
    made.save_as(file, enforce_file_format=True)
    written = file.getvalue()
    if syntax == DEFLATED_FRAMES:
        padded = DEFLATED_FRAMES.encode() + b"\0"
        written = written.replace(JPEGBaseline8Bit.encode(), padded, 1)
    return written


def _frames(ds: Dataset) -> Iterable[bytes]:
    size = ds.Rows * ds.Columns
    if ds.BitsAllocated == 8:
        for n in range(ds.NumberOfFrames):
            yield ds.PixelData[n * size : (n + 1) * size]
        return
    bits = np.unpackbits(np.frombuffer(ds.PixelData, np.uint8), bitorder="little")
    for n in range(ds.NumberOfFrames):
        frame = bits[n * size : (n + 1) * size]
        yield np.packbits(frame, bitorder="little").tobytes()


def _deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    made = packer.compress(data) + packer.flush()
    return made + b"\0" * (len(made) % 2)


def content(kind: str, name: Dataset | None = None, **values: Any) -> Dataset:
    """Return a content item."""
    made = item(ValueType=kind, RelationshipType="CONTAINS", **values)
    if name is not None:
        made.ConceptNameCodeSequence = Items([name])
    return made


def report(groups: Sequence[Dataset], *, series: int = 51) -> Dataset:
    """Return a TID 1500 report with these measurement groups."""
    made = bare(COMPREHENSIVE_3D_SR, series=series, modality="SR")
    made.ValueType = "CONTAINER"
    made.ContinuityOfContent = "SEPARATE"
    made.CompletionFlag, made.VerificationFlag = "COMPLETE", "UNVERIFIED"
    made.ConceptNameCodeSequence = Items([code("126000", "Imaging Measurement Report")])
    measurements = content(
        "CONTAINER",
        code("126010", "Imaging Measurements"),
        ContinuityOfContent="SEPARATE",
        ContentSequence=list(groups),
    )
    made.ContentSequence = Items([measurements])
    return made


def measurement_group(*children: Dataset) -> Dataset:
    return content(
        "CONTAINER",
        code("125007", "Measurement Group"),
        ContinuityOfContent="SEPARATE",
        ContentSequence=list(children),
    )


def number(value: float, name: Dataset, unit: Dataset, **more: Any) -> Dataset:
    measured = item(NumericValue=str(value), MeasurementUnitsCodeSequence=[unit])
    return content("NUM", name, MeasuredValueSequence=[measured], **more)


def in_image(kind: str, points: Sequence[float], image: Dataset) -> Dataset:
    selected = content("IMAGE", ReferencedSOPSequence=[reference(image)])
    selected.RelationshipType = "SELECTED FROM"
    return content(
        "SCOORD",
        code("111030", "Image Region"),
        GraphicType=kind,
        GraphicData=list(points),
        ContentSequence=[selected],
    )


def in_patient(kind: str, points: Sequence[float], image: Dataset) -> Dataset:
    return content(
        "SCOORD3D",
        code("111030", "Image Region"),
        GraphicType=kind,
        GraphicData=list(points),
        ReferencedFrameOfReferenceUID=image.FrameOfReferenceUID,
    )


def presentation(images: Sequence[Dataset], *, series: int = 52) -> Dataset:
    """Return a presentation state with a circle, a box and two texts."""
    made = bare(GrayscaleSoftcopyPresentationStateStorage, series=series, modality="PR")
    made.ContentLabel, made.ContentDescription = "LUNG", "肺窗"
    made.ImageRotation, made.ImageHorizontalFlip = 90, "Y"
    made.ReferencedSeriesSequence = Items(
        [
            item(
                SeriesInstanceUID=images[0].SeriesInstanceUID,
                ReferencedImageSequence=[reference(one) for one in images],
            )
        ]
    )
    made.GraphicLayerSequence = Items(
        [
            item(
                GraphicLayer="MARKS",
                GraphicLayerOrder=1,
                GraphicLayerRecommendedDisplayRGBValue=[65535, 0, 0],
            )
        ]
    )
    made.SoftcopyVOILUTSequence = Items([item(WindowCenter="-600", WindowWidth="1500")])
    circle = item(
        GraphicAnnotationUnits="PIXEL",
        GraphicDimensions=2,
        NumberOfGraphicPoints=2,
        GraphicData=[10.5, 12.5, 14.5, 12.5],
        GraphicType="CIRCLE",
        GraphicFilled="N",
    )
    text = item(
        BoundingBoxAnnotationUnits="DISPLAY",
        UnformattedTextValue="结节 <b>\\5 mm",
        BoundingBoxTopLeftHandCorner=[0.1, 0.2],
        BoundingBoxBottomRightHandCorner=[0.3, 0.4],
    )
    pointing = item(
        AnchorPointAnnotationUnits="PIXEL",
        UnformattedTextValue="here",
        AnchorPoint=[3.0, 4.0],
        AnchorPointVisibility="Y",
    )
    made.GraphicAnnotationSequence = Items(
        [
            item(
                GraphicLayer="MARKS",
                ReferencedImageSequence=[reference(images[0])],
                GraphicObjectSequence=[circle],
                TextObjectSequence=[text, pointing],
            )
        ]
    )
    return made


def structures(
    contours: Sequence[tuple[Sequence[float], Dataset | None]],
    frame_of_reference: str,
    *,
    series: int = 53,
) -> Dataset:
    """Return a structure set with one region of these contours."""
    made = bare(RTStructureSetStorage, series=series, modality="RTSTRUCT")
    made.StructureSetLabel = "PLAN"
    made.StructureSetROISequence = Items(
        [
            item(
                ROINumber=4,
                ROIName="GTV",
                ROIGenerationAlgorithm="MANUAL",
                ReferencedFrameOfReferenceUID=frame_of_reference,
            )
        ]
    )
    made.RTROIObservationsSequence = Items(
        [item(ObservationNumber=1, ReferencedROINumber=4, RTROIInterpretedType="GTV")]
    )
    drawn = []
    for points, image in contours:
        one = item(
            ContourGeometricType="CLOSED_PLANAR",
            NumberOfContourPoints=len(points) // 3,
            ContourData=[f"{value:.4f}"[:16] for value in points],
        )
        if image is not None:
            one.ContourImageSequence = Items([reference(image)])
        drawn.append(one)
    made.ROIContourSequence = Items(
        [
            item(
                ReferencedROINumber=4,
                ROIDisplayColor=[255, 0, 300],
                ContourSequence=drawn,
            )
        ]
    )
    return made


def stored_bytes(ds: Dataset, syntax: str = ExplicitVRLittleEndian) -> bytes:
    return part10(ds, syntax)
