"""The services around a study's life, on real packs and a clock that tests turn."""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian
from sqlalchemy import text

from pacs.domain.study import Accepted, Arrival, StoredInstance
from pacs.imaging.codecs import DecoderPool
from pacs.services.deletion import DeletionService
from pacs.services.describe import Rules
from pacs.services.erasure import Erasure
from pacs.services.ingest import IngestService
from pacs.services.packbook import PackBook
from pacs.services.policy import AccessPolicy, KnownPeer
from pacs.services.recovery import Recovered, Recovery
from pacs.services.renditions import RenditionReader, Renditions
from pacs.services.retirement import Retirement
from pacs.services.retrieve import RetrieveService
from pacs.services.sealing import Sealing
from pacs.services.settling import Settling
from storage.db import migrate
from storage.db.engine import Database
from storage.kernel.errors import NotFound
from storage.kernel.limits import Limits
from storage.kernel.settings import DuplicatePolicy, SyncPolicy
from storage.kernel.types import Actor, Digest, Door, Role, Source, TenantId
from storage.objects.protocol import ObjectStore
from storage.outbox import ChangeFeed, Event, Relay
from storage.packs.reader import PackReader
from storage.packs.seal import PackBuilder
from storage.packs.writer import PackWriter
from tests.support.datasets import dataset_bytes, part10

SETTLE_SECONDS = 60.0
GRACE_SECONDS = 900.0
REWRITE_SECONDS = 86_400.0
DAY = 86_400.0


class TurnedClock:
    """Stands still but for the microsecond each look costs, until it is turned."""

    def __init__(self) -> None:
        self._us = itertools.count(1_700_000_000_000_000)
        self._turned = 0
        self._lock = threading.Lock()

    def now_us(self) -> int:
        with self._lock:
            return next(self._us) + self._turned

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.now_us() / 1e6, UTC)

    def turn(self, seconds: float) -> None:
        self._turned += int(seconds * 1e6)


class NoPeers:
    def find(self, title: str) -> KnownPeer | None:
        return None


def admin(tenant: str = "default", *readable: str) -> Actor:
    return Actor(
        TenantId(tenant),
        "operator",
        readable=frozenset(map(TenantId, readable)),
        roles=frozenset({Role.OPEN}),
    )


class Jobs:
    """Takes jobs and remembers them, once for each key."""

    def __init__(self) -> None:
        self.asked: dict[tuple[str, str], dict[str, Any]] = {}

    def enqueue(self, name: str, key: str, payload: Any) -> bool:
        if (name, key) in self.asked:
            return False
        self.asked[name, key] = dict(payload)
        return True


class Life:
    """One process with everything; others on the same folder share its clock."""

    def __init__(
        self,
        folder: Path,
        url: str,
        objects: ObjectStore,
        *,
        clock: TurnedClock | None = None,
        duplicates: DuplicatePolicy = DuplicatePolicy.NEVER,
        roll_bytes: int = 1 << 30,
        pack_bytes: int = 1 << 30,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        migrate.upgrade(url)
        self.clock = clock or TurnedClock()
        self.folder = folder / "packs"
        self.objects = objects
        self.database = Database(url)
        self.book = PackBook(self.database)
        self.packs = PackWriter(
            self.folder, roll_bytes=roll_bytes, on_closed=self.book.closed
        )
        self.reader = PackReader(self.folder, objects)
        self.ingest = IngestService(
            database=self.database,
            packs=self.packs,
            rules=Rules(Limits(), settle_seconds=SETTLE_SECONDS, duplicates=duplicates),
            clock=self.clock,
            sync=SyncPolicy.INSTANCE,
            node_id="node-1",
        )
        self.decoders = DecoderPool(Limits())
        self.retrieve = RetrieveService(
            database=self.database,
            reader=self.reader,
            decoders=self.decoders,
            limits=Limits(),
            renditions=RenditionReader(self.database, objects),
        )
        self.renditions = Renditions(
            database=self.database,
            objects=objects,
            frames=self.retrieve,
            clock=self.clock,
            folder=folder,
            threads=2,
        )
        policy = AccessPolicy(our_aes={}, peers=NoPeers(), open_access=False)
        self.settling = Settling(
            database=self.database, policy=policy, clock=self.clock
        )
        self.deletion = DeletionService(
            database=self.database,
            packs=self.packs,
            policy=policy,
            clock=self.clock,
            node_id="node-1",
            settle_seconds=SETTLE_SECONDS,
            rewrite_seconds=REWRITE_SECONDS,
        )
        self.retirement = Retirement(
            database=self.database,
            packs=self.packs,
            reader=self.reader,
            objects=objects,
            clock=self.clock,
            node_id="node-1",
            grace_seconds=GRACE_SECONDS,
        )
        self.sealing = Sealing(
            database=self.database,
            reader=self.reader,
            objects=objects,
            retirement=self.retirement,
            clock=self.clock,
            folder=self.folder,
            node_id="node-1",
            pack_bytes=pack_bytes,
        )
        self.erasure = Erasure(
            database=self.database,
            reader=self.reader,
            objects=objects,
            retirement=self.retirement,
            clock=self.clock,
            folder=self.folder,
            node_id="node-1",
            pause_seconds=0,
        )
        self.recovery = Recovery(
            database=self.database,
            ingest=self.ingest,
            packs=self.packs,
            node_id="node-1",
            deletions=self.deletion,
        )

    def store(
        self,
        ds: Dataset,
        *,
        tenant: str = "default",
        origin: str = "external",
        syntax: str = ExplicitVRLittleEndian,
    ) -> Accepted:
        data = dataset_bytes(part10(ds, syntax))
        return self.ingest.accept(
            Arrival(
                admin(tenant),
                Source(Door.DIMSE, calling_ae="CT1", origin=origin),
                syntax,
                memoryview(data),
                Digest(hashlib.sha256(data).digest()),
            )
        )

    def store_large(self, ds: Dataset) -> Accepted:
        data = dataset_bytes(part10(ds))
        source = Source(Door.DIMSE)
        spool = self.ingest.open_spool(
            admin(),
            source,
            sop_class_uid=ds.SOPClassUID,
            sop_instance_uid=ds.SOPInstanceUID,
            transfer_syntax_uid=ExplicitVRLittleEndian,
        )
        spool.write(data)
        digest = Digest(hashlib.sha256(data).digest())
        return self.ingest.accept(
            Arrival(admin(), source, ExplicitVRLittleEndian, spool, digest)
        )

    def settle_all(self) -> None:
        """Let every pause pass and settle."""
        self.clock.turn(SETTLE_SECONDS + 1)
        while self.settling.tick():
            pass

    def seal_all(self) -> int:
        """Do the jobs that the settled studies ask for; return instances sealed."""
        jobs = Jobs()
        for event in self.events("study.settled"):
            self.sealing.follow(event, jobs)
        return sum(
            self.sealing.seal(payload)["instances"] for payload in jobs.asked.values()
        )

    def encode_all(self) -> int:
        """Do the jobs that the settled studies ask for; return instances encoded."""
        jobs = Jobs()
        for event in self.events("study.settled"):
            self.renditions.follow(event, jobs)
        return sum(
            self.renditions.make(payload)["instances"]
            for payload in jobs.asked.values()
        )

    def roll(self) -> None:
        """Close the open packs, as a full one is."""
        self.packs.close()
        self.book.flush()

    def events(self, *kinds: str) -> list[Event]:
        while Relay(self.database).tick():
            pass
        page = ChangeFeed(self.database).read(None, 0, 10_000)
        return [event for event in page.events if not kinds or event.kind in kinds]

    def rows(self, sql: str, **values: Any) -> list[tuple[Any, ...]]:
        with self.database.read() as connection:
            return [tuple(row) for row in connection.execute(text(sql), values)]

    def located(self, uid: str) -> StoredInstance:
        return self.retrieve.find_instance(admin(), uid)

    def bytes_of(self, uid: str) -> bytes | None:
        """Return the data set as the archive gives it out; None when unknown."""
        try:
            stored = self.located(uid)
        except NotFound:
            return None
        data = self.retrieve.read_object(stored, 0, stored.object_length)
        return data[stored.dataset_offset :]

    def everywhere(self) -> bytes:
        """Return all bytes of all packs, local and stored."""
        local = [path.read_bytes() for path in self.files()]
        stored = [
            self.objects.read(info.key, 0, info.size) for info in self.objects.list()
        ]
        return b"".join(local + stored)

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("??/*.pack"))

    def recount(self) -> list[tuple[Any, ...]]:
        """Return each study whose counters differ from its rows."""
        return self.rows(
            "SELECT study.id FROM study WHERE n_instances <> (SELECT count(*)"
            " FROM instance JOIN series ON series.id = series_pk"
            " WHERE study_pk = study.id)"
            " OR n_series <> (SELECT count(*) FROM series WHERE study_pk = study.id)"
            " OR size_bytes <> (SELECT coalesce(sum(object_length), 0) FROM instance"
            " JOIN series ON series.id = series_pk WHERE study_pk = study.id)"
            " UNION ALL SELECT series.id FROM series WHERE n_instances <>"
            " (SELECT count(*) FROM instance WHERE series_pk = series.id)"
        )

    def recover(self) -> Recovered:
        return self.recovery.run()

    def close(self) -> None:
        self.decoders.close()
        self.packs.close()
        self.reader.close()
        self.database.close()


def content(ds: Dataset) -> bytes:
    """Return the data set bytes that `Life.store` hands over."""
    return dataset_bytes(part10(ds))


def payload_of(event: Event) -> dict[str, Any]:
    """Return a copy of the payload, as JSON gives it."""
    copied: dict[str, Any] = orjson.loads(orjson.dumps(dict(event.payload)))
    return copied


def let_go(builder: PackBuilder, *_: object) -> None:
    """End a pack under way as a killed process does: nothing is tidied up."""
    os.close(builder._fd)  # noqa: SLF001  # what the kernel does


def lives(folder: Path, url: str, objects: ObjectStore, **more: Any) -> Iterator[Life]:
    made = Life(folder, url, objects, **more)
    yield made
    made.close()
