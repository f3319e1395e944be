"""The composition root: builds every part from settings; the only wiring.

Each process kind has its function here: `run_web`, `run_dimse`, `run_worker`. They
build what they need after forking, so that no connection, thread or lock crosses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pacs.services.deletion import DeletionService
from pacs.services.peers import PeerService
from pacs.services.query import QueryService
from pacs.services.settling import Settling

from pacs.services.ingest import IngestService
from pacs.services.policy import AccessPolicy
from pacs.services.retrieve import RetrieveService
from storage.db.engine import Database
from storage.kernel.clock import SystemClock
from storage.kernel.settings import Settings
from storage.objects.protocol import ObjectStore
from storage.packs.reader import PackReader
from storage.packs.writer import PackWriter

if TYPE_CHECKING:
    pass


@dataclass(slots=True)
class Node:
    """All services of one process, sharing one database and one pack writer."""

    settings: Settings
    clock: SystemClock
    database: Database
    objects: ObjectStore
    packs: PackWriter
    reader: PackReader
    ingest: IngestService
    query: QueryService
    retrieve: RetrieveService
    deletion: DeletionService
    settling: Settling
    peers: PeerService
    policy: AccessPolicy

    def close(self) -> None:
        """Close packs and connections; nothing is lost without it."""
        self.packs.close()
        self.reader.close()
        self.database.close()
