"""Pictures of a whole node: made by its worker, answered by its web processes."""

from __future__ import annotations

import io
import os
import signal
import sqlite3
from pathlib import Path

import pytest
from PIL import Image

from tests.support.datasets import a_study, part10, uid
from tests.support.dicomweb import multipart
from tests.support.node import RunningNode
from tests.support.process import is_running
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

STUDY = f"/dicom-web/studies/{uid(1)}"
IMAGE = f"{STUDY}/series/{uid(1, 1)}/instances/{uid(1, 1, 1)}"


def thumbnails(folder: Path) -> int:
    """Return how many pictures the worker has kept."""
    index = next(folder.rglob("index.db"))
    with sqlite3.connect(f"file:{index}?mode=ro", uri=True) as connection:
        return int(connection.execute("SELECT count(*) FROM thumbnail").fetchone()[0])


def workers(node: RunningNode) -> list[int]:
    """Return the processes of this node that make pictures."""
    parents = {str(pid) for pid in node.processes().values()}
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes()
            parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if b"pacs.imaging.worker" in command and parent in parents:
            found.append(int(path.name))
    return found


def test_pictures_are_made_when_a_study_settles_and_by_others_after_a_kill(
    tmp_path: Path,
) -> None:
    node = RunningNode.start(tmp_path, pacs__settle_seconds=1)
    try:
        body, headers = multipart([part10(ds) for ds in a_study(seed=1, n_series=2)])
        stored = node.request("POST", "/dicom-web/studies", body, headers)
        assert stored.status == 200

        wait_until(lambda: thumbnails(tmp_path) == 2, "two thumbnails", seconds=30)
        for path in (f"{STUDY}/thumbnail", f"{IMAGE}/rendered", f"{IMAGE}/thumbnail"):
            answer = node.get(path)
            assert answer.status == 200
            assert Image.open(io.BytesIO(answer.body)).format == "JPEG"
        query = f"studyUID={uid(1)}&seriesUID={uid(1, 1)}&objectUID={uid(1, 1, 1)}"
        assert node.get(f"/wado?requestType=WADO&{query}").status == 200

        before = workers(node)
        assert before
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_running, before)), "workers to die")
        # One that died idle costs nothing: another one is started.
        window = f"{IMAGE}/rendered?window=1,2,linear"
        assert node.get(window).status == 200
    finally:
        node.stop()
