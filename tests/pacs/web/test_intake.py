"""Parts on their way into the archive: order, bounds, and what goes wrong."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from pacs.domain.study import Accepted, Arrival, Outcome, Spool
from pacs.web import intake
from pacs.web.intake import EmptyPart, Intake, Reception, Refused
from storage.kernel.errors import DependencyDown, StorageFull, TooLarge
from storage.kernel.limits import KIB, MIB, Limits
from storage.kernel.types import DEFAULT_TENANT, Actor, Door, Source
from tests.support.datasets import ct_slice, dataset_bytes, part10

ACTOR = Actor(DEFAULT_TENANT, "test")
LIMITS = Limits(memory_instance_bytes=64 * KIB, instance_bytes=2 * MIB)


class FakeSpool:
    def __init__(self, fail_after: int | None) -> None:
        self.data = bytearray()
        self.aborted = 0
        self._fail_after = fail_after

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._fail_after is not None and len(self.data) >= self._fail_after:
            raise StorageFull("full")
        self.data += data

    def abort(self) -> None:
        self.aborted += 1


class FakeIngest:
    """Accepts everything; may be held up, and may fail."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []
        self.spools: list[FakeSpool] = []
        self.hold: threading.Event | None = None
        self.error: Exception | None = None
        self.fail_after: int | None = None
        self.n_inside = 0
        self.n_most = 0
        self.flushed = 0
        self.crowded = threading.Event()
        self._lock = threading.Lock()

    def check(self, actor: Actor, source: Source, **_: str) -> None:
        pass

    def open_spool(self, actor: Actor, source: Source, **_: str) -> Spool:
        self.spools.append(FakeSpool(self.fail_after))
        return self.spools[-1]

    def accept(self, arrival: Arrival) -> Accepted:
        with self._lock:
            self.n_inside += 1
            self.n_most = max(self.n_most, self.n_inside)
            if self.n_inside == 3:
                self.crowded.set()
        try:
            if self.hold is not None:
                self.hold.wait(20)
            if self.error is not None:
                raise self.error
            stored = arrival.dataset
            data = bytes(
                stored if isinstance(stored, memoryview) else self.spools[-1].data
            )
            with self._lock:
                self.seen.append(data)
            uid = arrival.claimed_instance_uid or ""
            return Accepted(Outcome.STORED, "1.2", uid, "1", "1.1")
        finally:
            with self._lock:
                self.n_inside -= 1

    def flush(self) -> None:
        self.flushed += 1


def receive(
    ingest: FakeIngest, run: Callable[[Reception], Any]
) -> list[Accepted | Refused]:
    """Run a coroutine on a reception; return the outcomes in the order of the parts."""
    found: dict[int, Accepted | Refused] = {}
    made = Intake(ingest, LIMITS, body_seconds=1)

    async def main() -> None:
        reception = Reception(made, ACTOR, Source(Door.WEB), None, found.__setitem__)
        try:
            await run(reception)
        finally:
            await reception.abort()
        await reception.drain()

    try:
        asyncio.run(main())
    finally:
        made.close()
    return [found[number] for number in sorted(found)]


async def put(reception: Reception, file: bytes, step: int = 10_000) -> None:
    reception.begin()
    for start in range(0, len(file), step):
        await reception.write(file[start : start + step])
    await reception.end()


def test_outcomes_keep_the_order_of_the_parts() -> None:
    ingest = FakeIngest()
    files = [part10(ct_slice(number=n)) for n in range(1, 40)]

    async def run(reception: Reception) -> None:
        for file in files:
            await put(reception, file, 1000)

    outcomes = receive(ingest, run)

    uids = [one.sop_instance_uid for one in outcomes]
    assert uids == [ct_slice(number=n).SOPInstanceUID for n in range(1, 40)]
    assert sorted(ingest.seen) == sorted(map(dataset_bytes, files))
    assert ingest.flushed == 1


def test_parts_in_flight_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    file = part10(ct_slice())
    monkeypatch.setattr(intake, "THREADS", 3)
    ingest = FakeIngest()
    ingest.hold = threading.Event()

    async def run(reception: Reception) -> None:
        sending = asyncio.create_task(many(reception))
        assert await asyncio.to_thread(ingest.crowded.wait, 20)
        for _ in range(100):
            await asyncio.sleep(0)
        assert not sending.done()
        assert ingest.hold is not None
        ingest.hold.set()
        await sending

    async def many(reception: Reception) -> None:
        for _ in range(10):
            await put(reception, file)

    outcomes = receive(ingest, run)

    assert len(outcomes) == 10
    assert ingest.n_most == 3


def test_bytes_in_flight_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    file = part10(ct_slice())
    monkeypatch.setattr(intake, "IN_FLIGHT_BYTES", len(file) + 10)
    ingest = FakeIngest()

    async def run(reception: Reception) -> None:
        for _ in range(10):
            await put(reception, file)

    assert len(receive(ingest, run)) == 10
    assert ingest.n_most == 1


@pytest.mark.parametrize("step", [1000, 65_536, 5 * MIB])
def test_large_data_sets_are_written_in_order(step: int) -> None:
    ingest = FakeIngest()
    file = part10(ct_slice(size=900))

    async def run(reception: Reception) -> None:
        await put(reception, file, step)

    (outcome,) = receive(ingest, run)

    assert isinstance(outcome, Accepted)
    assert ingest.seen == [dataset_bytes(file)]


def test_a_disk_that_fills_ends_the_spool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "BLOCK", 100 * KIB)
    ingest = FakeIngest()
    ingest.fail_after = 200 * KIB

    async def run(reception: Reception) -> None:
        await put(reception, part10(ct_slice(size=900)))

    (outcome,) = receive(ingest, run)

    assert isinstance(outcome, Refused)
    assert isinstance(outcome.error, StorageFull)
    assert outcome.sop_instance_uid == ct_slice().SOPInstanceUID
    assert ingest.spools[0].aborted
    assert ingest.seen == []


def test_what_is_too_large_ends_the_spool() -> None:
    ingest = FakeIngest()

    async def run(reception: Reception) -> None:
        await put(reception, part10(ct_slice(size=1200)))
        await put(reception, part10(ct_slice()))

    first, second = receive(ingest, run)

    assert isinstance(first, Refused)
    assert isinstance(first.error, TooLarge)
    assert ingest.spools[0].aborted
    assert isinstance(second, Accepted)


def test_a_part_that_never_ends_is_dropped() -> None:
    ingest = FakeIngest()

    async def run(reception: Reception) -> None:
        await put(reception, part10(ct_slice()))
        reception.begin()
        await reception.write(part10(ct_slice(size=900))[:-10])

    (outcome,) = receive(ingest, run)

    assert isinstance(outcome, Accepted)
    assert ingest.spools[0].aborted
    assert len(ingest.seen) == 1


def test_a_spool_that_breaks_unseen_is_ended_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ingest = FakeIngest()

    def broken(_: FakeSpool, data: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(FakeSpool, "write", broken)

    async def run(reception: Reception) -> None:
        reception.begin()
        await reception.write(part10(ct_slice(size=900)))

    with pytest.raises(ValueError, match="a bug"):
        receive(ingest, run)

    assert ingest.spools[0].aborted


@pytest.mark.parametrize("error", [DependencyDown("down"), ValueError("a bug")])
def test_errors_are_the_parts_own(error: Exception) -> None:
    ingest = FakeIngest()
    ingest.error = error

    async def run(reception: Reception) -> None:
        await put(reception, part10(ct_slice()))
        await put(reception, part10(ct_slice(size=900)))

    outcomes = receive(ingest, run)

    assert [type(one) for one in outcomes] == [Refused, Refused]
    assert all("bug" not in str(one.error) for one in outcomes)  # type: ignore[union-attr]


def test_an_empty_part_is_told_apart() -> None:
    async def run(reception: Reception) -> None:
        await put(reception, b"")
        await put(reception, b"x" * 500)

    first, second = receive(FakeIngest(), run)

    assert isinstance(first, Refused)
    assert isinstance(first.error, EmptyPart)
    assert isinstance(second, Refused)
    assert not isinstance(second.error, EmptyPart)
