"""Rows B17, B18 and B23-B28 of the bad-input table."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID

from pacs.dimse import command as cmd
from pacs.dimse import identifier
from pacs.dimse.client import (
    Address,
    Offer,
    RemoteAssociation,
    Reply,
    Timeouts,
    connect,
    propose,
)
from pacs.dimse.command import CommandField
from pacs.dimse.commit import (
    CLASS_UID,
    INSTANCE_UID,
    PUSH_MODEL,
    PUSH_MODEL_INSTANCE,
    REFERENCED_SEQUENCE,
    TRANSACTION_UID,
    ReportSender,
)
from pacs.dimse.deliver import Outgoing
from pacs.imaging.syntaxes import EXPLICIT_VR_LE, IMPLICIT_VR_LE
from pacs.services.peers import PeerService
from pacs.services.policy import KnownPeer
from storage.kernel.errors import DependencyDown
from storage.kernel.limits import Limits
from storage.kernel.uids import new_uid
from tests.support.archive import ADMIN, TIMEOUTS, Archive, archive
from tests.support.datasets import a_study, ct_slice, part10
from tests.support.dicom_peers import EventScp, PyScp, RawScp
from tests.support.ports import free_port
from tests.support.waiting import wait_until

MOVE_MODEL = "1.2.840.10008.5.1.4.1.2.2.2"
GET_MODEL = "1.2.840.10008.5.1.4.1.2.2.3"
CT = "1.2.840.10008.5.1.4.1.1.2"
FAILED_LIST = 0x00080058


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Archive]:
    with archive(tmp_path / "node") as made, made.listening():
        yield made


def asking(node: Archive, *models: str, title: str = "ASKER") -> RemoteAssociation:
    contexts = [(model, (EXPLICIT_VR_LE,)) for model in models]
    roles = {CT: (True, True)} if CT in models else {}
    return connect(
        Address("127.0.0.1", node.port, node.aet),
        title,
        propose(contexts),
        timeouts=Timeouts(dimse=30),
        roles=roles,
    )


def study_keys(seed: int = 1) -> bytes:
    return identifier.write(
        [
            (0x00080052, b"CS", "STUDY"),
            (0x0020000D, b"UI", str(ct_slice(seed=seed).StudyInstanceUID)),
        ],
        EXPLICIT_VR_LE,
    )


def request(
    association: RemoteAssociation,
    offer: Offer,
    field: CommandField,
    keys: bytes,
    destination: str = "",
) -> int:
    command: dict[int, cmd.Value] = {
        cmd.AFFECTED_CLASS: offer.abstract_syntax,
        cmd.FIELD: field,
        cmd.PRIORITY: 0,
    }
    if destination:
        command[cmd.MOVE_DESTINATION] = destination
    return association.request(offer.context_id, command, (keys,))


def last(association: RemoteAssociation, number: int) -> Reply:
    """Return the final response; check that the counts add up on the way."""
    totals = set()
    while True:
        reply = association.response(number)
        counts = [
            cmd.number(reply.command, one)
            for one in (cmd.REMAINING, cmd.COMPLETED, cmd.FAILED, cmd.WARNING)
        ]
        totals.add(sum(counts))
        if reply.status != 0xFF00:
            assert len(totals) == 1, totals
            return reply


def move(node: Archive, destination: str, seed: int = 1) -> Reply:
    with asking(node, MOVE_MODEL) as association:
        offer = association.offer(MOVE_MODEL)
        number = request(
            association,
            offer,
            CommandField.C_MOVE_RQ,
            study_keys(seed),
            destination,
        )
        return last(association, number)


def failed_uids(reply: Reply) -> list[str]:
    assert reply.dataset is not None
    elements = identifier.read(reply.dataset, EXPLICIT_VR_LE, Limits())
    return identifier.text(elements, FAILED_LIST).split("\\")


def counted(reply: Reply) -> tuple[int, int, int]:
    return (
        cmd.number(reply.command, cmd.COMPLETED),
        cmd.number(reply.command, cmd.FAILED),
        cmd.number(reply.command, cmd.WARNING),
    )


class Gate:
    """Lets a receiving peer answer one instance at a time."""

    def __init__(self) -> None:
        self.arrived = threading.Semaphore(0)
        self.answer = threading.Semaphore(0)

    def __call__(self, _number: int) -> int:
        self.arrived.release()
        assert self.answer.acquire(timeout=30)
        return 0x0000


def test_b17_requestor_vanishes_during_move(node: Archive) -> None:
    node.store_all(a_study(n_instances=5))
    gate = Gate()
    with PyScp(status=gate).running() as scp:
        node.add_peer(scp.title, scp.port)
        association = asking(node, MOVE_MODEL)
        offer = association.offer(MOVE_MODEL)
        request(association, offer, CommandField.C_MOVE_RQ, study_keys(), scp.title)
        assert gate.arrived.acquire(timeout=30)

        association.abort()
        gate.answer.release(5)

        wait_until(lambda: scp.open == 0, "the outbound association to end")
    assert 1 <= len(scp.received) < 5


def test_b17_destination_vanishes_during_move(node: Archive) -> None:
    uids = node.store_all(a_study(n_instances=5, size=256))
    with RawScp().vanishing(received=200_000) as scp:
        node.add_peer("RAW", scp.port)

        reply = move(node, "RAW")

    assert reply.status == 0xA702
    assert sorted(failed_uids(reply)) == sorted(uids)
    assert reply.comment.startswith("store: ")
    assert scp.connections == 1


def test_b17_requestor_vanishes_during_get(node: Archive) -> None:
    node.store_all(a_study(n_instances=5))
    association = asking(node, GET_MODEL, CT)
    request(
        association,
        association.offer(GET_MODEL),
        CommandField.C_GET_RQ,
        study_keys(),
    )
    store = association.receive(10)
    assert store is not None
    assert cmd.number(store.command, cmd.FIELD) == CommandField.C_STORE_RQ

    association.abort()

    with asking(node, GET_MODEL, CT) as again:
        number = request(
            again, again.offer(GET_MODEL), CommandField.C_GET_RQ, study_keys()
        )
        assert get_all(again, number)[0].status == 0x0000


def get_all(
    association: RemoteAssociation,
    number: int,
    *,
    before: Callable[[int], None] = lambda _number: None,
) -> tuple[Reply, int]:
    """Take what C-GET sends; return the final response and how many came."""
    stored = 0
    while True:
        message = association.receive(10)
        assert message is not None
        if cmd.number(message.command, cmd.FIELD) == CommandField.C_STORE_RQ:
            before(stored)
            stored += 1
            association.answer(message, 0x0000)
        elif message.status != 0xFF00:
            assert cmd.number(message.command, cmd.RESPONDED_ID) == number
            return message, stored


def test_b18_cancel_during_get(node: Archive) -> None:
    uids = node.store_all(a_study(n_instances=8))
    with asking(node, GET_MODEL, CT) as association:
        offer = association.offer(GET_MODEL)
        number = request(association, offer, CommandField.C_GET_RQ, study_keys())

        def cancel_at_third(stored: int) -> None:
            if stored == 2:
                association.cancel(offer, number)

        reply, stored = get_all(association, number, before=cancel_at_third)

    assert reply.status == 0xFE00
    assert stored == 3
    assert counted(reply) == (3, 0, 0)
    assert cmd.number(reply.command, cmd.REMAINING) == len(uids) - 3


def test_b18_cancel_with_the_last_instance_comes_too_late(node: Archive) -> None:
    node.store_all(a_study(n_instances=2))
    with asking(node, GET_MODEL, CT) as association:
        offer = association.offer(GET_MODEL)
        number = request(association, offer, CommandField.C_GET_RQ, study_keys())

        def cancel_at_last(stored: int) -> None:
            if stored == 1:
                association.cancel(offer, number)

        reply, stored = get_all(association, number, before=cancel_at_last)

    assert (reply.status, stored) == (0x0000, 2)
    assert cmd.REMAINING not in reply.command


def test_b18_cancel_during_move_lets_the_one_in_flight_finish(node: Archive) -> None:
    node.store_all(a_study(n_instances=8))
    gate = Gate()
    with PyScp(status=gate).running() as scp:
        node.add_peer(scp.title, scp.port)
        with asking(node, MOVE_MODEL) as association:
            offer = association.offer(MOVE_MODEL)
            number = request(
                association,
                offer,
                CommandField.C_MOVE_RQ,
                study_keys(),
                scp.title,
            )
            assert gate.arrived.acquire(timeout=30)
            association.cancel(offer, number)
            association.cancel(offer, number)
            gate.answer.release(8)

            reply = last(association, number)

    assert reply.status == 0xFE00
    completed, failed, _ = counted(reply)
    assert failed == 0
    assert completed == len(scp.received)
    assert cmd.number(reply.command, cmd.REMAINING) == 8 - completed


@pytest.mark.parametrize("wrong", [True, False], ids=["wrong id", "afterwards"])
def test_b18_cancel_of_nothing_is_ignored(node: Archive, wrong: bool) -> None:  # noqa: FBT001
    node.store_all(a_study(n_instances=4))
    with asking(node, GET_MODEL, CT) as association:
        offer = association.offer(GET_MODEL)
        for _ in range(2):
            number = request(association, offer, CommandField.C_GET_RQ, study_keys())
            if wrong:
                association.cancel(offer, number + 100)

            reply, stored = get_all(association, number)

            assert (reply.status, stored) == (0x0000, 4)
            association.cancel(offer, number)


def test_b23_move_to_unknown_destination(node: Archive) -> None:
    node.store_all(a_study())

    node.add_peer("ELSEWHERE", 104, tenant="other")
    node.add_peer("NOWHERE", 0, host="")

    for title in ("NOBODY", "ELSEWHERE", "NOWHERE", ""):
        assert move(node, title).status == 0xA801


def test_b23_destination_refuses_the_association(node: Archive) -> None:
    uids = node.store_all(a_study())
    with PyScp(title="OTHER", require_called_ae=True).running() as scp:
        node.add_peer("MISNAMED", scp.port)

        reply = move(node, "MISNAMED")

    assert reply.status == 0xA702
    assert sorted(failed_uids(reply)) == sorted(uids)
    assert "called AE title not recognized" in reply.comment


def test_b23_destination_accepts_no_context(node: Archive) -> None:
    uids = node.store_all(a_study())
    with PyScp(classes=["1.2.840.10008.5.1.4.1.1.4"]).running() as scp:
        node.add_peer(scp.title, scp.port)

        reply = move(node, scp.title)

    assert reply.status == 0xA702
    assert sorted(failed_uids(reply)) == sorted(uids)


@pytest.mark.parametrize("kind", ["hanging", "silent_after_acceptance"])
def test_b23_hanging_destination_is_bounded(node: Archive, kind: str) -> None:
    uids = node.store_all(a_study())
    scp = RawScp()
    with getattr(scp, kind)():
        node.add_peer("RAW", scp.port)

        reply = move(node, "RAW")

    assert reply.status == 0xA702
    assert sorted(failed_uids(reply)) == sorted(uids)
    assert "no answer in time" in reply.comment


def test_b24_what_cannot_be_converted_fails_and_the_rest_is_stored(
    node: Archive,
) -> None:
    convertible, not_convertible = ct_slice(number=1), ct_slice(number=2)
    node.store(part10(convertible))
    mpeg = encapsulated(not_convertible, "1.2.840.10008.1.2.4.102")
    uid = node.store(mpeg)
    with PyScp(syntaxes=[IMPLICIT_VR_LE]).running() as scp:
        node.add_peer(scp.title, scp.port)

        reply = move(node, scp.title)

    assert reply.status == 0xB000
    assert counted(reply) == (1, 1, 0)
    assert failed_uids(reply) == [uid]
    [received] = scp.received
    assert received.instance_uid == convertible.SOPInstanceUID
    assert received.transfer_syntax_uid == IMPLICIT_VR_LE


def encapsulated(ds: Dataset, syntax: str) -> bytes:
    """Return a Part 10 file whose frames are a stream that nobody decodes."""
    file = part10(ds)
    made = dcmread(io.BytesIO(file))
    made.file_meta.TransferSyntaxUID = UID(syntax)
    made.PixelData = encapsulate([b"not a video stream"])
    made["PixelData"].VR = "OB"
    made["PixelData"].is_undefined_length = True
    out = io.BytesIO()
    made.save_as(out, enforce_file_format=True)
    return out.getvalue()


@pytest.fixture
def half_readable(node: Archive) -> list[str]:
    """Three instances too long to be looked at before they are sent; one damaged."""
    uids = node.store_all(a_study(n_instances=3, size=1536))
    node.damage(uids[1])
    return uids


def test_d04_a_long_damaged_instance_does_not_take_the_move_with_it(
    node: Archive, half_readable: list[str]
) -> None:
    with PyScp().running() as scp:
        node.add_peer(scp.title, scp.port)

        reply = move(node, scp.title)

    assert reply.status == 0xB000
    assert failed_uids(reply) == [half_readable[1]]
    assert [one.instance_uid for one in scp.received] == [
        half_readable[0],
        half_readable[2],
    ]
    assert scp.associations == 2


def test_d04_a_long_damaged_instance_aborts_the_get(
    node: Archive, half_readable: list[str]
) -> None:
    association = asking(node, GET_MODEL, CT)
    number = request(
        association,
        association.offer(GET_MODEL),
        CommandField.C_GET_RQ,
        study_keys(),
    )

    with pytest.raises(DependencyDown, match="aborted by the peer"):
        get_all(association, number)


def test_d04_a_short_damaged_instance_is_a_failed_sub_operation(node: Archive) -> None:
    uids = node.store_all(a_study(n_instances=3))
    node.damage(uids[1])
    with PyScp().running() as scp:
        node.add_peer(scp.title, scp.port)

        reply = move(node, scp.title)

    assert reply.status == 0xB000
    assert counted(reply) == (2, 1, 0)
    assert failed_uids(reply) == [uids[1]]
    assert [one.instance_uid for one in scp.received] == [uids[0], uids[2]]
    assert scp.associations == 1

    with asking(node, GET_MODEL, CT) as association:
        offer = association.offer(GET_MODEL)
        number = request(association, offer, CommandField.C_GET_RQ, study_keys())
        final, stored = get_all(association, number)
    assert (final.status, stored, failed_uids(final)) == (0xB000, 2, [uids[1]])


def test_b25_more_than_the_counters_hold_is_refused_up_front(tmp_path: Path) -> None:
    limits = {"move_instances": 3}
    with (
        archive(tmp_path / "node", limits=limits) as node,
        node.listening(),
        PyScp().running() as scp,
    ):
        node.store_all(a_study(n_instances=4))
        node.add_peer(scp.title, scp.port)

        reply = move(node, scp.title)

        assert reply.status == 0xA702
        assert "move_instances" in reply.comment
        assert scp.associations == 0
        with asking(node, GET_MODEL, CT) as association:
            offer = association.offer(GET_MODEL)
            number = request(association, offer, CommandField.C_GET_RQ, study_keys())
            assert get_all(association, number)[0].status == 0xA702


def test_b23_a_destination_that_cannot_be_looked_up_is_not_called_unknown(
    node: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.store_all(a_study())

    find = PeerService.find

    def down(peers: PeerService, title: str) -> KnownPeer | None:
        if title == "ANYONE":
            raise DependencyDown("database does not answer")
        return find(peers, title)

    monkeypatch.setattr(PeerService, "find", down)

    assert move(node, "ANYONE").status == 0xA700


def test_b26_nothing_is_moved_to_ourselves(node: Archive) -> None:
    node.store_all(a_study())
    node.add_peer(node.aet, node.port)

    reply = move(node, node.aet)

    assert reply.status == 0xA801
    assert "this archive" in reply.comment


def test_b26_two_archives_that_forward_to_each_other_come_to_rest(
    tmp_path: Path,
) -> None:
    with (
        archive(tmp_path / "a", dimse={"aet": "A"}) as first,
        archive(tmp_path / "b", dimse={"aet": "B"}) as second,
        first.listening(),
        second.listening(),
    ):
        first.add_peer("B", second.port, forward=True)
        second.add_peer("A", first.port, forward=True)
        first.store_all(a_study(n_instances=3))

        assert first.settle_and_forward() == [{"sent": 3, "kept_back": 0}]

        assert second.settle_and_forward() == [{"sent": 0, "kept_back": 3}]
        assert first.settle_and_forward() == []


def commit(
    association: RemoteAssociation,
    references: list[tuple[str, str]] | None,
    transaction_uid: str = "",
) -> int:
    """Ask for commitment; return the status of the N-ACTION."""
    elements: list[tuple[int, bytes, identifier.Value]] = []
    elements.append((TRANSACTION_UID, b"UI", transaction_uid or new_uid()))
    if references is not None:
        items = [
            ((CLASS_UID, b"UI", one), (INSTANCE_UID, b"UI", other))
            for one, other in references
        ]
        elements.append((REFERENCED_SEQUENCE, b"SQ", items))
    return association.n_action(
        association.offer(PUSH_MODEL),
        class_uid=PUSH_MODEL,
        instance_uid=PUSH_MODEL_INSTANCE,
        action_type=1,
        information=identifier.write(elements, EXPLICIT_VR_LE),
    )


@pytest.fixture
def modality(node: Archive) -> KnownPeer:
    """A peer that has an address, where nobody listens."""
    return node.add_peer("MODALITY", free_port())


def test_b27_each_failure_has_its_reason(node: Archive, modality: KnownPeer) -> None:
    good, damaged, deleted = node.store_all(a_study(n_instances=3))
    node.damage(damaged)
    study, series = str(ct_slice().StudyInstanceUID), str(ct_slice().SeriesInstanceUID)
    node.node.deletion.delete(ADMIN, study, series, deleted, reason="rejected")
    unknown, transaction = new_uid(), new_uid()
    references = [
        (CT, good),
        (CT, unknown),
        ("1.2.840.10008.5.1.4.1.1.4", good),
        (CT, deleted),
        (CT, damaged),
    ]
    with asking(node, PUSH_MODEL, title=modality.title) as association:
        assert commit(association, references, transaction) == 0x0000

    report = node.check_commitment(transaction)

    assert [one.sop_instance_uid for one in report.committed] == [good]
    assert [(one.sop_instance_uid, int(reason)) for one, reason in report.failed] == [
        (unknown, 0x0112),
        (good, 0x0119),
        (deleted, 0x0112),
        (damaged, 0x0110),
    ]


def test_b27_malformed_requests_are_refused(node: Archive, modality: KnownPeer) -> None:
    with asking(node, PUSH_MODEL, title=modality.title) as association:
        assert commit(association, None) == 0x0114
        assert commit(association, []) == 0x0115
        assert commit(association, [(CT, "1.2.3")], "1.02.x") == 0x0115
        transaction = new_uid()
        assert commit(association, [(CT, "1.2.3")], transaction) == 0x0000
        assert commit(association, [(CT, "1.2.3")], transaction) == 0x0131
    assert node.commitment.waiting() == 1


def test_b27_a_hundred_thousand_references(node: Archive, modality: KnownPeer) -> None:
    [uid] = node.store_all(a_study(n_instances=1))
    references = [(CT, f"1.2.840.99999.{number}") for number in range(99_999)]
    transaction = new_uid()
    with asking(node, PUSH_MODEL, title=modality.title) as association:
        status = commit(association, [*references, (CT, uid)], transaction)
        assert status == 0x0000
        assert commit(association, [*references, (CT, uid), (CT, uid)]) == 0x0213

    report = node.check_commitment(transaction)

    assert [one.sop_instance_uid for one in report.committed] == [uid]
    assert len(report.failed) == 99_999


def test_b28_the_result_waits_until_the_requestor_takes_it(
    node: Archive,
) -> None:
    """It closes at once, is not there, refuses the role, answers with a failure."""
    [uid] = node.store_all(a_study(n_instances=1))
    transaction = new_uid()
    requestor = EventScp()
    node.add_peer(requestor.title, free_port())
    with asking(node, PUSH_MODEL, title=requestor.title) as association:
        commit(association, [(CT, uid)], transaction)
    work = node.commitment.worker(ReportSender(node.node.peers, Outgoing(TIMEOUTS)))
    payload = {"id": node.commitment_key(transaction)}

    with pytest.raises(DependencyDown, match="TCP"):
        work(payload)
    with PyScp().running() as unfit:
        node.add_peer(requestor.title, unfit.port)
        with pytest.raises(DependencyDown, match="does not offer"):
            work(payload)
    with requestor.running():
        node.add_peer(requestor.title, requestor.port)
        requestor.status = 0x0110
        with pytest.raises(DependencyDown, match="0110"):
            work(payload)
        [waiting] = node.commitment.find(ADMIN, transaction)
        assert waiting.report is not None
        assert not waiting.report.delivered
        assert waiting.attempts == 3
        requestor.status = 0x0000
        work(payload)
        work(payload)

    assert [event for event, _ in requestor.events] == [1, 1]
    assert requestor.events[-1][1].TransactionUID == transaction
    [done] = node.commitment.find(ADMIN, transaction)
    assert done.report is not None
    assert done.report.delivered


def test_a_requestor_without_an_address_is_answered_where_it_asked(
    node: Archive,
) -> None:
    [uid] = node.store_all(a_study(n_instances=1))
    transaction = new_uid()
    with asking(node, PUSH_MODEL, title="NOADDRESS") as association:
        assert commit(association, [(CT, uid), (CT, "1.2.3")], transaction) == 0x0000

        event = association.receive(10)

        assert event is not None
        assert event.dataset is not None
        assert cmd.number(event.command, cmd.EVENT_TYPE) == 2
        elements = identifier.read(event.dataset, EXPLICIT_VR_LE, Limits())
        assert identifier.text(elements, TRANSACTION_UID) == transaction
        association.answer(event, 0x0000)
    wait_until(lambda: node.commitment.waiting() == 0, "the result to be delivered")


def test_a_requestor_without_an_address_that_leaves_is_not_forgotten(
    node: Archive,
) -> None:
    [uid] = node.store_all(a_study(n_instances=1))
    transaction = new_uid()
    with asking(node, PUSH_MODEL, title="NOADDRESS") as association:
        commit(association, [(CT, uid)], transaction)

    assert [
        one.sop_instance_uid for one in node.check_commitment(transaction).committed
    ]
    work = node.commitment.worker(ReportSender(node.node.peers, Outgoing(TIMEOUTS)))
    with pytest.raises(DependencyDown, match="NOADDRESS has no address"):
        work({"id": node.commitment_key(transaction)})
