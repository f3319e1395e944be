"""Sealing: into the store and back, at every kill point, with readers under way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless

from gateway.app import open_objects
from pacs.repository import packs as rows
from pacs.services.sealing import Sealing
from storage.kernel.errors import DependencyDown, Gone, LostRace
from storage.kernel.settings import Objects, Settings
from storage.objects.protocol import ObjectInfo, ObjectStore
from storage.packs.seal import PackBuilder
from tests.support.datasets import ct_slice, uid
from tests.support.lifecycle import (
    DAY,
    GRACE_SECONDS,
    Jobs,
    Life,
    admin,
    content,
    let_go,
    lives,
)

STUDY, SERIES = uid(1), uid(1, 1)
SEAL = {"tenant": "default", "series": SERIES, "version": 1}


@pytest.fixture
def objects(tmp_path: Path, object_store_settings: Objects) -> ObjectStore:
    return open_objects(Settings(data=tmp_path, objects=object_store_settings))


@pytest.fixture
def life(tmp_path: Path, database_url: str, objects: ObjectStore) -> Iterator[Life]:
    yield from lives(tmp_path, database_url, objects)


#: For what does not depend on engine or store.
on_one = [
    pytest.mark.parametrize("database_url", ["sqlite"], indirect=True),
    pytest.mark.parametrize("object_store_settings", ["files"], indirect=True),
]


def once(test: Callable[..., None]) -> Callable[..., None]:
    for mark in on_one:
        test = mark(test)
    return test


def arrive(life: Life, *numbers: int) -> None:
    """Store instances against their order and settle."""
    for number in sorted(numbers, reverse=True):
        life.store(ct_slice(number=number))
    life.settle_all()


def places(life: Life) -> list[tuple[Any, ...]]:
    return life.rows(
        "SELECT pack.kind, pack.place, pack.state, instance_number FROM instance"
        " JOIN pack ON pack.id = pack_pk ORDER BY pack.id, record_offset"
    )


def test_a_settled_series_lies_in_the_store_in_presentation_order(life: Life) -> None:
    arrive(life, 1, 2, 3)

    assert life.seal_all() == 3

    assert places(life) == [("sealed", "object", "closed", n) for n in (1, 2, 3)]
    for number in (1, 2, 3):
        assert life.bytes_of(uid(1, 1, number)) == content(ct_slice(number=number))
    assert life.rows("SELECT sealed_version FROM series") == [(1,)]
    [info] = list(life.objects.list("packs/"))
    [(size, digest)] = life.rows(
        "SELECT size_bytes, sha256 FROM pack WHERE kind='sealed'"
    )
    stored = life.objects.stat(info.key)
    assert stored == ObjectInfo(info.key, size, bytes(digest).hex())


def test_the_old_pack_is_retired_when_it_is_closed_and_empty(life: Life) -> None:
    arrive(life, 1, 2)
    life.seal_all()
    assert life.rows("SELECT state FROM pack WHERE kind='log'") == [("open",)]

    life.roll()
    life.retirement.tick()
    assert life.rows("SELECT state FROM pack WHERE kind='log'") == [("retired",)]
    assert len(life.files()) == 1

    life.clock.turn(GRACE_SECONDS + 1)
    life.retirement.tick()
    assert life.rows("SELECT state FROM pack WHERE kind='log'") == []
    assert life.files() == []
    assert life.bytes_of(uid(1, 1, 1)) == content(ct_slice(number=1))


def test_a_pack_that_still_holds_live_records_stays(life: Life) -> None:
    arrive(life, 1)
    life.store(ct_slice(seed=2))
    life.seal_all()
    life.roll()

    life.retirement.tick()
    life.clock.turn(GRACE_SECONDS + 1)
    life.retirement.tick()

    assert life.bytes_of(uid(2, 1, 1)) == content(ct_slice(seed=2))
    assert len(life.files()) == 1


def test_a_large_object_is_sealed_and_its_pack_retired(life: Life) -> None:
    ds = ct_slice(size=600)
    life.store_large(ds)
    life.settle_all()

    life.seal_all()
    life.clock.turn(GRACE_SECONDS + 1)
    life.retirement.tick()

    assert life.files() == []
    assert life.bytes_of(uid(1, 1, 1)) == content(ds)


@once
def test_frames_are_found_after_the_move(life: Life) -> None:
    frames = [bytes([n]) * 50 for n in range(1, 4)]
    ds = ct_slice(NumberOfFrames=3)
    ds.PixelData = encapsulate(frames, has_bot=True)
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    life.store(ds, syntax=JPEG2000Lossless)
    before = [life.retrieve.frame(life.located(uid(1, 1, 1)), n) for n in (1, 2, 3)]
    life.settle_all()

    life.seal_all()

    stored = life.located(uid(1, 1, 1))
    assert places(life)[0][0] == "sealed"
    assert [life.retrieve.frame(stored, n) for n in (1, 2, 3)] == before
    assert [one.data[:50] for one in before] == frames


@once
def test_growth_seals_what_has_come(life: Life) -> None:
    arrive(life, 1, 2)
    life.seal_all()
    arrive(life, 3)

    assert life.seal_all() == 1

    assert life.rows("SELECT count(*) FROM pack WHERE kind='sealed'") == [(2,)]
    assert life.rows("SELECT sealed_version FROM series") == [(2,)]


@once
def test_a_job_is_asked_for_once_for_each_settled_version(life: Life) -> None:
    arrive(life, 1)
    jobs = Jobs()
    [event] = life.events("study.settled")

    life.sealing.follow(event, jobs)
    life.sealing.follow(event, jobs)

    [(name, key)] = jobs.asked
    assert name == life.sealing.job == "seal.node-1"
    assert key == f"default:{SERIES}:1:{event.created_us}"
    assert jobs.asked[name, key] == SEAL


@once
def test_a_study_that_is_gone_asks_for_nothing(life: Life) -> None:
    arrive(life, 1)
    life.deletion.delete(admin(), STUDY)
    jobs = Jobs()
    for event in life.events("study.settled"):
        life.sealing.follow(event, jobs)

    assert jobs.asked == {}
    assert life.sealing.seal(SEAL) == {"instances": 0, "packs": 0, "bytes": 0}


@once
def test_sealing_twice_changes_nothing(life: Life) -> None:
    arrive(life, 1, 2)
    first = life.sealing.seal(SEAL)
    before = places(life)

    assert life.sealing.seal(SEAL)["instances"] == 0
    assert first["instances"] == 2
    assert places(life) == before


@once
def test_a_long_series_gets_several_packs(
    tmp_path: Path, database_url: str, objects: ObjectStore
) -> None:
    for life in lives(tmp_path, database_url, objects, pack_bytes=8000):
        arrive(life, 1, 2, 3, 4)

        done = life.sealing.seal(SEAL)

        assert (done["instances"], done["packs"]) == (4, 2)
        assert [place[3] for place in places(life)] == [1, 2, 3, 4]


def test_a_reader_finds_its_bytes_across_swap_and_unlink(life: Life) -> None:
    ds = ct_slice(size=1000)
    life.store(ds)
    life.settle_all()
    stored = life.located(uid(1, 1, 1))
    stream = life.retrieve.dataset(stored, stored.transfer_syntax_uid)
    parts = [next(stream.chunks)]

    life.seal_all()
    life.roll()
    life.clock.turn(GRACE_SECONDS + 1)
    life.retirement.tick()
    life.clock.turn(GRACE_SECONDS + 1)
    life.retirement.tick()
    assert life.files() == []
    parts += stream.chunks

    assert b"".join(parts) == content(ds)


@once
def test_a_reader_of_something_deleted_and_unlinked_is_told(life: Life) -> None:
    arrive(life, 1)
    stored = life.located(uid(1, 1, 1))
    life.seal_all()
    life.roll()
    life.clock.turn(GRACE_SECONDS + 1)
    life.retirement.tick()
    life.deletion.delete(admin(), STUDY)
    life.clock.turn(GRACE_SECONDS + 1)
    life.retirement.tick()

    with pytest.raises(Gone):
        life.retrieve.read_object(stored, 0, 10)


@once
def test_a_reader_never_goes_on_in_other_content(life: Life) -> None:
    """On SQLite the new row may even have the key of the old one."""
    life.store(ct_slice(size=1536))
    stored = life.located(uid(1, 1, 1))
    stream = life.retrieve.dataset(stored, stored.transfer_syntax_uid)
    next(stream.chunks)
    [path] = life.files()
    life.roll()
    life.deletion.delete(admin(), STUDY)
    life.store(ct_slice(size=1536, StationName="OTHER"))
    life.reader.forget(stored.pack_key)
    path.unlink()

    with pytest.raises(Gone):
        next(stream.chunks)


class Killed(BaseException):
    """The process ends here."""


KILL_POINTS: dict[str, tuple[type, str, bool]] = {
    "before-copy": (PackBuilder, "copy", False),
    "after-copy": (PackBuilder, "copy", True),
    "before-put": (PackBuilder, "put", False),
    "after-put": (PackBuilder, "put", True),
    "before-swap": (Sealing, "_swap", False),
    "after-swap": (Sealing, "_swap", True),
    "before-retire": (Sealing, "_retire", False),
}


@once
@pytest.mark.parametrize("point", KILL_POINTS)
def test_a_job_that_is_killed_leaves_nothing_but_an_orphan(
    life: Life, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    arrive(life, 1, 2)
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
            life.sealing.seal(SEAL)
    for number in (1, 2):
        assert life.bytes_of(uid(1, 1, number)) == content(ct_slice(number=number))

    assert life.recover().findings == []
    life.sealing.seal(SEAL)
    life.clock.turn(DAY + 1)
    life.retirement.tick()

    assert list(life.folder.glob("??/*.partial")) == []
    assert [place[:3] for place in places(life)] == [("sealed", "object", "closed")] * 2
    assert len(list(life.objects.list("packs/"))) == 1
    assert life.rows("SELECT count(*) FROM pack WHERE place='object'") == [(1,)]
    for number in (1, 2):
        assert life.bytes_of(uid(1, 1, number)) == content(ct_slice(number=number))


@once
def test_a_store_that_is_down_leaves_everything_readable(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrive(life, 1)

    def down(*_: object) -> None:
        raise DependencyDown("object store does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(life.objects, "stat", down)
        with pytest.raises(DependencyDown):
            life.sealing.seal(SEAL)
    assert life.rows("SELECT count(*) FROM pack") == [(1,)]
    assert life.bytes_of(uid(1, 1, 1)) is not None

    assert life.sealing.seal(SEAL)["instances"] == 1


@once
def test_a_store_that_keeps_other_bytes_is_found_out(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrive(life, 1)
    read = life.objects.read

    def flips(key: str, offset: int, length: int) -> bytes:
        data = bytearray(read(key, offset, length))
        data[-1] ^= 1
        return bytes(data)

    with monkeypatch.context() as patch:
        patch.setattr(life.objects, "read", flips)
        with pytest.raises(Exception, match="does not hold"):
            life.sealing.seal(SEAL)

    assert list(life.objects.list()) == []
    assert places(life)[0][0] == "log"


def test_a_deletion_during_the_job_wins(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrive(life, 1, 2)
    put = PackBuilder.put

    def and_delete(builder: PackBuilder, objects: ObjectStore) -> None:
        put(builder, objects)
        life.deletion.delete(admin(), STUDY, SERIES, uid(1, 1, 1))

    with monkeypatch.context() as patch:
        patch.setattr(PackBuilder, "put", and_delete)
        with pytest.raises(LostRace):
            life.sealing.seal(SEAL)
    assert list(life.objects.list()) == []

    assert life.sealing.seal(SEAL)["instances"] == 1
    assert life.bytes_of(uid(1, 1, 1)) is None
    assert life.bytes_of(uid(1, 1, 2)) is not None


@once
def test_a_damaged_record_stays_and_the_rest_is_sealed(
    life: Life, caplog: pytest.LogCaptureFixture
) -> None:
    arrive(life, 1, 2)
    stored = life.located(uid(1, 1, 1))
    path = life.files()[0]
    data = bytearray(path.read_bytes())
    data[stored.object_offset + stored.object_length - 1] ^= 1
    path.write_bytes(data)

    assert life.sealing.seal(SEAL)["instances"] == 1

    assert [place[0] for place in places(life)] == ["log", "sealed"]
    assert [r.event for r in caplog.records if hasattr(r, "event")].count(
        "record.damaged"
    ) == 1


@once
def test_a_pack_with_records_the_index_does_not_know_is_left_alone(
    life: Life, caplog: pytest.LogCaptureFixture
) -> None:
    arrive(life, 1)
    life.store(ct_slice(number=2))
    life.seal_all()
    life.sealing.seal({**SEAL, "version": 2})
    with life.database.write() as connection:
        # As if the rows of the second had been lost.
        connection.exec_driver_sql("DELETE FROM instance WHERE instance_number = 2")
    life.roll()

    life.retirement.tick()

    assert life.rows("SELECT state FROM pack WHERE kind='log'") == [("closed",)]
    assert "records the index does not know" in caplog.text


@once
def test_other_nodes_packs_are_not_ours_to_seal(life: Life) -> None:
    arrive(life, 1)
    with life.database.write() as connection:
        connection.exec_driver_sql("UPDATE pack SET node_id = 'node-2'")

    assert life.sealing.seal(SEAL)["instances"] == 0
    with life.database.read() as connection:
        pack = rows.find_pack(connection, life.files()[0].stem)
    assert pack is not None
    assert pack.state == "open"
