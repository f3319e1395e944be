"""Public images over DICOMweb: what goes in comes out (PS3.18 10.4, 10.5)."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest

from pacs.imaging import syntaxes
from pacs.imaging.part10 import read_file_meta
from pacs.web.retrieve import NEVER
from storage.kernel.errors import MalformedObject
from tests.support.corpus import broken, files, needs_corpus
from tests.support.dicomweb import TENANT, WebArchive, multipart, split, web_archive
from tests.support.web import Response, request

pytestmark = needs_corpus
AS_STORED = 'multipart/related; type="application/octet-stream"; transfer-syntax=*'
DICOM = 'multipart/related; type="application/dicom"'


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebArchive]:
    with web_archive(tmp_path_factory.mktemp("corpus")) as served:
        yield served


def store(web: WebArchive, path: Path, tenant: str) -> Response:
    body, headers = multipart([path.read_bytes()])
    url = f"{web.dicomweb}/studies"
    return request(url, method="POST", body=body, headers=headers | {TENANT: tenant})


def data_set(file: bytes) -> tuple[str, bytes]:
    """Return transfer syntax and data set of a Part-10 file."""
    meta = read_file_meta(file)
    assert meta is not None
    return meta.transfer_syntax_uid, file[meta.dataset_offset :]


def test_what_goes_in_comes_out(web: WebArchive) -> None:
    seen: Counter[str] = Counter()
    n_stored = 0
    for path in files():
        # The same object in several syntaxes: each goes to a tenant of its own.
        name = uid_of(path)
        seen[name] += 1
        tenant = f"t{seen[name]}"
        answer = store(web, path, tenant)
        if answer.status == 409:
            # Identifiers that are missing or contradict each other, or no preamble.
            (item,) = failures(answer)
            assert item["00081197"]["Value"][0] in {0xA900, 0xA901, 0xC000}, path
            continue
        assert answer.status in {200, 202}, (path, answer.text)
        (item,) = answer.json()["00081199"]["Value"]
        check(web, path, item["00081190"]["Value"][0], tenant)
        n_stored += 1
    assert n_stored > len(files()) * 0.95


def uid_of(path: Path) -> str:
    head = path.read_bytes()[:4096]
    try:
        meta = read_file_meta(head, complete=False)
    except MalformedObject:
        return path.name
    return meta.sop_instance_uid if meta is not None else path.name


def failures(answer: Response) -> list[dict[str, Any]]:
    """Return the items of both sequences that tell of failures."""
    return [
        item
        for sequence in ("00081198", "0008119A")
        for item in answer.json().get(sequence, {"Value": []})["Value"]
    ]


def check(web: WebArchive, path: Path, url: str, tenant: str) -> None:
    """Retrieve one stored file in every way."""

    def get(target: str, **headers: str) -> Response:
        return request(web.url + target, headers={TENANT: tenant} | headers)

    syntax, data = data_set(path.read_bytes())
    file = get(f"/api/v1/instances/{url.rpartition('/')[2]}/file")
    assert data_set(file.body) == (syntax, data), path
    wado = get(url, Accept=f"{DICOM}; transfer-syntax=*")
    ((_, part),) = split(wado)
    if syntax in NEVER:
        assert data_set(part)[0] == syntaxes.EXPLICIT_VR_LE, path
        pydicom.dcmread(io.BytesIO(part))
    else:
        assert data_set(part) == (syntax, data), path
    (metadata,) = get(f"{url}/metadata").json()
    assert metadata["00080018"]["Value"] == [url.rpartition("/")[2]], path
    for accept in ("*/*", AS_STORED):
        frame = get(f"{url}/frames/1", Accept=accept)
        if metadata.keys() & {"7FE00008", "7FE00009", "7FE00010"}:
            assert frame.status in {200, 404, 406, 422}, (path, frame.text)
        else:
            assert frame.status in {404, 406}, path
    assert get(url).status == 200, path


def test_broken_files_are_answered_one_by_one(web: WebArchive) -> None:
    for path in broken():
        answer = store(web, path, "broken")

        assert answer.status in {200, 202, 400, 409, 413}, (path, answer.text)
        if answer.status == 409:
            (item,) = failures(answer)
            assert item["00091001"]["Value"][0], path
        if answer.status in {200, 202}:
            (item,) = answer.json()["00081199"]["Value"]
            url = web.url + item["00081190"]["Value"][0]
            for suffix in ("", "/metadata", "/frames/1", "/pixeldata", "/bulkdata"):
                retrieved = request(url + suffix, headers={TENANT: "broken"})
                assert retrieved.status < 500, (path, suffix)
    assert not list(web.archive.folder.rglob("*.partial"))
