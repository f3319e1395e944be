"""How much arrives: counted from the change feed, read by the first page.

The counters are added up by a follower of the feed, in the transaction that saves
its place, so that no arrival is counted twice and receiving pays nothing for them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, delete, func, select
from sqlalchemy.dialects import postgresql, sqlite

from storage.db.engine import Database
from storage.db.tables import IngestActivity
from storage.kernel.clock import Clock
from storage.kernel.types import Actor
from storage.outbox import Event

#: Name and kinds of the follower.
FOLLOWER = "activity"
KINDS = frozenset({"instance.stored", "instance.replaced"})

SLOT_SECONDS = 10
_SLOT_US = SLOT_SECONDS * 1_000_000
_SLOTS_PER_MINUTE = 60 // SLOT_SECONDS
#: Counters older than this many slots are deleted: two days.
KEPT_SLOTS = 2 * 86_400 // SLOT_SECONDS
#: Length of `Activity.per_minute`.
SERIES_MINUTES = 60


@dataclass(frozen=True, slots=True)
class Amount:
    """Instances and the bytes of their stored objects."""

    instances: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Activity:
    """What was stored lately.

    Attributes
    ----------
    minute, hour, day : Amount
        Of the last 60 seconds, hour and day, to within ten seconds.
    per_minute : tuple of int
        Instances of each of the last 60 minutes, oldest first; the last entry is
        the minute that ends now.
    """

    minute: Amount
    hour: Amount
    day: Amount
    per_minute: tuple[int, ...]


def count(connection: Connection, events: Sequence[Event]) -> None:
    """Add arrivals to the counters, in the caller's transaction."""
    added: dict[tuple[int, str], list[int]] = defaultdict(lambda: [0, 0])
    for event in events:
        amount = added[event.created_us // _SLOT_US, event.tenant]
        amount[0] += 1
        # Tolerates: events of versions that did not tell the size.
        amount[1] += int(event.payload.get("bytes", 0))
    if not added:
        return
    module = sqlite if connection.dialect.name == "sqlite" else postgresql
    statement = module.insert(IngestActivity)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["slot", "tenant"],
            set_={
                "instances": IngestActivity.instances + statement.excluded.instances,
                "size_bytes": IngestActivity.size_bytes + statement.excluded.size_bytes,
            },
        ),
        [
            {"slot": slot, "tenant": tenant, "instances": n, "size_bytes": size}
            for (slot, tenant), (n, size) in sorted(added.items())
        ],
    )
    newest = max(slot for slot, _ in added)
    connection.execute(
        delete(IngestActivity).where(IngestActivity.slot < newest - KEPT_SLOTS)
    )


class ActivityReader:
    """Read the counters an actor may see."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def activity(self, actor: Actor) -> Activity:
        """Return what was stored lately in the actor's tenants."""
        now = self._clock.now_us() // _SLOT_US
        minutes = [Amount(0, 0)] * SERIES_MINUTES
        sums = (
            func.sum(IngestActivity.instances),
            func.sum(IngestActivity.size_bytes),
        )
        mine = (
            IngestActivity.tenant.in_(actor.tenants),
            IngestActivity.slot <= now,
        )
        hour_ago = now - SERIES_MINUTES * _SLOTS_PER_MINUTE
        day_ago = now - 86_400 // SLOT_SECONDS
        with self._database.read() as connection:
            recent = connection.execute(
                select(IngestActivity.slot, *sums)
                .where(*mine, IngestActivity.slot > hour_ago)
                .group_by(IngestActivity.slot)
            ).all()
            day = connection.execute(
                select(*sums).where(*mine, IngestActivity.slot > day_ago)
            ).one()
        for slot, instances, size_bytes in recent:
            place = SERIES_MINUTES - 1 - (now - slot) // _SLOTS_PER_MINUTE
            minutes[place] = _plus(minutes[place], instances, size_bytes)
        hour = Amount(0, 0)
        for one in minutes:
            hour = _plus(hour, one.instances, one.size_bytes)
        return Activity(
            minute=minutes[-1],
            hour=hour,
            day=_plus(Amount(0, 0), day[0] or 0, day[1] or 0),
            per_minute=tuple(one.instances for one in minutes),
        )


def _plus(amount: Amount, instances: int, size_bytes: int) -> Amount:
    # PostgreSQL sums big integers as decimals.
    return Amount(
        amount.instances + int(instances), amount.size_bytes + int(size_bytes)
    )
