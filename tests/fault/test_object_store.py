"""Row D02 of the fault table: the object store stalls, or answers with errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.kernel.settings import Objects
from tests.fault.test_storage import SUCCESS, is_kept, store, stow
from tests.support.datasets import ct_slice
from tests.support.halting import HaltingProxy, Way
from tests.support.node import RunningNode
from tests.support.seaweed import SeaweedFS
from tests.support.waiting import wait_until

LIMIT = 1.0


@pytest.fixture
def way(seaweedfs: SeaweedFS) -> Iterator[HaltingProxy]:
    with HaltingProxy(seaweedfs.ports["s3"]) as proxy:
        yield proxy


@pytest.mark.parametrize("trouble", [Way.STALLED, Way.BROKEN])
def test_d02_what_only_the_object_store_has_is_503_until_it_answers(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    seaweedfs: SeaweedFS,
    way: HaltingProxy,
    trouble: Way,
) -> None:
    found = seaweedfs.objects()
    s3 = found.s3.model_copy(
        update={"endpoint": f"127.0.0.1:{way.port}", "timeout_seconds": LIMIT}
    )
    node = RunningNode.start(tmp_path, objects=Objects(kind="s3", s3=s3))
    request.addfinalizer(node.stop)
    sealed, local = ct_slice(seed=1), ct_slice(seed=2)
    assert store(node, sealed) == SUCCESS
    file = f"/api/v1/instances/{sealed.SOPInstanceUID}/file"
    wait_until(lambda: b"series.sealed" in node.log_bytes(), "the series to be sealed")
    assert is_kept(node, sealed)

    way.way = trouble
    assert store(node, local) == SUCCESS
    assert stow(node, ct_slice(seed=3)).status == 200
    assert is_kept(node, local)
    # Four tries at most, and what a request is allowed beside them.
    answer = node.request("GET", file, timeout=8 * LIMIT + 5)
    assert answer.status == 503
    assert "retry-after" in answer.headers
    assert node.get("/dicom-web/studies").status == 200

    way.way = Way.OPEN
    # Each process asks again some seconds after it found the store down.
    wait_until(
        lambda: all(node.get(file).status == 200 for _ in range(20)),
        "all processes to ask the object store again",
    )
    assert is_kept(node, sealed)
