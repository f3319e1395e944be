"""Table A, to A34: what is kept of odd objects and how it is served."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest

from storage.kernel.errors import InvalidInput, MalformedObject, NotFound
from storage.kernel.limits import MIB, Limits
from tests.fault.doors import Archive, Kind
from tests.fault.kept import O, column, keep, peak_of, served
from tests.fault.objects import (
    BITS_ALLOCATED,
    COLUMNS,
    DEFLATED,
    EXPLICIT,
    FRAMES,
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
