"""What the archive holds and what arrives, at a price that does not grow with use."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from storage.activity import Activity
from storage.kernel.types import Actor

#: Sums over all studies are taken again after this long at the earliest, and after
#: this many times as long as they took: they cost at most a fiftieth of a core.
TOTALS_SECONDS = 2.0
TOTALS_REST = 50
#: Sets of tenants whose sums are remembered.
REMEMBERED = 256


@dataclass(frozen=True, slots=True)
class Totals:
    """Everything an actor may see, counted."""

    studies: int
    series: int
    instances: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Report:
    """The answer of ``/api/v1/activity``."""

    totals: Totals
    recent: Activity


class Recent(Protocol):
    """Counters of what was stored lately; `storage.activity` has them."""

    def activity(self, actor: Actor) -> Activity:
        """Return what was stored lately in the actor's tenants."""
        ...


@dataclass(slots=True)
class _Held:
    totals: Totals
    until: float


@dataclass(slots=True)
class ArchiveActivity:
    """Join the counters and the sums; remember the sums for a while.

    Attributes
    ----------
    sums : callable
        Adds up all studies of an actor; slow in a large archive.
    """

    recent: Recent
    sums: Callable[[Actor], Totals]
    monotonic: Callable[[], float] = time.monotonic
    _held: dict[tuple[str, ...], _Held] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def report(self, actor: Actor) -> Report:
        """Return what the archive holds and what arrived lately."""
        return Report(self._totals(actor), self.recent.activity(actor))

    def _totals(self, actor: Actor) -> Totals:
        key: tuple[str, ...] = actor.tenants
        held = self._held.get(key)
        if held is None:
            with self._lock:
                return self._add_up(key, actor)
        # One thread adds up anew; meanwhile the others are given the old sums.
        if self.monotonic() < held.until or not self._lock.acquire(blocking=False):
            return held.totals
        try:
            return self._add_up(key, actor)
        finally:
            self._lock.release()

    def _add_up(self, key: tuple[str, ...], actor: Actor) -> Totals:
        held = self._held.get(key)
        # Another thread may have been here while this one waited.
        if held is not None and self.monotonic() < held.until:
            return held.totals
        started = self.monotonic()
        totals = self.sums(actor)
        ended = self.monotonic()
        if len(self._held) >= REMEMBERED:
            self._held.clear()
        rest = max(TOTALS_SECONDS, (ended - started) * TOTALS_REST)
        self._held[key] = _Held(totals, ended + rest)
        return totals
