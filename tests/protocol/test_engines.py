"""One life of a study over each database and each object store."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydicom.uid import ExplicitVRLittleEndian
from sqlalchemy import create_engine, func, select

from pacs.imaging.part10 import read_file_meta
from pacs.repository.tables import Deletion
from storage.kernel.settings import Objects
from tests.support import dcmtk, dicom_peers, postgres, process, web
from tests.support.datasets import a_study, dataset_bytes, part10, uid
from tests.support.dicom_peers import PyScp
from tests.support.dicomweb import multipart, split
from tests.support.node import DEFAULTS, RunningNode, environment
from tests.support.ports import free_port
from tests.support.waiting import wait_until

AS_STORED = 'multipart/related; type="application/dicom"; transfer-syntax=*'
QUICK: Mapping[str, Any] = {
    "packs__seal_grace_seconds": 0,
    "packs__rewrite_seconds": 1,
}
Images = dict[str, bytes]


@contextmanager
def engines(
    request: pytest.FixtureRequest, folder: Path, database: str, store: str
) -> Iterator[dict[str, Any]]:
    """Yield the settings of a database and an object store, both empty."""
    with ExitStack() as until_done:
        url = f"sqlite:///{folder / 'index.db'}"
        if database == "postgresql":
            server = request.getfixturevalue("postgres")
            url = until_done.enter_context(postgres.empty_database(server))
        objects = Objects()
        if store == "s3":
            objects = request.getfixturevalue("seaweedfs").objects()
        yield {"database__url": url, "objects": objects}


def made(seed: int) -> Images:
    return {str(ds.SOPInstanceUID): part10(ds) for ds in a_study(seed=seed)}


def send(port: int, aet: str, images: Images, folder: Path) -> None:
    folder.mkdir()
    for name, file in images.items():
        (folder / f"{name}.dcm").write_bytes(file)
    dcmtk.run("storescu", "+sd", "-aec", aet, "127.0.0.1", port, folder)


def stow(address: str, images: Images) -> None:
    body, headers = multipart(list(images.values()))
    url = f"{address}/dicom-web/studies"
    assert web.request(url, method="POST", body=body, headers=headers).status == 200


def sets(files: list[bytes]) -> list[bytes]:
    found = []
    for file in files:
        meta = read_file_meta(file)
        assert meta is not None
        found.append(file[meta.dataset_offset :])
    return sorted(found)


def check_doors(node: RunningNode, scp: PyScp, images: Images) -> None:
    """Retrieve a study by every door; all its bytes are there."""
    wanted = sorted(map(dataset_bytes, images.values()))
    first = next(iter(images))
    study, series = uid(int(first.split(".")[-3])), first.rpartition(".")[0]
    path = f"/dicom-web/studies/{study}"

    assert (
        sets([node.get(f"/api/v1/instances/{one}/file").body for one in images])
        == wanted
    )
    assert sets([file for _, file in split(node.get(path, accept=AS_STORED))]) == wanted
    contexts = [("1.2.840.10008.5.1.4.1.1.2", str(ExplicitVRLittleEndian))]
    got = dicom_peers.get(node.dimse_port, node.aet, [study], contexts)
    assert sorted(dataset for _, dataset in got.values()) == wanted
    scp.received.clear()
    dcmtk.run(
        "movescu", "-S", "-aec", node.aet, "-aem", scp.title, "127.0.0.1",
        node.dimse_port, "-k", "QueryRetrieveLevel=STUDY",
        "-k", f"StudyInstanceUID={study}",
    )  # fmt: skip
    assert sorted(one.dataset for one in scp.received) == wanted
    assert len(node.get(f"{path}/metadata").json()) == len(images)
    instance = f"{path}/series/{series}/instances/{first}"
    frame = node.get(f"{instance}/frames/1", accept="application/octet-stream")
    bulk = node.get(f"{instance}/bulkdata/7FE00010", accept="application/octet-stream")
    assert frame.body == bulk.body == images[first][-len(frame.body) :]
    assert found(node) >= {study}


def found(node: RunningNode) -> set[str]:
    """Return the studies that QIDO-RS finds."""
    answer = node.get("/dicom-web/studies")
    return {one["0020000D"]["Value"][0] for one in answer.json()}


def unerased(url: str) -> int:
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    try:
        with engine.connect() as connection:
            query = select(func.count()).select_from(Deletion)
            return connection.execute(
                query.where(Deletion.erased_us.is_(None))
            ).scalar_one()
    finally:
        engine.dispose()


def verify(node: RunningNode, *options: str) -> str:
    done = node.run("verify", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


ENGINES = [
    ("sqlite", "files"), ("postgresql", "files"), ("sqlite", "s3"),
    ("postgresql", "s3"),
]  # fmt: skip
Lives = dict[tuple[str, str], Future[None]]


@pytest.fixture(scope="module")
def lives(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Lives]:
    """Yield four lives; they run at once, for most of each is waiting."""
    with ExitStack() as until_done:
        pool = until_done.enter_context(ThreadPoolExecutor(len(ENGINES)))
        running = {}
        for database, store in ENGINES:
            folder = tmp_path_factory.mktemp(f"{database}-{store}")
            settings = until_done.enter_context(
                engines(request, folder, database, store)
            )
            running[database, store] = pool.submit(one_life, folder, settings)
        yield running
        wait(running.values())


@pytest.mark.parametrize(("database", "store"), ENGINES)
def test_the_life_of_a_study(lives: Lives, database: str, store: str) -> None:
    lives[database, store].result(300)


def one_life(folder: Path, settings: Mapping[str, Any]) -> None:
    node = RunningNode.start(folder / "node", **QUICK, **settings)
    try:
        with PyScp().running() as scp:
            peer(node, scp)
            live(node, scp, settings["database__url"], folder)
    finally:
        node.stop()


def peer(node: RunningNode, scp: PyScp) -> None:
    body = f'{{"host": "127.0.0.1", "port": {scp.port}}}'.encode()
    assert node.request("PUT", f"/api/v1/peers/{scp.title}", body).status == 200


def live(node: RunningNode, scp: PyScp, url: str, folder: Path) -> None:
    by_dimse, by_stow = made(1), made(2)
    send(node.dimse_port, node.aet, by_dimse, folder / "sent")
    stow(node.http, by_stow)
    assert found(node) == {uid(1), uid(2)}
    for images in (by_dimse, by_stow):
        check_doors(node, scp, images)

    wait_until(
        lambda: node.log_bytes().count(b'"series.sealed"') == 2,
        "both to be sealed",
        seconds=120,
    )
    for images in (by_dimse, by_stow):
        check_doors(node, scp, images)
    verify(node)
    feed = node.get("/api/v1/changes?limit=1000").json()

    gone = next(iter(by_dimse))
    path = f"/dicom-web/studies/{uid(1)}/series/{uid(1, 1)}/instances/{gone}"
    assert node.request("DELETE", path).status == 204
    assert node.request("DELETE", f"/dicom-web/studies/{uid(2)}").status == 204
    del by_dimse[gone]
    wait_until(
        lambda: unerased(url) == 0, "the deleted bytes to be erased", seconds=120
    )
    verify(node)

    node.restart()
    assert found(node) == {uid(1)}
    assert node.get(f"/api/v1/instances/{gone}/file").status in {404, 410}
    check_doors(node, scp, by_dimse)
    later = node.get(f"/api/v1/changes?since={feed['next']}&epoch={feed['epoch']}")
    kinds = {event["kind"] for event in later.json()["events"]}
    assert later.json()["epoch"] == feed["epoch"]
    assert any("deleted" in kind for kind in kinds), kinds

    node.stop()
    verify(node, "--rebuild-index")
    node.restart()
    peer(node, scp)
    assert found(node) == {uid(1)}
    check_doors(node, scp, by_dimse)
    verify(node)


class Part:
    """One of a node's kinds of process, started by its own command."""

    def __init__(
        self,
        folder: Path,
        data: Path,
        kind: str,
        settings: Mapping[str, Any],
        *options: str,
    ) -> None:
        self.log = folder / f"{kind}{free_port()}.log"
        command = [
            str(Path(sys.executable).with_name("huying")), kind, "--data", str(data),
            *options,
        ]  # fmt: skip
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output,
                env=environment({**DEFAULTS, **settings}),
            )  # fmt: skip

    def stop(self) -> None:
        process.stop(self.process)


@pytest.mark.parametrize("hosts", [("a", "a", "a"), ("a", "b", "c")])
def test_parts_on_their_own_share_one_archive(
    request: pytest.FixtureRequest, tmp_path: Path, hosts: tuple[str, str, str]
) -> None:
    """Two web nodes and a DICOM node over PostgreSQL and S3, with a worker each host.

    A host has a folder of its own: what it received is read elsewhere once sealed.
    """
    ports = [free_port() for _ in range(3)]
    webs = [f"http://127.0.0.1:{port}" for port in ports[:2]]
    with ExitStack() as until_done:
        settings = until_done.enter_context(
            engines(request, tmp_path, "postgresql", "s3")
        )
        settings |= QUICK

        def start(name: str, kind: str, *options: str) -> Part:
            part = Part(tmp_path, tmp_path / name, kind,
                        settings | {"node__id": name}, *options)  # fmt: skip
            until_done.callback(part.stop)
            return part

        subprocess.run(
            [Path(sys.executable).with_name("huying"), "db", "upgrade",
             "--data", tmp_path / "a"],
            env=environment(settings), check=True, capture_output=True,
        )  # fmt: skip
        first = start(hosts[0], "web", "--http", f"127.0.0.1:{ports[0]}", "--open")
        process.wait_ready(
            first.process, lambda: web.answers(f"{webs[0]}/healthz"),
            name="web a", log=first.log,
        )  # fmt: skip
        start(hosts[1], "web", "--http", f"127.0.0.1:{ports[1]}", "--open")
        start(hosts[2], "dimse", "--dimse", f"127.0.0.1:{ports[2]}", "--open")
        workers = [start(name, "worker") for name in sorted(set(hosts))]
        wait_until(lambda: web.answers(f"{webs[1]}/healthz"), "web b")
        wait_until(
            lambda: not dcmtk.run(
                "echoscu", "-aec", "HUYING", "127.0.0.1", ports[2], check=False
            ).returncode,
            "the DICOM node",
        )  # fmt: skip
        by_dimse, by_stow = made(1), made(2)
        send(ports[2], "HUYING", by_dimse, tmp_path / "sent")
        stow(webs[0], by_stow)

        wait_until(
            lambda: sum(part.log.read_bytes().count(b'"series.sealed"')
                        for part in workers) == 2,
            "both to be sealed", seconds=120,
        )  # fmt: skip
        for address in webs:
            for name, file in {**by_dimse, **by_stow}.items():
                answer = web.request(f"{address}/api/v1/instances/{name}/file")
                assert sets([answer.body]) == [dataset_bytes(file)]
        contexts = [("1.2.840.10008.5.1.4.1.1.2", str(ExplicitVRLittleEndian))]
        got = dicom_peers.get(ports[2], "HUYING", [uid(1), uid(2)], contexts)
        assert got.keys() == by_dimse.keys() | by_stow.keys()
