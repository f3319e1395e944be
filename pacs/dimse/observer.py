"""What the DIMSE server tells about itself: metrics, and lines in the log."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from typing import Protocol


class DimseObserver(Protocol):
    """Who counts what the server does."""

    def association_opened(self) -> None:
        """Note an accepted association."""
        ...

    def association_closed(self, outcome: str, seconds: float) -> None:
        """Note its end: released, aborted, gone, timeout or stopped."""
        ...

    def association_rejected(self, reason: str) -> None:
        """Note a rejection (PS3.8 9.3.4), named by its reason."""
        ...

    def message(self, command: str, status: int, seconds: float) -> None:
        """Note a served request: ``C-STORE``, its final status, the time it took."""
        ...


class Silent:
    """Counts nothing."""

    def association_opened(self) -> None:
        pass

    def association_closed(self, outcome: str, seconds: float) -> None:
        pass

    def association_rejected(self, reason: str) -> None:
        pass

    def message(self, command: str, status: int, seconds: float) -> None:
        pass


class OncePerPeer:
    """Lets one event of a peer pass in a while.

    Parameters
    ----------
    seconds : float
    most : int
        Peers that are remembered; the oldest is forgotten first.
    """

    def __init__(self, seconds: float = 60.0, most: int = 1000) -> None:
        self._seconds = seconds
        self._most = most
        self._seen: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()

    def passes(self, peer: str) -> bool:
        """Tell whether the last event of `peer` that passed is long ago."""
        now = time.monotonic()
        with self._lock:
            last = self._seen.get(peer)
            if last is not None and now - last < self._seconds:
                return False
            self._seen[peer] = now
            self._seen.move_to_end(peer)
            if len(self._seen) > self._most:
                self._seen.popitem(last=False)
            return True
