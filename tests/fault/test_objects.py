"""Table A of the bad-input table: files and data sets, through all three doors."""

from __future__ import annotations

import zlib

import pytest

from tests.fault.cases import CASES, Case
from tests.fault.doors import Archive, Door, StoreDoor, StowDoor, alive
from tests.fault.objects import Objects
from tests.support.node import RunningNode


def params(*doors: str) -> list[object]:
    return [pytest.param(case, id=case.id) for case in CASES if case.doors & set(doors)]


def seed(case: Case, door: str) -> int:
    return zlib.crc32(f"{case.id} {door}".encode())


def check(case: Case, door: Door) -> Objects:
    """Send the object of a case; assert the answer and what the index shows."""
    made = Objects(seed(case, door.name))
    claimed = case.claimed(made) if case.claimed is not None else None
    answer = door.send(case.make(made), claimed=claimed)
    assert answer.kind is case.kind, answer
    assert set(case.tags) <= answer.tags, answer
    assert door.has(made.instance_uid) == case.kind.is_kept
    return made


@pytest.mark.parametrize("case", params("import"))
def test_a_import(case: Case, archive: Archive) -> None:
    before = archive.left_behind()

    check(case, archive)

    if not case.kind.is_kept:
        assert archive.left_behind() == before
    good = Objects(1)
    alive(archive, good.good(), good.instance_uid)


@pytest.mark.parametrize("case", params("cstore"))
def test_a_cstore(case: Case, shared_node: RunningNode) -> None:
    door = StoreDoor(shared_node)

    check(case, door)

    good = Objects(1)
    alive(door, good.good(), good.instance_uid)


@pytest.mark.parametrize("case", params("stow"))
def test_a_stow(case: Case, shared_node: RunningNode) -> None:
    door = StowDoor(shared_node)

    check(case, door)

    good = Objects(1)
    alive(door, good.good(), good.instance_uid)
