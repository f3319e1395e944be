"""A node that keeps HTJ2K frames beside what it received."""

from __future__ import annotations

from pathlib import Path

from pydicom.uid import HTJ2KLosslessRPCL

from tests.support.datasets import ct_slice, dataset_bytes, part10, uid
from tests.support.dicomweb import multipart
from tests.support.node import RunningNode
from tests.support.waiting import wait_until
from tests.support.web import request

IMAGE = f"/studies/{uid(1)}/series/{uid(1, 1)}/instances/{uid(1, 1, 1)}"
JPHC = f"image/jphc; transfer-syntax={HTJ2KLosslessRPCL}"


def test_frames_are_kept_as_htj2k_until_the_study_is_deleted(tmp_path: Path) -> None:
    node = RunningNode.start(tmp_path, packs__htj2k=True)
    try:
        body, headers = multipart([part10(ct_slice(number=n)) for n in (1, 2, 3)])
        stored = request(
            f"{node.dicomweb}/studies", method="POST", body=body, headers=headers
        )
        assert stored.status == 200, stored.text
        asked = f"{node.dicomweb}{IMAGE}/frames/1"
        before = request(asked, headers={"Accept": JPHC})
        objects = node.data / "objects"

        def kept() -> list[Path]:
            return [p for p in objects.rglob("*.htj2k") if p.is_file()]

        wait_until(kept, "the rendition", seconds=60)
        after = request(asked, headers={"Accept": JPHC})

        # The same code stream, whether it was made for the request or before it.
        assert (before.status, after.status) == (200, 200)
        assert before.body == after.body
        assert before.headers["etag"] == after.headers["etag"]
        file = request(f"{node.http}/api/v1/instances/{uid(1, 1, 1)}/file")
        assert dataset_bytes(file.body) == dataset_bytes(part10(ct_slice()))

        gone = request(f"{node.dicomweb}/studies/{uid(1)}", method="DELETE")
        assert gone.status == 204, gone.text
        wait_until(lambda: not kept(), "the rendition to go", seconds=60)
    finally:
        node.stop()
