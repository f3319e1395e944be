"""Our SCU against pynetdicom, against ourselves, and against peers that misbehave."""

from __future__ import annotations

import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.sop_class import (
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelMove,
    Verification,
)

from pacs.dimse import identifier, pdu
from pacs.dimse.client import (
    VERIFICATION_CONTEXTS,
    Address,
    RemoteAssociation,
    Timeouts,
    client_tls,
    connect,
    propose,
)
from pacs.domain.study import ByteStream
from pacs.imaging.syntaxes import EXPLICIT_VR_LE, IMPLICIT_VR_LE
from storage.kernel.errors import DependencyDown, InvalidParameter
from storage.kernel.limits import Limits
from storage.kernel.settings import DimseTls
from tests.support.datasets import ct_slice, dataset_bytes, part10
from tests.support.dicom_peers import PyScp, RawScp, accept_all, read_pdu
from tests.support.ports import free_port

CT = "1.2.840.10008.5.1.4.1.1.2"
FAST = Timeouts(connect=2, acse=2, dimse=2, write=2)


def reach(
    port: int,
    *contexts: tuple[str, tuple[str, ...]],
    title: str = "PYSCP",
    timeouts: Timeouts = FAST,
) -> RemoteAssociation:
    return connect(
        Address("127.0.0.1", port, title),
        "HUYING",
        propose(contexts) or VERIFICATION_CONTEXTS,
        timeouts=timeouts,
    )


@contextmanager
def played(play: Callable[[socket.socket], None]) -> Iterator[int]:
    """Listen; let `play` have the first connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)

        def run() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(10)
                play(connection)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            thread.join()


@pytest.mark.parametrize("length", [0, 1, 2, 16_377, 16_378, 16_379, 3_000_001])
@pytest.mark.parametrize("max_pdu", [0, 4096, 16_384])
def test_a_data_set_arrives_byte_for_byte(length: int, max_pdu: int) -> None:
    """In whatever PDUs: the length of the value crosses every border."""
    head = struct.pack("<HH2sxxI", 0x7FE0, 0x0010, b"OB", length + length % 2)
    data = head + bytes(i % 251 for i in range(length)) + b"\0" * (length % 2)
    chunks = [data[i : i + 1_048_576] for i in range(0, len(data), 1_048_576)]
    scp = PyScp()
    scp.entity.maximum_pdu_size = max_pdu
    with scp.running(), reach(scp.port, (CT, (EXPLICIT_VR_LE,))) as association:
        [offer] = association.offers

        status = association.store(
            "1.2.3", CT, ByteStream(len(data), iter(chunks), EXPLICIT_VR_LE), offer
        )

    assert status == 0x0000
    [received] = scp.received
    assert received.dataset == data
    assert (received.instance_uid, received.class_uid) == ("1.2.3", CT)


def test_the_originator_of_a_move_is_named() -> None:
    with PyScp().running() as scp, reach(scp.port, (CT, (EXPLICIT_VR_LE,))) as remote:
        body = dataset_bytes(part10(ct_slice()))
        stream = ByteStream(len(body), iter((body,)), EXPLICIT_VR_LE)

        remote.store("1.2", CT, stream, remote.offers[0], originator=("ASKER", 77))

    assert scp.received[0].originator == ("ASKER", 77)


def test_a_status_is_returned_as_it_came() -> None:
    with (
        PyScp(status=lambda _: 0xA700).running() as scp,
        reach(scp.port, (CT, (EXPLICIT_VR_LE,))) as remote,
    ):
        body = dataset_bytes(part10(ct_slice()))
        stream = ByteStream(len(body), iter((body,)), EXPLICIT_VR_LE)

        assert remote.store("1.2", CT, stream, remote.offers[0]) == 0xA700


def test_the_acceptors_choice_is_visible() -> None:
    with (
        PyScp(syntaxes=[IMPLICIT_VR_LE]).running() as scp,
        reach(scp.port, (CT, (EXPLICIT_VR_LE,)), (CT, (IMPLICIT_VR_LE,))) as remote,
    ):
        assert [(one.context_id, one.transfer_syntax) for one in remote.offers] == [
            (3, IMPLICIT_VR_LE)
        ]


def test_find_and_move_iterate_over_responses() -> None:
    def find(event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        for number in range(3):
            match = Dataset()
            match.StudyInstanceUID = f"1.2.{number}"
            yield 0xFF00, match
        yield 0x0000, None

    def move(event: evt.Event) -> Iterator[object]:
        yield None, None

    entity = AE()
    entity.add_supported_context(StudyRootQueryRetrieveInformationModelFind)
    entity.add_supported_context(StudyRootQueryRetrieveInformationModelMove)
    server = entity.start_server(
        ("127.0.0.1", 0),
        block=False,
        evt_handlers=[(evt.EVT_C_FIND, find), (evt.EVT_C_MOVE, move)],
    )
    keys = identifier.write([(0x00080052, b"CS", "STUDY")], EXPLICIT_VR_LE)
    models = (
        StudyRootQueryRetrieveInformationModelFind,
        StudyRootQueryRetrieveInformationModelMove,
    )
    try:
        port = server.socket.getsockname()[1]
        with reach(port, *((one, (EXPLICIT_VR_LE,)) for one in models)) as remote:
            found = list(remote.find(remote.offer(models[0]), keys))
            moved = list(remote.move(remote.offer(models[1]), "NOBODY", keys))
    finally:
        server.shutdown()

    uids = [
        identifier.text(identifier.read(one, EXPLICIT_VR_LE, Limits()), 0x0020000D)
        for one in found
    ]
    assert uids == ["1.2.0", "1.2.1", "1.2.2"]
    assert [one.status for one in moved] == [0xA801]


@pytest.mark.parametrize(
    ("result", "source", "reason", "words"),
    [
        (1, 1, 7, "rejected, called AE title not recognized"),
        (1, 1, 3, "rejected, calling AE title not recognized"),
        (2, 3, 2, r"rejected, local limit exceeded \(for now\)"),
        (1, 9, 9, "rejected, unknown reason"),
    ],
)
def test_a_rejection_is_told_in_words(
    result: int, source: int, reason: int, words: str
) -> None:
    def play(connection: socket.socket) -> None:
        read_pdu(connection)
        connection.sendall(pdu.encode_associate_rj(result, source, reason))

    with played(play) as port, pytest.raises(DependencyDown, match=words):
        reach(port)


def test_where_it_fails_is_told() -> None:
    with pytest.raises(DependencyDown, match=r"^name resolution: "):
        connect(Address("no.such.invalid", 1, "X"), "A", VERIFICATION_CONTEXTS)
    with pytest.raises(DependencyDown, match=r"^TCP: Connection refused"):
        reach(free_port())
    with (
        RawScp().hanging() as scp,
        pytest.raises(DependencyDown, match=r"^association: no answer in time"),
    ):
        reach(scp.port, timeouts=Timeouts(acse=0.5))
    with (
        RawScp().silent_after_acceptance() as scp,
        reach(scp.port, timeouts=Timeouts(dimse=0.5)) as remote,
        pytest.raises(DependencyDown, match=r"^echo: no answer in time"),
    ):
        remote.echo()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        struct.pack(">BxI", 2, 0xFFFFFFFF),
        struct.pack(">BxI", 2, 10) + bytes(10),
        struct.pack(">BxI", 4, 6) + bytes(6),
        struct.pack(">BxI", 7, 4) + bytes(4),
        b"",
    ],
    ids=["http", "4 GiB", "short", "data", "abort", "hang up"],
)
def test_nonsense_instead_of_an_acceptance_is_a_failed_association(
    answer: bytes,
) -> None:
    def play(connection: socket.socket) -> None:
        read_pdu(connection)
        connection.sendall(answer)

    with played(play) as port, pytest.raises(DependencyDown, match=r"^association: "):
        reach(port)


@pytest.mark.parametrize(
    "answer",
    [
        struct.pack(">BxI", 4, 0x7FFFFFFF),
        struct.pack(">BxIIBB", 4, 8, 0xFFFFFFFF, 1, 3) + bytes(2),
        struct.pack(">BxIIBB", 4, 10, 6, 1, 3) + b"\1\2\3\4",
        struct.pack(">BxIIBB", 4, 10, 6, 1, 2) + bytes(4),
        struct.pack(">BxI", 9, 4) + bytes(4),
        pdu.RELEASE_RQ,
        b"",
    ],
    ids=["long PDU", "long PDV", "no command", "data first", "unknown", "release", ""],
)
def test_nonsense_instead_of_a_response_ends_the_association(answer: bytes) -> None:
    def play(connection: socket.socket) -> None:
        accept_all(connection)
        read_pdu(connection)
        connection.sendall(answer)

    with (
        played(play) as port,
        reach(port) as remote,
        pytest.raises(DependencyDown, match=r"^echo: "),
    ):
        remote.echo()

    assert not remote.is_open


def test_a_peer_that_does_not_read_is_given_up() -> None:
    leave = threading.Event()

    def play(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        accept_all(connection)
        leave.wait(20)

    def endless() -> Iterator[bytes]:
        while True:
            yield bytes(1 << 20)

    with played(play) as port:
        remote = reach(port, (CT, (EXPLICIT_VR_LE,)), timeouts=Timeouts(write=0.5))
        with pytest.raises(DependencyDown, match=r"^store: no answer in time"):
            remote.begin_store("1.2", CT, endless(), remote.offers[0])
        leave.set()

    assert not remote.is_open


def test_a_source_that_fails_takes_the_association_with_it() -> None:
    """Half a message is on the wire: nothing else may follow it."""

    def failing() -> Iterator[bytes]:
        yield bytes(1 << 20)
        raise LookupError

    with PyScp().running() as scp:
        remote = reach(scp.port, (CT, (EXPLICIT_VR_LE,)))
        with pytest.raises(LookupError):
            remote.begin_store("1.2", CT, failing(), remote.offers[0])

        assert not remote.is_open
        with pytest.raises(DependencyDown, match="has ended"):
            remote.begin_store("1.3", CT, (b"12",), remote.offers[0])
    assert scp.received == []


def test_release_leaves_nothing_open_and_abort_is_harmless() -> None:
    entity = AE()
    entity.add_supported_context(Verification)
    ended: list[str] = []
    released = threading.Event()

    def on_release(_event: evt.Event) -> None:
        ended.append("released")
        released.set()

    server = entity.start_server(
        ("127.0.0.1", 0),
        block=False,
        evt_handlers=[(evt.EVT_RELEASED, on_release)],
    )
    try:
        with reach(server.socket.getsockname()[1]) as remote:
            remote.echo()
        assert released.wait(10)
        remote.abort()
        remote.release()
    finally:
        server.shutdown()

    assert ended == ["released"]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    made, key = folder / "node.pem", folder / "node.key"
    subprocess.run(
        [  # noqa: S607
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
            "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", "/CN=node",
            "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key),
            "-out", str(made),
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return made, key


def test_tls_verifies_the_peer(certificate: tuple[Path, Path]) -> None:
    made, key = certificate
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_side.load_cert_chain(made, key)
    entity = AE()
    entity.add_supported_context(Verification)
    server = entity.start_server(("127.0.0.1", 0), block=False, ssl_context=server_side)
    address = Address("127.0.0.1", server.socket.getsockname()[1], "X", tls=True)
    try:
        trusting = client_tls(DimseTls(client_ca=made))
        with connect(
            address, "A", VERIFICATION_CONTEXTS, timeouts=FAST, tls=trusting
        ) as remote:
            remote.echo()
        with pytest.raises(DependencyDown, match=r"^TLS: CERTIFICATE_VERIFY_FAILED"):
            connect(
                address, "A", VERIFICATION_CONTEXTS, timeouts=FAST,
                tls=client_tls(DimseTls()),
            )  # fmt: skip
        with pytest.raises(DependencyDown, match=r"^TLS: no certificate"):
            connect(address, "A", VERIFICATION_CONTEXTS, timeouts=FAST)
    finally:
        server.shutdown()


def test_a_certificate_that_is_none_is_named(
    certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    made, _ = certificate
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")

    for settings in (
        DimseTls(certificate=tmp_path / "missing.pem"),
        DimseTls(client_ca=nonsense),
        DimseTls(certificate=made, key=nonsense),
    ):
        with pytest.raises(InvalidParameter, match=r"dimse\.tls"):
            client_tls(settings)
