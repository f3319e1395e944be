"""From the parts of a STOW-RS request to the ingest service.

The event loop splits the body; threads hash, check and store. Several parts are on
their way at a time, so that they share syncs and transactions, and what they may hold
together is bounded for the whole process: a client that sends faster than the disk
writes waits.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from pacs.domain.study import Accepted, Arrival, Ingest, Spool
from pacs.imaging.part10 import FileMeta, read_file_meta
from storage.kernel.errors import ImagingError, MalformedObject, TooLarge
from storage.kernel.limits import MIB, Limits
from storage.kernel.types import Actor, Digest, Source

log = logging.getLogger(__name__)

#: Parts a process works on at a time; as many share a sync.
THREADS = 8
#: What they may hold in memory together.
IN_FLIGHT_BYTES = 32 * MIB
#: Large data sets are hashed and written in pieces of this size.
BLOCK = 1 * MIB


@dataclass(frozen=True, slots=True)
class Refused:
    """A part that was not stored, with the UIDs it claimed as far as they are known."""

    error: Exception
    sop_class_uid: str = ""
    sop_instance_uid: str = ""


Outcome = Accepted | Refused


class EmptyPart(MalformedObject):
    """A part without a byte."""

    code = "input.empty_part"


class _Budget:
    """What may be in flight; for the event loop only, first come first served."""

    def __init__(self, n_items: int, n_bytes: int) -> None:
        self._free_items, self._free_bytes = n_items, n_bytes
        self._n_items = n_items
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()

    def _fits(self, size: int) -> bool:
        # One part alone always fits, whatever its size.
        alone = self._free_items == self._n_items
        return self._free_items > 0 and (alone or size <= self._free_bytes)

    def _take(self, size: int) -> None:
        self._free_items -= 1
        self._free_bytes -= size

    async def acquire(self, size: int) -> None:
        if not self._waiting and self._fits(size):
            self._take(size)
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((turn, size))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release(size)
            raise

    def release(self, size: int) -> None:
        self._free_items += 1
        self._free_bytes += size
        while self._waiting and self._fits(self._waiting[0][1]):
            turn, wanted = self._waiting.popleft()
            if not turn.done():
                self._take(wanted)
                turn.set_result(None)


class Intake:
    """The threads and the memory that STOW-RS requests of one process share.

    Parameters
    ----------
    ingest : Ingest
    limits : Limits
    body_seconds : float
        How long a client may take between two pieces of its body.
    """

    def __init__(self, ingest: Ingest, limits: Limits, *, body_seconds: float) -> None:
        self.ingest = ingest
        self.limits = limits
        self.body_seconds = body_seconds
        self._pool = ThreadPoolExecutor(THREADS, "stow")
        self._budget = _Budget(THREADS, IN_FLIGHT_BYTES)

    def close(self) -> None:
        """Wait for what is on its way."""
        self._pool.shutdown()

    def start(self, function: Callable[[], None]) -> asyncio.Future[None]:
        """Run `function` in a thread."""
        return asyncio.get_running_loop().run_in_executor(self._pool, function)

    async def submit(
        self, size: int, function: Callable[[], Outcome]
    ) -> asyncio.Future[Outcome]:
        """Run `function` in a thread, as soon as `size` bytes may be held for it."""
        await self._budget.acquire(size)
        future = asyncio.get_running_loop().run_in_executor(self._pool, function)
        future.add_done_callback(lambda _: self._budget.release(size))
        return future


class Reception:
    """The instances of one request, answered in the order they came.

    Parameters
    ----------
    study_uid : str, optional
        The study the request was addressed to.
    keep : callable
        Gets the number of each part and its outcome, in any order.
    """

    def __init__(
        self,
        intake: Intake,
        actor: Actor,
        source: Source,
        study_uid: str | None,
        keep: Callable[[int, Outcome], None],
    ) -> None:
        self.intake = intake
        self.actor = actor
        self.source = source
        self._study_uid = study_uid
        self._keep = keep
        self._n = 0
        self._pending: set[asyncio.Future[Outcome]] = set()
        self._part: _Incoming | None = None

    def begin(self) -> None:
        """Start an instance as a Part-10 file."""
        self._part = _Incoming(self)

    async def write(self, data: bytes) -> None:
        """Add bytes to it."""
        if self._part is not None:
            await self._part.write(data)

    async def end(self) -> None:
        """Complete it."""
        if self._part is not None:
            await self._part.end()
            self._part = None

    def refuse(
        self, error: ImagingError, class_uid: str = "", instance_uid: str = ""
    ) -> None:
        """Count a part that cannot be stored."""
        self._keep(self._number(), Refused(error, class_uid, instance_uid))

    async def add(
        self, transfer_syntax_uid: str, build: Callable[[], bytes], size: int
    ) -> None:
        """Add an instance whose data set `build` makes, in a thread."""

        def store() -> Outcome:
            try:
                data = build()
            except ImagingError as error:
                return Refused(error)
            return self.store_memory(
                FileMeta("", "", transfer_syntax_uid, 0), bytearray(data)
            )

        await self.submit(size, store)

    async def drain(self) -> None:
        """Wait until everything handed over is durable or refused."""
        while self._pending:
            await asyncio.wait(self._pending)
        await self.intake.start(self.intake.ingest.flush)

    async def abort(self) -> None:
        """Drop the part under way; what is complete goes its way."""
        part, self._part = self._part, None
        if part is not None:
            await part.abort()
        if self._pending:
            await asyncio.wait(self._pending)

    def _number(self) -> int:
        self._n += 1
        return self._n - 1

    async def submit(self, size: int, function: Callable[[], Outcome]) -> None:
        """Run `function` in a thread; its outcome counts for the next part."""
        number = self._number()
        future = await self.intake.submit(size, function)
        self._pending.add(future)
        future.add_done_callback(partial(self._finished, number))

    def _finished(self, number: int, future: asyncio.Future[Outcome]) -> None:
        self._pending.discard(future)
        error = None if future.cancelled() else future.exception()
        if future.cancelled():
            return
        if error is None:
            self._keep(number, future.result())
            return
        log.error("part not stored", exc_info=error, extra={"event": "stow.failed"})
        self._keep(number, Refused(RuntimeError("internal")))

    def _arrival(
        self, meta: FileMeta, dataset: memoryview | Spool, digest: bytes
    ) -> Arrival:
        return Arrival(
            self.actor,
            self.source,
            meta.transfer_syntax_uid,
            dataset,
            Digest(digest),
            claimed_class_uid=meta.sop_class_uid or None,
            claimed_instance_uid=meta.sop_instance_uid or None,
            study_uid=self._study_uid,
        )

    def store_memory(self, meta: FileMeta, buffer: bytearray) -> Outcome:
        """Store a data set that is in memory; for threads."""
        with memoryview(buffer) as whole, whole[meta.dataset_offset :] as view:
            digest = hashlib.sha256(view).digest()
            try:
                return self.intake.ingest.accept(self._arrival(meta, view, digest))
            except ImagingError as error:
                return Refused(error, meta.sop_class_uid, meta.sop_instance_uid)

    def store_spool(self, meta: FileMeta, spool: Spool, digest: bytes) -> Outcome:
        """Store a data set that went into a pack of its own; for threads."""
        try:
            return self.intake.ingest.accept(self._arrival(meta, spool, digest))
        except ImagingError as error:
            return Refused(error, meta.sop_class_uid, meta.sop_instance_uid)
        finally:
            spool.abort()


class _Incoming:
    """One Part-10 file on its way in."""

    def __init__(self, reception: Reception) -> None:
        self._reception = reception
        self._intake = reception.intake
        self._limits = self._intake.limits
        self._buffer = bytearray()
        self._meta: FileMeta | None = None
        self._read_meta_at = 1
        self._spool: Spool | None = None
        self._digest = hashlib.sha256()
        self._writing: asyncio.Future[None] | None = None
        self._size = 0
        self._error: ImagingError | None = None

    async def write(self, data: bytes) -> None:
        if self._error is not None:
            return
        self._buffer += data
        try:
            if self._meta is None and len(self._buffer) >= self._read_meta_at:
                self._meta = read_file_meta(self._buffer, complete=False)
                # Bound: a client that sends byte by byte costs no more than others.
                self._read_meta_at = 2 * len(self._buffer)
            if self._spool is not None:
                if len(self._buffer) >= BLOCK:
                    await self._write_block()
            elif self._meta is not None:
                size = len(self._buffer) - self._meta.dataset_offset
                if size > self._limits.memory_instance_bytes:
                    await self._open_spool(self._meta)
        except ImagingError as error:
            await self._fail(error)

    async def _open_spool(self, meta: FileMeta) -> None:
        uids = {
            "sop_class_uid": meta.sop_class_uid,
            "sop_instance_uid": meta.sop_instance_uid,
            "transfer_syntax_uid": meta.transfer_syntax_uid,
        }
        actor, source = self._reception.actor, self._reception.source
        ingest = self._intake.ingest

        def start() -> None:
            ingest.check(actor, source, **uids)
            self._spool = ingest.open_spool(actor, source, **uids)

        await self._intake.start(start)
        del self._buffer[: meta.dataset_offset]
        await self._write_block()

    async def _write_block(self) -> None:
        """Hash and write what has gathered, while the next block comes in."""
        spool, block = self._spool, self._buffer
        self._buffer = bytearray()
        self._size += len(block)
        if self._size > self._limits.instance_bytes:
            raise TooLarge("instance_bytes", self._limits.instance_bytes)

        def write() -> None:
            if spool is not None:
                self._digest.update(block)
                spool.write(block)

        await self._written()
        self._writing = self._intake.start(write)

    async def _written(self) -> None:
        """Wait for the block under way."""
        writing, self._writing = self._writing, None
        if writing is not None:
            await writing

    async def end(self) -> None:
        try:
            if self._error is None and self._meta is None:
                self._meta = self._complete_meta()
            if self._error is None and self._spool is not None:
                await self._write_block()
                await self._written()
        except ImagingError as error:
            await self._fail(error)
        reception, meta = self._reception, self._meta
        if self._error is not None or meta is None:
            claims = (meta.sop_class_uid, meta.sop_instance_uid) if meta else ("", "")
            reception.refuse(
                self._error or MalformedObject("not a DICOM file"), *claims
            )
        elif self._spool is not None:
            digest = self._digest.digest()
            await reception.submit(
                0, partial(reception.store_spool, meta, self._spool, digest)
            )
            self._spool = None
        else:
            await reception.submit(
                len(self._buffer),
                partial(reception.store_memory, meta, self._buffer),
            )

    def _complete_meta(self) -> FileMeta:
        if not self._buffer:
            raise EmptyPart("empty")
        meta = read_file_meta(self._buffer)
        if meta is None:
            raise MalformedObject("File Meta Information is cut off", 0x00020000)
        return meta

    async def _fail(self, error: ImagingError) -> None:
        self._error = error
        self._buffer = bytearray()
        await self.abort()

    async def abort(self) -> None:
        """Leave nothing behind."""
        # Order matters: a thread may still write into the spool.
        try:
            with suppress(ImagingError):
                await self._written()
        finally:
            if self._spool is not None:
                self._spool.abort()
                self._spool = None
