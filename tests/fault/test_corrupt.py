"""Row D04 of the fault table: an object whose bits have changed on the disk."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from tests.support.datasets import a_study, ct_slice, part10
from tests.support.node import RunningNode

#: Less and more than what is checked before anything is sent.
SIZES = {"short": 64, "long": 1536}
ANY_PARTS = 'multipart/related; type="application/dicom"; transfer-syntax=*'


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    made = RunningNode.start(tmp_path_factory.mktemp("corrupt"), packs__seal=False)
    yield made
    made.stop()


def stow(node: RunningNode, datasets: list[Dataset]) -> None:
    body = b"".join(
        b"--b\r\nContent-Type: application/dicom\r\n\r\n" + part10(ds) + b"\r\n"
        for ds in datasets
    )
    kind = 'multipart/related; type="application/dicom"; boundary=b'
    answer = node.request(
        "POST", "/dicom-web/studies", body + b"--b--\r\n", {"Content-Type": kind}
    )
    assert answer.status == 200, answer.text


def flip_a_bit(folder: Path, content: bytes) -> None:
    """Change one bit in the middle of `content`, which lies in one of the packs."""
    for path in folder.glob("packs/??/*.pack"):
        at = path.read_bytes().find(content)
        if at >= 0:
            with path.open("r+b") as stream:
                stream.seek(at + len(content) // 2)
                byte = stream.read(1)[0]
                stream.seek(-1, 1)
                stream.write(bytes((byte ^ 0x10,)))
            return
    raise AssertionError("no pack holds it")


def paths_of(ds: Dataset) -> dict[str, tuple[str, str]]:
    study = f"/dicom-web/studies/{ds.StudyInstanceUID}"
    series = f"{study}/series/{ds.SeriesInstanceUID}"
    instance = f"{series}/instances/{ds.SOPInstanceUID}"
    return {
        "file": (f"/api/v1/instances/{ds.SOPInstanceUID}/file", "*/*"),
        "single": (instance, "application/dicom"),
        "instance": (instance, ANY_PARTS),
        "series": (series, ANY_PARTS),
        "study": (study, ANY_PARTS),
    }


def broken_off(node: RunningNode, path: str, accept: str) -> bool:
    """Tell whether a body that was begun is not brought to its end."""
    try:
        node.get(path, accept=accept)
    except (http.client.IncompleteRead, ConnectionError):
        return True
    return False


@pytest.mark.parametrize("size", SIZES)
def test_d04_a_flipped_bit_is_an_error_and_never_other_bytes(
    node: RunningNode, size: str
) -> None:
    seed = 10 + len(size)
    whole, flipped = a_study(seed=seed, n_instances=2, size=SIZES[size])
    stow(node, [whole, flipped])
    before = node.metrics().get("huying_corrupt_reads_total", 0)
    flip_a_bit(node.data, flipped.PixelData)

    for kind, (path, accept) in paths_of(flipped).items():
        if size == "short":
            answer = node.get(path, accept=accept)
            assert answer.status == 500, kind
            assert answer.json()["code"] == "unavailable.corrupt", kind
        else:
            assert broken_off(node, path, accept), kind

    path, accept = paths_of(whole)["instance"]
    assert node.get(path, accept=accept).status == 200
    assert node.metrics()["huying_corrupt_reads_total"] - before == len(
        paths_of(flipped)
    )
    found = [
        line for line in node.log_bytes().splitlines() if b"object.corrupt" in line
    ]
    assert found
    assert all(b'"pack"' in line and b'"offset"' in line for line in found)
    assert b"Traceback" not in node.log_bytes()


def test_d04_a_value_is_not_taken_out_of_what_is_damaged(node: RunningNode) -> None:
    ds = ct_slice(seed=3)
    stow(node, [ds])
    flip_a_bit(node.data, ds.PixelData)
    path, _ = paths_of(ds)["instance"]

    answer = node.get(f"{path}/bulkdata/00080018")

    assert answer.status == 500
    assert answer.json()["code"] == "unavailable.corrupt"


def test_d04_ranges_are_served_as_they_lie(node: RunningNode) -> None:
    ds = ct_slice(seed=4)
    stow(node, [ds])
    flip_a_bit(node.data, ds.PixelData)
    path, _ = paths_of(ds)["file"]

    answer = node.get(path, range="bytes=0-131")

    assert (answer.status, answer.body[128:]) == (206, b"DICM")
