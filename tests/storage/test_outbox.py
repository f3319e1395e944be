"""The outbox: appended with the change, positioned by the relay, read in order."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from sqlalchemy import func, select, text

from storage import outbox
from storage.db import migrate
from storage.db.engine import Database
from storage.db.tables import OutboxEvent
from storage.kernel.types import Actor, TenantId
from storage.outbox import ChangeFeed, Event, NewEvent, Relay

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
on_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)

CITY = Actor(TenantId("city"), "city")


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    migrate.upgrade(database_url)
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture
def feed(database: Database) -> ChangeFeed:
    return ChangeFeed(database)


def put(database: Database, *subjects: str, tenant: str = "city", at: int = 1) -> None:
    events = [NewEvent(tenant, "thing.made", s, {"of": s}) for s in subjects]
    with database.write() as connection:
        outbox.append_many(connection, events, at)


def relay_all(database: Database) -> None:
    relay = Relay(database)
    while relay.tick():
        pass


def subjects(events: object) -> list[str]:
    return [event.subject for event in events]  # type: ignore[attr-defined]


def test_an_event_is_read_once_it_has_a_position(
    database: Database, feed: ChangeFeed
) -> None:
    put(database, "a", "b")
    assert feed.read(None, 0, 10).events == ()

    relay_all(database)

    page = feed.read(None, 0, 10)
    assert page.events == [
        Event(1, "city", "thing.made", "a", {"of": "a"}, 1),
        Event(2, "city", "thing.made", "b", {"of": "b"}, 1),
    ]
    assert (page.next, page.more, page.pruned) == (2, False, False)
    assert page.epoch == feed.epoch()


def test_an_event_of_a_transaction_that_fails_never_appears(
    database: Database, feed: ChangeFeed
) -> None:
    def fail() -> None:
        with database.write() as connection:
            outbox.append(connection, "city", "thing.made", "a", {}, 1)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    put(database, "b")
    relay_all(database)

    assert subjects(feed.read(None, 0, 10).events) == ["b"]


def test_pages_follow_each_other_without_gap(
    database: Database, feed: ChangeFeed
) -> None:
    put(database, *(f"{n}" for n in range(25)))
    relay_all(database)

    seen, since, more = [], 0, True
    while more:
        page = feed.read(None, since, 10)
        seen += subjects(page.events)
        since, more = page.next, page.more

    assert seen == [f"{n}" for n in range(25)]
    assert since == 25


def test_an_actor_sees_the_tenants_it_may_read(
    database: Database, feed: ChangeFeed
) -> None:
    put(database, "mine")
    put(database, "theirs", tenant="other")
    put(database, "last", tenant="other")
    relay_all(database)

    page = feed.read(CITY, 0, 10)

    assert subjects(page.events) == ["mine"]
    assert (page.next, page.more) == (3, False)


def test_a_long_stretch_of_other_tenants_is_passed_in_bounded_steps(
    database: Database, feed: ChangeFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "SCAN_POSITIONS", 2)
    put(database, "1", "2", "3", tenant="other")
    put(database, "mine")
    relay_all(database)

    first = feed.read(CITY, 0, 10)
    second = feed.read(CITY, first.next, 10)

    assert (first.events, first.next, first.more) == ([], 2, True)
    assert (subjects(second.events), second.more) == (["mine"], False)


def test_another_epoch_starts_over(database: Database, feed: ChangeFeed) -> None:
    put(database, "old")
    relay_all(database)
    epoch = feed.epoch()

    renewed = feed.new_epoch()
    put(database, "new")
    relay_all(database)

    page = feed.read(None, 1, 10, epoch=epoch)
    assert (page.epoch, page.events, page.next, page.more) == (renewed, (), 0, True)
    assert subjects(feed.read(None, page.next, 10, epoch=renewed).events) == ["new"]


def test_a_position_from_the_future_starts_over(
    database: Database, feed: ChangeFeed
) -> None:
    put(database, "a")
    relay_all(database)

    assert (feed.read(None, 99, 10).next, feed.read(None, 99, 10).more) == (0, True)


def test_the_epoch_survives_the_process(database: Database, database_url: str) -> None:
    epoch = ChangeFeed(database).epoch()
    other = Database(database_url)
    try:
        assert ChangeFeed(other).epoch() == epoch
    finally:
        other.close()


def test_many_writers_and_relays_leave_no_gap(
    database: Database, database_url: str, feed: ChangeFeed
) -> None:
    done = threading.Event()

    def write(name: str) -> None:
        own = Database(database_url)
        for n in range(20):
            put(own, f"{name}.{n}")
        own.close()

    def position() -> None:
        own = Database(database_url)
        Relay(own).run(done.is_set, done.wait)
        own.close()

    writers = [threading.Thread(target=write, args=(w,)) for w in "abc"]
    relays = [threading.Thread(target=position) for _ in range(2)]
    for thread in [*writers, *relays]:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    for thread in relays:
        thread.join()
    relay_all(database)

    events = feed.read(None, 0, 1000).events
    assert [event.position for event in events] == list(range(1, 61))
    for name in "abc":
        own = [s for s in subjects(events) if s.startswith(name)]
        assert own == [f"{name}.{n}" for n in range(20)]


@on_postgresql
def test_a_transaction_that_commits_late_gets_a_later_position(
    database: Database, feed: ChangeFeed
) -> None:
    with database.write() as slow:
        outbox.append(slow, "city", "thing.made", "slow", {}, 1)
        put(database, "fast")
        relay_all(database)
        assert subjects(feed.read(None, 0, 10).events) == ["fast"]
    relay_all(database)

    assert subjects(feed.read(None, 1, 10).events) == ["slow"]


@on_postgresql
def test_a_busy_relay_is_not_waited_for(database: Database, feed: ChangeFeed) -> None:
    feed.epoch()
    put(database, "a")
    with database.write() as connection:
        connection.execute(text("SELECT * FROM feed FOR UPDATE"))
        assert Relay(database).tick() == 0
    assert Relay(database).tick() == 1


def test_a_follower_sees_each_event_in_order_and_keeps_its_place(
    database: Database, feed: ChangeFeed
) -> None:
    seen: list[str] = []
    put(database, "a", "b")
    relay_all(database)

    assert feed.follow("counter", lambda event: seen.append(event.subject)) == 2
    assert feed.follow("counter", lambda event: seen.append(event.subject)) == 0
    put(database, "c")
    relay_all(database)
    assert feed.lag("counter") == 1
    assert ChangeFeed(database).follow("counter", lambda e: seen.append(e.subject)) == 1

    assert seen == ["a", "b", "c"]
    assert feed.lag("counter") == 0


def test_an_event_whose_handler_fails_comes_again(
    database: Database, feed: ChangeFeed
) -> None:
    seen: list[str] = []
    broken = True

    def handle(event: Event) -> None:
        if event.subject == "b" and broken:
            raise RuntimeError("not yet")
        seen.append(event.subject)

    put(database, "a", "b", "c")
    relay_all(database)
    with pytest.raises(RuntimeError):
        feed.follow("x", handle)
    broken = False
    feed.follow("x", handle)

    assert seen == ["a", "b", "c"]


def test_a_follower_is_only_given_the_kinds_it_wants(
    database: Database, feed: ChangeFeed
) -> None:
    seen: list[str] = []
    put(database, "a")
    with database.write() as connection:
        outbox.append(connection, "city", "study.settled", "s", {}, 1)
    relay_all(database)

    passed = feed.follow(
        "x", lambda e: seen.append(e.subject), kinds=frozenset({"study.settled"})
    )

    assert (seen, passed) == (["s"], 2)


def test_a_follower_starts_over_in_a_new_epoch(
    database: Database, feed: ChangeFeed
) -> None:
    seen: list[str] = []
    put(database, "a", "b", "c")
    relay_all(database)
    feed.follow("x", lambda e: seen.append(e.subject))
    feed.new_epoch()
    put(database, "d")
    relay_all(database)

    feed.follow("x", lambda e: seen.append(e.subject))

    assert seen == ["a", "b", "c", "d"]


@on_postgresql
def test_two_processes_do_not_follow_under_one_name(
    database: Database, database_url: str, feed: ChangeFeed
) -> None:
    other = Database(database_url)
    inner: list[int] = []
    put(database, "a")
    relay_all(database)

    feed.follow(
        "x", lambda _: inner.append(ChangeFeed(other).follow("x", lambda _: None))
    )
    other.close()

    assert inner == [0]


def test_pruning_keeps_what_is_young_or_not_yet_followed(
    database: Database, feed: ChangeFeed
) -> None:
    put(database, "old", "older", at=10)
    put(database, "young", at=50)
    relay_all(database)

    assert feed.prune(40, followers=["x"]) == 0
    feed.follow("x", lambda _: None)
    assert feed.prune(40, followers=["x"]) == 2

    page = feed.read(None, 0, 10)
    assert subjects(page.events) == ["young"]
    assert page.pruned
    assert not feed.read(None, 2, 10).pruned


def test_pruning_goes_in_batches(
    database: Database, feed: ChangeFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "PRUNE_BATCH", 3)
    put(database, *"abcdefgh")
    relay_all(database)

    assert feed.prune(100, followers=[]) == 8
    with database.read() as connection:
        assert connection.scalar(select(func.count(OutboxEvent.id))) == 0
    assert feed.read(None, 0, 10).pruned
    assert (feed.read(None, 8, 10).pruned, feed.read(None, 8, 10).next) == (False, 8)


def test_positions_go_on_after_everything_was_pruned(
    database: Database, feed: ChangeFeed
) -> None:
    put(database, "a")
    relay_all(database)
    feed.prune(100, followers=[])
    put(database, "b")
    relay_all(database)

    assert [e.position for e in feed.read(None, 0, 10).events] == [2]


@on_sqlite
def test_pending_events_are_found_by_an_index(database: Database) -> None:
    with database.read() as connection:
        plan = connection.execute(
            text(
                "EXPLAIN QUERY PLAN SELECT id FROM outbox_event WHERE position IS NULL"
                " ORDER BY position, id LIMIT 10"
            )
        ).all()
    assert any("INDEX" in row[3] for row in plan)
    assert not any("TEMP B-TREE" in row[3] for row in plan)
