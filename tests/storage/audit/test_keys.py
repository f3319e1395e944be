"""The key file and the memory beside it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from storage.audit.chain import Sealer
from storage.audit.keys import KEY_FILE, Memory, Seen, load_key, own_key
from storage.kernel.errors import DependencyDown, InvalidParameter

A, B, C = (bytes([n]) * 32 for n in (1, 2, 3))


def test_a_key_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "audit"

    key = own_key(folder)

    path = folder / KEY_FILE
    assert path.stat().st_mode & 0o777 == 0o600
    assert own_key(folder).key_id == key.key_id
    assert [one.name for one in folder.iterdir()] == [KEY_FILE]


def test_folders_have_keys_of_their_own(tmp_path: Path) -> None:
    assert own_key(tmp_path / "a").key_id != own_key(tmp_path / "b").key_id


def test_those_who_start_together_find_one_key(tmp_path: Path) -> None:
    found: list[str] = []
    start = threading.Barrier(8)

    def begin() -> None:
        start.wait()
        found.append(own_key(tmp_path / "audit").key_id)

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(found) == 8
    assert len(set(found)) == 1


@pytest.mark.parametrize("content", ["", "secret", "00" * 31, "00" * 33, "é" * 64])
def test_a_damaged_key_is_told_and_never_replaced(tmp_path: Path, content: str) -> None:
    path = tmp_path / KEY_FILE
    path.write_text(content, "utf-8")

    with pytest.raises(InvalidParameter, match="audit key"):
        own_key(tmp_path)

    assert path.read_text("utf-8") == content


def test_a_key_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="No such file"):
        load_key(tmp_path / "none")


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(DependencyDown, match="audit key"):
        own_key(tmp_path / "file" / "audit")


def test_a_key_does_not_tell_itself() -> None:
    key = bytes(range(32))
    sealer = Sealer(key)

    assert key.hex() not in repr(vars(sealer)["key_id"])
    assert len(sealer.key_id) == 16


class TestMemory:
    @pytest.fixture
    def memory(self, tmp_path: Path) -> Memory:
        return Memory(tmp_path, "access", Sealer(bytes(32)))

    def test_is_empty_at_first(self, memory: Memory) -> None:
        assert memory.read() is None
        assert list(memory.lost()) == []

    def test_advances_along_the_chain(self, memory: Memory) -> None:
        chain = {1: A, 2: B}

        assert memory.advance(Seen(1, A, 10), chain.get)
        assert memory.advance(Seen(2, B, 20), chain.get)

        assert memory.read() == Seen(2, B, 20)

    def test_does_not_go_back(self, memory: Memory) -> None:
        memory.advance(Seen(2, B, 20), {2: B}.get)

        assert memory.advance(Seen(1, A, 10), {1: A, 2: B}.get)

        assert memory.read() == Seen(2, B, 20)

    def test_keeps_what_the_chain_does_not_agree_with(self, memory: Memory) -> None:
        memory.advance(Seen(2, B, 20), {2: B}.get)

        assert not memory.advance(Seen(3, C, 30), {2: A, 3: C}.get)

        assert memory.read() == Seen(3, C, 30)
        assert list(memory.lost()) == [Seen(2, B, 20)]

    def test_tells_another_hash_in_the_same_place(self, memory: Memory) -> None:
        memory.advance(Seen(2, B, 20), {2: B}.get)

        assert not memory.advance(Seen(2, A, 30), {2: A}.get)

    def test_of_another_key_is_not_believed(
        self, memory: Memory, tmp_path: Path
    ) -> None:
        memory.advance(Seen(2, B, 20), {2: B}.get)

        with pytest.raises(InvalidParameter, match="key"):
            Memory(tmp_path, "access", Sealer(A)).read()
