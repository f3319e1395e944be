"""Table A: what is kept of odd objects, how it is found and how it is served."""

from __future__ import annotations

import hashlib
import json
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from sqlalchemy import text

from pacs.domain.study import Level
from pacs.imaging.part10 import read_file_meta
from storage.kernel.errors import InvalidInput, MalformedObject, NotFound, TooLarge
from storage.kernel.limits import MIB, Limits
from tests.fault.doors import ACTOR, Archive, Kind
from tests.fault.objects import (
    BIG,
    BITS_ALLOCATED,
    CHARSET,
    CLASS_UID,
    COLUMNS,
    DEFLATED,
    EXPLICIT,
    FRAMES,
    IMPLICIT,
    INSTANCE_UID,
    JPEG,
    JPEG_2000,
    JPEG_LS,
    PATIENT_ID,
    PATIENT_NAME,
    PIXEL_DATA,
    RLE,
    ROWS,
    SERIES_UID,
    STUDY_UID,
    Objects,
    deflated,
    element,
    item,
    nested,
    us,
)

O = Objects(1)  # noqa: E741  as in the table: objects


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    made = Archive(tmp_path)
    yield made
    made.close()


def keep(archive: Archive, body: bytes, syntax: str = EXPLICIT, **meta: Any) -> Any:
    """Store a data set; return its row."""
    assert archive.send(O.file(body, syntax, **meta)).kind.is_kept
    return archive.find(O.instance_uid)


def metadata(archive: Archive) -> dict[str, Any]:
    raw = archive.retrieve.metadata(archive.find(O.instance_uid))
    parsed: dict[str, Any] = json.loads(raw, parse_constant=_no_constant)
    return parsed


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def served(archive: Archive, syntax: str | None = None) -> bytes:
    stored = archive.find(O.instance_uid)
    return b"".join(archive.retrieve.part10(stored, syntax).chunks)


def column(archive: Archive, table: str, name: str) -> Any:
    with archive.database.read() as connection:
        return connection.execute(text(f"SELECT {name} FROM {table}")).scalar_one()  # noqa: S608


@pytest.mark.parametrize("magic", [b"MZ\x90\0", b"\x7fELF", b"II*\0", b"%PDF-1.7"])
def test_a03_a_preamble_is_never_served(archive: Archive, magic: bytes) -> None:
    assert archive.send(O.file(O.dataset(), preamble=magic)).kind is Kind.STORED
    assert served(archive)[:132] == bytes(128) + b"DICM"
    packs = (archive.folder / "packs").rglob("*.pack")
    assert not any(magic in path.read_bytes()[:1024] for path in packs)


def test_a06_no_memory_is_taken_for_a_length_that_lies(archive: Archive) -> None:
    lying = O.file(
        O.dataset(without=(PIXEL_DATA,)) + element(PIXEL_DATA, "OW", b"", 0xFFFFFFFE)
    )
    archive.send(lying)
    assert peak_of(lambda: archive.send(lying)) < 16 * MIB


def test_a08_depth_takes_no_stack(archive: Archive) -> None:
    deep = O.file(nested(200_000, undefined=True) + O.dataset())
    archive.send(deep)
    assert archive.send(deep).kind is Kind.MALFORMED
    assert peak_of(lambda: archive.send(deep)) < 48 * MIB


def test_a10_a_million_empty_elements(tmp_path: Path) -> None:
    archive = Archive(tmp_path, limits=Limits(elements=10_000))
    many = b"".join(element(0x00090000 | n, "LO") for n in range(0x1000, 0x1000 + 9000))
    assert archive.send(O.file(many + O.dataset())).kind is Kind.WARNED
    answer = archive.send(Objects(2).file(Objects(2).dataset(tail=b"") + many + many))
    assert answer.kind is Kind.TOO_LARGE
    assert "elements" in answer.text
    archive.close()


def test_a10_a_million_elements_are_refused_by_default(archive: Archive) -> None:
    many = element(0x00091001, "LO") * 1_000_001
    answer = archive.send(O.file(O.dataset() + many))
    assert answer.kind is Kind.TOO_LARGE
    assert answer.text == "more than 1000000 (elements)"
    assert peak_of(lambda: archive.send(O.file(O.dataset() + many))) < 48 * MIB


def test_a11_deflate_bomb(tmp_path: Path) -> None:
    bomb = deflated(O.dataset(tail=element(0x7FE10010, "OB", bytes(300 * MIB))))
    assert len(bomb) < MIB
    archive = Archive(tmp_path)
    file = O.file(bomb, DEFLATED)
    answer = archive.send(file)
    assert answer.kind is Kind.TOO_LARGE
    assert "inflation_ratio" in answer.text
    # A hundred times what came in, and a little.
    assert peak_of(lambda: archive.send(file)) < 100 * len(bomb) + 16 * MIB
    archive.close()


def test_a11_the_size_limit_stops_it_too(tmp_path: Path) -> None:
    archive = Archive(tmp_path, limits=Limits(inflated_bytes=2 * MIB))
    noise = np.random.default_rng(11).bytes(3 * MIB)
    body = deflated(O.dataset(tail=element(0x7FE10010, "OB", noise)))
    answer = archive.send(O.file(body, DEFLATED))
    assert answer.kind is Kind.TOO_LARGE
    assert "inflated_bytes" in answer.text
    archive.close()


def peak_of(act: Any) -> int:
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "values",
    [
        {ROWS: us(65_535), COLUMNS: us(65_535), 0x00280002: us(3)},
        {
            ROWS: us(65_535), COLUMNS: us(65_535), 0x00280002: us(65_535),
            BITS_ALLOCATED: us(64), FRAMES: ("IS", b"2147483647"),
        },
        {ROWS: us(0)},
        {BITS_ALLOCATED: us(99)},
        {ROWS: ("UL", struct.pack("<I", 4))},
        {ROWS: ("IS", b"512 ")},
        {PIXEL_DATA: ("OW", bytes(46))},
    ],
)  # fmt: skip
def test_a13_a14_a15_frames_that_are_not_there_are_not_served(
    archive: Archive, values: dict[int, Any]
) -> None:
    stored = keep(archive, O.dataset(values))
    for syntax in (None, EXPLICIT):
        with pytest.raises((NotFound, InvalidInput)):
            archive.retrieve.frame(stored, 1, syntax)
    other = Objects(2)
    frame = imagecodecs.jpegls_encode(np.zeros((4, 6), np.uint16))
    described = {tag: one for tag, one in values.items() if tag != PIXEL_DATA}
    body = other.encapsulated([frame], described or {ROWS: us(5)})
    assert archive.send(other.file(body, JPEG_LS)).kind.is_kept
    coded = archive.find(other.instance_uid)
    with pytest.raises((NotFound, InvalidInput)):
        archive.retrieve.part10(coded, EXPLICIT)


def test_a14_odd_rows_are_null_in_the_index(archive: Archive) -> None:
    keep(archive, O.dataset({ROWS: ("UL", struct.pack("<I", 4))}))
    assert column(archive, "instance", '"rows"') is None
    assert column(archive, "instance", '"columns"') == 6


def test_a15_only_whole_frames_exist(archive: Archive) -> None:
    body = O.dataset(
        {FRAMES: ("IS", b"3 "), PIXEL_DATA: ("OW", bytes(range(48)) * 2 + b"x" * 46)}
    )
    stored = keep(archive, body)
    assert archive.retrieve.frame(stored, 2).data == bytes(range(48))
    for number in (0, 3, 4, 10**9):
        with pytest.raises(NotFound):
            archive.retrieve.frame(stored, number)


def test_a16_bytes_behind_the_frames_are_no_pixels(archive: Archive) -> None:
    stored = keep(archive, O.dataset({PIXEL_DATA: ("OW", bytes(48) + b"secret" * 9)}))
    assert archive.retrieve.frame(stored, 1).data == bytes(48)
    with pytest.raises(NotFound):
        archive.retrieve.frame(stored, 2)


@pytest.mark.parametrize(
    ("frames", "served_frames"),
    [(b"0 ", 1), (b"", 1), (b"-1", 1), (b"1e9 ", 1), (b"many", 1), (b"1000000000", 1)],
)
def test_a18_impossible_numbers_of_frames(
    archive: Archive, frames: bytes, served_frames: int
) -> None:
    stored = keep(archive, O.dataset({FRAMES: ("IS", frames)}))
    assert archive.retrieve.frame_count(stored) == served_frames
    with pytest.raises(NotFound):
        archive.retrieve.frame(stored, 2)


@pytest.mark.parametrize(
    ("syntax", "fragment"),
    [
        (RLE, struct.pack("<16I", 2, 64, 4_000_000, *[0] * 13) + bytes(20)),
        (RLE, bytes(64)),
        (RLE, struct.pack("<16I", 16, *range(64, 79))),
        (JPEG, imagecodecs.jpeg8_encode(np.zeros((400, 600), np.uint8))),
        (JPEG_LS, imagecodecs.jpegls_encode(np.zeros((400, 600), np.uint8))),
        (JPEG_2000, b"\xff\x4f\xff\x51" + b"\xff" * 90),
        (JPEG_2000, bytes(100)),
    ],
)
def test_a19_a20_a21_only_decoding_fails(
    archive: Archive, syntax: str, fragment: bytes
) -> None:
    body = O.encapsulated([fragment])
    stored = keep(archive, body, syntax)
    assert archive.retrieve.frame(stored, 1).data == fragment
    assert served(archive).endswith(body)
    with pytest.raises(MalformedObject):
        archive.retrieve.frame(stored, 1, EXPLICIT)
    with pytest.raises(MalformedObject):
        archive.retrieve.part10(stored, EXPLICIT)


FRAGMENTS = [b"\xff\xd8\xff" + bytes([n]) * 21 for n in range(4)]


@pytest.mark.parametrize(
    "table",
    [
        b"",
        struct.pack("<2I", 0, 64),
        struct.pack("<2I", 0, 2**31),
        struct.pack("<2I", 64, 0),
        struct.pack("<2I", 0, 0),
        struct.pack("<2I", 3, 67),
        struct.pack("<3I", 0, 64, 96),
    ],
)
def test_a22_offset_tables_are_checked_against_the_fragments(
    archive: Archive, table: bytes
) -> None:
    # Two frames of two fragments; only the first of each looks like a start.
    parts = [FRAGMENTS[0], b"\1" * 24, FRAGMENTS[2], b"\2" * 24]
    body = O.encapsulated(parts, {FRAMES: ("IS", b"2 ")}, table=table)
    stored = keep(archive, body, JPEG)
    assert archive.retrieve.frame(stored, 1).data == parts[0] + parts[1]
    assert archive.retrieve.frame(stored, 2).data == parts[2] + parts[3]
    with pytest.raises(NotFound):
        archive.retrieve.frame(stored, 3)


@pytest.mark.parametrize(
    "offsets",
    [(0, 2**40), (0, 0), (64, 0), (0, 64), (7, 9)],
)
def test_a22_extended_offset_tables_too(
    archive: Archive, offsets: tuple[int, int]
) -> None:
    parts = [FRAGMENTS[0], b"\1" * 24, FRAGMENTS[2], b"\2" * 24]
    body = O.dataset(
        {
            FRAMES: ("IS", b"2 "),
            0x7FE00001: ("OV", struct.pack("<2Q", *offsets)),
            0x7FE00002: ("OV", struct.pack("<2Q", 48, 2**40)),
        },
        without=(PIXEL_DATA,),
    )
    body += element(PIXEL_DATA, "OB", length=0xFFFFFFFF) + item()
    body += b"".join(map(item, parts)) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    stored = keep(archive, body, JPEG)
    assert archive.retrieve.frame(stored, 2).data == parts[2] + parts[3]


def test_a22_without_any_hint_no_frame_is_guessed(archive: Archive) -> None:
    parts = [bytes([n]) * 24 for n in range(3)]
    stored = keep(archive, O.encapsulated(parts, {FRAMES: ("IS", b"2 ")}), JPEG)
    with pytest.raises((NotFound, InvalidInput)):
        archive.retrieve.frame(stored, 1)


def test_a26_trailing_padding_is_no_part_of_a_uid(archive: Archive) -> None:
    padded = O.instance_uid.encode() + b" \0"
    stored = keep(archive, O.dataset({INSTANCE_UID: ("UI", padded)}))
    assert stored.sop_instance_uid == O.instance_uid
    assert padded in served(archive)


def test_a26_a_lenient_source_keeps_what_it_calls_a_uid(tmp_path: Path) -> None:
    archive = Archive(tmp_path, lenient_uids=True)
    lenient = Objects(1)
    lenient.base = {**lenient.base, STUDY_UID: ("UI", b"1.2.840.01.x")}
    assert archive.send(lenient.file(lenient.dataset())).kind.is_kept
    assert column(archive, "study", "study_instance_uid") == "1.2.840.01.x"
    for hostile in (b"../../etc/x ", b"..\\..\\x ", b"1.*", b"a" * 66, b"1\x002.3"):
        body = lenient.dataset({SERIES_UID: ("UI", hostile)})
        assert archive.send(lenient.file(body)).kind is Kind.IDENTITY
    archive.close()


@pytest.mark.parametrize(
    "hostile", [b"../../../../../escaped", b"/tmp/escaped", b"..\\..\\escaped "]
)
def test_a27_no_file_appears_outside_the_node(tmp_path: Path, hostile: bytes) -> None:
    outside = tmp_path / "a" / "b" / "c" / "d"
    node = outside / "node"
    node.mkdir(parents=True)
    archive = Archive(node)
    for tag in (INSTANCE_UID, SERIES_UID, STUDY_UID, PATIENT_ID, 0x00080060):
        archive.send(O.file(O.dataset({tag: ("UI", hostile)})))
        archive.send(O.file(O.dataset({tag: ("UI", hostile)}), instance_uid=""))
    archive.close()
    elsewhere = [
        p for p in tmp_path.rglob("*") if p.is_file() and node not in p.parents
    ]
    assert elsewhere == []
    assert not [p for p in node.rglob("*") if "escaped" in p.name]


@pytest.mark.parametrize("value", [None, b"", b"    "])
def test_a28_patients_without_an_id_are_never_one(
    archive: Archive, value: bytes | None
) -> None:
    for seed in (1, 2):
        made = Objects(seed)
        body = (
            made.dataset(without=(PATIENT_ID,))
            if value is None
            else made.dataset({PATIENT_ID: ("LO", value)})
        )
        assert archive.send(made.file(body)).kind is Kind.WARNED
    rows, _ = archive.left_behind()
    assert (rows["patient"], rows["study"]) == (2, 2)


def test_a28_policy_may_require_it(tmp_path: Path) -> None:
    archive = Archive(tmp_path, require_patient_id=True)
    before = archive.left_behind()
    answer = archive.send(O.file(O.dataset(without=(PATIENT_ID,))))
    assert answer.kind is Kind.IDENTITY
    assert PATIENT_ID in answer.tags
    assert archive.left_behind() == before
    archive.close()


@pytest.mark.parametrize(
    ("values", "tag"),
    [
        ({PATIENT_ID: ("LO", b"OTHER ")}, PATIENT_ID),
        ({0x00100021: ("LO", b"OTHER HOSPITAL")}, PATIENT_ID),
        ({STUDY_UID: ("UI", b"1.2.3.99")}, SERIES_UID),
    ],
)
def test_a29_a30_nothing_moves_to_another_patient_or_study(
    archive: Archive, values: dict[int, Any], tag: int
) -> None:
    keep(archive, O.dataset())
    rows, packs = archive.left_behind()
    body = O.dataset({INSTANCE_UID: ("UI", b"1.2.3.4\0"), **values})
    answer = archive.send(O.file(body, instance_uid="1.2.3.4"))
    assert answer.kind is Kind.IDENTITY
    assert answer.tags == {tag}
    # Nothing but an event for those who watch over conflicts.
    events = rows["outbox_event"] + 1
    assert archive.left_behind() == ({**rows, "outbox_event": events}, packs)


def test_a30_an_instance_stays_in_its_series(archive: Archive) -> None:
    keep(archive, O.dataset())
    body = O.dataset({SERIES_UID: ("UI", b"1.2.3.98")})
    answer = archive.send(O.file(body))
    assert answer.kind in {Kind.IDENTITY, Kind.CONFLICT}
    assert served(archive).endswith(O.dataset())


def test_a31_the_same_twice_is_stored_once(archive: Archive) -> None:
    keep(archive, O.dataset())
    rows, packs = archive.left_behind()
    assert archive.send(O.good()).kind is Kind.DUPLICATE
    again, packs_again = archive.left_behind()
    assert packs_again == packs
    assert again == {**rows, "outbox_event": rows["outbox_event"] + 1}
    assert column(archive, "study", "n_instances") == 1


def test_a32_the_first_content_is_kept(archive: Archive) -> None:
    first = O.dataset()
    keep(archive, first)
    other = O.dataset({PATIENT_NAME: ("PN", b"Other^Name")})
    assert archive.send(O.file(other)).kind is Kind.CONFLICT
    assert served(archive).endswith(first)
    digest = archive.find(O.instance_uid).digest
    assert digest == hashlib.sha256(first).digest()


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
