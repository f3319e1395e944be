"""Frame tables: native by computing, encapsulated by tables, markers or counting."""

from __future__ import annotations

import struct
from array import array

import pytest

from pacs.imaging.dataset import scan
from pacs.imaging.frames import FrameTable, frame_ranges
from storage.kernel.errors import MalformedObject, NotFound
from storage.kernel.limits import Limits
from tests.fault.objects import EXPLICIT, FRAMES, JPEG, PIXEL_DATA, Objects

O = Objects(10)  # noqa: E741
START = b"\xff\xd8\xff"


def native(length: int, **values: int | None) -> FrameTable:
    described: dict[str, int | None] = {
        "rows": 4, "columns": 6, "samples": 1, "bits_allocated": 16, **values,
    }  # fmt: skip
    frames = described.pop("frames", 1) or 1
    return FrameTable.native(1000, length, frames=frames, **described)  # type: ignore[arg-type]


def test_native_frames_lie_one_behind_the_other() -> None:
    table = native(48 * 3, frames=3)
    assert [table.ranges(n) for n in (1, 2, 3)] == [
        [(1000, 48)], [(1048, 48)], [(1096, 48)],
    ]  # fmt: skip
    assert len(native(48 * 3 - 1, frames=3)) == 2
    assert len(native(48 * 9, frames=3)) == 3
    assert len(native(47)) == 0


@pytest.mark.parametrize("number", [0, -1, 2, 10**12])
def test_other_frames_do_not_exist(number: int) -> None:
    with pytest.raises(NotFound):
        native(48).ranges(number)


@pytest.mark.parametrize("missing", ["rows", "columns", "bits_allocated"])
@pytest.mark.parametrize("value", [None, 0])
def test_nothing_is_served_without_a_size(missing: str, value: int | None) -> None:
    assert len(native(10**6, **{missing: value})) == 0


def test_colour_counts_its_samples() -> None:
    assert native(72, samples=3, bits_allocated=8).ranges(1) == [(1000, 72)]
    table = FrameTable.native(
        0, 48, frames=1, rows=4, columns=6, samples=3, bits_allocated=8, subsampled=True
    )
    assert table.ranges(1) == [(0, 48)]


def test_frames_that_share_bytes_are_one_unit() -> None:
    assert native(2, rows=3, columns=5, bits_allocated=1).ranges(1) == [(1000, 2)]
    assert len(native(6, rows=3, columns=5, bits_allocated=1, frames=3)) == 0
    assert len(native(1, rows=3, columns=5, bits_allocated=1)) == 0
    assert len(native(8, rows=4, columns=4, bits_allocated=1, frames=4)) == 4


def frames_of(parts: list[bytes], frames: int, table: bytes = b"") -> list[bytes]:
    body = O.encapsulated(parts, {FRAMES: ("IS", b"%d" % frames)}, table=table)
    found = scan(body, 0, len(body), JPEG, Limits())
    made = frame_ranges(found, frames)
    packed = FrameTable.unpack(made.pack())
    assert [packed.ranges(n + 1) for n in range(len(packed))] == [
        made.ranges(n + 1) for n in range(len(made))
    ]
    return [
        b"".join(body[at : at + size] for at, size in made.ranges(n + 1))
        for n in range(len(made))
    ]


def test_one_fragment_for_each_frame() -> None:
    assert frames_of([b"aa", b"bb", b"cc"], 3) == [b"aa", b"bb", b"cc"]


def test_one_frame_takes_all_fragments() -> None:
    assert frames_of([b"aa", b"bb", b"cc"], 1) == [b"aabbcc"]


def test_frames_that_were_never_sent_do_not_exist() -> None:
    assert frames_of([b"aa", b"bb"], 3) == [b"aa", b"bb"]
    assert frames_of([b"aa"], 500) == [b"aa"]
    assert frames_of([], 1) == []


def test_the_basic_offset_table_divides_fragments() -> None:
    parts = [b"aa", b"bb", b"cc", b"dd"]
    assert frames_of(parts, 2, struct.pack("<2I", 0, 10)) == [b"aa", b"bbccdd"]
    assert frames_of(parts, 2, struct.pack("<2I", 0, 30)) == [b"aabbcc", b"dd"]


@pytest.mark.parametrize(
    "table", [(0, 11), (10, 20), (0, 0), (20, 10), (0, 40), (0, 2**32 - 1)]
)
def test_a22_wrong_tables_fall_back_to_markers(table: tuple[int, int]) -> None:
    parts = [START + b"a", b"bbbb", START + b"c", b"dddd"]
    packed = struct.pack("<2I", *table)
    assert frames_of(parts, 2, packed) == [START + b"abbbb", START + b"cdddd"]
    with pytest.raises(MalformedObject):
        frames_of([b"aaaa", b"bbbb", b"cccc"], 2, packed)


def test_native_scans_have_tables_too() -> None:
    body = O.dataset({FRAMES: ("IS", b"2 "), PIXEL_DATA: ("OW", bytes(96))})
    made = frame_ranges(scan(body, 0, len(body), EXPLICIT, Limits()), 2)
    assert [r for n in (1, 2) for r in made.ranges(n)] == [
        (len(body) - 96, 48), (len(body) - 48, 48),
    ]  # fmt: skip
    assert len(frame_ranges(scan(*_without_pixels()), 1)) == 0


def _without_pixels() -> tuple[bytes, int, int, str, Limits]:
    body = O.dataset(without=(PIXEL_DATA,))
    return body, 0, len(body), EXPLICIT, Limits()


def test_tables_of_nothing() -> None:
    assert len(FrameTable.empty()) == 0
    assert len(FrameTable.of_one_frame(array("Q"))) == 0
    assert FrameTable.of_one_frame(array("Q", (3, 4, 9, 1))).ranges(1) == [
        (3, 4), (9, 1),
    ]  # fmt: skip
