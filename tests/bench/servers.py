"""The servers that are compared, started on folders of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import psutil

from tests.support import dcmtk, process
from tests.support.node import RunningNode
from tests.support.orthanc import Orthanc
from tests.support.ports import free_port

#: Threads and processes that do background work; reported apart.
WORKER = "huying-worker"


class Server(Protocol):
    """One of the compared programs, running."""

    label: str
    aet: str
    dimse_port: int
    http_port: int

    @property
    def pid(self) -> int: ...
    def stop(self) -> None: ...


class Huying:
    """Our own node, two web and two DICOM processes, as a user starts it."""

    def __init__(self, folder: Path, label: str = "huying", **settings: Any) -> None:
        self.label = label
        settings = {
            "log__level": "WARNING",
            "http__metrics_token": "bench",
            **settings,
        }
        self.node = RunningNode.start(folder, **settings)
        self.aet = self.node.aet
        self.dimse_port = self.node.dimse_port
        self.http_port = self.node.http_port

    @property
    def pid(self) -> int:
        return self.node.pid

    def stop(self) -> None:
        self.node.stop()


class OrthancServer:
    """Debian's Orthanc."""

    def __init__(
        self, folder: Path, label: str, *, nodelay: bool = True, sync: bool = True
    ) -> None:
        self.label = label
        self.orthanc = Orthanc(
            folder, nodelay=nodelay, SyncStorageArea=sync, HttpThreadsCount=50
        )
        self.orthanc.start()
        self.aet = self.orthanc.aet
        self.dimse_port = self.orthanc.dimse_port
        self.http_port = self.orthanc.http_port

    @property
    def pid(self) -> int:
        return self.orthanc.pid

    def stop(self) -> None:
        self.orthanc.stop()


class Program:
    """A receiver that is one command: DCMTK's storescp, pynetdicom's."""

    aet = "STORE"
    http_port = 0

    def __init__(self, folder: Path, label: str, command: list[str]) -> None:
        self.label = label
        self.dimse_port = free_port()
        folder.mkdir(parents=True)
        log = folder / "log"
        filled = [part.format(port=self.dimse_port, folder=folder) for part in command]
        with log.open("ab") as output:
            # DCMTK's tools leave Nagle's algorithm on unless this is set.
            self._process = subprocess.Popen(
                filled,
                stdout=output,
                stderr=output,
                env=os.environ | {"TCP_NODELAY": "1"},
            )
        process.wait_ready(
            self._process,
            lambda: _listens(self._process.pid, self.dimse_port),
            name=label,
            log=log,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        process.stop(self._process)


def _listens(pid: int, port: int) -> bool:
    with suppress(psutil.Error):
        return any(
            one.status == psutil.CONN_LISTEN and one.laddr.port == port
            for one in psutil.Process(pid).net_connections("tcp")
        )
    return False


def storescp(folder: Path, label: str = "storescp") -> Program:
    """Start DCMTK's receiver: no index, no sync, a process for each association."""
    return _storescp(folder, label, "+B", "-od", "{folder}")


def sink(folder: Path) -> Program:
    """Start DCMTK's receiver as one that keeps nothing: a destination."""
    return _storescp(folder, "sink", "--ignore")


def _storescp(folder: Path, label: str, *options: str) -> Program:
    command = [dcmtk.tool("storescp"), "--fork", "-pdu", "131072", "-aet", "STORE"]
    return Program(folder, label, [*command, *options, "{port}"])


def pynetdicom_scp(folder: Path, label: str = "pynetdicom") -> Program:
    """Start pynetdicom as its documentation shows; it has no index either."""
    return Program(
        folder,
        label,
        [sys.executable, "-m", "tests.bench.pynetdicom_scp", "{port}", "{folder}"],
    )


def pynetdicom_qrscp(folder: Path, label: str = "pynetdicom qrscp") -> Program:
    """Start pynetdicom's own archive: files and an index in SQLite."""
    return Program(
        folder,
        label,
        [
            str(Path(sys.executable).with_name("qrscp")), "--quiet",
            "--port", "{port}", "--bind-address", "127.0.0.1", "--ae-title", "STORE",
            "--database-location", "{folder}/index.sqlite",
            "--instance-location", "{folder}",
        ],
    )  # fmt: skip


@contextmanager
def scratch(root: Path) -> Iterator[Path]:
    """Yield a folder that is gone afterwards."""
    root.mkdir(parents=True, exist_ok=True)
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def family(pid: int, *, worker: bool) -> list[psutil.Process]:
    """Return a server's processes, only the workers, or all but those."""
    with suppress(psutil.Error):
        parent = psutil.Process(pid)
        children = parent.children(recursive=True)
        workers = [one for one in children if one.name().startswith(WORKER)]
        for one in tuple(workers):
            workers += one.children(recursive=True)
        if worker:
            return workers
        return [one for one in (parent, *children) if one not in workers]
    return []


def cpu_seconds(pid: int) -> float:
    """Return what a server's processes have used, ended children too."""
    total = 0.0
    for one in family(pid, worker=False):
        with suppress(psutil.Error):
            total += sum(one.cpu_times()[:4])
    return total


def pss_mib(pid: int, *, worker: bool = False) -> float:
    """Return the memory of a server's processes, shared pages counted once."""
    total = 0
    for one in family(pid, worker=worker):
        with suppress(psutil.Error, OSError):
            total += one.memory_full_info().pss
    return total / 2**20
