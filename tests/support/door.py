"""The door and its packs in this process: ingest, index, folder, recovery."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian
from sqlalchemy import text

from pacs.domain.study import Accepted, Arrival
from pacs.services.describe import Rules
from pacs.services.ingest import IngestService
from pacs.services.recovery import Recovered, Recovery
from storage.db import migrate
from storage.db.engine import Database
from storage.kernel.clock import Clock, SystemClock
from storage.kernel.limits import Limits
from storage.kernel.settings import DuplicatePolicy, SyncPolicy
from storage.kernel.types import Actor, Digest, Door, Source, TenantId
from storage.packs.format import Kind, RecordInfo
from storage.packs.recover import iter_records
from storage.packs.writer import PackWriter, pack_path
from tests.support.datasets import dataset_bytes, part10

SOURCE = Source(Door.DIMSE, calling_ae="CT1", called_ae="HUYING")


def actor(tenant: str = "default") -> Actor:
    return Actor(TenantId(tenant), "CT1")


class Archive:
    """One process of a node: more of them on one folder are its other processes.

    Parameters
    ----------
    url : str, optional
        Of the index; SQLite in `folder` by default.
    """

    def __init__(
        self,
        folder: Path,
        *,
        url: str = "",
        sync: SyncPolicy = SyncPolicy.INSTANCE,
        duplicates: DuplicatePolicy = DuplicatePolicy.NEVER,
        clock: Clock | None = None,
        roll_bytes: int = 1 << 30,
        min_free_bytes: int = 0,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        url = url or f"sqlite:///{folder / 'index.db'}"
        migrate.upgrade(url)
        self.folder = folder / "packs"
        self.clock = clock or SystemClock()
        self.database = Database(url)
        self.packs = PackWriter(
            self.folder,
            roll_bytes=roll_bytes,
            sync=sync,
            min_free_bytes=min_free_bytes,
        )
        self.ingest = IngestService(
            database=self.database,
            packs=self.packs,
            rules=Rules(Limits(), settle_seconds=0, duplicates=duplicates),
            clock=self.clock,
            sync=sync,
            node_id="node-1",
        )
        self.recovery = Recovery(
            database=self.database,
            ingest=self.ingest,
            packs=self.packs,
            node_id="node-1",
        )

    def store(self, ds: Dataset, tenant: str = "default") -> Accepted:
        """Let `ds` arrive in Explicit VR Little Endian."""
        return self.ingest.accept(arrival(ds, tenant))

    def store_large(self, ds: Dataset, tenant: str = "default") -> Accepted:
        """Let `ds` arrive through a pack of its own."""
        data = dataset_bytes(part10(ds))
        spool = self.ingest.open_spool(
            actor(tenant),
            SOURCE,
            sop_class_uid=ds.SOPClassUID,
            sop_instance_uid=ds.SOPInstanceUID,
            transfer_syntax_uid=ExplicitVRLittleEndian,
        )
        spool.write(data)
        return self.ingest.accept(
            Arrival(
                actor(tenant),
                SOURCE,
                ExplicitVRLittleEndian,
                spool,
                Digest(hashlib.sha256(data).digest()),
            )
        )

    def recover(self) -> Recovered:
        return self.recovery.run()

    def rows(self, sql: str, **values: Any) -> list[tuple[Any, ...]]:
        with self.database.read() as connection:
            return [tuple(row) for row in connection.execute(text(sql), values)]

    def held(self) -> dict[tuple[str, str], str]:
        """Return digest by (tenant, SOP Instance UID), as the index has it."""
        return {
            (tenant, uid): bytes(digest).hex()
            for tenant, uid, digest in self.rows(
                "SELECT tenant, sop_instance_uid, digest FROM instance"
            )
        }

    def bytes_of(self, uid: str, tenant: str = "default") -> bytes:
        """Return the data set bytes that the index points at."""
        [(key, start, length, skip)] = self.rows(
            "SELECT pack.key, object_offset, object_length, dataset_offset"
            " FROM instance JOIN pack ON pack.id = pack_pk"
            " WHERE instance.tenant = :tenant AND sop_instance_uid = :uid",
            tenant=tenant,
            uid=uid,
        )
        data = pack_path(self.folder, key).read_bytes()
        return data[start + skip : start + length]

    def pack_files(self) -> list[Path]:
        return sorted(self.folder.glob("??/*.pack"))

    def records(self, kind: Kind) -> list[RecordInfo]:
        """Return the records of one kind, of all packs."""
        return [
            one
            for path in self.pack_files()
            for one in iter_records(path)
            if isinstance(one, RecordInfo) and one.kind is kind
        ]

    def die(self) -> None:
        """Let go of everything as a killed process does: nothing is finished."""
        for pack in self.packs._open.values():  # noqa: SLF001  # what the kernel does
            os.close(pack.fd)
        self.packs._open.clear()  # noqa: SLF001
        self.database.close()

    def close(self) -> None:
        self.packs.close()
        self.database.close()


def arrival(ds: Dataset, tenant: str = "default") -> Arrival:
    """Return `ds` as an edge hands it over."""
    data = dataset_bytes(part10(ds))
    return Arrival(
        actor(tenant),
        SOURCE,
        ExplicitVRLittleEndian,
        memoryview(data),
        Digest(hashlib.sha256(data).digest()),
        claimed_class_uid=ds.SOPClassUID,
        claimed_instance_uid=ds.SOPInstanceUID,
    )


def digest_of(ds: Dataset) -> str:
    return hashlib.sha256(dataset_bytes(part10(ds))).hexdigest()
