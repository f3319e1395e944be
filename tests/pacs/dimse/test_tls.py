"""The TLS listener."""

from __future__ import annotations

import logging
import ssl
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from pynetdicom import AE
from pynetdicom.sop_class import CTImageStorage, Verification

from pacs.dimse import command as cmd
from pacs.dimse.tls import tls_context
from pacs.services.policy import KnownPeer
from storage.kernel.errors import InvalidParameter
from storage.kernel.limits import KIB, Limits
from storage.kernel.settings import DimseTls
from tests.support.datasets import ct_slice, dataset_bytes, part10
from tests.support.dimse import (
    EXPLICIT,
    VERIFICATION,
    DimseNode,
    RawPeer,
    abort_of,
    associate_rq,
    message,
    pdv,
    rejection_of,
    store_rq,
)


class Authority:
    """A certificate authority that signs what a test needs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        _openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
            "-nodes", "-days", "2", "-subj", "/CN=test authority",
            "-keyout", folder / "ca.key", "-out", folder / "ca.pem",
        )  # fmt: skip
        self.certificate = folder / "ca.pem"

    def sign(self, name: str) -> tuple[Path, Path]:
        """Return certificate and key of `name`."""
        key, request, made = (
            self.folder / f"{name}.{end}" for end in ("key", "csr", "pem")
        )
        _openssl(
            "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
            "-nodes", "-subj", f"/CN={name}", "-keyout", key, "-out", request,
        )  # fmt: skip
        _openssl(
            "x509", "-req", "-in", request, "-CA", self.certificate,
            "-CAkey", self.folder / "ca.key", "-days", "2", "-out", made,
        )  # fmt: skip
        return made, key


def _openssl(*arguments: object) -> None:
    subprocess.run(
        ["openssl", *map(str, arguments)],  # noqa: S607
        check=True,
        capture_output=True,
    )


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "ca")


def settings(authority: Authority, *, mutual: bool = False) -> DimseTls:
    certificate, key = authority.sign("node")
    return DimseTls(
        port=1,
        certificate=certificate,
        key=key,
        client_ca=authority.certificate if mutual else None,
    )


def client(authority: Authority, name: str | None = None) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=str(authority.certificate))
    made.check_hostname = False
    if name is not None:
        made.load_cert_chain(*authority.sign(name))
    return made


class TlsPeer(RawPeer):
    """A raw peer behind TLS."""

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        super().__init__(port)
        self.socket = context.wrap_socket(self.socket)


def test_pynetdicom_stores_over_tls(tmp_path: Path, authority: Authority) -> None:
    ds = ct_slice(size=256)
    body = dataset_bytes(part10(ds))
    limits = Limits(memory_instance_bytes=64 * KIB)
    with DimseNode(tmp_path, tls=settings(authority), limits=limits) as node:
        ae = AE("TEST")
        ae.add_requested_context(Verification)
        association = ae.associate(
            "127.0.0.1",
            node.tls_port,
            ae_title="HUYING",
            tls_args=(client(authority), "localhost"),
        )
        assert association.is_established
        assert association.send_c_echo().Status == 0
        association.release()
        with TlsPeer(node.tls_port, client(authority)) as peer:
            peer.associate(((1, str(CTImageStorage), (EXPLICIT,)),))
            assert peer.store(ds.SOPInstanceUID, body)[cmd.STATUS] == 0
            peer.release()
        with RawPeer(node.port) as plain:
            plain.associate(((1, VERIFICATION, (EXPLICIT,)),))
            assert plain.echo() == 0
        assert node.dataset(ds.SOPInstanceUID) == body


def test_b10_the_certificate_must_name_the_peer(
    tmp_path: Path, authority: Authority
) -> None:
    known = KnownPeer("TEST", "", 0, "", frozenset({"echo", "store"}))
    tls = settings(authority, mutual=True)
    with DimseNode(tmp_path, tls=tls, open_access=False, peers=[known]) as node:
        with TlsPeer(node.tls_port, client(authority, "OTHER")) as peer:
            peer.send(associate_rq())
            assert rejection_of(peer.read_to_end()) == (1, 1, 3)
        with TlsPeer(node.tls_port, client(authority, "TEST")) as peer:
            peer.associate()
            peer.release()


def refused(port: int, context: ssl.SSLContext) -> bool:
    """Tell whether no association is to be had."""
    try:
        with TlsPeer(port, context) as peer:
            peer.send(associate_rq())
            return peer.read_to_end() == b""
    except OSError:
        return True


def test_b31_handshakes_below_the_profile_are_refused(
    tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = Authority(tmp_path / "stranger")
    unsigned = client(authority)
    unsigned.load_cert_chain(*stranger.sign("TEST"))
    tls = settings(authority, mutual=True)
    with DimseNode(tmp_path, tls=tls) as node:
        assert refused(node.tls_port, client(authority))
        assert refused(node.tls_port, unsigned)
        with RawPeer(node.tls_port) as peer:
            peer.send(associate_rq())
            peer.read_to_end()
        node.wait_idle()
        assert {one.message for one in caplog.records} == {"TLS refused"}
        with RawPeer(node.port) as plain:
            plain.associate()
            plain.release()


def test_a_drip_inside_a_pdu_ends_with_its_timer(
    tmp_path: Path, authority: Authority
) -> None:
    tls = settings(authority)
    with DimseNode(tmp_path, tls=tls, read_seconds=0.5) as node:
        with TlsPeer(node.tls_port, client(authority)) as peer:
            peer.associate()
            peer.send(message(1, store_rq("1.2.3")))
            peer.send(pdv(1, 0, bytes(200_000))[:12])
            peer.socket.settimeout(0.05)
            answer, sent = b"", 0
            while not answer and sent < 1000:
                peer.send(b"\0")
                sent += 1
                with suppress(TimeoutError):
                    answer = peer.socket.recv(100)
        assert abort_of(answer) == (0, 0)
        node.wait_closed()
        assert node.recorder.closed == ["timeout"]


def test_old_versions_are_refused(authority: Authority) -> None:
    context = tls_context(settings(authority))

    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_tls_probes_leave_nothing(
    tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    with DimseNode(tmp_path, tls=settings(authority)) as node:
        for _ in range(20):
            RawPeer(node.tls_port).close()
        node.wait_idle()

    assert [one for one in caplog.records if one.levelno > logging.DEBUG] == []


@pytest.mark.parametrize("key", [None, Path("/nowhere/key.pem")])
def test_a_listener_without_a_usable_certificate_does_not_start(
    tmp_path: Path, key: Path | None
) -> None:
    certificate = None if key is None else tmp_path / "nowhere.pem"

    with pytest.raises(InvalidParameter, match=r"dimse\.tls"):
        tls_context(DimseTls(port=1, certificate=certificate, key=key))
