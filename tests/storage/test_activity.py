"""Counters of what arrives, and the follower that keeps them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

import pytest
from sqlalchemy import Connection, func, select

from storage import activity, outbox
from storage.activity import Activity, ActivityReader, Amount
from storage.db import migrate
from storage.db.engine import Database
from storage.db.tables import IngestActivity
from storage.kernel.types import Actor, TenantId
from storage.outbox import ChangeFeed, Event, NewEvent, Relay

CITY = Actor(TenantId("city"), "city")
BOTH = Actor(TenantId("city"), "both", readable=frozenset({TenantId("town")}))
SECOND = 1_000_000
MINUTE = 60 * SECOND
NOW = 1_700_000_000 * SECOND


class FixedClock:
    def now(self) -> datetime:
        return datetime.fromtimestamp(NOW / SECOND, UTC)

    def now_us(self) -> int:
        return NOW


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    migrate.upgrade(database_url)
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture
def feed(database: Database) -> ChangeFeed:
    return ChangeFeed(database)


def put(
    database: Database,
    at_us: int,
    *,
    n: int = 1,
    size: int | None = 100,
    kind: str = "instance.stored",
    tenant: str = "city",
) -> None:
    payload = {} if size is None else {"bytes": size}
    with database.write() as connection:
        outbox.append_many(
            connection,
            [NewEvent(tenant, kind, f"{i}", payload) for i in range(n)],
            at_us,
        )


def follow(database: Database, feed: ChangeFeed) -> None:
    relay = Relay(database)
    while relay.tick():
        pass
    while feed.follow_batch(activity.FOLLOWER, activity.count, kinds=activity.KINDS):
        pass


def read(database: Database, actor: Actor = CITY) -> Activity:
    return ActivityReader(database, FixedClock()).activity(actor)


def test_arrivals_are_counted_by_minute_hour_and_day(
    database: Database, feed: ChangeFeed
) -> None:
    put(database, NOW, n=3)
    put(database, NOW - 5 * MINUTE, n=2, size=1000)
    put(database, NOW - 90 * MINUTE, size=7)
    put(database, NOW - 25 * 60 * MINUTE, size=9)
    follow(database, feed)

    found = read(database)

    assert found.minute == Amount(3, 300)
    assert found.hour == Amount(5, 2300)
    assert found.day == Amount(6, 2307)
    assert len(found.per_minute) == activity.SERIES_MINUTES
    assert (found.per_minute[-1], found.per_minute[-6]) == (3, 2)
    assert sum(found.per_minute) == 5


def test_later_batches_are_added(database: Database, feed: ChangeFeed) -> None:
    put(database, NOW, n=2)
    follow(database, feed)
    put(database, NOW, n=3)
    follow(database, feed)

    assert read(database).minute == Amount(5, 500)


def test_only_what_was_stored_counts(database: Database, feed: ChangeFeed) -> None:
    put(database, NOW, kind="instance.duplicate")
    put(database, NOW, kind="instance.replaced", size=5)
    put(database, NOW, size=None)
    follow(database, feed)

    assert read(database).minute == Amount(2, 5)


def test_an_actor_sees_its_tenants(database: Database, feed: ChangeFeed) -> None:
    put(database, NOW)
    put(database, NOW, tenant="town")
    put(database, NOW, tenant="else")
    follow(database, feed)

    assert read(database).day.instances == 1
    assert read(database, BOTH).day.instances == 2


def test_an_idle_node_shows_noughts(database: Database) -> None:
    nothing = Amount(0, 0)

    assert read(database) == Activity(nothing, nothing, nothing, (0,) * 60)


def test_old_counters_go(database: Database, feed: ChangeFeed) -> None:
    put(database, NOW - 72 * 60 * MINUTE)
    follow(database, feed)
    put(database, NOW)
    follow(database, feed)

    with database.read() as connection:
        assert connection.scalar(select(func.count()).select_from(IngestActivity)) == 1


def test_a_batch_and_its_place_commit_together(
    database: Database, feed: ChangeFeed
) -> None:
    def fail(connection: Connection, events: Sequence[Event]) -> None:
        activity.count(connection, events)
        raise RuntimeError

    put(database, NOW, n=4)
    while Relay(database).tick():
        pass
    with pytest.raises(RuntimeError):
        feed.follow_batch(activity.FOLLOWER, fail)
    assert (read(database).minute.instances, feed.lag(activity.FOLLOWER)) == (0, 4)

    follow(database, feed)

    assert (read(database).minute.instances, feed.lag(activity.FOLLOWER)) == (4, 0)


def test_a_batch_is_bounded(
    database: Database, feed: ChangeFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "TOGETHER_BATCH", 3)
    batches: list[int] = []
    put(database, NOW, n=7)
    while Relay(database).tick():
        pass

    passed = [
        feed.follow_batch("x", lambda _, events: batches.append(len(events)))
        for _ in range(4)
    ]

    assert (passed, batches) == ([3, 3, 1, 0], [3, 3, 1])


def test_a_batch_follower_starts_over_in_a_new_epoch(
    database: Database, feed: ChangeFeed
) -> None:
    seen: list[str] = []

    def note(_: Connection, events: Sequence[Event]) -> None:
        seen.extend(event.subject for event in events)

    put(database, NOW, n=2)
    while Relay(database).tick():
        pass
    feed.follow_batch("x", note)
    feed.new_epoch()
    put(database, NOW)
    while Relay(database).tick():
        pass
    while feed.follow_batch("x", note):
        pass

    assert seen == ["0", "1", "0"]


def test_events_that_nobody_wants_are_passed(
    database: Database, feed: ChangeFeed
) -> None:
    put(database, NOW, n=2, kind="study.settled")
    while Relay(database).tick():
        pass

    assert feed.follow_batch("x", activity.count, kinds=activity.KINDS) == 2
    assert feed.lag("x") == 0
