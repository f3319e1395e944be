"""Part-10 files: what we write, what we read, where File Meta Information ends."""

from __future__ import annotations

import io
import struct

import pydicom
import pytest

from pacs.imaging.part10 import MAX_FILE_META, file_meta, read_file_meta
from storage.kernel.errors import MalformedObject
from tests.fault.objects import EXPLICIT, IMPLICIT, Objects, element
from tests.support.corpus import files, needs_corpus

O = Objects(9)  # noqa: E741


def test_pydicom_reads_our_file_meta() -> None:
    for uid in ("1.2.3", "1.2.34"):
        ds = pydicom.dcmread(io.BytesIO(file_meta("1.2.840.1", uid, EXPLICIT)))
        meta = ds.file_meta
        assert meta.MediaStorageSOPClassUID == "1.2.840.1"
        assert meta.MediaStorageSOPInstanceUID == uid
        assert meta.TransferSyntaxUID == EXPLICIT
        assert meta.FileMetaInformationVersion == b"\0\1"
        assert meta.ImplementationClassUID.is_valid


def test_what_is_written_is_read() -> None:
    head = file_meta("1.2.840.1", "1.2.3", IMPLICIT)
    made = read_file_meta(head + b"data")
    assert made is not None
    assert (made.sop_class_uid, made.sop_instance_uid) == ("1.2.840.1", "1.2.3")
    assert (made.transfer_syntax_uid, made.dataset_offset) == (IMPLICIT, len(head))


@needs_corpus
def test_the_corpus_is_read_as_pydicom_reads_it() -> None:
    for path in files():
        data = path.read_bytes()
        if data[128:132] != b"DICM":
            continue
        made = read_file_meta(data)
        theirs = pydicom.filereader.read_file_meta_info(path)
        assert made is not None
        assert made.transfer_syntax_uid == theirs.TransferSyntaxUID
        assert made.sop_instance_uid == theirs.get("MediaStorageSOPInstanceUID", "")


@pytest.mark.parametrize("stop", range(0, 300, 7))
def test_a_part_is_not_enough_and_says_so(stop: int) -> None:
    head = file_meta("1.2.840.1", "1.2.3", IMPLICIT)
    part = head[: min(stop, len(head) - 1)]
    assert read_file_meta(part, complete=False) is None
    with pytest.raises(MalformedObject):
        read_file_meta(part)


def test_a_wrong_group_length_is_tolerated() -> None:
    head = bytearray(file_meta("1.2.840.1", "1.2.3", EXPLICIT))
    for wrong in (0, 4, 2**31, 0xFFFFFFFF):
        head[140:144] = struct.pack("<I", wrong)
        made = read_file_meta(bytes(head) + O.dataset())
        assert made is not None
        assert made.dataset_offset == len(head)


def test_file_meta_is_bounded() -> None:
    head = bytes(128) + b"DICM" + element(0x00020102, "OB", b"", 0xFFFFFFFE)
    with pytest.raises(MalformedObject):
        read_file_meta(head)
    with pytest.raises(MalformedObject):
        read_file_meta(head, complete=False)
    long = bytes(128) + b"DICM" + element(0x00020102, "OB", bytes(MAX_FILE_META))
    with pytest.raises(MalformedObject):
        read_file_meta(long)


def test_no_transfer_syntax_is_no_file() -> None:
    head = bytes(128) + b"DICM" + element(0x00020002, "UI", b"1.2\0")
    with pytest.raises(MalformedObject) as caught:
        read_file_meta(head + O.dataset())
    assert caught.value.tag == 0x00020010


@pytest.mark.parametrize(
    "data",
    [b"", b"DICM", bytes(131), bytes(132), bytes(128) + b"dicm", O.dataset(),
     bytes(128) + b"DICM", b"PK\3\4" + bytes(300)],
)  # fmt: skip
def test_what_is_no_file(data: bytes) -> None:
    with pytest.raises(MalformedObject):
        read_file_meta(data)


@pytest.mark.parametrize(
    ("body", "syntax"), [(O.dataset(), EXPLICIT), (O.implicit_dataset(), IMPLICIT)]
)
def test_a_bare_data_set_is_taken_when_asked(body: bytes, syntax: str) -> None:
    made = read_file_meta(body, accept_without_preamble=True)
    assert made is not None
    assert (made.transfer_syntax_uid, made.dataset_offset) == (syntax, 0)


@pytest.mark.parametrize("data", [b"", b"x", b"hello world, no data set", bytes(500)])
def test_a_bare_data_set_is_not_guessed(data: bytes) -> None:
    with pytest.raises(MalformedObject):
        read_file_meta(data, accept_without_preamble=True)
