"""What the index and a process must tell each other about the process' packs.

Each process that receives, deletes or reads has one: it notes packs that were closed,
closes packs that the worker wants to rewrite, and lets go of packs that were unlinked.
"""

from __future__ import annotations

import threading

from pacs.repository import packs as rows
from storage.db.engine import Database
from storage.packs.reader import PackReader
from storage.packs.writer import PackWriter


class PackBook:
    """Keep rows and files of a process' packs in step.

    Pass `closed` to the writer as `on_closed`, `tick` every few seconds, and `flush`
    after the writer was closed; what is left undone is recovery's.
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

    def tick(self, packs: PackWriter, reader: PackReader) -> int:
        """Do what is to do now; return how many packs were closed."""
        reader.sweep()
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
