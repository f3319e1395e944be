"""Appending: durable before it returns, nothing left when it fails."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from storage.kernel.errors import DependencyDown, StorageFull
from storage.kernel.settings import SyncPolicy
from storage.packs.format import Kind, Record, RecordHeader, RecordInfo
from storage.packs.recover import claimed, is_alive, iter_records, remove_partial
from storage.packs.writer import (
    FILL_BYTES,
    PARTIAL,
    SPLIT_BYTES,
    PackWriter,
    pack_path,
)


def a_record(number: int = 1, size: int = 100, tenant: str = "default") -> Record:
    header = RecordHeader(tenant, "dimse", number, "1.2", "1.2", f"1.2.{number}", 0)
    return Record(header, (bytes([number % 256]) * size,), bytes(32))


def opened(folder: Path, **options: Any) -> PackWriter:
    return PackWriter(folder, **{"roll_bytes": 1 << 30, **options})


def uids(folder: Path) -> list[str]:
    return [
        one.header.sop_instance_uid
        for path in sorted(folder.glob("??/*.pack"))
        for one in iter_records(path)
        if isinstance(one, RecordInfo)
    ]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note what is asked of the disk, in order."""
    noted: list[str] = []
    for name in ("pwritev", "fdatasync", "fsync"):
        real = getattr(os, name)

        def noting(*args: Any, name: str = name, real: Any = real) -> Any:
            noted.append(name)
            return real(*args)

        monkeypatch.setattr(os, name, noting)
    return noted


def test_a_group_is_written_and_then_synced_once(
    tmp_path: Path, calls: list[str]
) -> None:
    packs = opened(tmp_path / "packs")
    packs.append([a_record()])
    calls.clear()

    packs.append([a_record(number) for number in range(2, 10)])

    assert calls == ["pwritev", "fdatasync"]


def test_a_new_pack_is_synced_with_its_folders(
    tmp_path: Path, calls: list[str]
) -> None:
    packs = opened(tmp_path / "packs")
    calls.clear()

    packs.append([a_record()])

    # The header, the record, zero bytes for those to come.
    assert calls == ["pwritev"] * 3 + ["fdatasync", "fsync", "fsync"]


@pytest.mark.parametrize("policy", [SyncPolicy.ASSOCIATION, SyncPolicy.NONE])
def test_a_weaker_policy_syncs_when_it_is_told_to(
    tmp_path: Path, calls: list[str], policy: SyncPolicy
) -> None:
    packs = opened(tmp_path / "packs", sync=policy)
    calls.clear()
    packs.append([a_record(1)])
    packs.append([a_record(2)])
    assert "fdatasync" not in calls

    packs.sync()
    packs.sync()

    assert calls.count("fdatasync") == 1


def test_tombstones_are_synced_under_every_policy(
    tmp_path: Path, calls: list[str]
) -> None:
    packs = opened(tmp_path / "packs", sync=SyncPolicy.NONE)

    packs.append_tombstones([a_record().header])

    assert calls[-3:] == ["fdatasync", "fsync", "fsync"]
    [path] = packs.folder.glob("??/*.pack")
    assert [one.kind for one in iter_records(path) if isinstance(one, RecordInfo)] == [
        Kind.TOMBSTONE
    ]


def test_tenants_have_packs_of_their_own(tmp_path: Path) -> None:
    packs = opened(tmp_path / "packs")

    places = packs.append(
        [a_record(1, tenant="a"), a_record(2, tenant="b"), a_record(3, tenant="a")]
    )

    assert places[0].pack_key == places[2].pack_key != places[1].pack_key
    assert places[2].record_offset > places[0].record_offset


def test_a_long_pack_is_closed_and_told(tmp_path: Path) -> None:
    closed: list[tuple[str, int]] = []
    packs = opened(
        tmp_path / "packs",
        roll_bytes=1000,
        on_closed=lambda key, size: closed.append((key, size)),
    )

    [first] = packs.append([a_record(1, 2000)])
    [second] = packs.append([a_record(2, 10)])

    path = pack_path(packs.folder, first.pack_key)
    assert closed == [(first.pack_key, path.stat().st_size)]
    assert second.pack_key != first.pack_key
    assert not is_alive(path)
    assert is_alive(pack_path(packs.folder, second.pack_key))


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (errno.ENOSPC, StorageFull),
        (errno.EDQUOT, StorageFull),
        (errno.EIO, DependencyDown),
    ],
)
@pytest.mark.parametrize("call", ["pwritev", "fdatasync"])
def test_a_failed_append_leaves_nothing_and_the_next_one_works(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    error: type[Exception],
    call: str,
) -> None:
    packs = opened(tmp_path / "packs")
    packs.append([a_record(1)])

    def fails(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        with pytest.raises(error):
            packs.append([a_record(2), a_record(3)])
    assert uids(packs.folder) == ["1.2.1"]

    [place] = packs.append([a_record(4)])

    assert sorted(uids(packs.folder)) == ["1.2.1", "1.2.4"]
    synced_again = len(list(packs.folder.glob("??/*.pack"))) == 1
    # A pack whose sync failed takes no more.
    assert synced_again == (call == "pwritev")
    assert place.object_length == 100


def test_a_write_that_is_cut_short_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwritev

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        return real(fd, [buffers[0][:7]], offset)

    monkeypatch.setattr(os, "pwritev", short)
    packs = opened(tmp_path / "packs")

    packs.append([a_record(1), a_record(2)])

    assert uids(packs.folder) == ["1.2.1", "1.2.2"]


def test_a_sync_that_failed_as_a_pack_was_closed_is_told_at_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs = opened(tmp_path / "packs", sync=SyncPolicy.ASSOCIATION, roll_bytes=10)

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "x")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fails)
        packs.append([a_record(1)])

    with pytest.raises(DependencyDown):
        packs.sync()
    packs.sync()


def test_a_pack_that_a_process_appends_to_is_alive_until_it_lets_go(
    tmp_path: Path,
) -> None:
    packs = opened(tmp_path / "packs")
    [place] = packs.append([a_record()])
    path = pack_path(packs.folder, place.pack_key)

    with claimed(path) as mine:
        assert not mine
    packs.close()

    with claimed(path) as mine:
        assert mine
    assert not is_alive(tmp_path / "nothing")


def test_a_large_record_is_named_when_it_is_whole(tmp_path: Path) -> None:
    packs = opened(tmp_path / "packs")
    large = packs.open_large(a_record().header)
    large.write(b"first ")
    large.write(b"second")
    assert list(packs.folder.glob("??/*.pack")) == []
    with large.mmap() as mapped:
        assert mapped[large.object_offset :] == b"first second"

    place = large.finish(bytes(32))

    path = pack_path(packs.folder, place.pack_key)
    assert is_alive(path)
    large.release()
    assert not is_alive(path)
    [info] = iter_records(path)
    assert isinstance(info, RecordInfo)
    assert info.location == place
    assert path.read_bytes()[place.object_offset :][:12] == b"first second"


@pytest.mark.parametrize("finished", [False, True])
def test_what_is_aborted_or_discarded_leaves_nothing(
    tmp_path: Path, *, finished: bool
) -> None:
    packs = opened(tmp_path / "packs")
    large = packs.open_large(a_record().header)
    large.write(b"data")
    if finished:
        large.finish(bytes(32))
        large.discard()
    large.abort()
    large.abort()

    assert [path for path in packs.folder.rglob("*") if path.is_file()] == []
    with pytest.raises(DependencyDown):
        large.write(b"more")


def test_partial_files_of_the_living_stay(tmp_path: Path) -> None:
    packs = opened(tmp_path / "packs")
    large = packs.open_large(a_record().header)

    assert remove_partial(packs.folder) == 0
    large.release()
    assert remove_partial(packs.folder) == 1
    assert list(packs.folder.glob(f"??/*{PARTIAL}")) == []


def test_the_guard_says_no_in_time_and_yes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs = opened(tmp_path / "packs", min_free_bytes=1000)
    free = 1000 + 500
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))

    packs.append([a_record(1, 10)])
    with pytest.raises(StorageFull):
        packs.append([a_record(2, 600)])
    free = 1000 - 1
    with pytest.raises(StorageFull):
        packs.check_space()
    free = 1 << 40

    packs.check_space()
    packs.append([a_record(3, 600)])
    assert uids(packs.folder) == ["1.2.1", "1.2.3"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder],  # noqa: S607
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip("file systems may not be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)  # noqa: S607


def fill(disk: Path, leave: int) -> Callable[[], None]:
    """Fill a disk but for `leave` bytes; return what gives the space back."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        file.write(bytes(max(0, free - leave)))
    return ballast.unlink


def test_d03_a_full_disk_is_refused_and_taken_up_again(small_disk: Path) -> None:
    packs = opened(small_disk / "packs")
    packs.append([a_record(1, 1000)])
    give_back = fill(small_disk, 64 * 1024)

    with pytest.raises(StorageFull):
        packs.append([a_record(2, 50_000), a_record(3, FILL_BYTES + 100_000)])
    large = packs.open_large(a_record(4).header)
    with pytest.raises(StorageFull):
        # Also what the failed append gave back does not suffice.
        large.write(bytes(FILL_BYTES + 200_000))
    large.abort()
    assert uids(packs.folder) == ["1.2.1"]

    give_back()
    packs.append([a_record(5, 100_000)])
    assert uids(packs.folder) == ["1.2.1", "1.2.5"]
    packs.close()


def test_d03_small_records_are_taken_without_room_to_fill(small_disk: Path) -> None:
    packs = opened(small_disk / "packs")
    packs.append([a_record(1, FILL_BYTES)])
    fill(small_disk, 64 * 1024)

    packs.append([a_record(2, 1000)])
    assert uids(packs.folder) == ["1.2.1", "1.2.2"]
    packs.close()


def test_small_records_lie_in_zero_bytes_written_before(tmp_path: Path) -> None:
    packs = opened(tmp_path / "packs")
    [first] = packs.append([a_record(1, 1000)])
    path = pack_path(packs.folder, first.pack_key)
    filled = path.stat().st_size

    number = 1
    while path.stat().st_size == filled:
        number += 1
        [last] = packs.append([a_record(number, 1000)])
    assert number > FILL_BYTES // 1500
    assert all(isinstance(one, RecordInfo) for one in iter_records(path))
    # Large ones take over what is filled, and need nothing filled behind them.
    packs.append([a_record(number + 1, 2 * FILL_BYTES)])
    assert path.stat().st_size < last.record_offset + 3 * FILL_BYTES

    packs.append([a_record(number + 2, 10)])
    packs.close()
    records = list(iter_records(path))
    assert isinstance(records[-1], RecordInfo)
    assert path.stat().st_size == records[-1].end
    assert uids(packs.folder) == [f"1.2.{n}" for n in range(1, number + 3)]


def test_d03_the_guard_refuses_before_the_disk_is_full(small_disk: Path) -> None:
    packs = opened(small_disk / "packs", min_free_bytes=1 << 20)
    packs.append([a_record(1, 1000)])
    give_back = fill(small_disk, (1 << 20) + 100_000)

    packs.append([a_record(2, 50_000)])
    with pytest.raises(StorageFull):
        packs.append([a_record(3, 110_000)])
    give_back()

    packs.append([a_record(4, 90_000)])
    assert uids(packs.folder) == ["1.2.1", "1.2.2", "1.2.4"]
    packs.close()


class Late:
    """A digest that is asked for while the record is on its way."""

    def __init__(self, asked: Callable[[], None]) -> None:
        self._asked = asked

    def digest(self) -> bytes:
        self._asked()
        return b"\7" * 32


def test_a_digest_is_waited_for_after_the_object_is_written_and_before_the_sync(
    tmp_path: Path, calls: list[str]
) -> None:
    packs = opened(tmp_path / "packs")
    packs.append([a_record()])
    calls.clear()
    large = a_record(2, 2 * SPLIT_BYTES)

    packs.append([replace(large, digest=Late(lambda: calls.append("digest")))])

    assert calls == ["pwritev", "digest", "pwritev", "fdatasync"]
    packs.close()
    assert uids(tmp_path / "packs") == ["1.2.1", "1.2.2"]


def test_without_its_trailer_a_record_is_a_torn_tail(tmp_path: Path) -> None:
    packs = opened(tmp_path / "packs")
    packs.append([a_record()])
    path = next(tmp_path.rglob("*.pack"))
    seen: list[bytes] = []
    large = a_record(2, 2 * SPLIT_BYTES)

    packs.append([replace(large, digest=Late(lambda: seen.append(path.read_bytes())))])

    crashed = tmp_path / "crashed" / "ab" / path.name
    crashed.parent.mkdir(parents=True)
    crashed.write_bytes(seen[0])
    assert uids(tmp_path / "crashed") == ["1.2.1"]
    assert uids(tmp_path / "packs") == ["1.2.1", "1.2.2"]


def test_a_digest_that_fails_takes_the_whole_group_back(tmp_path: Path) -> None:
    packs = opened(tmp_path / "packs")
    packs.append([a_record()])
    path = next(tmp_path.rglob("*.pack"))
    [first] = iter_records(path)
    assert isinstance(first, RecordInfo)

    def fail() -> None:
        raise DependencyDown("hash")

    large = replace(a_record(3, 2 * SPLIT_BYTES), digest=Late(fail))
    with pytest.raises(DependencyDown):
        packs.append([a_record(2), large])

    assert path.stat().st_size == first.end
    packs.append([a_record(4)])
    assert uids(tmp_path / "packs") == ["1.2.1", "1.2.4"]


def test_blocks_set_aside_are_given_back_when_a_pack_is_closed(tmp_path: Path) -> None:
    packs = opened(tmp_path / "packs")
    packs.append([a_record()])
    path = next(tmp_path.rglob("*.pack"))
    assert path.stat().st_blocks * 512 > FILL_BYTES

    packs.close()

    assert path.stat().st_size < 4096
    assert path.stat().st_blocks * 512 <= 4096
