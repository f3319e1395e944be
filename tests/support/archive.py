"""An archive inside the test's own process: its services, and its DICOM listener.

Real database, packs and sockets; only the supervisor and its processes are missing.
"""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from sqlalchemy import select

from gateway.app import Node, open_node, our_aes, pack_folder
from pacs.dimse.association import Handler
from pacs.dimse.client import Timeouts
from pacs.dimse.command import CommandField
from pacs.dimse.commit import CommitHandler
from pacs.dimse.deliver import Outgoing, PeerSender
from pacs.dimse.get import GetHandler
from pacs.dimse.move import MoveHandler
from pacs.dimse.server import AssociationCounts, DimseServer
from pacs.domain.study import Arrival
from pacs.imaging.part10 import read_file_meta
from pacs.repository.tables import CommitmentRequest, Study
from pacs.services.commitment import CommitmentService, Report
from pacs.services.forwarding import FOLLOWER, KINDS, Enqueue, ForwardingService
from pacs.services.policy import KnownPeer
from storage.db import migrate
from storage.kernel.settings import Settings
from storage.kernel.types import Actor, Digest, Door, Role, Source, TenantId
from storage.outbox import Event, Relay
from storage.packs.writer import pack_path
from tests.support.datasets import part10

ADMIN = Actor(TenantId("default"), "test", roles=frozenset({Role.OPEN}))
#: Short, so that a hanging peer does not hold a test.
TIMEOUTS = Timeouts(connect=5, acse=5, dimse=5, write=5)
Follow = Callable[[Enqueue], Callable[[Event], None]]


class Archive:
    """A node's services and, with `listening`, its DICOM port."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.commitment = CommitmentService(
            database=node.database, retrieve=node.retrieve, clock=node.clock
        )
        self.port = 0

    @property
    def aet(self) -> str:
        return self.node.settings.dimse.aet

    def store(
        self, file: bytes, *, actor: Actor = ADMIN, source: Source | None = None
    ) -> str:
        """Take a Part 10 file; return its SOP Instance UID."""
        meta = read_file_meta(file)
        assert meta is not None
        dataset = file[meta.dataset_offset :]
        accepted = self.node.ingest.accept(
            Arrival(
                actor=actor,
                source=source or Source(Door.IMPORT),
                transfer_syntax_uid=meta.transfer_syntax_uid,
                dataset=memoryview(dataset),
                digest=Digest(hashlib.sha256(dataset).digest()),
            )
        )
        return accepted.sop_instance_uid

    def store_all(self, datasets: Iterable[Dataset], **more: Any) -> list[str]:
        """Take data sets in Explicit VR Little Endian."""
        return [self.store(part10(ds), **more) for ds in datasets]

    def add_peer(self, title: str, port: int, **more: Any) -> KnownPeer:
        """Make a peer on this machine known."""
        values = {"host": "127.0.0.1", "tenant": "", "may": frozenset({"store"})}
        peer = KnownPeer(title=title, port=port, **{**values, **more})
        self.node.peers.put(peer)
        return peer

    def damage(self, sop_instance_uid: str) -> None:
        """Flip one bit of the last byte of an object in its pack."""
        found = self.node.retrieve.find_instance(ADMIN, sop_instance_uid)
        path = pack_path(pack_folder(self.node.settings), found.pack_key)
        with path.open("r+b") as stream:
            stream.seek(found.object_offset + found.object_length - 1)
            last = stream.read(1)[0]
            stream.seek(-1, 1)
            stream.write(bytes((last ^ 1,)))

    def forwarding(self) -> ForwardingService:
        """Return the service that forwards, as the worker has it."""
        node = self.node
        return ForwardingService(
            database=node.database,
            retrieve=node.retrieve,
            reader=node.reader,
            peers=node.peers,
            sender=PeerSender(node.retrieve, Outgoing(TIMEOUTS), self.aet),
            clock=node.clock,
            trail=node.audit,
        )

    def jobs_of(self, name: str, kinds: frozenset[str], handler: Follow) -> list[Any]:
        """Follow the change feed once; return the payloads of the jobs asked for."""
        asked: list[Any] = []

        def enqueue(_name: str, _key: str, payload: Mapping[str, Any]) -> bool:
            asked.append(payload)
            return True

        while Relay(self.node.database).tick():
            pass
        self.node.feed.follow(name, handler(enqueue), kinds=kinds)
        return asked

    def settle_and_forward(self) -> list[dict[str, int]]:
        """Settle every study, do the jobs that follow; return what they did."""
        with self.node.database.read() as connection:
            studies = connection.scalars(select(Study.study_instance_uid)).all()
        for uid in studies:
            self.node.settling.settle(ADMIN, uid)
        service = self.forwarding()
        jobs = self.jobs_of(FOLLOWER, KINDS, service.follower)
        done = [service.work(payload) for payload in jobs]
        return [{name: one[name] for name in ("sent", "kept_back")} for one in done]

    def commitment_key(self, transaction_uid: str) -> int:
        """Return the key of the only request with this Transaction UID."""
        with self.node.database.read() as connection:
            return connection.execute(
                select(CommitmentRequest.id).where(
                    CommitmentRequest.transaction_uid == transaction_uid
                )
            ).scalar_one()

    def check_commitment(self, transaction_uid: str) -> Report:
        """Check a request as the worker does; return the result."""
        report = self.commitment.check(self.commitment_key(transaction_uid))
        assert report is not None
        return report

    @contextmanager
    def listening(self) -> Iterator[int]:
        """Serve DICOM on a free port while the block runs."""
        node = self.node
        settings = node.settings
        outgoing = Outgoing(TIMEOUTS)
        handlers: Mapping[int, Handler] = {
            CommandField.C_GET_RQ: GetHandler(
                node.retrieve, node.policy, settings.limits, TIMEOUTS.dimse
            ),
            CommandField.C_MOVE_RQ: MoveHandler(
                node.retrieve,
                node.policy,
                settings.limits,
                our_aes(settings),
                outgoing,
            ),
            CommandField.N_ACTION_RQ: CommitHandler(
                self.commitment, node.policy, node.peers, settings.limits
            ),
        }
        server = DimseServer(
            settings=settings.dimse,
            limits=settings.limits,
            policy=node.policy,
            ingest=node.ingest,
            handlers=handlers,
            counts=AssociationCounts.for_settings(settings, 1),
            slot=0,
            observer=None,
        )
        stop = threading.Event()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
            thread = threading.Thread(target=server.serve, args=(listener, None, stop))
            thread.start()
            try:
                yield self.port
            finally:
                stop.set()
                thread.join()


@contextmanager
def archive(folder: Path, **settings: Any) -> Iterator[Archive]:
    """Yield an empty archive below `folder`; `settings` as of `Settings`."""
    tree = {"open": True, "data": folder / "data", "packs": {"min_free_bytes": 0}}
    made = Settings(**{**tree, **settings})
    made.data.mkdir(parents=True)
    migrate.upgrade(made.database_url())
    node = open_node(made)
    try:
        yield Archive(node)
    finally:
        node.close()
