"""Events: written with the change they tell of, read in one order.

A service appends events in its own transaction (`append`). Database sequences are
neither gap-free nor in commit order, so an event only becomes readable once the one
`Relay` has given it a `position`; the feed shows positioned events, without gaps, in
order. Followers inside the node keep their place in the `subscriber` table and see
every event at least once.

The feed has an epoch. It changes after a restore or a rebuild, and tells a follower
that its position means nothing any more: start over at 0.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import orjson
from sqlalchemy import Connection, delete, func, insert, select, text, update
from sqlalchemy.dialects import postgresql, sqlite

from storage.db.engine import Database
from storage.db.tables import Feed, OutboxEvent, Subscriber
from storage.kernel.types import Actor

#: Events that one transaction of the relay positions.
RELAY_BATCH = 2000
#: Pause of the relay while events come in, and while none do.
BUSY_SECONDS = 0.1
IDLE_SECONDS = 0.1
#: Positions one `read` looks at, however few of them the actor may see.
SCAN_POSITIONS = 20_000
#: Events one `follow` hands over before it saves its position for good.
FOLLOW_BATCH = 200
#: How long a follower's place is only remembered while no event was for it.
SAVE_SECONDS = 2.0
#: Events one `follow_batch` hands over in one transaction.
TOGETHER_BATCH = 2000
#: Events one transaction of `prune` deletes.
PRUNE_BATCH = 5000

FEED_ID = 1

_APPEND = insert(OutboxEvent).inline()

#: Works on SQLite (3.33) and PostgreSQL. The inner query stops at the limit before
#: the rows are numbered; ordering by `position` first lets both use its index.
_POSITION = text(
    "UPDATE outbox_event SET position = :last + batch.n"
    " FROM (SELECT id, row_number() OVER (ORDER BY id) AS n FROM"
    " (SELECT id FROM outbox_event WHERE position IS NULL"
    " ORDER BY position, id LIMIT :size) AS pending) AS batch"
    " WHERE outbox_event.id = batch.id"
)
_PENDING = text("SELECT 1 FROM outbox_event WHERE position IS NULL LIMIT 1")


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event to append.

    Attributes
    ----------
    kind : str
        Dotted, past tense: ``study.settled``.
    subject : str
        Identity of what changed; at most 128 characters.
    payload : mapping
        JSON values; no names, birth dates or free text.
    """

    tenant: str
    kind: str
    subject: str
    payload: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Event:
    """A committed event with its place in the feed."""

    position: int
    tenant: str
    kind: str
    subject: str
    payload: Mapping[str, Any]
    created_us: int


@dataclass(frozen=True, slots=True)
class ChangePage:
    """A stretch of the feed.

    Attributes
    ----------
    epoch : str
        Of this node's feed; a reader that knows another one starts over at 0.
    events : sequence of Event
        In order of position.
    next : int
        The `since` of the following page.
    more : bool
        Whether the following page can be asked for at once.
    pruned : bool
        Events after `since` are no longer kept: the reader has missed some.
    """

    epoch: str
    events: Sequence[Event]
    next: int
    more: bool
    pruned: bool = False


def append(
    connection: Connection,
    tenant: str,
    kind: str,
    subject: str,
    payload: Mapping[str, Any],
    now_us: int,
) -> None:
    """Write one event in the caller's transaction."""
    append_many(connection, [NewEvent(tenant, kind, subject, payload)], now_us)


def append_many(
    connection: Connection, events: Iterable[NewEvent], now_us: int
) -> None:
    """Write events in the caller's transaction; they keep this order."""
    rows = [
        {
            "tenant": event.tenant,
            "kind": event.kind,
            "subject": event.subject,
            "payload": orjson.dumps(event.payload).decode(),
            "created_us": now_us,
        }
        for event in events
    ]
    if rows:
        connection.execute(_APPEND, rows)


@dataclass(frozen=True, slots=True)
class _Place:
    """How far a follower has come, and when that was last saved."""

    epoch: str
    position: int
    saved_at: float


class Relay:
    """Give committed events their positions.

    Any number may run: the row of the feed is their lock, so that one works at a
    time, and transactions that commit late simply get later positions.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def tick(self) -> int:
        """Position the events that wait, up to one batch; return how many.

        The commit is fully synced: a position that a follower has seen stays.
        """
        with self._database.read() as connection:
            if connection.execute(_PENDING).first() is None:
                return 0
        with self._database.write() as connection:
            feed = _lock_feed(connection)
            if feed is None:
                return 0
            result = connection.execute(
                _POSITION, {"last": feed.last_position, "size": RELAY_BATCH}
            )
            count = int(result.rowcount)
            connection.execute(
                update(Feed)
                .where(Feed.id == FEED_ID)
                .values(last_position=Feed.last_position + count)
            )
        return count

    def run(
        self, stopping: Callable[[], bool], sleep: Callable[[float], object]
    ) -> None:
        """Tick until `stopping` says so."""
        while not stopping():
            count = self.tick()
            if count < RELAY_BATCH:
                sleep(BUSY_SECONDS if count else IDLE_SECONDS)


class ChangeFeed:
    """The ordered feed of committed events."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._remembered: dict[str, _Place] = {}

    def read(
        self,
        actor: Actor | None,
        since: int,
        limit: int,
        *,
        epoch: str | None = None,
        kinds: frozenset[str] | None = None,
    ) -> ChangePage:
        """Return the events after position `since` that `actor` may see.

        Parameters
        ----------
        actor : Actor or None
            None is the node itself, which sees every tenant.
        since : int
            `next` of the page before; 0 at first.
        limit : int
            Events in the answer at most.
        epoch : str, optional
            The epoch `since` belongs to. When it is no longer this feed's, the page
            is empty, names the new epoch, and continues at 0.
        kinds : frozenset of str, optional
            The kinds wanted; all by default.
        """
        with self._database.read() as connection:
            # Order matters: events up to this position are visible to what follows.
            feed = connection.execute(
                select(Feed.epoch, Feed.last_position).where(Feed.id == FEED_ID)
            ).first()
            if feed is None:
                return ChangePage("", (), 0, more=False)
            current, last = feed
            if since > last or (epoch and epoch != current):
                return ChangePage(current, (), 0, more=last > 0)
            until = min(last, since + SCAN_POSITIONS)
            query = (
                select(
                    OutboxEvent.position,
                    OutboxEvent.tenant,
                    OutboxEvent.kind,
                    OutboxEvent.subject,
                    OutboxEvent.payload,
                    OutboxEvent.created_us,
                )
                .where(OutboxEvent.position > since, OutboxEvent.position <= until)
                .order_by(OutboxEvent.position)
                .limit(limit)
            )
            if actor is not None:
                query = query.where(OutboxEvent.tenant.in_(actor.tenants))
            if kinds is not None:
                query = query.where(OutboxEvent.kind.in_(sorted(kinds)))
            events = [_event(row) for row in connection.execute(query)]
            pruned = since < last and _oldest(connection, last) > since + 1
        following = events[-1].position if len(events) == limit else until
        return ChangePage(current, events, following, following < last, pruned)

    def epoch(self) -> str:
        """Return the feed's epoch; it is made on the first call."""
        with self._database.read() as connection:
            found = connection.scalar(select(Feed.epoch).where(Feed.id == FEED_ID))
        if found is not None:
            return str(found)
        with self._database.write() as connection:
            feed = _lock_feed(connection, wait=True)
        return feed.epoch if feed is not None else ""

    def new_epoch(self) -> str:
        """Begin anew: positioned events go, followers start over at 0.

        Call after a restore or a rebuild, while no relay runs.
        """
        epoch = uuid.uuid4().hex
        with self._database.write() as connection:
            _lock_feed(connection, wait=True)
            connection.execute(
                delete(OutboxEvent).where(OutboxEvent.position.is_not(None))
            )
            connection.execute(
                update(Feed)
                .where(Feed.id == FEED_ID)
                .values(epoch=epoch, last_position=0)
            )
        return epoch

    def follow(
        self,
        name: str,
        handler: Callable[[Event], None],
        *,
        kinds: frozenset[str] | None = None,
    ) -> int:
        """Hand the next events to `handler`; return how many positions were passed.

        Every event comes at least once, in order. The position is saved after the
        handler has returned; when it raises, the event comes again next time and
        the exception goes to the caller.

        Parameters
        ----------
        name : str
            The follower, at most 64 characters. One process follows a name at a
            time; for the others this returns 0.
        kinds : frozenset of str, optional
            The kinds `handler` wants; all by default.
        """
        with _exclusive(self._database, f"follow.{name}") as mine:
            if not mine:
                return 0
            epoch, position = self._passed(name)
            page = self.read(None, position, FOLLOW_BATCH, epoch=epoch, kinds=kinds)
            if page.epoch != epoch:
                position = 0
                page = self.read(None, 0, FOLLOW_BATCH, kinds=kinds)
            done = position
            try:
                for event in page.events:
                    handler(event)
                    done = event.position
                done = page.next
            finally:
                if done != position or page.epoch != epoch:
                    now = bool(page.events) or page.epoch != epoch
                    self._pass(name, page.epoch, done, save_now=now)
            return done - position

    def follow_batch(
        self,
        name: str,
        handler: Callable[[Connection, Sequence[Event]], None],
        *,
        kinds: frozenset[str] | None = None,
    ) -> int:
        """Hand the next events to `handler` together; return the positions passed.

        The handler's rows and the position commit in one transaction: what it
        writes through its connection happens exactly once for each event. When it
        raises, nothing is written and the whole batch comes again.
        """
        with _exclusive(self._database, f"follow.{name}") as mine:
            if not mine:
                return 0
            epoch, position = self._place(name)
            page = self.read(None, position, TOGETHER_BATCH, epoch=epoch, kinds=kinds)
            if page.epoch != epoch:
                position = 0
                page = self.read(None, 0, TOGETHER_BATCH, kinds=kinds)
            if page.next == position and page.epoch == epoch:
                return 0
            # Need not be synced: rows and place go together, or not at all.
            with self._database.ingest() as connection:
                if page.events:
                    handler(connection, page.events)
                self._save_in(connection, name, page.epoch, page.next)
            return page.next - position

    def lag(self, name: str) -> int:
        """Return how many positions the follower `name` has still to pass."""
        epoch, position = self._passed(name)
        with self._database.read() as connection:
            feed = connection.execute(select(Feed.epoch, Feed.last_position)).first()
        if feed is None:
            return 0
        return int(feed.last_position) - (position if feed.epoch == epoch else 0)

    def prune(self, before_us: int, *, followers: Iterable[str]) -> int:
        """Delete events older than `before_us` that all `followers` have passed."""
        floor = min((self._place(name)[1] for name in followers), default=None)
        removed = 0
        while True:
            with self._database.read() as connection:
                query = (
                    select(OutboxEvent.position, OutboxEvent.created_us)
                    .where(OutboxEvent.position.is_not(None))
                    .order_by(OutboxEvent.position)
                    .limit(PRUNE_BATCH)
                )
                if floor is not None:
                    query = query.where(OutboxEvent.position <= floor)
                old = [
                    position
                    for position, created_us in _leading(
                        connection.execute(query), before_us
                    )
                ]
            if not old:
                return removed
            with self._database.write() as connection:
                connection.execute(
                    delete(OutboxEvent).where(OutboxEvent.position <= old[-1])
                )
            removed += len(old)
            if len(old) < PRUNE_BATCH:
                return removed

    def _place(self, name: str) -> tuple[str, int]:
        with self._database.read() as connection:
            row = connection.execute(
                select(Subscriber.epoch, Subscriber.position).where(
                    Subscriber.name == name
                )
            ).first()
        return (str(row[0]), int(row[1])) if row is not None else ("", 0)

    def _passed(self, name: str) -> tuple[str, int]:
        """Return where `name` goes on: as saved, or as remembered since."""
        epoch, position = self._place(name)
        remembered = self._remembered.get(name)
        if remembered is not None and remembered.epoch == epoch:
            position = max(position, remembered.position)
        return epoch, position

    def _pass(self, name: str, epoch: str, position: int, *, save_now: bool) -> None:
        """Remember a place; save it when that is due.

        A place that is lost costs a repetition, which followers expect: the commit
        need not be synced, and a stretch without events of theirs need not be saved.
        """
        now = time.monotonic()
        remembered = self._remembered.get(name)
        saved_at = remembered.saved_at if remembered is not None else 0.0
        if save_now or now - saved_at >= SAVE_SECONDS:
            with self._database.ingest() as connection:
                self._save_in(connection, name, epoch, position)
            saved_at = now
        self._remembered[name] = _Place(epoch, position, saved_at)

    def _save_in(
        self, connection: Connection, name: str, epoch: str, position: int
    ) -> None:
        module = sqlite if self._database.is_sqlite else postgresql
        statement = module.insert(Subscriber).values(
            name=name, epoch=epoch, position=position
        )
        connection.execute(
            statement.on_conflict_do_update(
                index_elements=["name"],
                set_={"epoch": epoch, "position": position},
            )
        )


def _event(row: Any) -> Event:
    position, tenant, kind, subject, payload, created_us = row
    return Event(position, tenant, kind, subject, orjson.loads(payload), created_us)


def _leading(rows: Iterable[Any], before_us: int) -> Iterator[tuple[int, int]]:
    """Yield rows until the first that is young enough to stay."""
    for position, created_us in rows:
        if created_us >= before_us:
            return
        yield position, created_us


def _oldest(connection: Connection, last: int) -> int:
    """Return the first position that is still kept, or the one after `last`."""
    found = connection.scalar(select(func.min(OutboxEvent.position)))
    return int(found) if found is not None else last + 1


def _lock_feed(connection: Connection, *, wait: bool = False) -> Any:
    """Return the feed's row, locked; None while another relay holds it."""
    query = select(Feed.epoch, Feed.last_position).where(Feed.id == FEED_ID)
    locking = query.with_for_update(skip_locked=not wait)
    row = connection.execute(locking).first()
    if row is not None or connection.execute(query).first() is not None:
        return row
    module = sqlite if connection.dialect.name == "sqlite" else postgresql
    connection.execute(
        module.insert(Feed)
        .values(id=FEED_ID, epoch=uuid.uuid4().hex, last_position=0)
        .on_conflict_do_nothing()
    )
    return connection.execute(locking).first()


@contextmanager
def _exclusive(database: Database, name: str) -> Iterator[bool]:
    """Tell whether this process may do `name` now; it may while the block runs.

    With SQLite the lock on the data folder has already decided.
    """
    if database.is_sqlite:
        yield True
        return
    with database.read() as connection:
        # A transaction lock also works behind a pooler, and ends with the process.
        yield bool(
            connection.scalar(
                text("SELECT pg_try_advisory_xact_lock(hashtextextended(:name, 0))"),
                {"name": name},
            )
        )
