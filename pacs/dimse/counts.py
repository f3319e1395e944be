"""How many associations are open, in memory that the DIMSE processes share.

Made before the processes are forked. One cell per open association holds a hash of
the calling AE title, so that whatever a killed process had open can be forgotten.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from storage.kernel.settings import Settings

#: Slots above `max_associations` that only monitors may take: associations that
#: propose nothing but Verification.
RESERVE = 1


class AssociationCounts:
    """Open associations of all processes.

    Parameters
    ----------
    slots : int
        Processes.
    most, most_per_ae : int
        At a time, of all processes together.
    """

    def __init__(self, *, slots: int, most: int, most_per_ae: int) -> None:
        self._most = most
        self._most_per_ae = most_per_ae
        self._width = most + RESERVE
        self._slots = slots
        # The lock of a file, unlike one in memory, ends with the process that holds
        # it; it knows processes only, so threads have one of their own.
        self._file = os.memfd_create("huying-associations")
        self._threads = threading.Lock()
        size = 8 * slots * (self._width + 1)
        os.ftruncate(self._file, size)
        with memoryview(mmap.mmap(self._file, size)) as raw:
            self._cells = raw.cast("Q")
        self._loads = slots * self._width

    @classmethod
    def for_settings(cls, settings: Settings, slots: int) -> Self:
        """Return counts for a node's settings; call before forking."""
        return cls(
            slots=slots,
            most=settings.dimse.max_associations,
            most_per_ae=settings.dimse.max_associations_per_ae,
        )

    @property
    def most(self) -> int:
        """Associations allowed at a time, the reserve left out."""
        return self._most

    def claim(self, slot: int, calling_ae: str, *, monitor: bool) -> int | None:
        """Count an association; return its cell, or None over a limit.

        Parameters
        ----------
        monitor : bool
            It only verifies, and may use the reserve.
        """
        mark = _mark(calling_ae)
        with self.locked():
            cells = self._cells[: self._loads].tolist()
            taken = sum(map(bool, cells))
            if taken >= self._most + (RESERVE if monitor else 0):
                return None
            if not monitor and cells.count(mark) >= self._most_per_ae:
                return None
            first = slot * self._width
            for cell in range(first, first + self._width):
                if not cells[cell]:
                    self._cells[cell] = mark
                    return cell
            return None

    def release(self, cell: int) -> None:
        """Give a cell back."""
        self._cells[cell] = 0

    def open(self) -> int:
        """Return how many associations are open."""
        return sum(map(bool, self._cells[: self._loads].tolist()))

    def set_load(self, slot: int, connections: int) -> None:
        """Tell the other processes how many connections this one serves."""
        self._cells[self._loads + slot] = connections

    def is_busiest(self, slot: int) -> bool:
        """Tell whether another process serves fewer connections."""
        loads = self._cells[self._loads :].tolist()
        return min(loads) < loads[slot]

    def reset(self, slot: int) -> None:
        """Forget what a process that died had open."""
        with self.locked():
            for cell in range(slot * self._width, (slot + 1) * self._width):
                self._cells[cell] = 0
            self._cells[self._loads + slot] = 0

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep the other processes out; ends with the process."""
        with self._threads:
            fcntl.lockf(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.lockf(self._file, fcntl.LOCK_UN)


def _mark(calling_ae: str) -> int:
    """Return a number for an AE title that is never zero."""
    raw = hashlib.blake2b(calling_ae.encode(), digest_size=8).digest()
    return int.from_bytes(raw, "big") or 1
