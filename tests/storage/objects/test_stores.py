"""The contract of object stores: one suite, files and S3."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from storage.kernel.errors import (
    CorruptData,
    DependencyDown,
    InvalidParameter,
    NotFound,
)
from storage.kernel.settings import S3, Objects
from storage.objects import s3
from storage.objects.files import FileObjectStore
from storage.objects.protocol import ObjectInfo, ObjectStore
from storage.objects.s3 import S3ObjectStore

Put = Callable[[str, bytes], ObjectInfo]


@pytest.fixture
def store(object_store_settings: Objects, tmp_path: Path) -> ObjectStore:
    if object_store_settings.kind == "s3":
        return S3ObjectStore(object_store_settings.s3)
    return FileObjectStore(tmp_path / "objects")


@pytest.fixture
def put(store: ObjectStore, tmp_path: Path) -> Put:
    def do(key: str, data: bytes) -> ObjectInfo:
        path = tmp_path / "source"
        path.write_bytes(data)
        return store.put_file(key, path, hashlib.sha256(data).hexdigest())

    return do


def test_what_was_put_is_read_back(store: ObjectStore, put: Put) -> None:
    data = bytes(range(256)) * 40

    info = put("packs/ab/one.pack", data)

    assert info == ObjectInfo(
        "packs/ab/one.pack", len(data), hashlib.sha256(data).hexdigest()
    )
    assert store.stat("packs/ab/one.pack") == info
    assert store.read("packs/ab/one.pack", 0, len(data)) == data


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, 3, b"012"),
        (7, 3, b"789"),
        (8, 100, b"89"),
        (10, 5, b""),
        (5000, 5, b""),
        (3, 0, b""),
    ],
)
def test_a_range_is_what_there_is_of_it(
    store: ObjectStore, put: Put, offset: int, length: int, expected: bytes
) -> None:
    put("key", b"0123456789")

    assert store.read("key", offset, length) == expected


def test_an_object_of_several_parts_is_whole(
    store: ObjectStore, put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    data = b"".join(number.to_bytes(4, "big") for number in range(3 << 20))

    info = put("large", data)

    assert store.stat("large") == info
    assert store.read("large", (5 << 20) - 2, 4) == data[(5 << 20) - 2 :][:4]


def test_an_empty_object_is_an_object(store: ObjectStore, put: Put) -> None:
    assert put("empty", b"").size == 0
    assert store.read("empty", 0, 10) == b""


def test_what_is_not_there(store: ObjectStore) -> None:
    assert store.stat("nothing") is None
    with pytest.raises(NotFound):
        store.read("nothing", 0, 1)
    with pytest.raises(NotFound):
        store.read("nothing", 0, 0)
    store.delete("nothing")
    assert list(store.list()) == []


def test_an_object_is_replaced(store: ObjectStore, put: Put) -> None:
    put("key", b"first")
    put("key", b"the second")

    assert store.read("key", 0, 100) == b"the second"
    found = store.stat("key")
    assert found is not None
    assert found.sha256 == hashlib.sha256(b"the second").hexdigest()


def test_a_deleted_object_is_gone(store: ObjectStore, put: Put) -> None:
    put("key", b"data")

    store.delete("key")

    assert store.stat("key") is None
    assert list(store.list()) == []


def test_objects_are_listed_by_prefix_and_in_order(
    store: ObjectStore, put: Put
) -> None:
    for key in ("packs/b/2", "packs/a/1", "packs/a/3", "other/1"):
        put(key, key.encode())

    listed = [(one.key, one.size) for one in store.list("packs/")]

    assert listed == [("packs/a/1", 9), ("packs/a/3", 9), ("packs/b/2", 9)]
    assert next(iter(store.list())).key == "other/1"


def test_bytes_that_are_not_those_promised_are_not_kept(
    store: ObjectStore, tmp_path: Path
) -> None:
    path = tmp_path / "source"
    path.write_bytes(b"other bytes")

    with pytest.raises(CorruptData):
        store.put_file("key", path, hashlib.sha256(b"bytes").hexdigest())

    assert store.stat("key") is None


@pytest.mark.parametrize("key", ["", "../up", "a/../b", "/root", "a//b", "a b", ".x"])
def test_a_key_that_could_leave_the_store_is_refused(
    store: ObjectStore, tmp_path: Path, key: str
) -> None:
    path = tmp_path / "source"
    path.write_bytes(b"")
    with pytest.raises(InvalidParameter):
        store.put_file(key, path, "")
    with pytest.raises(InvalidParameter):
        store.read(key, 0, 1)
    with pytest.raises(InvalidParameter):
        store.stat(key)
    with pytest.raises(InvalidParameter):
        store.delete(key)


def test_a_source_that_is_not_there_is_our_own_error(
    store: ObjectStore, tmp_path: Path
) -> None:
    with pytest.raises(DependencyDown):
        store.put_file("key", tmp_path / "missing", "")


def test_files_of_a_killed_upload_go_after_a_day(tmp_path: Path) -> None:
    store = FileObjectStore(tmp_path / "objects")
    source = tmp_path / "source"
    source.write_bytes(b"kept")
    store.put_file("a/kept.pack", source, hashlib.sha256(b"kept").hexdigest())
    folder = tmp_path / "objects" / "a"
    left = [folder / ".put-old", folder / "never.pack.sha256"]
    young = [folder / ".put-young", folder / "soon.pack.sha256"]
    for path in (*left, *young):
        path.write_bytes(b"half")
    long_ago = time.time() - 2 * 86_400
    for path in (*left, *folder.glob("kept*")):
        os.utime(path, (long_ago, long_ago))

    assert store.sweep() == 2
    assert store.sweep() == 0

    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in young)
    assert store.read("a/kept.pack", 0, 9) == b"kept"
    assert store.stat("a/kept.pack") == ObjectInfo(
        "a/kept.pack", 4, hashlib.sha256(b"kept").hexdigest()
    )


def test_a_store_that_works_is_healthy_and_leaves_no_trace(store: ObjectStore) -> None:
    store.health()

    assert list(store.list()) == []


class Fake:
    """A service on a socket that answers every request with the same bytes."""

    def __init__(self, answer: bytes | None) -> None:
        self.requests = 0
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(client)
            self.requests += 1
            client.recv(65536)
            if self._answer is not None:
                client.sendall(self._answer)
                client.close()

    def close(self) -> None:
        self._listener.close()
        for client in self._open:
            client.close()


def s3_settings(endpoint: str, seconds: float = 0.1) -> S3:
    return S3(
        endpoint=endpoint,
        access_key=SecretStr("key"),
        secret_key=SecretStr("secret"),
        secure=False,
        timeout_seconds=seconds,
    )


@pytest.fixture
def faking() -> Iterator[Callable[[bytes | None], Fake]]:
    made: list[Fake] = []

    def start(answer: bytes | None) -> Fake:
        made.append(Fake(answer))
        return made[-1]

    yield start
    for one in made:
        one.close()


@pytest.mark.parametrize(
    "answer",
    [
        None,
        b"",
        b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nshort",
        b"nothing like HTTP\r\n\r\n",
        b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n",
    ],
    ids=["silent", "hangs-up", "500", "wrong-length", "not-http", "refuses"],
)
def test_d02_a_service_that_fails_is_down_and_nothing_else(
    faking: Callable[[bytes | None], Fake], tmp_path: Path, answer: bytes | None
) -> None:
    path = tmp_path / "source"
    path.write_bytes(b"data")
    digest = hashlib.sha256(b"data").hexdigest()
    calls: list[Callable[[ObjectStore], object]] = [
        lambda store: store.put_file("key", path, digest),
        lambda store: store.read("key", 0, 1000),
        lambda store: store.health(),
        lambda store: list(store.list()),
    ]
    for call in calls:
        store = S3ObjectStore(s3_settings(faking(answer).endpoint))
        with pytest.raises(DependencyDown):
            call(store)


def test_d02_after_a_failure_calls_fail_without_asking_until_the_service_had_time(
    faking: Callable[[bytes | None], Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = faking(None)
    store = S3ObjectStore(s3_settings(fake.endpoint))
    with pytest.raises(DependencyDown):
        store.read("key", 0, 10)
    asked = fake.requests

    with pytest.raises(DependencyDown):
        store.read("key", 0, 10)
    assert fake.requests == asked

    later = time.monotonic() + s3.COOL_SECONDS + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    with pytest.raises(DependencyDown):
        store.read("key", 0, 10)
    assert fake.requests > asked


def test_files_list_what_is_there_while_others_delete(
    tmp_path: Path,
) -> None:
    store = FileObjectStore(tmp_path / "objects")
    source = tmp_path / "source"
    source.write_bytes(b"x")
    digest = hashlib.sha256(b"x").hexdigest()
    for key in ("a", "b", "c"):
        store.put_file(key, source, digest)

    listed = store.list()
    next(listed)
    store.delete("b")

    assert [one.key for one in listed] == ["c"]
