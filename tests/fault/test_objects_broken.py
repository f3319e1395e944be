"""The broken files of the corpus: each has one outcome, and is served as received."""

from __future__ import annotations

from pathlib import Path

import pytest

from pacs.imaging import syntaxes
from pacs.imaging.part10 import read_file_meta
from storage.kernel.errors import ImagingError
from tests.fault.doors import ACTOR, Archive, Kind, StoreDoor, StowDoor, alive
from tests.fault.objects import Objects
from tests.support.corpus import CORPUS, broken, files, needs_corpus
from tests.support.node import RunningNode

pytestmark = needs_corpus

NAMES = 0x00100010
PATIENT_ID, CLASS_UID, INSTANCE_UID = 0x00100020, 0x00080016, 0x00080018
STUDY_UID, SERIES_UID, PIXEL_DATA = 0x0020000D, 0x0020000E, 0x7FE00010
TRANSFER_SYNTAX, FILE_META = 0x00020010, 0x00020000

#: What becomes of each file, and the attributes that the answer names.
EXPECTED: dict[str, tuple[Kind, set[int]]] = {
    "D_CLUNIE_CT1_RLE_FRAGS": (Kind.STORED, set()),
    "ExplVR_BigEndNoMeta": (Kind.NOT_DICOM, set()),
    "ExplVR_LitEndNoMeta": (Kind.NOT_DICOM, set()),
    "GH177_D_CLUNIE_CT1_IVRLE_BigEndian_undefined_length": (Kind.STORED, set()),
    "GH340": (Kind.NOT_DICOM, set()),
    "Issue1097_FailToOpenDeflatedFileWithSQ": (Kind.SOP_CLASS, {CLASS_UID}),
    "MR_truncated": (Kind.MALFORMED, {PIXEL_DATA}),
    "UN_sequence": (Kind.IDENTITY, {CLASS_UID}),
    "badVR": (Kind.IDENTITY, {INSTANCE_UID}),
    "bad_sequence": (Kind.IDENTITY, {INSTANCE_UID}),
    "empty_charset_LEI": (Kind.IDENTITY, {CLASS_UID}),
    "emri_small_jpeg_2k_lossless_too_short": (Kind.MALFORMED, {PIXEL_DATA}),
    "explicit_VR-UN": (Kind.STORED, set()),
    "invalid-vr-length-test": (Kind.STORED, set()),
    "meta_missing_tsyntax": (Kind.MALFORMED, {TRANSFER_SYNTAX}),
    "no_meta": (Kind.NOT_DICOM, set()),
    "no_meta_group_length": (Kind.IDENTITY, {CLASS_UID}),
    "no_preamble_dicm_in_data": (Kind.MALFORMED, {TRANSFER_SYNTAX}),
    "own-bad-date": (Kind.WARNED, {0x00080020, 0x00080030, 0x00100030}),
    "own-bad-orientation": (Kind.STORED, set()),
    "own-bad-spacing": (Kind.STORED, set()),
    "own-bits-99": (Kind.WARNED, {0x00280100}),
    "own-deep-1200": (Kind.MALFORMED, {0x00081140}),
    "own-deflate-bomb": (Kind.TOO_LARGE, set()),
    "own-duplicate-uid-a": (Kind.STORED, set()),
    "own-duplicate-uid-b": (Kind.STORED, set()),
    "own-elf-preamble": (Kind.STORED, set()),
    "own-empty": (Kind.NOT_DICOM, set()),
    "own-frames-billion": (Kind.WARNED, {PIXEL_DATA}),
    "own-frames-negative": (Kind.WARNED, {0x00280008}),
    "own-html": (Kind.NOT_DICOM, set()),
    "own-huge-pixel-length": (Kind.MALFORMED, {PIXEL_DATA}),
    "own-long-text": (Kind.STORED, set()),
    "own-no-patient-id": (Kind.WARNED, {PATIENT_ID}),
    "own-no-sop-uid": (Kind.IDENTITY, {INSTANCE_UID}),
    "own-no-study-uid": (Kind.IDENTITY, {STUDY_UID}),
    "own-nul-in-name": (Kind.STORED, set()),
    "own-only-magic": (Kind.MALFORMED, {FILE_META}),
    "own-only-preamble": (Kind.NOT_DICOM, set()),
    "own-pe-preamble": (Kind.STORED, set()),
    "own-rows-too-many": (Kind.WARNED, {PIXEL_DATA}),
    "own-rows-zero": (Kind.WARNED, {0x00280010}),
    "own-slope-zero": (Kind.STORED, set()),
    "own-sopclass-unknown": (Kind.STORED, set()),
    "own-sql-patient-id": (Kind.STORED, set()),
    "own-text": (Kind.NOT_DICOM, set()),
    "own-trailing-zip": (Kind.WARNED, {0xFFFCFFFC}),
    "own-truncated-10": (Kind.MALFORMED, set()),
    "own-truncated-40": (Kind.MALFORMED, {PIXEL_DATA}),
    "own-truncated-70": (Kind.MALFORMED, {PIXEL_DATA}),
    "own-truncated-99": (Kind.MALFORMED, {PIXEL_DATA}),
    "own-tsyntax-unknown": (Kind.SYNTAX, {TRANSFER_SYNTAX}),
    "own-uid-leading-zero": (Kind.IDENTITY, {SERIES_UID}),
    "own-uid-mismatch": (Kind.IDENTITY, {INSTANCE_UID}),
    "own-uid-path-traversal": (Kind.IDENTITY, {STUDY_UID}),
    "own-uid-too-long": (Kind.IDENTITY, {STUDY_UID}),
    "own-undefined-length-native": (Kind.MALFORMED, {PIXEL_DATA}),
    "own-wildcard-patient-id": (Kind.STORED, set()),
    "own-xss-patient-name": (Kind.STORED, set()),
    "priv_SQ": (Kind.IDENTITY, {CLASS_UID}),
    "reportsi_with_empty_number_tags": (Kind.WARNED, {PATIENT_ID}),
    "rtplan_truncated": (Kind.MALFORMED, {0x300A00B0}),
    "rtstruct": (Kind.NOT_DICOM, set()),
    "vlut_04": (Kind.STORED, set()),
}
PARAMS = [pytest.param(path, id=path.stem) for path in broken()]


def test_every_broken_file_has_its_row() -> None:
    assert {path.stem for path in broken()} == set(EXPECTED)


@pytest.mark.parametrize("path", PARAMS)
def test_broken_import(path: Path, archive: Archive) -> None:
    kind, tags = EXPECTED[path.stem]
    before = archive.left_behind()

    answer = archive.send(path.read_bytes())

    assert answer.kind is kind, answer
    assert tags <= answer.tags, answer
    if not kind.is_kept:
        assert archive.left_behind() == before
    good = Objects(1)
    alive(archive, good.good(), good.instance_uid)


@pytest.mark.parametrize("path", PARAMS)
def test_broken_stow(path: Path, shared_node: RunningNode) -> None:
    door = StowDoor(shared_node)
    kind, tags = EXPECTED[path.stem]

    answer = door.send(path.read_bytes())

    if kind is Kind.NOT_DICOM:
        assert answer.kind in {Kind.NOT_DICOM, Kind.MALFORMED}, answer
    elif answer.kind is Kind.CONFLICT:
        # Several files are variants of one object.
        assert kind.is_kept
    else:
        assert answer.kind is kind, answer
        assert tags <= answer.tags, answer
    good = Objects(1)
    alive(door, good.good(), good.instance_uid)


def _is_sendable(path: Path) -> bool:
    """Tell whether a file has enough File Meta to make a C-STORE request of it."""
    try:
        meta = read_file_meta(path.read_bytes())
    except ImagingError:
        return False
    return meta is not None and bool(meta.sop_class_uid and meta.sop_instance_uid)


@pytest.mark.parametrize(
    "path", [p for p in PARAMS if _is_sendable(Path(str(p.values[0])))]
)
def test_broken_cstore(path: Path, shared_node: RunningNode) -> None:
    door = StoreDoor(shared_node)
    kind, _ = EXPECTED[path.stem]

    answer = door.send(path.read_bytes())

    if kind.is_kept:
        # Tests of other doors may have stored it, or its twin, already.
        assert answer.kind in {kind, Kind.STORED, Kind.CONFLICT}, answer
    else:
        assert answer.kind is kind or answer.kind is Kind.SOP_CLASS, answer
    good = Objects(1)
    alive(door, good.good(), good.instance_uid)


def test_a32_two_files_with_one_uid_keep_the_first(archive: Archive) -> None:
    first, second = (
        (CORPUS / "broken" / f"own-duplicate-uid-{letter}.dcm").read_bytes()
        for letter in "ab"
    )
    assert archive.send(first).kind is Kind.STORED
    rows, packs = archive.left_behind()

    assert archive.send(second).kind is Kind.CONFLICT
    assert archive.send(first).kind is Kind.DUPLICATE

    # Nothing but one event for each.
    events = rows["outbox_event"] + 2
    assert archive.left_behind() == ({**rows, "outbox_event": events}, packs)


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id="/".join(path.parts[-2:])) for path in
     [*files("syntaxes"), *files("objects"), *files("charsets"), *broken()]],
)  # fmt: skip
def test_what_is_stored_is_served_byte_for_byte(path: Path, archive: Archive) -> None:
    data = path.read_bytes()
    if not archive.send(data).kind.is_kept:
        return
    meta = read_file_meta(data)
    assert meta is not None
    received = data[meta.dataset_offset :]
    uid = meta.sop_instance_uid or _only_instance(archive)
    stored = archive.find(uid)
    syntax = stored.transfer_syntax_uid

    sent = b"".join(archive.retrieve.dataset(stored, syntax).chunks)
    file = b"".join(archive.retrieve.part10(stored).chunks)

    assert sent == received
    assert file.endswith(received)
    assert file[:132] == bytes(128) + b"DICM"
    head = read_file_meta(file)
    assert head is not None
    assert head.dataset_offset == len(file) - len(received)
    assert head.transfer_syntax_uid == meta.transfer_syntax_uid
    assert archive.retrieve.metadata(stored)
    _frames_or_an_error(archive, uid)


def _only_instance(archive: Archive) -> str:
    from sqlalchemy import text

    with archive.database.read() as connection:
        found = connection.execute(text("SELECT sop_instance_uid FROM instance"))
        return str(found.scalar_one())


def _frames_or_an_error(archive: Archive, uid: str) -> None:
    """Read every frame as stored and decoded, and convert the whole."""
    stored = archive.find(uid)
    try:
        count = archive.retrieve.frame_count(stored)
    except ImagingError:
        count = 0
    for number in range(1, min(count, 3) + 1):
        for syntax in (None, syntaxes.EXPLICIT_VR_LE):
            try:
                archive.retrieve.frame(stored, number, syntax)
            except ImagingError:
                continue
    for target in (syntaxes.EXPLICIT_VR_LE, syntaxes.IMPLICIT_VR_LE):
        try:
            archive.retrieve.part10(stored, target)
        except ImagingError:
            continue
    assert archive.retrieve.instances(ACTOR, stored.study_instance_uid)
