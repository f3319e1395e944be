"""A whole node that forwards, commits and moves, with its jobs and its processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from pacs.dimse import identifier
from pacs.dimse.client import Address, RemoteAssociation, connect, propose
from pacs.dimse.commit import (
    CLASS_UID,
    INSTANCE_UID,
    PUSH_MODEL,
    PUSH_MODEL_INSTANCE,
    REFERENCED_SEQUENCE,
    TRANSACTION_UID,
)
from pacs.domain.study import ByteStream
from pacs.imaging.syntaxes import EXPLICIT_VR_LE
from storage.kernel.uids import new_uid
from tests.support.datasets import a_study, dataset_bytes, part10
from tests.support.dicom_peers import EventScp, PyScp
from tests.support.node import RunningNode
from tests.support.ports import free_port
from tests.support.waiting import wait_until

CT = "1.2.840.10008.5.1.4.1.1.2"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    made = RunningNode.start(tmp_path_factory.mktemp("node"))
    yield made
    made.stop()


def huying(node: RunningNode, *arguments: object) -> str:
    """Run the command beside the node."""
    command = [
        str(Path(sys.executable).with_name("huying")), *map(str, arguments),
        "--data", str(node.data),
    ]  # fmt: skip
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def reach(node: RunningNode, sop_class: str, title: str) -> RemoteAssociation:
    return connect(
        Address("127.0.0.1", node.dimse_port, node.aet),
        title,
        propose([(sop_class, (EXPLICIT_VR_LE,))]),
    )


def store(node: RunningNode, datasets: Sequence[Dataset]) -> list[str]:
    with reach(node, CT, "SCANNER") as association:
        for ds in datasets:
            body = dataset_bytes(part10(ds))
            stream = ByteStream(len(body), iter((body,)), EXPLICIT_VR_LE)
            uid = str(ds.SOPInstanceUID)
            assert association.store(uid, CT, stream, association.offers[0]) == 0
    return [str(ds.SOPInstanceUID) for ds in datasets]


def test_a_settled_study_reaches_a_peer_that_was_down(node: RunningNode) -> None:
    port = free_port()
    huying(node, "peer", "add", "LATE", "127.0.0.1", port, "--forward")
    uids = store(node, a_study(seed=101, n_instances=4))
    wait_until(lambda: b"job.waits" in node.log_bytes(), "the first attempt")

    scp = PyScp(title="LATE")
    with scp.running(port):
        wait_until(lambda: len(scp.received) == 4, "the study", seconds=60)

    assert [one.instance_uid for one in scp.received] == uids
    huying(node, "peer", "remove", "LATE")


def test_a_worker_that_dies_goes_on_where_it_stopped(node: RunningNode) -> None:
    killed: list[int] = []

    def kill_at_third(number: int) -> int:
        if number == 2:
            killed.append(number)
            node.kill("huying-worker-1")
        return 0x0000

    with PyScp(title="WITNESS", status=kill_at_third).running() as scp:
        huying(node, "peer", "add", "WITNESS", "127.0.0.1", scp.port, "--forward")
        uids = store(node, a_study(seed=102, n_instances=6))

        wait_until(
            lambda: {one.instance_uid for one in scp.received} == set(uids),
            "the whole study",
            seconds=90,
        )

    assert killed
    huying(node, "peer", "remove", "WITNESS")


def test_commitment_is_delivered_on_an_association_of_the_nodes(
    node: RunningNode,
) -> None:
    uids = store(node, a_study(seed=103, n_instances=2))
    transaction = new_uid()
    items = [
        ((CLASS_UID, b"UI", CT), (INSTANCE_UID, b"UI", uid))
        for uid in (*uids, "1.2.3.4")
    ]
    information = identifier.write(
        [(TRANSACTION_UID, b"UI", transaction), (REFERENCED_SEQUENCE, b"SQ", items)],
        EXPLICIT_VR_LE,
    )
    with EventScp().running() as modality:
        huying(node, "peer", "add", modality.title, "127.0.0.1", modality.port)
        with reach(node, PUSH_MODEL, modality.title) as association:
            status = association.n_action(
                association.offers[0],
                class_uid=PUSH_MODEL,
                instance_uid=PUSH_MODEL_INSTANCE,
                action_type=1,
                information=information,
            )
        wait_until(lambda: modality.events, "the result", seconds=30)

    assert status == 0x0000
    [(event_type, result)] = modality.events
    assert event_type == 2
    assert result.TransactionUID == transaction
    assert [one.ReferencedSOPInstanceUID for one in result.ReferencedSOPSequence] == (
        uids
    )
    [failed] = result.FailedSOPSequence
    assert (failed.ReferencedSOPInstanceUID, failed.FailureReason) == (
        "1.2.3.4",
        0x0112,
    )

    path = f"/api/v1/commitments/{transaction}"
    wait_until(lambda: node.get(path).json()[0]["state"] == "delivered", "the delivery")
    [standing] = node.get(path).json()
    assert (standing["peer"], standing["references"]) == (modality.title, 3)
    assert standing["committed"] == 2
    assert standing["failed"] == [
        {"class": CT, "instance": "1.2.3.4", "reason": 0x0112}
    ]
    assert node.get("/api/v1/commitments/1.2.3").status == 404


def test_the_command_line_echoes_and_sends(node: RunningNode) -> None:
    [ds] = a_study(seed=104, n_instances=1)
    store(node, [ds])
    with PyScp(title="TARGET").running() as scp:
        huying(node, "peer", "add", scp.title, "127.0.0.1", scp.port)

        echoed = huying(node, "echo", "127.0.0.1", node.dimse_port, "--aet", node.aet)
        sent = huying(node, "send", "TARGET", ds.StudyInstanceUID)

    assert "answers" in echoed
    assert "sent 1" in sent
    assert scp.received[0].dataset == dataset_bytes(part10(ds))
