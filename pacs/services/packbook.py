"""What the index says about the packs one process appends to.

Each process that receives or deletes has one, ticked every few seconds: it notes packs
that were closed, and closes packs that the worker wants to rewrite.
"""

from __future__ import annotations

import threading

from pacs.repository import packs as rows
from storage.db.engine import Database
from storage.packs.writer import PackWriter


class PackBook:
    """Keep the rows of a process' own packs in step with its files.

    Pass `closed` to the writer as `on_closed`.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._closed: dict[str, int] = {}
        self._lock = threading.Lock()

    def closed(self, key: str, size: int) -> None:
        """Remember a pack that no longer grows.

        It is called inside the writer's lock, where the database must not be waited
        for: a deletion holds the two the other way round.
        """
        with self._lock:
            self._closed[key] = size

    def tick(self, packs: PackWriter) -> int:
        """Note what was closed, and close what the worker asks for."""
        mine = packs.open_keys()
        if mine:
            with self._database.read() as connection:
                wanted = rows.asked_to_close(connection, mine)
            if wanted:
                packs.roll(wanted)
        return self.flush()

    def flush(self) -> int:
        """Note what was closed; return how many packs.

        A pack whose first rows are still being written waits for the next time.
        """
        with self._lock:
            waiting = dict(self._closed)
        if not waiting:
            return 0
        with self._database.write() as connection:
            done = [
                key
                for key, size in waiting.items()
                if rows.close_pack(connection, key, size)
            ]
        with self._lock:
            for key in done:
                self._closed.pop(key, None)
        return len(done)
