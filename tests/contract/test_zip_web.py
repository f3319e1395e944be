"""WADO-RS as a ZIP archive: readable by others, streamed, with harmless names."""

from __future__ import annotations

import http.client
import io
import re
import shutil
import subprocess
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pydicom
import pytest
from pydicom.fileset import FileSet
from pydicom.uid import BasicTextSRStorage, ExplicitVRLittleEndian, JPEGLSLossless

from pacs.domain.study import ByteStream, StoredInstance
from pacs.services.retrieve import Check, RetrieveService
from pacs.web.zip import DICOMDIR, README, archive, entries
from storage.kernel.errors import DependencyDown
from storage.kernel.limits import MIB
from storage.kernel.types import DEFAULT_TENANT, Actor
from tests.support import dcmtk
from tests.support.datasets import ct_slice, dataset_bytes, part10, uid
from tests.support.dicomweb import TENANT, WebArchive
from tests.support.wado import (
    IMAGE,
    IMPLICIT,
    INSTANCE,
    SERIES,
    STUDY,
    get,
    image,
    keep,
    wado_archive,
)
from tests.support.web import request

ZIP = "application/zip"


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebArchive]:
    with wado_archive(tmp_path_factory.mktemp("zip")) as served:
        yield served


@pytest.mark.parametrize(
    ("path", "count", "name"),
    [
        (f"/studies/{STUDY}", 6, STUDY),
        (f"/studies/{STUDY}/series/{SERIES}", 3, SERIES),
        (IMAGE, 1, INSTANCE),
    ],
)
def test_objects_come_in_an_archive(
    web: WebArchive, path: str, count: int, name: str
) -> None:
    answer = get(web, path, ZIP)

    assert answer.status == 200
    assert answer.headers["content-type"] == ZIP
    assert answer.headers["content-disposition"] == f'attachment; filename="{name}.zip"'
    with zipfile.ZipFile(io.BytesIO(answer.body)) as opened:
        assert opened.testzip() is None
        *names, directory, last = opened.namelist()
        assert (directory, last) == (DICOMDIR, README)
        assert len(names) == len(set(names)) == count
        for found in names:
            assert re.fullmatch(r"DICOM/ST\d{6}/SE\d{6}/IM\d{6}", found)
        first = opened.read(names[0])
        assert dataset_bytes(first) == dataset_bytes(part10(ct_slice()))
        assert f"{names[0]}\t{INSTANCE}\t" in opened.read(README).decode()
    head = request(web.dicomweb + path, method="HEAD", headers={"Accept": ZIP})
    assert (head.status, head.body) == (200, b"")


def test_the_archive_is_in_presentation_order(web: WebArchive) -> None:
    answer = get(web, f"/studies/{STUDY}", ZIP)

    with zipfile.ZipFile(io.BytesIO(answer.body)) as opened:
        found = [
            pydicom.dcmread(io.BytesIO(opened.read(name))).SOPInstanceUID
            for name in opened.namelist()
            if name not in {DICOMDIR, README}
        ]
    assert found == [uid(1, s, n) for s in (1, 2) for n in (1, 2, 3)]


@pytest.mark.parametrize("tool", ["unzip", "python", "java"])
def test_others_can_unpack_it(web: WebArchive, tool: str, tmp_path: Path) -> None:
    saved = tmp_path / "study.zip"
    saved.write_bytes(get(web, f"/studies/{STUDY}", ZIP).body)
    commands = {
        "unzip": ("unzip", "-q", str(saved), "-d", str(tmp_path / "out")),
        "python": ("python3", "-m", "zipfile", "-e", str(saved), str(tmp_path / "out")),
        "java": ("jar", "xf", str(saved)),
    }
    command = commands[tool]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    out = tmp_path / "out"
    out.mkdir()

    subprocess.run(command, check=True, cwd=out, capture_output=True, timeout=60)

    files = sorted(out.rglob("IM*"))
    assert len(files) == 6
    assert pydicom.dcmread(files[0]).SOPInstanceUID == INSTANCE


def test_the_directory_lists_the_objects(
    web: WebArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its folder for changes, which nobody closes.
    folder = SimpleNamespace(name=str(tmp_path), cleanup=lambda: None)
    monkeypatch.setattr("pydicom.fileset.TemporaryDirectory", lambda *_, **__: folder)
    saved = tmp_path / "study.zip"
    saved.write_bytes(get(web, f"/studies/{STUDY}", ZIP).body)
    with zipfile.ZipFile(saved) as opened:
        opened.extractall(tmp_path)

    found = FileSet(tmp_path / DICOMDIR)

    assert len(found) == 6
    assert {one.SOPInstanceUID for one in found} == {
        uid(1, s, n) for s in (1, 2) for n in (1, 2, 3)
    }
    for one in found:
        assert one.load().SOPInstanceUID == one.SOPInstanceUID
    assert found.find_values("PatientName") == [ct_slice().PatientName]
    assert len(found.find(SeriesInstanceUID=SERIES)) == 3
    checked = dcmtk.run("dcmdump", tmp_path / DICOMDIR, check=True)
    assert checked.stdout.count("CS [IMAGE]") == 6
    assert "not in DICOMDIR" not in (tmp_path / README).read_text("ascii")


def test_what_cannot_be_listed_is_in_the_archive_all_the_same(web: WebArchive) -> None:
    # A report without the keys that its record must have (PS3.3 F.5.24).
    ds = ct_slice(seed=70, PixelData=None, Rows=None, Columns=None, Modality="SR")
    ds.SOPClassUID = BasicTextSRStorage
    keep(web, part10(ds))
    keep(web, part10(ct_slice(seed=70, number=2)))

    answer = get(web, f"/studies/{uid(70)}", ZIP)

    with zipfile.ZipFile(io.BytesIO(answer.body)) as opened:
        assert len(opened.namelist()) == 4
        lines = opened.read(README).decode().splitlines()
        directory = pydicom.dcmread(io.BytesIO(opened.read(DICOMDIR)))
    (unlisted,) = [line for line in lines if line.endswith("not in DICOMDIR")]
    assert uid(70, 1, 1) in unlisted
    kinds = [one.DirectoryRecordType for one in directory.DirectoryRecordSequence]
    assert kinds == ["PATIENT", "STUDY", "SERIES", "IMAGE"]


def test_a_reader_of_streams_needs_no_directory(web: WebArchive) -> None:
    body = get(web, IMAGE, ZIP).body
    # Local header: deflated, sizes behind the data (APPNOTE 4.4.4 bit 3, 4.4.5).
    assert body[:4] == b"PK\x03\x04"
    assert int.from_bytes(body[6:8], "little") & 0x08
    assert int.from_bytes(body[8:10], "little") == zipfile.ZIP_DEFLATED


def test_the_transfer_syntax_can_be_chosen(web: WebArchive) -> None:
    for accept, syntax in (
        (ZIP, ExplicitVRLittleEndian),
        (f"{ZIP}; transfer-syntax={JPEGLSLossless}", JPEGLSLossless),
        (f"{ZIP};transfer-syntax=*", ExplicitVRLittleEndian),
    ):
        answer = get(web, image(IMPLICIT), accept)
        with zipfile.ZipFile(io.BytesIO(answer.body)) as opened:
            file = pydicom.dcmread(io.BytesIO(opened.read(opened.namelist()[0])))
        assert file.file_meta.TransferSyntaxUID == syntax
    assert get(web, IMAGE, f"{ZIP}; transfer-syntax=1.2.3").status == 406


def test_archives_are_made_for_who_asks_for_them(web: WebArchive) -> None:
    assert get(web, f"/studies/{STUDY}?accept={ZIP}").headers["content-type"] == ZIP
    assert get(web, f"/studies/{STUDY}", "*/*").headers["content-type"] != ZIP
    for path in (f"/studies/{uid(99)}", f"/studies/{uid(50)}"):
        assert get(web, path, ZIP).status == 404
    other = get(web, f"/studies/{uid(50)}", ZIP, **{TENANT: "other"})
    assert other.status == 200


def test_an_object_that_fails_ends_the_archive_unfinished(
    web: WebArchive, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(
        _: RetrieveService, one: StoredInstance, to: str, check: Check
    ) -> ByteStream:
        check()
        if one.sop_instance_uid == uid(1, 2, 2):
            raise DependencyDown("packs")
        # More than is made before the status is sent.
        return ByteStream(2 * MIB, iter((bytes(MIB), bytes(MIB))), to)

    monkeypatch.setattr(RetrieveService, "part10", failing)

    # A client sees that the answer was cut off: never a whole archive with holes.
    with pytest.raises((http.client.HTTPException, OSError)):
        get(web, f"/studies/{STUDY}", ZIP)


def test_an_object_that_fails_at_once_is_told_by_the_status(
    web: WebArchive, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> ByteStream:
        raise DependencyDown("packs")

    monkeypatch.setattr(RetrieveService, "part10", failing)

    assert get(web, f"/studies/{STUDY}", ZIP).status == 503


def test_an_archive_is_never_held(web: WebArchive) -> None:
    (instance,) = web.archive.retrieve.instances(
        Actor(DEFAULT_TENANT, "test"), STUDY, SERIES, INSTANCE
    )
    size, chunk = 64, bytes(MIB)

    def big(_: StoredInstance) -> ByteStream:
        return ByteStream(size * MIB, (chunk for _ in range(size)), "1.2")

    listed = entries([instance] * 4)
    tracemalloc.start()
    total = sum(map(len, archive(listed, map(big, [instance] * 4))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert total > 4 * size * MIB
    assert peak < 16 * MIB
