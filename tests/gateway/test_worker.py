"""The worker's loops: isolated from each other, stopped together."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway import worker as worker_module
from gateway.worker import Follower, Loop, Worker, standard_loops
from storage import outbox
from storage.db import migrate
from storage.db.engine import Database
from storage.jobs.runner import JobRunner
from storage.kernel.clock import SystemClock
from storage.kernel.errors import DependencyDown
from storage.outbox import ChangeFeed, Event


@pytest.fixture(autouse=True)
def _backs_off_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "BACK_OFF_SECONDS", (0.01, 0.02))


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


@pytest.fixture
def running() -> Iterator[Callable[[Worker], None]]:
    stop = threading.Event()
    threads: list[threading.Thread] = []

    def start(worker: Worker) -> None:
        threads.append(threading.Thread(target=worker.run, args=(stop,)))
        threads[-1].start()

    yield start
    stop.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


class Broken:
    """Fails three times, then works."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.calls = 0

    def tick(self) -> int:
        self.calls += 1
        if self.calls <= 3:
            raise self.error
        return 0


class Counter:
    def __init__(self) -> None:
        self.seen: list[tuple[str, bool]] = []

    def looped(self, name: str, seconds: float, *, failed: bool) -> None:
        self.seen.append((name, failed))


def test_a_loop_that_fails_goes_on_and_leaves_the_others_alone(
    running: Callable[[Worker], None], caplog: pytest.LogCaptureFixture
) -> None:
    broken, other = Broken(RuntimeError("bug")), Broken(DependencyDown("db is down"))
    other.calls = 3
    counter = Counter()
    worker = Worker(
        [Loop("broken", broken.tick, 0.01), Loop("fine", other.tick, 0.01)],
        observer=counter,
    )

    with caplog.at_level(logging.WARNING):
        running(worker)
        eventually(lambda: worker.health and worker.health["broken"].rounds > 2)

    assert worker.health["broken"].failures == 3
    assert worker.health["broken"].failing_since is None
    assert worker.health["fine"].failures == 0
    assert counter.seen == [("broken", True)] * 3
    assert [r.getMessage() for r in caplog.records] == ["loop failed"] * 3


def test_what_is_down_is_a_warning_without_traceback(
    running: Callable[[Worker], None], caplog: pytest.LogCaptureFixture
) -> None:
    broken = Broken(DependencyDown("database does not answer"))
    running(Worker([Loop("x", broken.tick, 0.01)]))
    eventually(lambda: broken.calls > 4)

    assert {r.levelname for r in caplog.records} == {"WARNING"}
    assert all(r.exc_info is None for r in caplog.records)


class LateJobs(JobRunner):
    """Jobs whose database is away at first."""

    def __init__(self, failures: int) -> None:
        super().__init__("sqlite://")
        self.failures = failures
        self.calls: list[str] = []

    def start(self) -> None:
        self.calls.append("start")
        if len(self.calls) <= self.failures:
            raise DependencyDown("database does not answer")

    def stop(self, *, grace_seconds: int = 10) -> None:
        self.calls.append("stop")


def test_jobs_wait_for_their_database(
    running: Callable[[Worker], None], caplog: pytest.LogCaptureFixture
) -> None:
    jobs, ticked = LateJobs(2), threading.Event()

    def tick() -> int:
        ticked.set()
        return 0

    running(Worker([Loop("x", tick)], jobs))

    assert ticked.wait(10)
    assert jobs.calls == ["start"] * 3
    assert [r.getMessage() for r in caplog.records] == [
        "jobs wait: database does not answer"
    ] * 2


def test_a_worker_that_waits_for_its_jobs_can_be_stopped() -> None:
    jobs, stop = LateJobs(1_000_000), threading.Event()
    thread = threading.Thread(target=Worker([], jobs).run, args=(stop,))
    thread.start()
    eventually(lambda: jobs.calls)

    stop.set()
    thread.join(10)

    assert not thread.is_alive()
    assert "stop" not in jobs.calls


def test_a_busy_loop_does_not_pause(running: Callable[[Worker], None]) -> None:
    left = [100]

    def tick() -> int:
        left[0] -= left[0] > 0
        return left[0]

    running(Worker([Loop("x", tick, idle_seconds=60)]))

    eventually(lambda: left[0] == 0)


def test_events_stay_until_every_follower_has_passed_them(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'index.db'}"
    migrate.upgrade(url)
    database = Database(url)
    feed = ChangeFeed(database)
    with database.write() as connection:
        outbox.append(connection, "t", "instance.stored", "i", {}, 1)
    loops = {
        loop.name: loop.tick
        for loop in standard_loops(
            database=database, feed=feed, clock=SystemClock(), waits_for=["counter"]
        )
    }
    loops["relay"]()

    assert loops["prune.events"]() == 0
    feed.follow("counter", lambda _event: None)
    assert loops["prune.events"]() == 1
    database.close()


def test_an_event_goes_from_its_transaction_to_its_follower(
    running: Callable[[Worker], None], tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'index.db'}"
    migrate.upgrade(url)
    database = Database(url)
    feed = ChangeFeed(database)
    seen: list[Event] = []
    ticked = threading.Event()

    def settle() -> int:
        ticked.set()
        return 0

    loops = standard_loops(
        database=database,
        feed=feed,
        clock=SystemClock(),
        followers=[Follower("test", seen.append, frozenset({"study.settled"}))],
        ticks={"settle": settle},
    )
    running(Worker(loops))

    with database.write() as connection:
        outbox.append(connection, "t", "instance.stored", "i", {}, 1)
        outbox.append(connection, "t", "study.settled", "s", {"version": 1}, 1)
    eventually(lambda: seen)

    assert (seen[0].subject, seen[0].payload) == ("s", {"version": 1})
    assert ticked.is_set()
