"""Rows B01 to B19 of the bad-input table: what a network may do to the listener."""

from __future__ import annotations

import logging
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pacs.dimse import command as cmd
from pacs.dimse import pdu, transport
from pacs.dimse.association import Association, Message
from pacs.dimse.command import CommandField, Value
from pacs.dimse.pdu import AbortReason, PduType
from storage.kernel.limits import KIB, MIB, Limits
from tests.support.datasets import ct_slice, dataset_bytes, part10
from tests.support.dimse import (
    CT,
    EXPLICIT,
    STUDY_FIND,
    VERIFICATION,
    DimseNode,
    Ended,
    RawPeer,
    abort_of,
    associate_rq,
    message,
    pdv,
    rejection_of,
    store_rq,
)

LIMITS = Limits(
    memory_instance_bytes=64 * KIB,
    instance_bytes=256 * KIB,
    command_bytes=KIB,
    identifier_bytes=KIB,
    pdu_bytes=16 * KIB,
    associate_pdu_bytes=16 * KIB,
)
TLS_HELLO = bytes.fromhex("16030100") + b"\xc8\x01\x00\x00\xc4\x03\x03" + bytes(196)
PUSH_MODEL = "1.2.840.10008.1.20.1"
PROVIDER, USER = 2, 0
BOTH = ((1, VERIFICATION, (EXPLICIT,)), (3, CT, (EXPLICIT,)))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at timers more often."""
    monkeypatch.setattr(transport, "TICK", 0.05)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[DimseNode]:
    with DimseNode(tmp_path, limits=LIMITS) as made:
        yield made


def alive(node: DimseNode) -> None:
    """Require that the server still answers, and keeps nothing of what went wrong."""
    with RawPeer(node.port) as peer:
        peer.associate(((1, VERIFICATION, (EXPLICIT,)),), calling="MONITOR")
        assert peer.echo() == 0
        peer.release()
    node.wait_idle()
    assert node.uids() == []
    assert node.partial_files() == []
    assert node.counts.open() == 0


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.message for one in caplog.records if one.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        TLS_HELLO,
        random.Random(1).randbytes(MIB),  # noqa: S311
    ],
    ids=["http", "tls", "random"],
)
def test_b01_other_protocols_are_closed_at_once(
    node: DimseNode, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with RawPeer(node.port) as peer:
        try:
            peer.send(sent)
            answer = peer.read_to_end()
        except ConnectionError:
            answer = b""

    assert answer == b"" or abort_of(answer) == (
        PROVIDER,
        AbortReason.UNRECOGNIZED_PDU,
    )
    alive(node)
    assert warnings_of(caplog) == ["association aborted"]


def test_b02_a_pdu_of_four_gib_is_refused_by_its_header(node: DimseNode) -> None:
    before = psutil.Process().memory_info().rss
    for prefix in (b"", associate_rq()):
        with RawPeer(node.port) as peer:
            peer.send(prefix)
            if prefix:
                peer.read_pdu()
            kind = PduType.DATA if prefix else PduType.ASSOCIATE_RQ
            peer.send(pdu.HEADER.pack(kind, 0xFFFFFFFF))
            assert abort_of(peer.read_to_end()) == (
                PROVIDER,
                AbortReason.INVALID_PARAMETER,
            )

    alive(node)
    assert psutil.Process().memory_info().rss - before < 64 * MIB


def test_b03_a_pdu_longer_than_announced_aborts(node: DimseNode) -> None:
    with RawPeer(node.port) as peer:
        peer.associate()
        peer.send(message(1, store_rq("1.2.3")), pdv(1, 0, bytes(16 * KIB)))
        assert abort_of(peer.read_to_end())[0] == PROVIDER

    alive(node)


@pytest.mark.parametrize(
    ("fragment", "flags"),
    [(bytes(4 * KIB), 0), (bytes(128), pdu.COMMAND), (b"", 0), (b"", pdu.COMMAND)],
    ids=["data set", "command", "empty data", "empty command"],
)
def test_b04_fragments_without_end_abort(
    node: DimseNode, fragment: bytes, flags: int
) -> None:
    with RawPeer(node.port) as peer:
        peer.associate()
        if not flags:
            peer.send(message(1, store_rq("1.2.3")))
        sender = threading.Thread(
            target=_send_for_ever, args=(peer, pdv(1, flags, fragment))
        )
        sender.start()
        answer = peer.read_to_end()
        sender.join()

    assert answer == b"" or abort_of(answer)[0] == PROVIDER
    alive(node)


def _send_for_ever(peer: RawPeer, data: bytes) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            peer.send(data)
        except OSError:
            return
    raise AssertionError("the server reads on")


@pytest.mark.parametrize("drip", [False, True], ids=["silence", "drip"])
def test_b05_a_slow_request_ends_with_its_timer(tmp_path: Path, *, drip: bool) -> None:
    request = associate_rq()
    with DimseNode(tmp_path, limits=LIMITS, acse_seconds=0.4) as node:
        with RawPeer(node.port) as peer:
            peer.socket.settimeout(0.05)
            answer, at = b"", 0
            deadline = time.monotonic() + 20
            while not answer and time.monotonic() < deadline:
                if drip and at < len(request):
                    peer.send(request[at : at + 1])
                    at += 1
                try:
                    answer = peer.socket.recv(100)
                except TimeoutError:
                    continue
        assert abort_of(answer)[0] == USER
        assert at < len(request)
        alive(node)


def test_b06_an_idle_association_is_aborted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with DimseNode(tmp_path, limits=LIMITS, idle_seconds=0.3) as node:
        with RawPeer(node.port) as peer:
            peer.associate()
            assert abort_of(peer.read_to_end()) == (USER, 0)
        node.wait_closed()
        assert node.recorder.closed == ["timeout"]
        assert warnings_of(caplog) == ["association timed out"]
        alive(node)


@pytest.mark.parametrize("drip", [False, True], ids=["silence", "drip"])
def test_b06_a_message_that_stops_in_the_middle_is_aborted(
    tmp_path: Path, *, drip: bool
) -> None:
    with DimseNode(tmp_path, limits=LIMITS, read_seconds=0.4) as node:
        with RawPeer(node.port) as peer:
            peer.associate()
            peer.send(message(1, store_rq("1.2.3")), pdv(1, 0, bytes(100)))
            peer.socket.settimeout(0.05)
            answer = b""
            deadline = time.monotonic() + 20
            while not answer and time.monotonic() < deadline:
                if drip:
                    peer.send(pdv(1, 0, b"\0\0"))
                try:
                    answer = peer.socket.recv(100)
                except TimeoutError:
                    continue
        assert abort_of(answer)[0] == USER
        alive(node)


def test_a_peer_that_does_not_read_is_aborted(tmp_path: Path) -> None:
    with DimseNode(tmp_path, write_seconds=0.3) as node:
        node.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with RawPeer(node.port) as peer:
            peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            peer.associate(((1, VERIFICATION, (EXPLICIT,)),))
            echo = message(
                1,
                {
                    cmd.AFFECTED_CLASS: VERIFICATION,
                    cmd.FIELD: CommandField.C_ECHO_RQ,
                    cmd.MESSAGE_ID: 1,
                    cmd.DATASET_TYPE: cmd.NO_DATASET,
                },
            )
            sender = threading.Thread(target=_send_for_ever, args=(peer, echo * 100))
            sender.start()
            node.wait_closed()
            sender.join()
        assert node.recorder.closed == ["timeout"]
        alive(node)


def test_b07_more_associations_than_allowed_are_rejected_for_now(
    tmp_path: Path,
) -> None:
    with DimseNode(tmp_path, max_associations=3, max_associations_per_ae=2) as node:
        peers = [RawPeer(node.port) for _ in range(3)]
        peers[0].associate(BOTH, calling="A")
        peers[1].associate(BOTH, calling="A")
        with RawPeer(node.port) as same:
            same.send(associate_rq(BOTH, calling="A"))
            assert rejection_of(same.read_to_end()) == (2, 3, 2)
        peers[2].associate(BOTH, calling="B")
        with RawPeer(node.port) as other:
            other.send(associate_rq(BOTH, calling="C"))
            assert rejection_of(other.read_to_end()) == (2, 3, 2)
        with RawPeer(node.port) as monitor:
            monitor.associate(((1, VERIFICATION, (EXPLICIT,)),), calling="A")
            assert monitor.echo() == 0
            monitor.release()
        for peer in peers:
            assert peer.echo() == 0
            peer.release()
            peer.close()
        alive(node)


def test_more_connections_than_threads_are_turned_away(tmp_path: Path) -> None:
    with DimseNode(tmp_path, max_associations=1) as node:
        silent = [RawPeer(node.port) for _ in range(1 + 64)]
        with RawPeer(node.port) as peer:
            assert rejection_of(peer.read_to_end()) == (2, 3, 2)
        for one in silent:
            one.close()
        node.wait_idle()
        alive(node)


def test_b08_health_probes_leave_nothing(
    node: DimseNode, caplog: pytest.LogCaptureFixture
) -> None:
    alive(node)
    process = psutil.Process()
    before = (process.num_fds(), threading.active_count())

    for _ in range(300):
        RawPeer(node.port).close()
    for _ in range(50):
        RawPeer(node.port).reset()

    alive(node)
    assert process.num_fds() <= before[0]
    assert threading.active_count() <= before[1]
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(
    "raw",
    [
        message(5, store_rq("1.2.3"), bytes(100)),
        message(1, {**store_rq("1.2.3"), cmd.FIELD: 0x8001}),
        pdv(1, pdu.LAST, b"\0\0"),
        pdv(1, pdu.COMMAND | pdu.LAST, b"\0\0"),
        pdv(1, pdu.COMMAND | pdu.LAST, cmd.encode({cmd.MESSAGE_ID: 1})),
        message(1, store_rq("1.2.3")) + pdu.RELEASE_RQ,
        message(1, store_rq("1.2.3")) + pdv(3, pdu.LAST, b"\0\0"),
        message(1, store_rq("1.2.3")) + message(1, store_rq("1.2.3")),
        pdu.HEADER.pack(PduType.DATA, 0),
        pdu.HEADER.pack(PduType.DATA, 6) + struct.pack(">IBB", 9, 1, 3),
        pdu.HEADER.pack(PduType.DATA, 6) + struct.pack(">IBB", 1, 1, 3),
        pdu.HEADER.pack(PduType.DATA, 3) + b"abc",
        pdu.HEADER.pack(PduType.RELEASE_RQ, 5) + bytes(5),
        pdu.RELEASE_RP,
        associate_rq(),
        pdu.HEADER.pack(9, 4) + bytes(4),
    ],
    ids=[
        "context", "response", "data without command", "half a command",
        "no command field", "release in a message", "contexts mixed",
        "command in a data set", "empty PDU", "PDV too long", "PDV too short",
        "PDU too short", "release of five bytes", "release answer", "second request",
        "unknown PDU",
    ],
)  # fmt: skip
def test_b14_what_does_not_belong_aborts(
    node: DimseNode, raw: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with RawPeer(node.port) as peer:
        peer.associate(((1, CT, (EXPLICIT,)), (3, VERIFICATION, (EXPLICIT,))))
        peer.send(raw)
        assert abort_of(peer.read_to_end())[0] == PROVIDER

    alive(node)
    assert warnings_of(caplog) == ["association aborted"]


def test_b14_an_unknown_command_is_0211(node: DimseNode) -> None:
    with RawPeer(node.port) as peer:
        peer.associate(BOTH)
        for field in (0x0140, 0x0021, 0x7000):
            peer.request(1, {**store_rq("1.2"), cmd.FIELD: field}, b"\0\0")
            assert peer.read_response()[cmd.STATUS] == 0x0211
        assert peer.echo() == 0
        peer.release()

    alive(node)


@pytest.mark.parametrize("lacks", [cmd.AFFECTED_CLASS, cmd.MESSAGE_ID, None], ids=str)
def test_b15_a_mistyped_command_is_0212(node: DimseNode, lacks: int | None) -> None:
    values: dict[int, Value] = store_rq("1.2.3")
    if lacks is not None:
        del values[lacks]
    raw = bytearray(cmd.encode(values))
    if lacks is None:
        raw[8] += 2

    with RawPeer(node.port) as peer:
        peer.associate(BOTH)
        peer.send(pdv(3, pdu.COMMAND | pdu.LAST, bytes(raw)), pdv(3, 2, b"\0\0"))
        assert peer.read_response()[cmd.STATUS] == 0x0212
        assert peer.echo() == 0
        peer.release()

    alive(node)


@pytest.mark.parametrize("size", [64, 256], ids=["in memory", "in a pack"])
@pytest.mark.parametrize("how", ["reset", "close", "abort"])
def test_b16_a_peer_that_vanishes_leaves_nothing_and_may_come_back(
    node: DimseNode, size: int, how: str
) -> None:
    ds = ct_slice(size=size)
    body = dataset_bytes(part10(ds))
    raw = message(
        1,
        store_rq(ds.SOPInstanceUID),
        *(body[at : at + 8000] for at in range(0, len(body), 8000)),
    )
    peer = RawPeer(node.port)
    peer.associate()
    peer.send(raw[: len(raw) // 2])
    if how == "abort":
        peer.send(raw[len(raw) // 2 : -1000])
    if how == "reset":
        peer.reset()
    peer.close()
    node.wait_closed()

    assert node.recorder.closed == ["gone"]
    alive(node)
    with RawPeer(node.port) as again:
        again.associate()
        assert again.store(ds.SOPInstanceUID, body)[cmd.STATUS] == 0
        again.release()
    assert node.dataset(ds.SOPInstanceUID) == body


def test_an_abort_between_fragments_is_seen_at_once(node: DimseNode) -> None:
    peer = RawPeer(node.port)
    peer.associate()
    peer.send(
        message(1, store_rq("1.2.3")),
        pdv(1, 0, bytes(100)),
        pdu.encode_abort(AbortReason.NOT_SPECIFIED, 0),
    )
    node.wait_closed()
    peer.close()

    assert node.recorder.closed == ["gone"]
    alive(node)


def test_shutdown_finishes_the_message_in_hand(node: DimseNode) -> None:
    ds = ct_slice(size=64)
    body = dataset_bytes(part10(ds))
    with RawPeer(node.port) as idle, RawPeer(node.port) as peer:
        idle.associate()
        peer.associate()
        peer.send(message(1, store_rq(ds.SOPInstanceUID)), pdv(1, 0, body[:4000]))
        stopper = threading.Thread(target=node.shut_down)
        stopper.start()
        assert abort_of(idle.read_to_end())[0] == USER
        peer.send(pdv(1, pdu.LAST, body[4000:]))
        assert peer.read_response()[cmd.STATUS] == 0
        assert abort_of(peer.read_to_end())[0] == USER
        stopper.join()

    assert node.dataset(ds.SOPInstanceUID) == body
    assert sorted(node.recorder.closed) == ["stopped", "stopped"]


def test_shutdown_does_not_wait_for_a_sender_that_goes_on(node: DimseNode) -> None:
    ds = ct_slice(size=8)
    raw = message(1, store_rq(ds.SOPInstanceUID), dataset_bytes(part10(ds)))
    with RawPeer(node.port) as peer:
        peer.associate()
        sender = threading.Thread(target=_send_for_ever, args=(peer, raw))
        sender.start()
        for _ in range(10):
            assert peer.read_response()[cmd.STATUS] == 0
        node.shut_down()
        peer.read_to_end()
        sender.join()

    assert node.recorder.closed == ["stopped"]


def test_a_handler_that_breaks_answers_0110_and_the_association_goes_on(
    node: DimseNode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ds = ct_slice(size=8)
    body = dataset_bytes(part10(ds))
    with monkeypatch.context() as patch, RawPeer(node.port) as peer:
        patch.setattr(node.ingest, "accept", lambda arrival: 1 / 0)
        peer.associate()
        assert peer.store(ds.SOPInstanceUID, body)[cmd.STATUS] == 0x0110
        patch.undo()
        assert peer.store(ds.SOPInstanceUID, body)[cmd.STATUS] == 0
        peer.release()

    assert [one.message for one in caplog.records if one.levelno >= logging.ERROR] == [
        "request failed"
    ]


def test_a_sender_of_rubbish_does_not_fill_the_log(
    node: DimseNode, caplog: pytest.LogCaptureFixture
) -> None:
    with RawPeer(node.port) as peer:
        peer.associate()
        for _ in range(30):
            assert peer.store("1.2.3", b"rubbish!")[cmd.STATUS] == 0xC000
        peer.release()

    alive(node)
    assert warnings_of(caplog) == ["instance refused"] * 10
    text = " ".join(str(one.__dict__) for one in caplog.records)
    assert "rubbish" not in text


def test_b20_a_key_of_64_kib_of_wild_cards_is_bounded(tmp_path: Path) -> None:
    from pacs.dimse import identifier

    keys = identifier.write(
        [
            (0x00080052, b"CS", "STUDY"),
            (0x00100010, b"PN", "*?" * 8000),
            (0x00100020, b"LO", "*?a" * 300),
        ],
        EXPLICIT,
    )
    with DimseNode(tmp_path) as node, RawPeer(node.port) as peer:
        peer.associate(((1, STUDY_FIND, (EXPLICIT,)),))
        values = {**store_rq(""), cmd.AFFECTED_CLASS: STUDY_FIND}
        values |= {cmd.FIELD: CommandField.C_FIND_RQ}
        peer.request(1, values, keys)
        assert peer.read_response()[cmd.STATUS] == 0xC001
        peer.release()


def test_an_identifier_that_is_too_long_aborts(node: DimseNode) -> None:
    with RawPeer(node.port) as peer:
        peer.associate(((1, STUDY_FIND, (EXPLICIT,)),))
        values = {**store_rq(""), cmd.AFFECTED_CLASS: STUDY_FIND}
        values |= {cmd.FIELD: CommandField.C_FIND_RQ}
        peer.request(1, values, bytes(2 * KIB))
        assert abort_of(peer.read_to_end())[0] == PROVIDER

    alive(node)


def test_action_information_has_a_limit_of_its_own(tmp_path: Path) -> None:
    seen: list[int] = []

    def answer(association: Association, message: Message) -> None:
        seen.append(len(message.dataset or b""))
        association.send(message.context_id, cmd.response(message.command, 0))

    with (
        DimseNode(
            tmp_path,
            limits=LIMITS.model_copy(update={"action_bytes": 4 * KIB}),
            handlers={CommandField.N_ACTION_RQ: answer},
        ) as node,
        RawPeer(node.port) as peer,
    ):
        peer.associate(((1, PUSH_MODEL, (EXPLICIT,)),))
        values = {**store_rq(""), cmd.AFFECTED_CLASS: PUSH_MODEL}
        values |= {cmd.FIELD: CommandField.N_ACTION_RQ}
        peer.request(1, values, bytes(4 * KIB))
        assert peer.read_response()[cmd.STATUS] == 0
        peer.request(1, values, bytes(4 * KIB + 2))
        assert abort_of(peer.read_to_end())[0] == PROVIDER

    assert seen == [4 * KIB]


def conversation() -> bytes:
    """Return everything a well-behaved sender would send."""
    ds = ct_slice(size=64)
    body = dataset_bytes(part10(ds))
    echo: dict[int, Value] = {
        cmd.AFFECTED_CLASS: VERIFICATION,
        cmd.FIELD: CommandField.C_ECHO_RQ,
        cmd.MESSAGE_ID: 1,
        cmd.DATASET_TYPE: cmd.NO_DATASET,
    }
    return b"".join(
        (
            associate_rq(BOTH),
            message(1, echo),
            message(3, store_rq("1.2.3"), body[:3000], b"", body[3000:]),
            pdu.RELEASE_RQ,
        )
    )


def mutated(valid: bytes, made: random.Random) -> bytes:
    """Return a conversation with one to three things wrong with it."""
    raw = bytearray(valid)
    for _ in range(made.randint(1, 3)):
        at = made.randrange(len(raw))
        kind = made.randrange(6)
        if kind == 0:  # a flipped bit
            raw[at] ^= 1 << made.randrange(8)
        elif kind == 1:  # a length that lies, most likely in a header
            at = made.choice([2, 208, made.randrange(min(400, len(raw) - 4)), at])
            raw[at : at + 4] = made.randbytes(2) + raw[at + 2 : at + 4]
        elif kind == 2:  # cut off
            del raw[max(1, at) :]
        elif kind == 3:  # a piece said twice
            raw[at:at] = raw[at : at + made.randint(1, 300)]
        elif kind == 4:  # a piece left out
            del raw[at : at + made.randint(1, 300)]
        else:  # a piece of something else
            raw[at : at + 8] = made.randbytes(8)
        raw = raw or bytearray(b"\0")
    return bytes(raw)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_conversations_leave_a_server_that_works(
    tmp_path: Path, seed: int
) -> None:
    valid = conversation()
    made = random.Random(seed)  # noqa: S311  # the same each time
    with DimseNode(
        tmp_path, limits=LIMITS, acse_seconds=2, read_seconds=2, idle_seconds=2
    ) as node:
        alive(node)
        process = psutil.Process()
        before = (process.num_fds(), threading.active_count())
        for _ in range(100):
            raw = mutated(valid, made)
            with RawPeer(node.port, timeout=20) as peer:
                try:
                    peer.send(raw)
                    peer.socket.shutdown(socket.SHUT_WR)
                    while True:
                        peer.read_pdu()
                except (Ended, OSError):
                    continue
        alive(node)
        assert process.num_fds() <= before[0]
        assert threading.active_count() <= before[1]
