"""Rows and files of a process' packs, kept in step."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pacs.repository import packs as rows
from storage.objects.files import FileObjectStore
from tests.support.datasets import ct_slice, uid
from tests.support.lifecycle import Life, admin, content, lives


@pytest.fixture
def life(tmp_path: Path, database_url: str) -> Iterator[Life]:
    yield from lives(
        tmp_path, database_url, FileObjectStore(tmp_path / "objects"), roll_bytes=5000
    )


def states(life: Life) -> list[tuple[str, int]]:
    return [(s, n) for s, n in life.rows("SELECT state, size_bytes FROM pack")]


def test_a_full_pack_is_noted_as_closed_with_its_size(life: Life) -> None:
    for number in (1, 2):
        life.store(ct_slice(number=number))
    [path] = life.files()
    assert states(life) == [("open", 0)]

    assert life.book.tick(life.packs, life.reader) == 1

    assert states(life) == [("closed", path.stat().st_size)]
    assert life.book.tick(life.packs, life.reader) == 0


def test_a_pack_that_closes_before_its_first_row_is_noted_later(life: Life) -> None:
    life.book.closed("0" * 32, 64)
    early = life.book.flush()
    with life.database.write() as connection:
        rows.register_pack(
            connection,
            key="0" * 32,
            tenant="default",
            kind="log",
            node_id="node-1",
            now_us=1,
        )

    assert (early, life.book.flush()) == (0, 1)
    assert states(life) == [("closed", 64)]


def test_a_pack_is_closed_when_that_is_asked_for(life: Life) -> None:
    life.store(ct_slice())
    [path] = life.files()
    life.book.tick(life.packs, life.reader)
    assert life.packs.open_keys() == [path.stem]
    with life.database.write() as connection:
        rows.ask_to_close(connection, [path.stem], 1)

    life.book.tick(life.packs, life.reader)

    assert states(life) == [("closed", path.stat().st_size)]
    life.store(ct_slice(number=2))
    assert len(life.files()) == 2


def test_an_unlinked_pack_is_let_go(life: Life) -> None:
    life.store(ct_slice())
    assert life.bytes_of(uid(1, 1, 1)) == content(ct_slice())
    life.files()[0].unlink()

    assert (life.reader.sweep(), life.reader.sweep()) == (1, 0)


def test_closing_packs_and_deleting_do_not_wait_for_each_other(life: Life) -> None:
    """One holds the writer's lock, the other the database's."""
    for number in range(1, 41):
        life.store(ct_slice(number=number, size=4))

    def delete() -> None:
        for number in range(1, 41):
            life.deletion.delete(admin(), uid(1), uid(1, 1), uid(1, 1, number))

    def receive() -> None:
        for number in range(1, 41):
            life.store(ct_slice(seed=2, number=number, size=40))

    threads = [threading.Thread(target=work) for work in (delete, receive)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert life.rows("SELECT count(*) FROM instance") == [(40,)]
