"""Erasing deleted bytes: packs that hold some are rewritten without them.

Deleted is out of the index; erased is out of every copy. Besides the pack that a
deletion names, a local pack may hold the same bytes: the series was sealed out of it,
or a copy lost a race. So every local pack of the tenant that is older than the deletion
and has bytes without an instance is rewritten, and `erased_us` is set once no such pack
is left, unlinked ones included.

Work begins at half the time that a deletion has, so that deletions share a rewrite.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection

from pacs.repository import packs as rows
from pacs.repository.packs import Live, PackRow
from pacs.services.retirement import UNKNOWN_US, Retirement
from storage.db.engine import Database
from storage.kernel.clock import Clock
from storage.kernel.errors import CorruptData, LostRace, Unavailable
from storage.objects.protocol import ObjectStore
from storage.packs.format import FILE_HEADER_LENGTH, Location, RecordInfo
from storage.packs.reader import PackGone, PackReader
from storage.packs.seal import PackBuilder, Wanted, new_key

log = logging.getLogger(__name__)

#: Packs that one tick rewrites.
REWRITTEN = 4
PAUSE_SECONDS = 10.0
LOCK = ".erasing"


class Erasure:
    """Rewrite packs in time, and note what is gone.

    Parameters
    ----------
    database : Database
    reader : PackReader
    objects : ObjectStore
    retirement : Retirement
    clock : Clock
    folder : Path
        Of the local packs.
    node_id : str
    min_free_bytes : int
    pause_seconds : float
        Between two looks at the table of deletions.
    """

    def __init__(
        self,
        *,
        database: Database,
        reader: PackReader,
        objects: ObjectStore,
        retirement: Retirement,
        clock: Clock,
        folder: Path,
        node_id: str,
        min_free_bytes: int = 0,
        pause_seconds: float = PAUSE_SECONDS,
    ) -> None:
        self._database = database
        self._reader = reader
        self._objects = objects
        self._retirement = retirement
        self._clock = clock
        self._folder = folder
        self._node_id = node_id
        self._min_free_bytes = min_free_bytes
        self._pause_seconds = pause_seconds
        self._next = 0.0

    def tick(self) -> int:
        """Do a bounded part of what is due; return packs rewritten and bytes noted."""
        now = time.monotonic()
        if now < self._next:
            return 0
        self._next = now + self._pause_seconds
        with self._database.read() as connection:
            due = rows.due_tenants(connection, self._clock.now_us())
        if not due:
            return 0
        with _alone(self._folder / LOCK) as mine:
            if not mine:
                return 0
            done = sum(self._erase(tenant, until_us) for tenant, until_us in due)
        if done:
            self._next = now
        return done

    def _erase(self, tenant: str, until_us: int) -> int:
        """Get rid of what `tenant` deleted until then, as far as possible now."""
        with self._database.read() as connection:
            candidates = rows.holding(connection, tenant, until_us)
        oldest = until_us + 1
        growing: list[str] = []
        rewritten = 0
        for pack in candidates:
            if not self._holds_dead(pack, until_us):
                continue
            oldest = min(oldest, pack.created_us)
            here = pack.place == "object" or pack.node_id == self._node_id
            if not here or pack.state == "retired":
                continue
            if pack.state == "open":
                growing.append(pack.key)
            elif rewritten < REWRITTEN:
                rewritten += self._rewrite(pack)
        now_us = self._clock.now_us()
        with self._database.write() as connection:
            rows.ask_to_close(connection, growing, now_us)
            noted = rows.note_erased(connection, tenant, oldest, now_us)
        if noted:
            log.info(
                "deleted bytes erased",
                extra={"event": "erased", "tenant": tenant, "instances": noted},
            )
        return rewritten + noted

    def _holds_dead(self, pack: PackRow, until_us: int) -> bool:
        """Tell whether the pack may hold bytes that no instance refers to."""
        if pack.state == "retired":
            return True
        if pack.kind == "sealed" and pack.state == "open":
            # It takes its place only if all it holds is alive then.
            return False
        ours = pack.place == "local" and pack.node_id == self._node_id
        size = pack.size_bytes
        if ours:
            try:
                size = self._retirement.path(pack).stat().st_size
            except FileNotFoundError:
                return False
        with self._database.read() as connection:
            if rows.is_named(connection, pack.key, until_us):
                return True
            live = rows.live_bytes(connection, pack.pk) + FILE_HEADER_LENGTH
        if pack.place == "object":
            return False
        # Of another node's pack only the row is known, once it is closed.
        known = ours or (pack.state == "closed" and size > 0)
        return live < size if known else True

    def _rewrite(self, pack: PackRow) -> bool:
        """Replace a closed pack by one with only its live records; True when done."""
        with self._database.read() as connection:
            live = rows.live(connection, pack.pk)
        unknown: list[RecordInfo] = []
        try:
            if pack.place == "local":
                kept = {one.location.record_offset for one in live}
                unknown = self._retirement.contents(pack, skip=kept).unknown
                if unknown and not self._is_old(pack):
                    # Their rows may be on the way: a pack is closed before they come.
                    return False
            if not live and not unknown:
                return self._retirement.retire(pack)
            self._copy_and_swap(pack, live, unknown)
        except Unavailable as error:
            log.warning(
                "pack not rewritten: %s",
                error,
                extra={"event": "pack.kept", "pack": pack.key, "code": error.code},
            )
            return False
        log.info(
            "pack rewritten",
            extra={
                "event": "pack.rewritten",
                "pack": pack.key,
                "kept": len(live) + len(unknown),
            },
        )
        self._retirement.retire(
            pack, copied={info.location.record_offset for info in unknown}
        )
        return True

    def _copy_and_swap(
        self, pack: PackRow, live: list[Live], unknown: list[RecordInfo]
    ) -> None:
        key = new_key()
        if pack.place == "object":
            # Known before it is made, as in sealing. A local pack is not: recovery
            # looks after those that were left behind.
            self._register(key, pack)
        with PackBuilder(
            self._folder, key, min_free_bytes=self._min_free_bytes
        ) as builder:
            try:
                moved = [(one, self._copy(builder, one.wanted())) for one in live]
                for info in unknown:
                    self._copy(
                        builder,
                        Wanted(info.location, info.header.dataset_offset, info.digest),
                    )
                if pack.place == "object":
                    builder.put(self._objects)
                else:
                    builder.keep()
            except Unavailable:
                self._undo(key, pack.place)
                raise
            try:
                self._swap(builder, pack, moved)
            except LostRace:
                # After any other failure nobody knows whether the swap is in force.
                self._undo(key, pack.place)
                raise

    def _swap(
        self, builder: PackBuilder, pack: PackRow, moved: list[tuple[Live, Location]]
    ) -> None:
        with self._database.write() as connection:
            if pack.place == "local":
                self._register_in(connection, builder.key, pack)
            if not rows.swap(
                connection,
                builder.key,
                moved,
                size=builder.size,
                sha256=builder.digest(),
            ):
                raise LostRace("a record changed while its pack was rewritten")

    def _register(self, key: str, pack: PackRow) -> None:
        with self._database.write() as connection:
            self._register_in(connection, key, pack)

    def _register_in(self, connection: Connection, key: str, pack: PackRow) -> None:
        rows.register_pack(
            connection,
            key=key,
            tenant=pack.tenant,
            kind=pack.kind,
            node_id=self._node_id,
            place=pack.place,
            now_us=self._clock.now_us(),
        )

    def _copy(self, builder: PackBuilder, wanted: Wanted) -> Location:
        try:
            return builder.copy(wanted, self._reader.read)
        except PackGone as error:
            raise LostRace("the pack moved while it was rewritten") from error
        except CorruptData:
            # Its neighbours must go in time; what is left of it is kept.
            log.error(  # noqa: TRY400 - the place says it all
                "record is damaged",
                extra={
                    "event": "record.damaged",
                    "pack": wanted.location.pack_key,
                    "offset": wanted.location.record_offset,
                },
            )
            return builder.copy(wanted, self._reader.read, checked=False)

    def _is_old(self, pack: PackRow) -> bool:
        changed_us = self._retirement.path(pack).stat().st_mtime_ns // 1000
        return self._clock.now_us() - changed_us > UNKNOWN_US

    def _undo(self, key: str, place: str) -> None:
        """Remove a pack that took nobody's place."""
        try:
            self._retirement.remove_bytes(key, place)
            with self._database.write() as connection:
                rows.forget_pack(connection, key)
        except Unavailable as error:
            log.warning(
                "unfinished pack stays: %s",
                error,
                extra={"event": "pack.stays", "pack": key, "code": error.code},
            )


@contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Tell whether no other worker of this node erases."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)
