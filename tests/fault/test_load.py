"""Row C30 of the bad-input table: those who do not read hold nobody up."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import psutil
import pytest
from pydicom.uid import ImplicitVRLittleEndian

from pacs.dimse.client import connect, propose
from pacs.dimse.dial import Address
from tests.fault.test_storage import TIMEOUTS, stow
from tests.support.datasets import a_study, ct_slice, part10
from tests.support.node import RunningNode

READERS = 60
VERIFICATION = "1.2.840.10008.1.1"
MIB = 1 << 20
PARTS = 'multipart/related; type="application/dicom"; transfer-syntax=*'
#: What one connection may hold of a study it does not read: what was read ahead
#: for it, and the buffers of its socket.
MOST_HELD = 8 * MIB


def memory(node: RunningNode) -> int:
    """Return the proportional set size of all processes but the worker."""
    return sum(
        psutil.Process(pid).memory_full_info().pss
        for name, pid in node.processes().items()
        if "worker" not in name
    )


@contextmanager
def readers_that_do_not_read(node: RunningNode, path: str) -> Iterator[None]:
    """Ask for `path` many times at once and take only the head of each answer."""
    asked = (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: {PARTS}\r\n\r\n"
    ).encode()
    with ExitStack() as stack:
        opened = []
        for _ in range(READERS):
            one = socket.socket()
            stack.callback(one.close)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.settimeout(60)
            one.connect(("127.0.0.1", node.http_port))
            one.sendall(asked)
            opened.append(one)
        for one in opened:
            assert one.recv(12) == b"HTTP/1.1 200"
        yield


@pytest.fixture
def large_study(node: RunningNode) -> str:
    """Store a study that is larger than the sockets' buffers; return its path."""
    datasets = a_study(seed=5, n_instances=24, size=1024)
    for ds in datasets:
        assert stow(node, ds).status == 200
    return f"/dicom-web/studies/{datasets[0].StudyInstanceUID}"


def test_c30_slow_readers_hold_nobody_up_and_little_memory(
    node: RunningNode, large_study: str
) -> None:
    late = ct_slice(seed=6)
    for _ in range(20):
        node.get("/dicom-web/studies?limit=1")
    before = memory(node)

    with readers_that_do_not_read(node, large_study):
        deadline = time.monotonic() + 2
        most = 0
        while time.monotonic() < deadline:
            assert node.get("/dicom-web/studies?limit=1", accept="*/*").status == 200
            most = max(most, memory(node))
        with connect(
            Address("127.0.0.1", node.dimse_port, node.aet),
            "FAULTS",
            propose([(VERIFICATION, (ImplicitVRLittleEndian,))]),
            timeouts=TIMEOUTS,
        ) as association:
            association.echo()
        assert stow(node, late).status == 200
        path = f"/api/v1/instances/{late.SOPInstanceUID}/file"
        assert node.get(path).body == part10(late)
        most = max(most, memory(node))

    assert most - before < READERS * MOST_HELD
