"""Erasing: no copy of deleted bytes is left when its row says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset

from gateway.app import open_objects
from pacs.services.erasure import Erasure
from storage.kernel.settings import DuplicatePolicy, Objects, Settings
from storage.objects.protocol import ObjectStore
from storage.packs.seal import PackBuilder
from tests.support.datasets import ct_slice, uid
from tests.support.lifecycle import (
    DAY,
    GRACE_SECONDS,
    REWRITE_SECONDS,
    Life,
    admin,
    content,
    let_go,
    lives,
)

STUDY, SERIES = uid(1), uid(1, 1)
MARK = "ERASED^STATION"


@pytest.fixture
def objects(tmp_path: Path, object_store_settings: Objects) -> ObjectStore:
    return open_objects(Settings(data=tmp_path, objects=object_store_settings))


@pytest.fixture
def life(tmp_path: Path, database_url: str, objects: ObjectStore) -> Iterator[Life]:
    yield from lives(tmp_path, database_url, objects)


on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
on_files = pytest.mark.parametrize("object_store_settings", ["files"], indirect=True)


def marked(number: int = 1, **more: Any) -> Dataset:
    return ct_slice(number=number, StationName=MARK, **more)


def erase(life: Life) -> None:
    """Let half of the time pass, and the grace of what is retired then."""
    life.clock.turn(REWRITE_SECONDS / 2 + 1)
    for _ in range(3):
        life.book.tick(life.packs, life.reader)
        while life.erasure.tick():
            pass
        life.book.tick(life.packs, life.reader)
        life.clock.turn(GRACE_SECONDS + 1)
        while life.retirement.tick():
            pass
    life.erasure.tick()


def erased(life: Life) -> list[bool]:
    return [
        row[0] is not None
        for row in life.rows("SELECT erased_us FROM deletion ORDER BY id")
    ]


def in_time(life: Life) -> bool:
    [(late,)] = life.rows(
        "SELECT count(*) FROM deletion WHERE erased_us IS NULL"
        " OR erased_us > deadline_us"
    )
    return bool(late == 0)


def test_an_open_pack_is_closed_and_rewritten_in_time(life: Life) -> None:
    kept = ct_slice(number=2)
    life.store(marked())
    life.store(kept)
    life.deletion.delete(admin(), STUDY, SERIES, uid(1, 1, 1))
    assert MARK.encode() in life.everywhere()

    erase(life)

    assert MARK.encode() not in life.everywhere()
    assert in_time(life)
    assert life.bytes_of(uid(1, 1, 2)) == content(kept)


def test_nothing_is_rewritten_before_half_the_time(life: Life) -> None:
    life.store(marked())
    life.store(ct_slice(number=2))
    life.deletion.delete(admin(), STUDY, SERIES, uid(1, 1, 1))
    life.roll()

    life.clock.turn(REWRITE_SECONDS / 2 - 10)

    assert life.erasure.tick() == 0
    assert MARK.encode() in life.everywhere()


def test_a_sealed_pack_is_rewritten_in_the_store(life: Life) -> None:
    kept = ct_slice(number=2)
    life.store(marked())
    life.store(kept)
    life.settle_all()
    life.seal_all()
    life.roll()
    life.deletion.delete(admin(), STUDY, SERIES, uid(1, 1, 1))

    erase(life)

    assert MARK.encode() not in life.everywhere()
    assert in_time(life)
    assert life.located(uid(1, 1, 2)).pack_key in {
        row[0] for row in life.rows("SELECT key FROM pack WHERE kind='sealed'")
    }
    assert life.bytes_of(uid(1, 1, 2)) == content(kept)
    assert len(list(life.objects.list("packs/"))) == 1


def test_a_large_object_goes_with_its_pack(life: Life) -> None:
    life.store_large(marked(size=600))
    life.deletion.delete(admin(), STUDY)

    erase(life)

    assert MARK.encode() not in life.everywhere()
    assert in_time(life)


@on_files
def test_the_pack_a_series_was_sealed_out_of_counts_too(life: Life) -> None:
    """The deletion names the sealed pack; the log pack still holds the bytes."""
    life.store(marked())
    other = ct_slice(seed=2)
    life.store(other)
    life.clock.turn(1)
    life.settling.settle(admin(), STUDY)
    life.seal_all()
    life.deletion.delete(admin(), STUDY)
    life.clock.turn(REWRITE_SECONDS / 2 + 1)
    life.erasure.tick()
    life.clock.turn(GRACE_SECONDS + 1)
    life.retirement.tick()
    life.erasure.tick()
    assert erased(life) == [False]

    erase(life)

    assert MARK.encode() not in life.everywhere()
    assert erased(life) == [True]
    assert life.bytes_of(uid(2, 1, 1)) == content(other)


@on_files
def test_erased_is_said_only_after_the_unlink(life: Life) -> None:
    life.store(marked())
    life.store(ct_slice(number=2))
    life.deletion.delete(admin(), STUDY, SERIES, uid(1, 1, 1))
    life.roll()
    life.clock.turn(REWRITE_SECONDS / 2 + 1)

    life.erasure.tick()
    life.erasure.tick()

    assert MARK.encode() in life.everywhere()
    assert erased(life) == [False]


@on_files
def test_replaced_content_is_kept_until_its_time_and_then_erased(
    tmp_path: Path, database_url: str, objects: ObjectStore
) -> None:
    for life in lives(
        tmp_path, database_url, objects, duplicates=DuplicatePolicy.IF_CHANGED
    ):
        now = ct_slice()
        life.store(marked())
        life.store(now)
        life.roll()

        life.clock.turn(REWRITE_SECONDS - 10)
        life.erasure.tick()
        assert MARK.encode() in life.everywhere()
        life.clock.turn(20)
        erase(life)

        assert MARK.encode() not in life.everywhere()
        assert erased(life) == [True]
        assert life.bytes_of(uid(1, 1, 1)) == content(now)


@on_files
def test_what_was_stored_again_stays(life: Life) -> None:
    ds = marked()
    life.store(ds)
    life.deletion.delete(admin(), STUDY)
    life.store(ds)

    erase(life)

    assert erased(life) == [True]
    assert life.bytes_of(uid(1, 1, 1)) == content(ds)
    assert life.everywhere().count(MARK.encode()) == 1


@on_files
def test_tombstones_outlive_the_pack_they_lie_in_while_they_bury(life: Life) -> None:
    """The sealed copy goes last; until then a rebuild must know of the deletion."""
    life.store(marked())
    life.store(ct_slice(number=2))
    life.settle_all()
    life.seal_all()
    life.deletion.delete(admin(), STUDY, SERIES, uid(1, 1, 1))
    life.roll()

    life.retirement.tick()
    life.clock.turn(GRACE_SECONDS + 1)
    life.retirement.tick()

    assert erased(life) == [False]
    local = b"".join(path.read_bytes() for path in life.files())
    assert MARK.encode() not in local
    assert uid(1, 1, 1).encode() in local


class Killed(BaseException):
    """The process ends here."""


KILL_POINTS: dict[str, tuple[type, str, bool]] = {
    "before-copy": (PackBuilder, "copy", False),
    "after-copy": (PackBuilder, "copy", True),
    "before-keep": (PackBuilder, "keep", False),
    "after-keep": (PackBuilder, "keep", True),
    "before-swap": (Erasure, "_swap", False),
    "after-swap": (Erasure, "_swap", True),
}


@on_sqlite
@on_files
@pytest.mark.parametrize("point", KILL_POINTS)
def test_a_rewrite_that_is_killed_loses_and_keeps_nothing(
    life: Life, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    kept = ct_slice(number=2)
    life.store(marked())
    life.store(kept)
    life.deletion.delete(admin(), STUDY, SERIES, uid(1, 1, 1))
    life.roll()
    life.clock.turn(REWRITE_SECONDS / 2 + 1)
    owner, name, after = KILL_POINTS[point]
    whole = getattr(owner, name)

    def dies(*args: Any, **more: Any) -> None:
        if after:
            whole(*args, **more)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies)
        patch.setattr(PackBuilder, "__exit__", let_go)
        with pytest.raises(Killed):
            life.erasure.tick()
    assert life.bytes_of(uid(1, 1, 2)) == content(kept)

    assert life.recover().findings == []
    erase(life)
    life.clock.turn(DAY + 1)
    life.retirement.tick()

    assert MARK.encode() not in life.everywhere()
    assert erased(life) == [True]
    assert life.bytes_of(uid(1, 1, 2)) == content(kept)
    assert list(life.folder.glob("??/*.partial")) == []
    copies = life.everywhere().count(content(kept))
    assert copies == 1


@on_files
def test_a_deletion_during_the_rewrite_wins(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (2, 3):
        life.store(ct_slice(number=number))
    life.store(marked())
    life.deletion.delete(admin(), STUDY, SERIES, uid(1, 1, 1))
    life.roll()
    life.clock.turn(REWRITE_SECONDS / 2 + 1)
    keep = PackBuilder.keep

    def and_delete(builder: PackBuilder) -> None:
        keep(builder)
        life.deletion.delete(admin(), STUDY, SERIES, uid(1, 1, 2))

    with monkeypatch.context() as patch:
        patch.setattr(PackBuilder, "keep", and_delete)
        life.erasure.tick()
    assert life.bytes_of(uid(1, 1, 2)) is None
    erase(life)
    erase(life)

    assert erased(life) == [True, True]
    assert MARK.encode() not in life.everywhere()
    assert content(ct_slice(number=2)) not in life.everywhere()
    assert life.bytes_of(uid(1, 1, 3)) == content(ct_slice(number=3))


@on_sqlite
@on_files
def test_a_damaged_neighbour_does_not_hold_up_erasing(life: Life) -> None:
    life.store(marked())
    life.store(ct_slice(number=2))
    stored = life.located(uid(1, 1, 2))
    life.deletion.delete(admin(), STUDY, SERIES, uid(1, 1, 1))
    life.roll()
    path = life.folder / stored.pack_key[:2] / f"{stored.pack_key}.pack"
    data = bytearray(path.read_bytes())
    data[stored.object_offset + stored.object_length - 1] ^= 1
    path.write_bytes(data)

    erase(life)

    assert erased(life) == [True]
    left = life.bytes_of(uid(1, 1, 2))
    assert left is not None
    assert left[:-1] == content(ct_slice(number=2))[:-1]


@on_sqlite
@on_files
def test_another_tenants_packs_are_not_touched(life: Life) -> None:
    life.store(marked(), tenant="a")
    life.store(ct_slice(), tenant="b")
    life.roll()
    life.deletion.delete(admin("a"), STUDY)
    [(before,)] = life.rows("SELECT key FROM pack WHERE tenant='b'")

    erase(life)

    assert life.rows("SELECT key FROM pack WHERE tenant='b'") == [(before,)]
    assert erased(life) == [True]
