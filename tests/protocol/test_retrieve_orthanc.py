"""Orthanc as destination, as requestor, and as one who asks for commitment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pacs.dimse.commit import ReportSender
from pacs.dimse.deliver import Outgoing
from storage.kernel.uids import new_uid
from tests.support import dcmtk, web
from tests.support.archive import ADMIN, TIMEOUTS, Archive, archive
from tests.support.datasets import a_study, ct_slice, dataset_bytes, part10, uid
from tests.support.orthanc import Orthanc
from tests.support.waiting import wait_until


@pytest.fixture
def node(tmp_path: Path, orthanc: Orthanc) -> Iterator[Archive]:
    with archive(tmp_path / "node") as made, made.listening():
        orthanc.clear()
        orthanc.add_modality("huying", made.aet, made.port)
        made.add_peer(orthanc.aet, orthanc.dimse_port)
        yield made


def held(orthanc: Orthanc) -> dict[str, bytes]:
    """Return UID and data set of every instance in Orthanc."""
    found = {}
    for key in orthanc.rest("GET", "/instances"):
        about = orthanc.rest("GET", f"/instances/{key}/simplified-tags")
        file = web.request(f"{orthanc.http}/instances/{key}/file").body
        found[about["SOPInstanceUID"]] = dataset_bytes(file)
    return found


def test_a_study_moves_to_orthanc(node: Archive, orthanc: Orthanc) -> None:
    made = a_study(seed=71, n_series=2)
    node.store_all(made)

    dcmtk.run(
        "movescu", "-S", "-aet", "MOVER", "-aec", node.aet, "-aem", orthanc.aet,
        "127.0.0.1", node.port, "-k", "QueryRetrieveLevel=STUDY",
        "-k", f"StudyInstanceUID={uid(71)}",
    )  # fmt: skip

    assert held(orthanc) == {
        str(ds.SOPInstanceUID): dataset_bytes(part10(ds)) for ds in made
    }


def test_orthanc_moves_a_study_to_itself(node: Archive, orthanc: Orthanc) -> None:
    made = a_study(seed=72)
    node.store_all(made)
    node.store_all(a_study(seed=73))

    orthanc.rest(
        "POST",
        "/modalities/huying/move",
        {
            "Level": "Study",
            "Resources": [{"StudyInstanceUID": uid(72)}],
            "TargetAet": orthanc.aet,
        },
    )

    assert sorted(held(orthanc)) == sorted(str(ds.SOPInstanceUID) for ds in made)


def test_orthanc_asks_for_commitment(node: Archive, orthanc: Orthanc) -> None:
    [stored] = node.store_all(a_study(seed=74, n_instances=1))
    unknown = new_uid()
    sop_class = str(ct_slice().SOPClassUID)

    asked = orthanc.rest(
        "POST",
        "/modalities/huying/storage-commitment",
        {"DicomInstances": [[sop_class, stored], [sop_class, unknown]]},
    )

    transaction = asked["ID"]
    wait_until(lambda: node.commitment.find(ADMIN, transaction), "the request")
    work = node.commitment.worker(ReportSender(node.node.peers, Outgoing(TIMEOUTS)))
    work({"id": node.commitment_key(transaction)})
    answer = orthanc.rest("GET", f"/storage-commitment/{transaction}")
    assert answer["Status"] == "Failure"
    assert [one["SOPInstanceUID"] for one in answer["Success"]] == [stored]
    [failure] = answer["Failures"]
    assert failure["SOPInstanceUID"] == unknown
    assert failure["FailureReason"] == 0x0112
