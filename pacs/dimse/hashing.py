"""SHA-256 of what is received, computed while there is something to wait for.

On the way from the socket to the pack the digest costs most. Fragments are hashed
while the next one is on its way; those that came faster are hashed when the digest is
asked for, which is when the disk is at work. Handing them to another thread would
cost more than it saves, but for what is larger than a few slices: of that, a thread
of the association computes the rest. With others at work there is nothing to wait
for: then every fragment is hashed at once.
"""

from __future__ import annotations

import hashlib
import threading
from queue import SimpleQueue

from storage.kernel.limits import MIB

#: Bytes of each data set that no thread is started for.
ALONE = 1 * MIB


class RunningDigest:
    """The digest of one data set; a `storage.kernel.types.PendingDigest`."""

    def __init__(self, hasher: Hasher | None) -> None:
        self._hasher = hasher
        self._hash = hashlib.sha256()
        self._size = 0
        #: What came before there was time to hash it.
        self._late: list[memoryview] = []
        self._pending = 0
        #: Made for the first fragment that is handed over: most objects are small.
        self._done: threading.Condition | None = None

    def update(self, data: memoryview, *, later: bool = False) -> None:
        """Hash `data`, which must stay as it is until `settle` or `digest` returns.

        Parameters
        ----------
        later : bool
            The next fragment has come already, or there will be none.
        """
        self._size += len(data)
        if self._hasher is not None and self._size > ALONE:
            for one in (*self._late, data):
                self._hand_over(self._hasher, one)
            self._late.clear()
        elif self._hasher is not None and later:
            self._late.append(data)
        else:
            self._catch_up()
            self._hash.update(data)

    def settle(self) -> None:
        """Hash what was left for later; wait until everything given is hashed."""
        self._catch_up()
        if self._pending and self._done is not None:
            with self._done:
                while self._pending:
                    self._done.wait()

    def _catch_up(self) -> None:
        for one in self._late:
            self._hash.update(one)
        self._late.clear()

    def _hand_over(self, hasher: Hasher, data: memoryview) -> None:
        if self._done is None:
            self._done = threading.Condition(threading.Lock())
        with self._done:
            self._pending += 1
        hasher.put(self, data, self._done)

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
        """Return a digest of nothing yet; `beside`: it need not be done at once."""
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
