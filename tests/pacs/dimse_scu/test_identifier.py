"""Small data sets, against pydicom."""

from __future__ import annotations

import io

import pytest
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.uid import UID

from pacs.dimse import identifier
from pacs.imaging.syntaxes import EXPLICIT_VR_BE, EXPLICIT_VR_LE, IMPLICIT_VR_LE
from storage.kernel.errors import MalformedObject, TooLarge
from storage.kernel.limits import Limits

SYNTAXES = (IMPLICIT_VR_LE, EXPLICIT_VR_LE, EXPLICIT_VR_BE)
ITEM = (
    (0x00081150, b"UI", "1.2.3"),
    (0x00081155, b"UI", "1.2.3.4"),
    (0x00081197, b"US", 0x0112),
)
ELEMENTS: identifier.Item = [
    (0x00080052, b"CS", "IMAGE"),
    (0x00080058, b"UI", "1.2\\1.2.345"),
    (0x00081198, b"SQ", [ITEM, ITEM]),
    (0x00081199, b"SQ", []),
    (0x00100020, b"LO", "张三".encode("gb18030")),
]


def by_pydicom(raw: bytes, syntax: str) -> Dataset:
    uid = UID(syntax)
    return read_dataset(
        io.BytesIO(raw),
        is_implicit_VR=uid.is_implicit_VR,
        is_little_endian=uid.is_little_endian,
    )


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_pydicom_reads_what_we_write(syntax: str) -> None:
    ds = by_pydicom(identifier.write(ELEMENTS, syntax), syntax)

    assert ds.QueryRetrieveLevel == "IMAGE"
    assert list(ds.FailedSOPInstanceUIDList) == ["1.2", "1.2.345"]
    assert [one.FailureReason for one in ds.FailedSOPSequence] == [0x0112, 0x0112]
    assert ds.FailedSOPSequence[1].ReferencedSOPInstanceUID == "1.2.3.4"
    assert len(ds.ReferencedSOPSequence) == 0


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_we_read_what_we_write(syntax: str) -> None:
    elements = identifier.read(identifier.write(ELEMENTS, syntax), syntax, Limits())

    assert identifier.text(elements, 0x00080052) == "IMAGE"
    items = elements[0x00081198]
    assert isinstance(items, list)
    assert [identifier.text(one, 0x00081155) for one in items] == ["1.2.3.4"] * 2
    assert elements[0x00081199] == []
    with pytest.raises(MalformedObject):
        identifier.text(elements, 0x00081198)


def test_a_list_too_long_for_its_length_field_is_written_as_un() -> None:
    uids = "\\".join(f"1.2.840.99999.{number}" for number in range(10_000))

    raw = identifier.write([(0x00080058, b"UI", uids)], EXPLICIT_VR_LE)

    assert raw[4:6] == b"UN"
    elements = identifier.read(raw, EXPLICIT_VR_LE, Limits())
    assert identifier.text(elements, 0x00080058) == uids


@pytest.mark.parametrize(
    "raw",
    [b"\1", b"\x08\x00\x52\x00CS\xff\xff", bytes(8) + b"\1", b"\xff" * 64],
)
def test_what_is_no_data_set_is_refused(raw: bytes) -> None:
    with pytest.raises(MalformedObject):
        identifier.read(raw, EXPLICIT_VR_LE, Limits())


def test_depth_and_number_are_bounded() -> None:
    nested: identifier.Value = "x"
    vr = b"LO"
    for _ in range(70):
        nested, vr = [[(0x00081199, vr, nested)]], b"SQ"
    deep = identifier.write([(0x00081199, b"SQ", nested)], EXPLICIT_VR_LE)
    wide = identifier.write([(0x00081199, b"SQ", [ITEM] * 50)], EXPLICIT_VR_LE)

    with pytest.raises(MalformedObject, match="deeper"):
        identifier.read(deep, EXPLICIT_VR_LE, Limits())
    with pytest.raises(TooLarge):
        identifier.read(wide, EXPLICIT_VR_LE, Limits(elements=100))
