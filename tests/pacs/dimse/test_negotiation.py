"""What is accepted of a proposed association, and what is rejected how."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from pynetdicom import AE
from pynetdicom.pdu_primitives import (
    AsynchronousOperationsWindowNegotiation,
    SOPClassCommonExtendedNegotiation,
    UserIdentityNegotiation,
)
from pynetdicom.sop_class import Verification

from pacs.dimse import pdu
from pacs.dimse.association import Association, Handler, Message
from pacs.dimse.command import CommandField
from pacs.dimse.negotiation import is_ae_title, negotiate
from pacs.dimse.pdu import (
    AssociateRequest,
    ContextResult,
    ProposedContext,
    ProtocolError,
)
from pacs.imaging import syntaxes
from pacs.imaging.sopclasses import storage_classes
from pacs.services.policy import KnownPeer
from storage.kernel.errors import DependencyDown
from storage.kernel.limits import KIB, MIB, Limits
from tests.support import dcmtk
from tests.support.dimse import (
    CT,
    EXPLICIT,
    IMPLICIT,
    STUDY_FIND,
    VERIFICATION,
    DimseNode,
    Peers,
    RawPeer,
    associate_rq,
    rejection_of,
)

ALL = frozenset(CommandField)
GET = "1.2.840.10008.5.1.4.1.2.2.3"
COMMITMENT = "1.2.840.10008.1.20.1"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[DimseNode]:
    with DimseNode(tmp_path) as made:
        yield made


def a_request(*contexts: ProposedContext, **values: object) -> AssociateRequest:
    return AssociateRequest("HUYING", "TEST", contexts, **values)  # type: ignore[arg-type]


def proposed(uid: str, *transfer: str, number: int = 1) -> ProposedContext:
    return ProposedContext(number, uid, transfer or (EXPLICIT,))


def test_every_storage_class_in_every_syntax_is_accepted() -> None:
    for uid in (*storage_classes(), "1.2.826.0.1.3680043.10.1999.99"):
        for one in syntaxes.all_syntaxes():
            agreed = negotiate(a_request(proposed(uid, one.uid)), ALL, Limits())
            assert agreed.contexts[1].transfer_syntax == one.uid
            assert agreed.contexts[1].as_scp


def test_the_senders_first_known_syntax_is_taken() -> None:
    jpeg = "1.2.840.10008.1.2.4.50"

    agreed = negotiate(
        a_request(proposed(CT, "1.2.3.4", jpeg, EXPLICIT)), ALL, Limits()
    )

    assert agreed.contexts[1].transfer_syntax == jpeg


@pytest.mark.parametrize(
    ("uid", "transfer", "result"),
    [
        ("1.2.840.10008.1.3.10", EXPLICIT, ContextResult.ABSTRACT_SYNTAX),
        ("1.2.840.10008.5.1.4.31", EXPLICIT, ContextResult.ABSTRACT_SYNTAX),
        ("not a uid", EXPLICIT, ContextResult.ABSTRACT_SYNTAX),
        (CT, "1.2.3.4", ContextResult.TRANSFER_SYNTAXES),
        (STUDY_FIND, "1.2.840.10008.1.2.4.50", ContextResult.TRANSFER_SYNTAXES),
    ],
)
def test_what_we_cannot_do_is_refused_context_by_context(
    uid: str, transfer: str, result: ContextResult
) -> None:
    agreed = negotiate(
        a_request(proposed(uid, transfer), proposed(CT, number=3)), ALL, Limits()
    )

    assert [one.result for one in agreed.results] == [result, ContextResult.ACCEPTED]
    assert list(agreed.contexts) == [3]


def test_services_without_a_handler_are_not_accepted() -> None:
    services = {CommandField.C_ECHO_RQ, CommandField.C_STORE_RQ}

    agreed = negotiate(a_request(proposed(STUDY_FIND)), services, Limits())

    assert agreed.results[0].result is ContextResult.ABSTRACT_SYNTAX


def test_roles_are_granted_where_we_send_requests() -> None:
    asked = dict.fromkeys((CT, VERIFICATION, COMMITMENT), (True, True))
    contexts = [
        proposed(uid, number=number)
        for uid, number in ((CT, 1), (VERIFICATION, 3), (COMMITMENT, 5))
    ]

    agreed = negotiate(a_request(*contexts, roles=asked), ALL, Limits())

    assert agreed.roles[CT] == (True, True)
    assert agreed.contexts[1].as_scu
    assert agreed.roles[VERIFICATION] == (True, False)
    assert not agreed.contexts[3].as_scu


def test_without_role_selection_the_requestor_is_the_scu() -> None:
    agreed = negotiate(a_request(proposed(CT)), ALL, Limits())

    assert (agreed.contexts[1].as_scu, agreed.contexts[1].as_scp) == (False, True)
    assert agreed.roles == {}


@pytest.mark.parametrize(
    ("uid", "asked", "answered"),
    [
        (STUDY_FIND, b"\x01", b"\x01"),
        (STUDY_FIND, b"\x01\x01\x01\x01", b"\x01\x00\x01\x00"),
        (STUDY_FIND, b"\x00\x01\x00", b"\x00\x00\x00"),
        (STUDY_FIND, b"\x01" * 20, b"\x01\x00\x01\x00\x00\x00\x00"),
        (GET, b"\x01\x01", b"\x01\x00"),
        (CT, b"\x02\x00\x03\x00\x01\x00", b"\x02\x00\x03\x00\x00\x00"),
    ],
)
def test_extended_negotiation_claims_no_more_than_there_is(
    uid: str, asked: bytes, answered: bytes
) -> None:
    agreed = negotiate(a_request(proposed(uid), extended={uid: asked}), ALL, Limits())

    assert agreed.extended == {uid: answered}


def test_extended_items_of_other_classes_are_not_answered() -> None:
    request = a_request(
        proposed(CT), extended={STUDY_FIND: b"\x01", VERIFICATION: b"\x01", CT: b""}
    )

    assert negotiate(request, ALL, Limits()).extended == {}


@pytest.mark.parametrize(
    ("announced", "used"),
    [(0, 256 * KIB), (16 * KIB, 16 * KIB), (128, 128), (0xFFFFFFFF, MIB)],
)
def test_the_peers_pdu_length_is_honoured_and_bounded(
    announced: int, used: int
) -> None:
    request = a_request(proposed(CT), max_length=announced)

    assert negotiate(request, ALL, Limits()).max_send == used


def test_a_pdu_length_that_holds_nothing_is_an_error() -> None:
    with pytest.raises(ProtocolError):
        negotiate(a_request(proposed(CT), max_length=8), ALL, Limits())


@pytest.mark.parametrize(
    ("title", "legal"),
    [
        ("HUYING", True), ("A B", True), ("A" * 16, True),
        ("", False), ("A" * 17, False), ("A\\B", False), ("A\tB", False), ("Ä", False),
    ],
)  # fmt: skip
def test_ae_titles(title: str, *, legal: bool) -> None:
    assert is_ae_title(title) is legal


def rejected(node: DimseNode, request: bytes) -> tuple[int, int, int]:
    with RawPeer(node.port) as peer:
        peer.send(request)
        return rejection_of(peer.read_to_end())


@pytest.mark.parametrize(
    ("called", "calling", "reason"),
    [
        ("NOBODY", "TEST", 7),
        ("                ", "TEST", 7),
        ("HUYING", "                ", 3),
        ("HUYING", "A\\B", 3),
        ("HUYING", "A\nB", 3),
        ("HUYING", "ä", 3),
    ],
)
def test_b09_ae_titles_we_do_not_take(
    node: DimseNode, called: str, calling: str, reason: int
) -> None:
    request = associate_rq(called=called, calling=calling)

    assert rejected(node, request) == (1, 1, reason)


def test_b09_unknown_callers_are_rejected_and_logged_once_a_minute(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with DimseNode(tmp_path, open_access=False) as node:
        answers = [rejected(node, associate_rq()) for _ in range(3)]

    assert answers == [(1, 1, 3)] * 3
    assert node.recorder.rejected == ["calling AE title not recognized"] * 3
    warnings = [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert [one.message for one in warnings] == ["association rejected"]
    assert warnings[0].__dict__["peer"] == "127.0.0.1"


def test_b10_a_known_caller_from_elsewhere_is_rejected(tmp_path: Path) -> None:
    known = KnownPeer("TEST", "192.0.2.1", 104, "", frozenset({"store"}))

    with DimseNode(tmp_path, open_access=False, peers=[known]) as node:
        assert rejected(node, associate_rq()) == (1, 1, 3)


def test_a_caller_who_cannot_be_looked_up_is_asked_to_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(_: object, title: str) -> KnownPeer | None:
        raise DependencyDown("database does not answer")

    monkeypatch.setattr(Peers, "find", down)

    with DimseNode(tmp_path, open_access=False) as node:
        assert rejected(node, associate_rq()) == (2, 3, 1)

    assert node.recorder.rejected == ["temporary congestion"]


def test_another_protocol_version_or_application_is_rejected(node: DimseNode) -> None:
    request = bytearray(associate_rq())
    request[6:8] = b"\x00\x02"
    assert rejected(node, bytes(request)) == (1, 2, 2)

    other = associate_rq().replace(b"1.2.840.10008.3.1.1.1", b"1.2.840.10008.3.1.1.2")
    assert rejected(node, other) == (1, 1, 2)


def test_b12_no_acceptable_context_is_still_an_association(node: DimseNode) -> None:
    with RawPeer(node.port) as peer:
        answer = peer.associate(((1, "1.2.840.10008.1.3.10", (EXPLICIT,)),))
        peer.release()

    assert [one.result for one in answer.contexts] == [ContextResult.ABSTRACT_SYNTAX]


def test_b13_128_contexts_with_many_syntaxes_are_accepted(node: DimseNode) -> None:
    unknown = tuple(f"1.2.3.{number}" for number in range(40))
    contexts = [(2 * number + 1, CT, (*unknown, IMPLICIT)) for number in range(128)]

    with RawPeer(node.port) as peer:
        answer = peer.associate(contexts)
        peer.release()

    assert len(answer.contexts) == 128
    assert {one.transfer_syntax for one in answer.contexts} == {IMPLICIT}


@pytest.mark.parametrize("ids", [(2,), (1, 1), (0,)], ids=["even", "duplicate", "zero"])
def test_b13_wrong_context_ids_abort(node: DimseNode, ids: tuple[int, ...]) -> None:
    with RawPeer(node.port) as peer:
        peer.send(associate_rq([(number, CT, (EXPLICIT,)) for number in ids]))
        kind, body = peer.read_pdu()

    assert (kind, body) == (pdu.PduType.ABORT, b"\x00\x00\x02\x06")


def test_the_answer_announces_our_limits(node: DimseNode) -> None:
    with RawPeer(node.port) as peer:
        answer = peer.associate()

    assert answer.max_length == node.limits.pdu_bytes


def test_b11_peers_that_may_only_store_may_not_search(tmp_path: Path) -> None:
    known = KnownPeer("TEST", "127.0.0.1", 104, "", frozenset({"echo", "store"}))

    with DimseNode(tmp_path, open_access=False, peers=[known]) as node:
        done = dcmtk.run(
            "findscu", "-v", "-S", "-aet", "TEST", "-aec", "HUYING",
            "-k", "QueryRetrieveLevel=STUDY", "-k", "PatientName",
            "127.0.0.1", node.port, check=False,
        )  # fmt: skip
        assert ("C-FIND", 0x0124) in node.recorder.messages, done.stdout


def test_pynetdicoms_other_items_are_tolerated(node: DimseNode) -> None:
    window = AsynchronousOperationsWindowNegotiation()
    window.maximum_number_operations_invoked = 5
    window.maximum_number_operations_performed = 5
    common = SOPClassCommonExtendedNegotiation()
    common.sop_class_uid = CT
    common.service_class_uid = "1.2.840.10008.4.2"
    identity = UserIdentityNegotiation()
    identity.user_identity_type = 2
    identity.primary_field = b"user"
    identity.secondary_field = b"secret"
    identity.positive_response_requested = True
    ae = AE("TEST")
    ae.add_requested_context(Verification)

    association = ae.associate(
        "127.0.0.1", node.port, ae_title="HUYING", ext_neg=[window, common, identity]
    )

    assert association.is_established
    assert association.send_c_echo().Status == 0
    items = association.acceptor.user_information
    assert any(type(one).__name__.startswith("UserIdentity") for one in items)
    association.release()


def test_echoscu_echoes(node: DimseNode) -> None:
    dcmtk.run("echoscu", "-aec", "HUYING", "127.0.0.1", node.port)

    node.wait_closed()
    assert node.recorder.closed == ["released"]
    assert node.recorder.messages == [("C-ECHO", 0)]


def test_a_handler_sees_its_association(tmp_path: Path) -> None:
    seen: list[tuple[Association, Message]] = []

    def handle(association: Association, message: Message) -> None:
        seen.append((association, message))
        raise ProtocolError("enough")

    handlers: dict[int, Handler] = {CommandField.N_ACTION_RQ: handle}
    with DimseNode(tmp_path, handlers=handlers) as node, RawPeer(node.port) as peer:
        peer.associate(((1, COMMITMENT, (IMPLICIT,)),))
        peer.request(
            1,
            {0x0003: COMMITMENT, 0x0100: 0x0130, 0x0110: 7, 0x0800: 1, 0x1008: 1},
            struct.pack("<HHI", 8, 0x1195, 2) + b"1\0",
        )
        peer.read_to_end()

    [(association, message)] = seen
    assert association.calling_ae == "TEST"
    assert association.actor.tenant == "default"
    assert message.dataset == struct.pack("<HHI", 8, 0x1195, 2) + b"1\0"
