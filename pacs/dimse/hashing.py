"""SHA-256 of what is received: of large data sets beside the work that goes on.

On the way from the socket to the pack the digest costs most. For a slice it is
computed at once, while the next fragment is on its way: handing fragments to another
thread would cost more than it saves. Of what is larger, a thread of the association
computes the rest.
"""

from __future__ import annotations

import hashlib
import threading
from queue import SimpleQueue

from storage.kernel.limits import MIB

#: Bytes of each data set that are hashed at once.
AT_ONCE = 1 * MIB


class RunningDigest:
    """The digest of one data set; a `storage.kernel.types.PendingDigest`."""

    def __init__(self, hasher: Hasher | None) -> None:
        self._hasher = hasher
        self._hash = hashlib.sha256()
        self._size = 0
        self._pending = 0
        #: Made for the first fragment that is handed over: most objects are small.
        self._done: threading.Condition | None = None

    def update(self, data: memoryview) -> None:
        """Hash `data`, which must stay as it is until `settle` or `digest` returns."""
        self._size += len(data)
        if self._hasher is None or self._size <= AT_ONCE:
            self._hash.update(data)
            return
        if self._done is None:
            self._done = threading.Condition(threading.Lock())
        with self._done:
            self._pending += 1
        self._hasher.put(self, data, self._done)

    def settle(self) -> None:
        """Wait until everything given has been hashed."""
        if self._pending and self._done is not None:
            with self._done:
                while self._pending:
                    self._done.wait()

    def digest(self) -> bytes:
        """Return the digest of everything given."""
        self.settle()
        return self._hash.digest()

    def work(self, data: memoryview, done: threading.Condition) -> None:
        """Hash a piece; called by the thread."""
        self._hash.update(data)
        with done:
            self._pending -= 1
            if not self._pending:
                done.notify_all()


class Hasher:
    """The hashing thread of one association; it starts when it is first needed."""

    def __init__(self) -> None:
        self._work: SimpleQueue[
            tuple[RunningDigest, memoryview, threading.Condition] | None
        ] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def begin(self, *, beside: bool) -> RunningDigest:
        """Return a digest of nothing yet; `beside`: the thread computes it."""
        return RunningDigest(self if beside else None)

    def put(
        self, digest: RunningDigest, data: memoryview, done: threading.Condition
    ) -> None:
        """Have the thread hash `data`."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name="digest", daemon=True
            )
            self._thread.start()
        self._work.put((digest, data, done))

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._work.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (job := self._work.get()) is not None:
            digest, data, done = job
            digest.work(data, done)
            # Nothing is held while the thread waits for the next data set.
            del job, digest, data, done
