"""Table A, from A35: odd values in the index, in JSON and in what is served."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from pacs.domain.study import Level
from pacs.imaging.part10 import read_file_meta
from storage.kernel.errors import TooLarge
from storage.kernel.limits import MIB, Limits
from tests.fault.doors import ACTOR, Archive, Kind
from tests.fault.kept import O, column, keep, metadata, served
from tests.fault.objects import (
    BIG,
    BITS_ALLOCATED,
    CHARSET,
    CLASS_UID,
    EXPLICIT,
    IMPLICIT,
    PATIENT_ID,
    PATIENT_NAME,
    PIXEL_DATA,
    Objects,
    element,
    item,
)


@pytest.mark.parametrize(
    ("tag", "value", "name"),
    [
        (0x00080020, b"20260230", "study_date"),
        (0x00080020, b"NotADate", "study_date"),
        (0x00080030, b"2560", "study_time"),
        (0x00100030, b"19701301", "birth_date"),
    ],
)
def test_a35_impossible_dates_are_null_and_never_found(
    archive: Archive, tag: int, value: bytes, name: str
) -> None:
    keep(archive, O.dataset({tag: ("DA", value)}))
    assert column(archive, "study", name) is None
    keys = {0x0020000D: "", 0x00080020: "20000101-20991231"}
    found = list(archive.query.find(ACTOR, Level.STUDY, keys, root="STUDY"))
    assert len(found) == (0 if tag == 0x00080020 else 1)
    assert metadata(archive)[f"{tag:08X}"]["Value"] == [value.decode()]


def test_a35_impossible_integers_are_null(archive: Archive) -> None:
    keep(archive, O.dataset({0x00200013: ("IS", b"1e3 ")}))
    assert column(archive, "instance", "instance_number") is None
    assert metadata(archive)["00200013"]["Value"] == ["1e3"]


NAMES = [
    b"A\r\nSet-Cookie: x^\0\x1b[31m\x7f\t",
    b"<script>alert(1)</script>",
    b'"><img src=x onerror=alert(1)>',
    b"${jndi:ldap://x/a}",
    b"=HYPERLINK(1)",
    b"' OR 1=1 --",
    b"100%_sure",
]


@pytest.mark.parametrize("name", NAMES)
def test_a36_a37_names_stay_literal(archive: Archive, name: bytes) -> None:
    body = O.dataset({PATIENT_NAME: ("PN", name + b" " * (len(name) % 2))})
    keep(archive, body)
    other = Objects(2)
    assert archive.send(other.good()).kind is Kind.STORED
    assert served(archive).endswith(body)
    groups = metadata(archive)["00100010"]["Value"][0]
    names = ("Alphabetic", "Ideographic", "Phonetic")
    value = "=".join(groups.get(name, "") for name in names).rstrip("=")
    assert value == name.decode().rstrip(" \0")
    wanted = value if not set(value) & set("*?\\\r\n\0") else ""
    keys = {0x00100010: wanted, 0x0020000D: ""}
    found = list(archive.query.find(ACTOR, Level.STUDY, keys, root="STUDY"))
    assert len(found) == (1 if wanted else 2)


@pytest.mark.parametrize("wildcard", ["%*", "*_*", "*%_*"])
def test_a37_signs_of_sql_are_found_literally(archive: Archive, wildcard: str) -> None:
    keep(archive, O.dataset({PATIENT_NAME: ("PN", b"%_^Case ")}))
    assert archive.send(Objects(2).good()).kind is Kind.STORED
    keys = {0x00100010: wildcard, 0x0020000D: ""}
    (found,) = archive.query.find(ACTOR, Level.STUDY, keys, root="STUDY")
    assert found[0x0020000D] == O.study_uid


@pytest.mark.parametrize(
    ("term", "raw", "shown"),
    [
        (b"ISO IR 192", "王^伟".encode(), "王^伟"),
        (b"GB18030 ", "王^伟".encode("gb18030"), "王^伟"),
        (b"GB18030\\ISO_IR 6", "王^伟".encode("gb18030"), "王^伟"),
        (b"KLINGON ", b"A^\xce\xb0", "A^<CE><B0>"),
        (b"ISO_IR 100", "王^伟".encode("gbk"), "Íõ^Î°"),
        (b"", "王^伟".encode("gbk"), "<CD><F5>^<CE><B0>"),
        (b"GBK ", "匼^乗".encode("gbk"), "匼^乗"),
        (b"GB18030 ", "區^孿".encode("gb18030"), "區^孿"),
        (b"GB18030 ", "𠮷^㐂𬎆".encode("gb18030"), "𠮷^㐂𬎆"),
        (b"ISO_IR 192", "𠮷^㐂𬎆".encode(), "𠮷^㐂𬎆"),
    ],
)
def test_a38_to_a41_character_sets(
    archive: Archive, term: bytes, raw: bytes, shown: str
) -> None:
    value = raw + b" " * (len(raw) % 2)
    body = O.dataset({CHARSET: ("CS", term), PATIENT_NAME: ("PN", value)})
    keep(archive, body)
    assert served(archive).endswith(body)
    alphabetic = metadata(archive)["00100010"]["Value"][0]["Alphabetic"]
    assert alphabetic == shown
    for wanted in (shown, shown[0] + "*", "*" + shown[-1]):
        keys = {0x00100010: wanted, 0x0020000D: ""}
        (found,) = archive.query.find(ACTOR, Level.STUDY, keys, root="STUDY")
        assert found[0x00100010] == shown


def test_a42_the_first_of_two_values_wins_everywhere(archive: Archive) -> None:
    body = O.dataset(tail=element(PATIENT_ID, "LO", b"SECOND"))
    keep(archive, body)
    assert column(archive, "study", "patient_id") == O.patient_id
    assert metadata(archive)["00100020"]["Value"] == [O.patient_id]
    assert served(archive).endswith(body)


def test_a43_what_lies_behind_the_pixels_is_kept(archive: Archive) -> None:
    tail = (
        element(0x7FE10010, "LO", b"MINE")
        + element(0x7FE11001, "OB", b"ab")
        + element(0xFFFCFFFC, "OB", bytes(100))
    )
    body = O.dataset(tail=tail)
    stored = keep(archive, body)
    assert served(archive).endswith(body)
    assert archive.retrieve.frame(stored, 1).data == bytes(range(48))
    assert served(archive, EXPLICIT).endswith(tail)


@pytest.mark.parametrize("vr", ["UC", "UR", "UT"])
def test_a44_long_text_is_bulk_data(archive: Archive, vr: str) -> None:
    value = b"x" * 10_000_000
    stored = keep(
        archive, O.dataset({0x00180010: ("LO", b"a"), 0x00189321: (vr, value)})
    )
    member = metadata(archive)["00189321"]
    assert member["BulkDataURI"].endswith("/bulkdata/00189321")
    bulk = archive.retrieve.bulkdata(stored, "00189321")
    assert b"".join(bulk.source.chunks()) == value
    assert bulk.vr == vr


def test_a44_a45_numbers_stay_json(archive: Archive) -> None:
    keep(
        archive,
        O.dataset(
            {
                0x00090010: ("LO", b"WIDE"),
                0x00091001: ("OV", bytes(8)),
                0x00091002: ("SV", struct.pack("<q", -(2**63))),
                0x00091003: ("UV", struct.pack("<Q", 2**64 - 1)),
                0x00091004: ("OW", b"abc"),
                0x00189073: (
                    "FD", struct.pack("<3d", float("nan"), float("inf"), -float("inf"))
                ),
                0x00280009: ("AT", struct.pack("<4H", 0x18, 0x1063, 0x18, 0x1065)),
            }
        ),
    )  # fmt: skip
    made = metadata(archive)
    assert made["00091002"]["Value"] == [str(-(2**63))]
    assert made["00091003"]["Value"] == [str(2**64 - 1)]
    assert made["00189073"]["Value"] == ["NaN", "Infinity", "-Infinity"]
    assert made["00280009"]["Value"] == ["00181063", "00181065"]
    assert made["00091004"]["InlineBinary"] == "YWJj"


@pytest.mark.parametrize(("vr", "first"), [("OW", b"\1\0\3\2"), ("OB", b"\0\1\2\3")])
def test_a44_bytes_in_words_are_swapped_back(
    archive: Archive, vr: str, first: bytes
) -> None:
    values = {
        **O.base,
        BITS_ALLOCATED: ("US", struct.pack(">H", 8)),
        PIXEL_DATA: (vr, bytes(range(24))),
    }
    numbers = {
        tag: struct.pack(">H", *struct.unpack("<H", value))
        for tag, (kind, value) in O.base.items()
        if kind == "US"
    }
    body = b""
    for tag in sorted(values):
        kind, value = values[tag]
        if tag != BITS_ALLOCATED:
            value = numbers.get(tag, value)
        head = struct.pack(">HH2s", tag >> 16, tag & 0xFFFF, kind.encode())
        long = kind in {"OW", "OB"}
        body += head + struct.pack(">xxI" if long else ">H", len(value)) + value
    stored = keep(archive, body, BIG)
    data = archive.retrieve.frame(stored, 1).data
    assert data[:4] == first
    converted = served(archive, EXPLICIT)
    assert converted[-24:] == data


@pytest.mark.parametrize("claimed", [b"text/html\r\nX-Evil: 1 ", b"", b"nonsense"])
def test_a49_a_wrong_media_type_is_never_passed_on(
    archive: Archive, claimed: bytes
) -> None:
    body = O.dataset(
        {
            CLASS_UID: ("UI", b"1.2.840.10008.5.1.4.1.1.104.1\0"),
            0x00420011: ("OB", b"<html><script>alert(1)</script>"),
            0x00420012: ("LO", claimed),
        },
        without=(PIXEL_DATA,),
    )
    stored = keep(archive, body, class_uid="1.2.840.10008.5.1.4.1.1.104.1")
    bulk = archive.retrieve.bulkdata(stored, "00420011")
    assert bulk.mime_type == "application/octet-stream"


def test_a50_references_to_nothing_and_to_itself(archive: Archive) -> None:
    def referring(uid: bytes) -> bytes:
        return item(element(0x00081155, "UI", uid + b"\0" * (len(uid) % 2)))

    sop = element(
        0x00081199, "SQ", referring(O.instance_uid.encode()) + referring(b"9.9.9")
    )
    series = element(0x00081115, "SQ", item(sop))
    body = O.dataset(
        {
            CLASS_UID: ("UI", b"1.2.840.10008.5.1.4.1.1.88.59\0"),
            0x0040A375: ("SQ", item(series)),
        },
        without=(PIXEL_DATA,),
    )
    stored = keep(archive, body, class_uid="1.2.840.10008.5.1.4.1.1.88.59")
    evidence = metadata(archive)["0040A375"]["Value"][0]["00081115"]["Value"][0]
    assert len(evidence["00081199"]["Value"]) == 2
    assert archive.retrieve.frame_count(stored) == 0
    made = served(archive, IMPLICIT)
    head = read_file_meta(made)
    assert head is not None
    assert head.transfer_syntax_uid == IMPLICIT


def test_conversion_is_bounded_by_what_is_stored(tmp_path: Path) -> None:
    archive = Archive(tmp_path, limits=Limits(inflated_bytes=MIB))
    body = O.dataset({0x00091001: ("OB", bytes(2 * MIB)), 0x00090010: ("LO", b"MINE")})
    stored = keep(archive, body)
    with pytest.raises(TooLarge):
        archive.retrieve.part10(stored, IMPLICIT)
    archive.close()
