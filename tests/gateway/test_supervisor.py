"""The supervisor, with small processes in place of the application's."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from gateway import supervisor
from gateway.supervisor import Kind
from storage.kernel.errors import Conflict, InvalidParameter
from storage.kernel.settings import Settings, load_settings

ROOT = Path(__file__).parents[2]

#: A node whose processes write what happens to them into files named after them.
PROGRAM = textwrap.dedent(
    """
    import os, signal, sys, time
    from pathlib import Path
    from gateway import supervisor
    from storage.kernel.settings import load_settings
    from storage.kernel.errors import Conflict

    data = Path(sys.argv[1])
    behaviour = set(sys.argv[2:])

    def note(name, text):
        with open(data / name, "a") as file:
            file.write(text + chr(10))

    def wait(name):
        note(name, f"start {os.getpid()}")
        if "stubborn" in behaviour:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        else:
            def stop(*_):
                note(name, "stopped")
                raise SystemExit(0)
            signal.signal(signal.SIGTERM, stop)
        while True:
            time.sleep(0.05)

    def web(settings, listening, slot):
        note(f"web{slot}", f"start {os.getpid()}")
        if "broken" in behaviour:
            raise RuntimeError("broken")
        def stop(*_):
            note(f"web{slot}", "stopped")
            raise SystemExit(0)
        signal.signal(signal.SIGTERM, stop)
        while True:
            connection, _ = listening.accept()
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\n\\r\\n")
            connection.close()

    class Counts:
        def reset(self, slot):
            note("resets", str(slot))

    entry = supervisor.Entry(
        prepare=lambda settings: note("prepared", str(os.getpid())),
        web=web,
        dimse=lambda settings, plain, tls, counts, slot: wait(f"dimse{slot}"),
        worker=lambda settings, slot: wait("worker"),
        counts=lambda settings, slots: Counts(),
    )
    if "impatient" in behaviour:
        supervisor.STOP_SECONDS = 0.3
    settings = load_settings(
        overrides={"data": str(data), "http": {"port": 0}, "dimse": {"port": 0}},
        environ={},
    )
    try:
        status = supervisor.serve(settings, entry=lambda: entry)
    except Conflict as error:
        print("refused:", error)
        status = 3
    sys.exit(status)
    """
)


class Node:
    """A running supervisor."""

    def __init__(self, data: Path, *behaviour: str) -> None:
        self.data = data
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(data), *behaviour],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def notes(self, name: str) -> list[str]:
        path = self.data / name
        return path.read_text().splitlines() if path.exists() else []

    def pid(self, name: str) -> int:
        starts = [note for note in self.notes(name) if note.startswith("start")]
        return int(starts[-1].split()[1])

    def finish(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        self.process.communicate(timeout=20)
        return self.process.returncode


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    nodes: list[Node] = []

    def make(*behaviour: str, data: Path = tmp_path) -> Node:
        nodes.append(Node(data, *behaviour))
        return nodes[-1]

    yield make
    for node in nodes:
        node.process.kill()
        node.process.communicate()


def eventually(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_node_prepares_starts_all_kinds_and_says_where(
    start: Callable[..., Node],
) -> None:
    node = start()

    line = node.line()

    assert line.startswith("huying: web http://127.0.0.1:")
    assert "DICOM HUYING 127.0.0.1:" in line
    assert len(node.notes("prepared")) == 1
    for name in ("web0", "web1", "dimse0", "dimse1", "worker"):
        eventually(partial(node.notes, name))
    group = {os.getpgid(node.pid(name)) for name in ("web0", "dimse0", "worker")}
    assert group == {os.getpgid(node.process.pid)}
    assert (node.data / "index.db").exists()


def test_sigterm_is_passed_on_and_waited_for(start: Callable[..., Node]) -> None:
    node = start()
    node.line()
    eventually(lambda: node.notes("dimse1"))

    assert node.finish() == 0

    for name in ("web0", "web1", "dimse0", "dimse1", "worker"):
        assert node.notes(name)[-1] == "stopped"


def test_a_process_that_does_not_stop_is_killed(start: Callable[..., Node]) -> None:
    node = start("stubborn", "impatient")
    node.line()
    eventually(lambda: node.notes("worker"))
    pid = node.pid("worker")

    assert node.finish() == 0

    assert is_gone(pid)


def test_a_process_that_dies_is_started_again(start: Callable[..., Node]) -> None:
    node = start()
    node.line()
    eventually(lambda: node.notes("dimse1"))
    first = node.pid("dimse1")

    os.kill(first, signal.SIGKILL)

    eventually(lambda: node.pid("dimse1") != first)
    assert node.notes("resets") == ["1"]
    assert node.finish() == 0


def test_the_processes_die_with_the_parent_and_free_the_folder(
    start: Callable[..., Node],
) -> None:
    node = start("stubborn")
    node.line()
    eventually(lambda: node.notes("dimse1"))
    pids = [node.pid(name) for name in ("web0", "dimse0", "worker")]

    node.finish(signal.SIGKILL)

    eventually(lambda: all(is_gone(pid) for pid in pids), 3)
    again = start()
    assert again.line().startswith("huying: web")


def test_a_second_node_in_the_same_folder_is_refused(
    start: Callable[..., Node],
) -> None:
    node = start()
    node.line()

    second = start()
    out, _ = second.process.communicate(timeout=15)

    assert second.process.returncode == 3
    assert out.startswith(
        f"refused: another Huying (process {node.process.pid}) works in"
    )


def test_a_node_that_cannot_start_gives_up(start: Callable[..., Node]) -> None:
    node = start("broken")

    _, log = node.process.communicate(timeout=30)

    assert node.process.returncode == 1
    assert '"exception": "RuntimeError"' in log
    assert is_gone(node.pid("worker"))


def test_an_index_of_a_newer_version_is_refused(
    start: Callable[..., Node], tmp_path: Path
) -> None:
    import sqlite3

    from storage.db import migrate

    migrate.upgrade(f"sqlite:///{tmp_path / 'index.db'}")
    with sqlite3.connect(tmp_path / "index.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num='9999'")
    connection.close()

    node = start()
    out, _ = node.process.communicate(timeout=15)

    assert node.process.returncode == 3
    assert "refused: the index has revision 9999" in out


def settings_on(port: int, name: str = "http") -> Settings:
    tree = {"http": {"port": 0}, "dimse": {"port": 0}}
    tree[name] = {"port": port}
    return load_settings(overrides={**tree, "data": "unused"}, environ={})


@pytest.mark.parametrize("name", ["http", "dimse"])
def test_a_port_in_use_is_named(name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Conflict, match=f"{name}: port {port} of 127.0.0.1 is in"):
            supervisor.listen(settings_on(port, name))


def test_web_processes_share_a_port_that_others_cannot_take() -> None:
    sockets = supervisor.listen(settings_on(0))
    try:
        port = sockets.settings.http.port
        assert {s.getsockname()[1] for s in sockets.web} == {port}
        with pytest.raises(Conflict):
            supervisor.listen(settings_on(port))
    finally:
        for one in sockets.all():
            one.close()


def test_an_address_of_another_machine_is_refused() -> None:
    settings = load_settings(overrides={"http": {"host": "192.0.2.1"}}, environ={})
    with pytest.raises(InvalidParameter, match="http: 192"):
        supervisor.listen(settings)


def test_parts_share_a_folder_but_only_one_is_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "LOCK_SECONDS", 0)
    with (
        supervisor.data_lock(tmp_path, [Kind.WEB]),
        supervisor.data_lock(tmp_path, [Kind.WORKER]),
        supervisor.data_lock(tmp_path, [Kind.DIMSE]),
    ):
        for kinds in ([Kind.WORKER], list(Kind)):
            with pytest.raises(Conflict), supervisor.data_lock(tmp_path, kinds):
                pass
    with supervisor.data_lock(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(InvalidParameter, match="data: "),
        supervisor.data_lock(tmp_path / "file" / "data"),
    ):
        pass
