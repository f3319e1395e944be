"""Import through the real ingest service: files, folders, archives, DICOMDIRs."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian
from sqlalchemy import text

from gateway.importer import ImportSummary, count_files, import_paths
from gateway.unpack import MEDIA_STORAGE_DIRECTORY
from pacs.services.describe import Rules
from pacs.services.ingest import IngestService
from storage.db import migrate
from storage.db.engine import Database
from storage.kernel.clock import SystemClock
from storage.kernel.errors import StorageFull
from storage.kernel.limits import MIB, Limits
from storage.kernel.settings import SyncPolicy
from storage.packs.writer import PackWriter

SMALL = Limits(
    memory_instance_bytes=64 * 1024,
    archive_entries=20,
    archive_bytes=4 * MIB,
    archive_ratio=50,
    instance_bytes=3 * MIB,
)


def dicom(number: int, *, size: int = 100, name: str = "张^三") -> bytes:
    """Return a Part-10 CT image."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = UID(f"2.25.{number}")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = Dataset()
    ds.file_meta = meta
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SOPClassUID = CTImageStorage
    ds.SOPInstanceUID = f"2.25.{number}"
    ds.StudyInstanceUID = "2.25.1000"
    ds.SeriesInstanceUID = "2.25.1001"
    ds.PatientName = name
    ds.PatientID = "P1"
    ds.Modality = "CT"
    ds.InstanceNumber = number
    ds.PixelData = bytes(size)
    ds["PixelData"].VR = "OW"
    out = io.BytesIO()
    pydicom.dcmwrite(out, ds, enforce_file_format=True)
    return out.getvalue()


class Archive:
    """A node's ingest with what it has stored."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        url = f"sqlite:///{folder / 'index.db'}"
        migrate.upgrade(url)
        self.database = Database(url)
        self.packs = PackWriter(folder / "packs", roll_bytes=1 << 30)
        self.ingest = IngestService(
            database=self.database,
            packs=self.packs,
            rules=Rules(SMALL),
            clock=SystemClock(),
            sync=SyncPolicy.INSTANCE,
            node_id="node-1",
        )

    def take(self, *paths: Path, limits: Limits = SMALL) -> ImportSummary:
        return import_paths(self.ingest, paths, limits=limits)

    def uids(self) -> list[str]:
        with self.database.read() as connection:
            rows = connection.execute(
                text("SELECT sop_instance_uid FROM instance ORDER BY 1")
            )
            return [row[0] for row in rows]

    def close(self) -> None:
        self.packs.close()
        self.database.close()


@pytest.fixture
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Archive]:
    made = Archive(tmp_path_factory.mktemp("node"))
    yield made
    made.close()


@pytest.fixture
def zipped(tmp_path: Path) -> Callable[..., Path]:
    def make(entries: dict[str, bytes], name: str = "disc.zip") -> Path:
        path = tmp_path / name
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
            for entry, data in entries.items():
                out.writestr(entry, data)
        return path

    return make


def reasons(summary: ImportSummary) -> list[str]:
    return [one.reason for one in summary.rejected]


def test_a_folder_is_stored_and_what_is_not_dicom_is_skipped(
    archive: Archive, tmp_path: Path
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "1.dcm").write_bytes(dicom(1))
    (tmp_path / "a" / "b" / "2").write_bytes(dicom(2))
    (tmp_path / "a" / "README.txt").write_text("viewer on this disc")

    summary = archive.take(tmp_path / "a")

    assert (summary.stored, summary.skipped, summary.ok) == (2, 1, True)
    assert archive.uids() == ["2.25.1", "2.25.2"]
    assert count_files([tmp_path / "a"]) == 3


def test_the_same_bytes_again_are_duplicates(archive: Archive, tmp_path: Path) -> None:
    (tmp_path / "1.dcm").write_bytes(dicom(1))
    archive.take(tmp_path)

    summary = archive.take(tmp_path)

    assert (summary.stored, summary.duplicate, summary.ok) == (0, 1, True)


def test_other_bytes_under_one_uid_are_rejected_with_the_reason(
    archive: Archive, tmp_path: Path
) -> None:
    (tmp_path / "1.dcm").write_bytes(dicom(1))
    archive.take(tmp_path)
    (tmp_path / "1.dcm").write_bytes(dicom(1, size=200))

    summary = archive.take(tmp_path)

    assert reasons(summary) == [
        "SOP Instance UID (0008,0018) is taken by other content"
    ]
    assert not summary.ok


def test_a_file_that_was_named_and_is_not_dicom_is_rejected(
    archive: Archive, tmp_path: Path
) -> None:
    (tmp_path / "x").write_text("hello" * 100)

    summary = archive.take(tmp_path / "x", tmp_path / "missing")

    assert reasons(summary) == [
        "No such file or directory",
        "not a DICOM file: no DICM after the preamble",
    ]


def test_a_damaged_dicom_file_is_rejected_and_the_rest_stored(
    archive: Archive, tmp_path: Path
) -> None:
    (tmp_path / "1.dcm").write_bytes(dicom(1)[:-20])
    (tmp_path / "2.dcm").write_bytes(dicom(2))

    summary = archive.take(tmp_path)

    assert (summary.stored, summary.n_rejected) == (1, 1)
    assert "(7FE0,0010)" in reasons(summary)[0]
    assert archive.uids() == ["2.25.2"]


@pytest.mark.parametrize("around", [-1, 0, 1, 100_000])
def test_objects_around_the_memory_limit_arrive_whole(
    archive: Archive, tmp_path: Path, around: int
) -> None:
    empty = dicom(1, size=0)
    overhead = len(empty) - empty.index(b"\x08\x00\x05\x00CS")
    size = SMALL.memory_instance_bytes - overhead + around
    data = dicom(1, size=size + size % 2)
    (tmp_path / "1.dcm").write_bytes(data)

    summary = archive.take(tmp_path)

    assert (summary.stored, summary.ok) == (1, True)
    assert summary.n_bytes == len(data) - data.index(b"\x08\x00\x05\x00CS")


def test_an_object_above_the_limit_leaves_nothing(
    archive: Archive, tmp_path: Path
) -> None:
    (tmp_path / "1.dcm").write_bytes(dicom(1, size=SMALL.instance_bytes))

    summary = archive.take(tmp_path)

    assert "instance_bytes" in reasons(summary)[0]
    assert not list(archive.folder.rglob("*.p*"))


def test_links_in_a_folder_are_not_followed(archive: Archive, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "1.dcm").write_bytes(dicom(1))
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "out").symlink_to(tmp_path / "outside")
    (folder / "one").symlink_to(tmp_path / "outside" / "1.dcm")
    (folder / "loop").symlink_to(folder)

    assert archive.take(folder).stored == 0


def test_a_pipe_is_not_waited_for(archive: Archive, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    assert archive.take(tmp_path).ok
    assert reasons(archive.take(tmp_path / "pipe")) == ["not a regular file"]


def test_a_zip_is_stored(archive: Archive, zipped: Callable[..., Path]) -> None:
    path = zipped({"a/1.dcm": dicom(1), "a/": b"", "2": dicom(2), "x.txt": b"x"})

    summary = archive.take(path)

    assert (summary.stored, summary.skipped, summary.ok) == (2, 1, True)


def test_a46_names_that_lead_elsewhere_are_rejected_and_the_rest_stored(
    archive: Archive, tmp_path: Path
) -> None:
    path = tmp_path / "evil.zip"
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "w") as out:
        for n, name in enumerate(
            ["../up", "/abs", "C:/drive", "a\\..\\b", "d/" * 10_000 + "deep"], 1
        ):
            out.writestr(zipfile.ZipInfo(name), dicom(n))
        out.writestr(link, b"/etc/passwd")
        out.writestr("twice", dicom(7))
        with pytest.warns(UserWarning, match="Duplicate"):
            out.writestr("twice", dicom(8))
        out.writestr("good", dicom(9))
    before = {p for p in tmp_path.parent.rglob("*") if "index" not in p.name}

    summary = archive.take(path)

    assert sorted(reasons(summary)) == sorted(
        [
            "absolute name",
            "absolute name",
            "the name climbs out of the archive",
            "the name climbs out of the archive",
            "name too long",
            "symbolic link",
            "the archive has this name twice",
        ]
    )
    assert summary.stored == 2
    assert {p for p in tmp_path.parent.rglob("*") if "index" not in p.name} >= before
    assert not (tmp_path / "up").exists()


def test_a46_an_encrypted_entry_is_rejected(
    archive: Archive, zipped: Callable[..., Path]
) -> None:
    path = zipped({"1": dicom(1)})
    data = bytearray(path.read_bytes())
    for magic, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(magic) + flags] |= 1
    path.write_bytes(data)

    assert reasons(archive.take(path)) == ["encrypted"]


def test_a47_a_bomb_is_stopped_by_what_it_inflates_to(
    archive: Archive, zipped: Callable[..., Path]
) -> None:
    bomb = dicom(1, size=2 * MIB)
    path = zipped({"bomb": bomb, "good": dicom(2)})

    summary = archive.take(path)

    assert reasons(summary) == ["more than 50 (archive_ratio)"]
    assert archive.uids() == ["2.25.2"]


def test_a47_the_sum_of_all_entries_is_limited(
    archive: Archive, tmp_path: Path
) -> None:
    path = tmp_path / "many.zip"
    with zipfile.ZipFile(path, "w") as out:
        for n in range(8):
            out.writestr(f"{n}", dicom(n + 1, size=900_000))

    summary = archive.take(path)

    assert 1 <= summary.stored <= 4
    assert summary.stored + summary.n_rejected == 8
    assert set(reasons(summary)) == {f"more than {4 * MIB} (archive_bytes)"}


def test_a47_a_forged_size_does_not_help(
    archive: Archive, zipped: Callable[..., Path]
) -> None:
    path = zipped({"1": dicom(1, size=2 * MIB)})
    data = bytearray(path.read_bytes())
    for magic, at in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        struct.pack_into("<I", data, data.index(magic) + at, 10)
    path.write_bytes(data)

    summary = archive.take(path)

    assert summary.stored == 0
    assert archive.uids() == []


def test_a47_overlapping_entries_are_rejected(
    archive: Archive, zipped: Callable[..., Path]
) -> None:
    path = zipped({"1": dicom(1), "2": dicom(2), "3": dicom(3)})
    data = bytearray(path.read_bytes())
    first = data.index(b"PK\1\2")
    second = data.index(b"PK\1\2", first + 4)
    struct.pack_into("<I", data, second + 42, 0)  # both claim the first entry's bytes
    path.write_bytes(data)

    summary = archive.take(path)

    assert reasons(summary) == ["the entry overlaps another"] * 2
    assert archive.uids() == ["2.25.3"]


def test_a47_too_many_entries_are_not_even_listed(
    archive: Archive, zipped: Callable[..., Path]
) -> None:
    path = zipped({f"{n}": b"" for n in range(21)})

    assert reasons(archive.take(path)) == ["more than 20 (archive_entries)"]


def test_a47_a_zip_in_a_zip_is_not_opened(
    archive: Archive, zipped: Callable[..., Path]
) -> None:
    inner = zipped({"1": dicom(1)}, "inner.zip").read_bytes()

    summary = archive.take(zipped({"inner.zip": inner}))

    assert (summary.stored, summary.skipped) == (0, 1)


def test_a_damaged_zip_is_rejected(archive: Archive, tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"PK\3\4" + bytes(300))

    assert reasons(archive.take(tmp_path / "x.zip")) == ["not a readable ZIP archive"]


def test_a_damaged_entry_is_rejected_and_the_rest_stored(
    archive: Archive, tmp_path: Path
) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("1", dicom(1))
        out.writestr("2", dicom(2))
    data = bytearray(path.read_bytes())
    data[400] ^= 0xFF
    path.write_bytes(data)

    summary = archive.take(path)

    assert reasons(summary) == ["the archive entry is damaged"]
    assert summary.stored == 1


def test_a_dicom_file_whose_preamble_is_a_zip_is_dicom(
    archive: Archive, tmp_path: Path
) -> None:
    (tmp_path / "1.dcm").write_bytes(b"PK\3\4" + dicom(1)[4:])

    assert archive.take(tmp_path).stored == 1


def dicomdir(*file_ids: list[str]) -> bytes:
    """Return a DICOMDIR whose records all point at each other in a loop."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID(MEDIA_STORAGE_DIRECTORY)
    meta.MediaStorageSOPInstanceUID = UID("2.25.9")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = Dataset()
    ds.file_meta = meta
    ds.FileSetID = "DISC"
    ds.OffsetOfTheFirstDirectoryRecordOfTheRootDirectoryEntity = 400
    ds.OffsetOfTheLastDirectoryRecordOfTheRootDirectoryEntity = 400
    ds.FileSetConsistencyFlag = 0
    ds.DirectoryRecordSequence = []
    for file_id in file_ids:
        record = Dataset()
        record.OffsetOfTheNextDirectoryRecord = 400
        record.RecordInUseFlag = 0xFFFF
        record.OffsetOfReferencedLowerLevelDirectoryEntity = 400
        record.DirectoryRecordType = "IMAGE"
        record.ReferencedFileID = file_id
        ds.DirectoryRecordSequence.append(record)
    out = io.BytesIO()
    pydicom.dcmwrite(out, ds, enforce_file_format=True)
    return out.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a48_a_dicomdir_gives_what_it_references_inside_its_folder(
    archive: Archive, tmp_path: Path
) -> None:
    disc = tmp_path / "disc"
    (disc / "IMG").mkdir(parents=True)
    (disc / "IMG" / "A1").write_bytes(dicom(1))
    (disc / "IMG" / "b2").write_bytes(dicom(2))
    (disc / "IMG" / "LOST").write_bytes(dicom(3))
    (tmp_path / "SECRET").write_bytes(dicom(4))
    (disc / "LINK").symlink_to(tmp_path / "SECRET")
    (disc / "DICOMDIR").write_bytes(
        dicomdir(
            ["IMG", "A1"],
            ["IMG", "A1"],
            ["IMG", "B2"],
            ["..", "SECRET"],
            ["LINK"],
            ["/etc/passwd"],
            ["IMG", "GONE"],
        )
    )

    summary = archive.take(disc / "DICOMDIR")

    assert archive.uids() == ["2.25.1", "2.25.2"]
    assert summary.n_rejected == 4
    assert set(reasons(summary)) == {
        "Referenced File ID (0004,1500) names no file of the file-set"
    }
    assert archive.take(disc).stored == 1


def test_a48_a_dicomdir_that_is_not_one_is_rejected(
    archive: Archive, tmp_path: Path
) -> None:
    (tmp_path / "DICOMDIR").write_bytes(dicom(1))

    assert "not a DICOMDIR" in reasons(archive.take(tmp_path / "DICOMDIR"))[0]


class FullIngest:
    """An ingest whose disk is full."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        def refuse(*_: object, **__: object) -> None:
            raise StorageFull("less free space than the guard keeps back")

        return refuse


def test_a_full_disk_stops_the_import(tmp_path: Path) -> None:
    for n in range(100):
        (tmp_path / f"{n}.dcm").write_bytes(dicom(n + 1))

    summary = import_paths(FullIngest(), [tmp_path], limits=SMALL)  # type: ignore[arg-type]

    assert "less free space" in summary.stopped
    assert (summary.stored, summary.ok) == (0, False)


class Watch:
    def __init__(self) -> None:
        self.found_files = 0
        self.done = 0

    def found(self, n_files: int) -> None:
        self.found_files += n_files

    def finished(self, n_bytes: int) -> None:
        self.done += 1


def test_progress_ends_where_it_said(
    archive: Archive, tmp_path: Path, zipped: Callable[..., Path]
) -> None:
    zipped({"1": dicom(1), "2": dicom(2), "../3": b""})
    (tmp_path / "4").write_bytes(dicom(4))
    watch = Watch()

    import_paths(archive.ingest, [tmp_path], limits=SMALL, progress=watch)

    assert watch.done == count_files([tmp_path]) + watch.found_files == 5
