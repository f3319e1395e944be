"""Group commit: arrivals that wait at the same time share one sync and one commit.

The thread that finds nobody working becomes the leader and works for all that wait;
the others sleep. While a leader waits for the disk the next group gathers, so the
group grows with the load and a lone caller pays no hand-over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from storage.kernel.errors import ImagingError

T = TypeVar("T")


@dataclass(slots=True)
class Ticket(Generic[T]):
    """One caller's work and how it ended.

    `wake` is a binary semaphore that the leader releases: to pass the lead on when
    `lead` is set, else because the work is done.
    """

    item: T
    cost: int
    error: BaseException | None = None
    lead: bool = False
    wake: threading.Lock = field(default_factory=threading.Lock)


class GroupCommit(Generic[T]):
    """Run `process` on groups of items, one group at a time.

    Parameters
    ----------
    process : callable
        Gets the tickets of a group. Sets `error` on those that failed by
        themselves; an exception fails all that have no error yet.
    max_items, max_cost : int
        Bounds of one group; cost is in bytes.
    """

    def __init__(
        self,
        process: Callable[[Sequence[Ticket[T]]], None],
        *,
        max_items: int = 64,
        max_cost: int = 32 << 20,
    ) -> None:
        self._process = process
        self._max_items = max_items
        self._max_cost = max_cost
        self._lock = threading.Lock()
        self._waiting: list[Ticket[T]] = []
        self._busy = False

    def submit(self, item: T, cost: int) -> None:
        """Block until `item` has been processed; raise what went wrong with it."""
        ticket = Ticket(item, cost)
        ticket.wake.acquire()
        with self._lock:
            self._waiting.append(ticket)
            lead = not self._busy
            if lead:
                self._busy = True
        if not lead:
            ticket.wake.acquire()
            lead = ticket.lead
        if lead:
            self._work()
        if ticket.error is not None:
            raise ticket.error

    def _work(self) -> None:
        """Process one group, which holds the caller's ticket, and pass the lead on."""
        with self._lock:
            group = self._take()
        try:
            self._process(group)
        except ImagingError as error:
            _fail(group, error)
        except BaseException as error:
            _fail(group, error)
            raise
        finally:
            with self._lock:
                heir = self._waiting[0] if self._waiting else None
                if heir is None:
                    self._busy = False
                else:
                    heir.lead = True
            if heir is not None:
                heir.wake.release()
            for ticket in group:
                ticket.wake.release()

    def _take(self) -> list[Ticket[T]]:
        """Cut the next group off the queue; always at least its head."""
        cost, n = 0, 0
        for ticket in self._waiting[: self._max_items]:
            cost += ticket.cost
            if n and cost > self._max_cost:
                break
            n += 1
        group, self._waiting = self._waiting[:n], self._waiting[n:]
        return group


def _fail(group: Sequence[Ticket[T]], error: BaseException) -> None:
    for ticket in group:
        if ticket.error is None:
            ticket.error = error
