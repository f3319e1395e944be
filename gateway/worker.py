"""The worker's loops: what a node does when nobody asks.

Each loop runs in a thread of its own and is alone with its failures: an exception is
logged and counted, and the loop goes on after a pause that grows.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Protocol

from storage.db.engine import Database
from storage.jobs.runner import JobRunner
from storage.kernel.clock import Clock
from storage.kernel.errors import Unavailable
from storage.outbox import BUSY_SECONDS, IDLE_SECONDS, ChangeFeed, Event, Relay

log = logging.getLogger(__name__)

#: Pause after the first failure of a loop, and the longest.
BACK_OFF_SECONDS = (0.5, 60.0)
#: How long the loops are waited for when the worker stops.
STOP_SECONDS = 15.0
CHECKPOINT_SECONDS = 1.0
FOLLOW_SECONDS = 0.3
TICK_SECONDS = 1.0
PRUNE_SECONDS = 600.0


class LoopObserver(Protocol):
    """Who counts what the loops do."""

    def looped(self, name: str, seconds: float, *, failed: bool) -> None:
        """Note one round of a loop that did something or failed."""
        ...


@dataclass(frozen=True, slots=True)
class Loop:
    """Something to do again and again.

    Attributes
    ----------
    tick : callable
        Does a bounded piece of work and returns how much: more than nothing means
        that there may be more at once.
    idle_seconds, busy_seconds : float
        Pause after a round that found nothing, and after one that did.
    """

    name: str
    tick: Callable[[], int]
    idle_seconds: float = TICK_SECONDS
    busy_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Follower:
    """A part of the node that follows the change feed.

    `handler` is called at least once for each event of `kinds`, in order, and must
    be quick: what takes longer becomes a job.
    """

    name: str
    handler: Callable[[Event], None]
    kinds: frozenset[str] | None = None


@dataclass(slots=True)
class LoopHealth:
    """How a loop is doing, for `/readyz` and metrics."""

    rounds: int = 0
    failures: int = 0
    failing_since: float | None = None


@dataclass(slots=True)
class Worker:
    """Run loops, and the durable jobs beside them, until told to stop.

    Attributes
    ----------
    jobs : JobRunner, optional
        Started first, stopped last.
    """

    loops: Sequence[Loop]
    jobs: JobRunner | None = None
    observer: LoopObserver | None = None
    health: dict[str, LoopHealth] = field(default_factory=dict)

    def run(self, stop: threading.Event) -> None:
        """Block until `stop` is set and the loops have ended."""
        for loop in self.loops:
            self.health[loop.name] = LoopHealth()
        if self.jobs is not None and not _start(self.jobs, stop):
            return
        threads = [
            threading.Thread(
                target=self._turn, args=(loop, stop), name=loop.name, daemon=True
            )
            for loop in self.loops
        ]
        try:
            for thread in threads:
                thread.start()
            stop.wait()
        finally:
            stop.set()
            deadline = time.monotonic() + STOP_SECONDS
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
            if self.jobs is not None:
                self.jobs.stop()

    def _turn(self, loop: Loop, stop: threading.Event) -> None:
        health = self.health[loop.name]
        first, longest = BACK_OFF_SECONDS
        pause = first
        while not stop.is_set():
            started = time.monotonic()
            done = _tick(loop)
            if done is None:
                health.failures += 1
                health.failing_since = health.failing_since or started
                self._observe(loop, started, failed=True)
                stop.wait(pause)
                pause = min(pause * 2, longest)
                continue
            health.rounds += 1
            health.failing_since = None
            pause = first
            if done:
                self._observe(loop, started, failed=False)
            stop.wait(loop.busy_seconds if done else loop.idle_seconds)

    def _observe(self, loop: Loop, started: float, *, failed: bool) -> None:
        if self.observer is not None:
            self.observer.looped(loop.name, time.monotonic() - started, failed=failed)


def _start(jobs: JobRunner, stop: threading.Event) -> bool:
    """Start the jobs once what they need answers; False when told to stop first."""
    pause, longest = BACK_OFF_SECONDS
    while not stop.is_set():
        try:
            jobs.start()
        except Unavailable as error:
            log.warning(
                "jobs wait: %s", error, extra={"event": "jobs.wait", "code": error.code}
            )
            stop.wait(pause)
            pause = min(pause * 2, longest)
        else:
            return True
    return False


def _tick(loop: Loop) -> int | None:
    """Do one round; None when it failed."""
    fields = {"event": "loop.failed", "loop": loop.name}
    try:
        return loop.tick()
    except Unavailable as error:
        log.warning("loop waits: %s", error, extra={**fields, "code": error.code})
    except Exception:
        log.exception("loop failed", extra=fields)
    return None


def standard_loops(
    *,
    database: Database,
    feed: ChangeFeed,
    clock: Clock,
    followers: Iterable[Follower] = (),
    ticks: Mapping[str, Callable[[], int]] | None = None,
    jobs: JobRunner | None = None,
    waits_for: Iterable[str] = (),
    event_days: float = 30,
    job_days: float = 7,
) -> list[Loop]:
    """Return the loops every worker runs.

    Parameters
    ----------
    ticks : mapping of name to callable
        Work of the services that is due by time: settling, erasing, unlinking.
    waits_for : iterable of str
        More followers that must have passed an event before it is pruned.
    event_days, job_days : float
        How long positioned events and finished jobs are kept.
    """
    followers = list(followers)
    names = [*(one.name for one in followers), *waits_for]
    loops = [Loop("relay", Relay(database).tick, IDLE_SECONDS, BUSY_SECONDS)]
    if database.is_sqlite:
        loops.append(Loop("checkpoint", _checkpoint(database), CHECKPOINT_SECONDS))
    loops += [
        Loop(f"follow.{one.name}", _following(feed, one), FOLLOW_SECONDS)
        for one in followers
    ]
    loops += [Loop(name, tick, TICK_SECONDS) for name, tick in (ticks or {}).items()]

    def prune_events() -> int:
        before_us = clock.now_us() - int(event_days * 86_400e6)
        return feed.prune(before_us, followers=names)

    loops.append(Loop("prune.events", prune_events, PRUNE_SECONDS))
    if jobs is not None:
        keep = timedelta(days=job_days)
        loops.append(Loop("prune.jobs", lambda: jobs.prune(keep), PRUNE_SECONDS))
    return loops


def _checkpoint(database: Database) -> Callable[[], int]:
    def tick() -> int:
        database.checkpoint()
        return 0

    return tick


def _following(feed: ChangeFeed, follower: Follower) -> Callable[[], int]:
    def tick() -> int:
        return feed.follow(follower.name, follower.handler, kinds=follower.kinds)

    return tick


def stop_on_signal() -> threading.Event:
    """Return an event that SIGTERM and SIGINT set."""
    stop = threading.Event()

    def handle(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    return stop
