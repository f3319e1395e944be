"""The limits of the DICOM listener hold over its processes, and over their deaths."""

from __future__ import annotations

from pathlib import Path

from pacs.dimse import command as cmd
from pacs.dimse.pdu import PduType
from tests.support.datasets import ct_slice, dataset_bytes, part10
from tests.support.dimse import (
    CT,
    EXPLICIT,
    VERIFICATION,
    Ended,
    RawPeer,
    associate_rq,
    rejection_of,
)
from tests.support.node import RunningNode
from tests.support.waiting import wait_until

BOTH = ((1, VERIFICATION, (EXPLICIT,)), (3, CT, (EXPLICIT,)))
MOST = 4


def opened(node: RunningNode) -> RawPeer | None:
    """Return a new association, or None when it is one too many."""
    peer = RawPeer(node.dimse_port, timeout=30)
    peer.send(associate_rq(BOTH))
    kind, body = peer.read_pdu()
    if kind == PduType.ASSOCIATE_AC:
        return peer
    assert rejection_of(b"\x03\0\0\0\0\4" + body) == (2, 3, 2)
    peer.close()
    return None


def fill(node: RunningNode, held: list[RawPeer]) -> None:
    """Open associations until there are no more."""
    while (peer := opened(node)) is not None:
        held.append(peer)


def lives(peer: RawPeer) -> bool:
    try:
        return peer.echo() == 0
    except (Ended, OSError):
        peer.close()
        return False


def test_a_process_that_is_killed_gives_its_associations_back(tmp_path: Path) -> None:
    node = RunningNode.start(tmp_path, dimse__max_associations=MOST)
    held: list[RawPeer] = []
    try:
        fill(node, held)
        assert len(held) == MOST
        for number, peer in enumerate(held, 1):
            ds = ct_slice(number=number, size=8)
            body = dataset_bytes(part10(ds))
            response = peer.store(ds.SOPInstanceUID, body, context_id=3)
            assert response[cmd.STATUS] == 0

        node.kill("huying-dimse-1")
        wait_until(lambda: "huying-dimse-1" in node.processes(), "a new process")
        held = [peer for peer in held if lives(peer)]
        fill(node, held)

        assert len(held) == MOST
        assert all(map(lives, held))
        for peer in held:
            peer.release()
            peer.close()
        held = []
        fill(node, held)
        assert len(held) == MOST
    finally:
        for peer in held:
            peer.close()
        node.stop()
