"""Table D of the fault table: what the node stands on fails under it."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from pydantic import SecretStr
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from sqlalchemy import make_url

from pacs.dimse.client import RemoteAssociation, connect, propose
from pacs.dimse.dial import Address, Timeouts
from pacs.domain.study import ByteStream
from storage.kernel.settings import S3, Objects
from tests.support import web
from tests.support.datasets import ct_slice, dataset_bytes, part10
from tests.support.node import RunningNode
from tests.support.ports import free_port
from tests.support.postgres import empty_database
from tests.support.waiting import wait_until

TIMEOUTS = Timeouts(connect=5, acse=10, dimse=60, write=10)
SUCCESS = 0x0000


def store(node: RunningNode, ds: Dataset) -> int:
    """Send `ds` with C-STORE on an association of its own; return the status."""
    with associated(node) as association:
        return send(association, ds)


def associated(node: RunningNode) -> RemoteAssociation:
    return connect(
        Address("127.0.0.1", node.dimse_port, node.aet),
        "FAULTS",
        propose([(CTImageStorage, (ExplicitVRLittleEndian,))]),
        timeouts=TIMEOUTS,
    )


def send(association: RemoteAssociation, ds: Dataset) -> int:
    data = dataset_bytes(part10(ds))
    return association.store(
        str(ds.SOPInstanceUID),
        CTImageStorage,
        ByteStream(len(data), iter([data]), ExplicitVRLittleEndian),
        association.offer(CTImageStorage),
    )


def stow(node: RunningNode, ds: Dataset) -> web.Response:
    body = (
        b"--b\r\nContent-Type: application/dicom\r\n\r\n"
        + part10(ds)
        + b"\r\n--b--\r\n"
    )
    kind = 'multipart/related; type="application/dicom"; boundary=b'
    return node.request(
        "POST", "/dicom-web/studies", body, {"Content-Type": kind}, timeout=60
    )


def is_kept(node: RunningNode, ds: Dataset) -> bool:
    """Tell whether the node gives back exactly `ds`."""
    answer = node.get(f"/api/v1/instances/{ds.SOPInstanceUID}/file")
    if answer.status == 404:
        return False
    assert answer.status == 200, (answer.status, answer.text)
    wanted = hashlib.sha256(dataset_bytes(part10(ds)))
    return hashlib.sha256(dataset_bytes(answer.body)).digest() == wanted.digest()


def out_of_resources(status: int) -> bool:
    return status & 0xFF00 == 0xA700


def test_d02_an_object_store_that_is_down_stops_neither_storing_nor_reading(
    tmp_path: Path,
) -> None:
    away = S3(
        endpoint=f"127.0.0.1:{free_port()}",
        access_key=SecretStr("key"),
        secret_key=SecretStr("secret"),
        secure=False,
        timeout_seconds=1,
    )
    node = RunningNode.start(tmp_path, objects=Objects(kind="s3", s3=away))
    first, second = ct_slice(number=1), ct_slice(number=2)

    assert store(node, first) == SUCCESS
    assert stow(node, second).status == 200

    assert is_kept(node, first)
    assert is_kept(node, second)
    node.stop()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a file system of 96 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", folder],  # noqa: S607
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip("file systems may not be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)  # noqa: S607


def test_d03_a_full_disk_is_out_of_resources_and_recovers_without_a_restart(
    small_disk: Path,
) -> None:
    node = RunningNode.start(
        small_disk, packs__min_free_bytes=16 << 20, packs__seal=False
    )
    kept = ct_slice(number=1)
    assert store(node, kept) == SUCCESS
    pids = node.processes()
    ballast = small_disk / "ballast"
    with ballast.open("wb") as file:
        about = os.statvfs(small_disk)
        file.write(bytes(about.f_bavail * about.f_frsize - (12 << 20)))

    # Each process looks at the free space once a second.
    more = (ct_slice(number=number, size=512) for number in itertools.count(10))
    wait_until(lambda: out_of_resources(store(node, next(more))), "A700")
    wait_until(lambda: stow(node, next(more)).status in {503, 507}, "507")
    wait_until(lambda: node.get("/readyz").status == 503, "/readyz to be 503")
    assert is_kept(node, kept)

    ballast.unlink()
    late = ct_slice(number=4, size=512)
    wait_until(lambda: store(node, late) == SUCCESS, "space to be noticed")
    wait_until(lambda: node.get("/readyz").status == 200, "/readyz to be 200")
    assert is_kept(node, late)
    assert node.processes() == pids
    node.stop()


def test_d04_a_pack_that_is_gone_gives_an_error_and_never_other_bytes(
    node: RunningNode,
) -> None:
    lost, kept = ct_slice(seed=1), ct_slice(seed=2)
    assert store(node, lost) == SUCCESS
    packs = set((node.data / "packs").glob("??/*.pack"))
    for path in packs:
        path.unlink()
    node.restart()
    assert store(node, kept) == SUCCESS

    answer = node.get(f"/api/v1/instances/{lost.SOPInstanceUID}/file")

    assert answer.status in {404, 410, 500, 502, 503}
    assert is_kept(node, kept)
    assert b"pack.missing" in node.log_bytes()


def test_d05_a_database_that_is_away_is_out_of_resources_until_it_is_back(
    tmp_path: Path, postgres: str
) -> None:
    with empty_database(postgres) as url:
        node = RunningNode.start(tmp_path, database__url=url)
        first, second = ct_slice(number=1), ct_slice(number=2)
        association = associated(node)
        assert send(association, first) == SUCCESS
        name = str(make_url(url).database)

        def allow(allowed: str) -> None:
            with psycopg.connect(postgres, autocommit=True) as connection:
                connection.execute(
                    sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}").format(
                        sql.Identifier(name), sql.SQL(allowed)
                    )
                )
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = %s",
                    (name,),
                )

        allow("false")
        try:
            assert out_of_resources(send(association, second))
            answer = stow(node, second)
            assert answer.status == 503
            assert "retry-after" in answer.headers
            wait_until(lambda: node.get("/readyz").status == 503, "/readyz to be 503")
        finally:
            allow("true")

        wait_until(
            lambda: send(association, second) == SUCCESS, "the database to be back"
        )
        association.release()
        assert is_kept(node, first)
        assert is_kept(node, second)
        node.stop()


def test_d08_a_study_settles_although_the_node_was_killed_meanwhile(
    tmp_path: Path,
) -> None:
    node = RunningNode.start(tmp_path, pacs__settle_seconds=3)
    ds = ct_slice()
    assert store(node, ds) == SUCCESS
    node.kill()
    node.restart()

    def settled() -> bool:
        page = node.get("/api/v1/changes?since=0").json()
        return any(
            event["kind"] == "study.settled" and event["subject"] == ds.StudyInstanceUID
            for event in page["events"]
        )

    wait_until(settled, "study.settled")
    assert is_kept(node, ds)
    node.stop()
