"""A DIMSE server in this process over real storage, and a peer that may misbehave."""

from __future__ import annotations

import functools
import shutil
import socket
import struct
import tempfile
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlalchemy import text

from pacs.dimse import command as cmd
from pacs.dimse import pdu
from pacs.dimse.association import Handler
from pacs.dimse.command import CommandField, Value
from pacs.dimse.find import FindHandler
from pacs.dimse.pdu import PduType, ProposedContext
from pacs.dimse.server import AssociationCounts, DimseServer
from pacs.repository import locate
from pacs.services.describe import Rules
from pacs.services.ingest import IngestService
from pacs.services.policy import AccessPolicy, KnownPeer
from pacs.services.query import QueryService
from storage.db import migrate
from storage.db.engine import Database
from storage.kernel.clock import SystemClock
from storage.kernel.limits import KIB, Limits
from storage.kernel.settings import Dimse, DuplicatePolicy, SyncPolicy
from storage.kernel.types import DEFAULT_TENANT, Actor
from storage.packs.reader import PackReader
from storage.packs.writer import PackWriter
from tests.support.waiting import wait_until

READER = Actor(DEFAULT_TENANT, "test")
CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"
IMPLICIT = "1.2.840.10008.1.2"
VERIFICATION = "1.2.840.10008.1.1"
STUDY_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
PATIENT_FIND = "1.2.840.10008.5.1.4.1.2.1.1"


class Peers:
    """Remote AEs by title."""

    def __init__(self, peers: Iterable[KnownPeer] = ()) -> None:
        self._peers = {peer.title: peer for peer in peers}

    def find(self, title: str) -> KnownPeer | None:
        return self._peers.get(title)


class Recorder:
    """Keeps what the server tells its observer."""

    def __init__(self) -> None:
        self.opened = 0
        self.closed: list[str] = []
        self.rejected: list[str] = []
        self.messages: list[tuple[str, int]] = []

    def association_opened(self) -> None:
        self.opened += 1

    def association_closed(self, outcome: str, seconds: float) -> None:
        self.closed.append(outcome)

    def association_rejected(self, reason: str) -> None:
        self.rejected.append(reason)

    def message(self, command: str, status: int, seconds: float) -> None:
        self.messages.append((command, status))


@functools.cache
def _empty_index() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.db"
        migrate.upgrade(f"sqlite:///{path}")
        return path.read_bytes()


class DimseNode:
    """A DIMSE server with ingest and query on SQLite in `folder`.

    Parameters
    ----------
    **settings
        Fields of `Dimse`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        limits: Limits | None = None,
        peers: Iterable[KnownPeer] = (),
        our_aes: Mapping[str, str] | None = None,
        open_access: bool = True,
        sync: SyncPolicy = SyncPolicy.NONE,
        duplicates: DuplicatePolicy = DuplicatePolicy.NEVER,
        min_free_bytes: int = 0,
        handlers: Mapping[int, Handler] | None = None,
        **settings: Any,
    ) -> None:
        self.folder = folder
        self.limits = limits or Limits()
        self.settings = Dimse(**settings)
        index = folder / "index.db"
        index.write_bytes(_empty_index())
        self.database = Database(f"sqlite:///{index}")
        self.packs = PackWriter(
            folder / "packs",
            roll_bytes=1 << 30,
            sync=sync,
            min_free_bytes=min_free_bytes,
        )
        self.reader = PackReader(folder / "packs")
        self.ingest = IngestService(
            database=self.database,
            packs=self.packs,
            rules=Rules(self.limits, duplicates=duplicates),
            clock=SystemClock(),
            sync=sync,
            node_id="node-1",
        )
        self.policy = AccessPolicy(
            our_aes=our_aes or {"HUYING": "default"},
            peers=Peers(peers),
            open_access=open_access,
        )
        self.query = QueryService(database=self.database, limits=self.limits)
        self.recorder = Recorder()
        self.counts = AssociationCounts(
            slots=1,
            most=self.settings.max_associations,
            most_per_ae=self.settings.max_associations_per_ae,
        )
        find = FindHandler(query=self.query, policy=self.policy, limits=self.limits)
        self.server = DimseServer(
            settings=self.settings,
            limits=self.limits,
            policy=self.policy,
            ingest=self.ingest,
            handlers={CommandField.C_FIND_RQ: find, **(handlers or {})},
            counts=self.counts,
            slot=0,
            observer=self.recorder,
        )
        self.stop = threading.Event()
        self.listener = _listen()
        self.port = int(self.listener.getsockname()[1])
        self.tls_listener: socket.socket | None = None
        self.tls_port = 0
        if self.settings.tls.certificate is not None:
            self.tls_listener = _listen()
            self.tls_port = int(self.tls_listener.getsockname()[1])
        self._thread = threading.Thread(
            target=self.server.serve,
            args=(self.listener, self.tls_listener, self.stop),
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def shut_down(self) -> None:
        """Stop serving, as SIGTERM does."""
        self.stop.set()
        self._thread.join(30)
        if self._thread.is_alive():
            raise TimeoutError("the server does not stop")

    def close(self) -> None:
        self.shut_down()
        for one in (self.listener, self.tls_listener):
            if one is not None:
                one.close()
        self.packs.close()
        self.reader.close()
        self.database.close()
        shutil.rmtree(self.folder / "packs", ignore_errors=True)

    def uids(self) -> list[str]:
        """Return the SOP Instance UIDs in the index, sorted."""
        with self.database.read() as connection:
            rows = connection.execute(
                text("SELECT sop_instance_uid FROM instance ORDER BY 1")
            )
            return [row[0] for row in rows]

    def dataset(self, sop_instance_uid: str) -> bytes:
        """Return the stored data set bytes of an instance."""
        with self.database.read() as connection:
            [stored] = locate.instances(
                connection, READER, instance_uid=sop_instance_uid
            )
        start = stored.object_offset + stored.dataset_offset
        length = stored.object_length - stored.dataset_offset
        return self.reader.read(stored.pack_key, start, length)

    def partial_files(self) -> list[Path]:
        """Return what was begun under the pack folder and is not a pack."""
        return sorted((self.folder / "packs").rglob("*.partial"))

    def wait_closed(self, number: int = 1) -> None:
        """Wait until `number` associations have ended."""
        wait_until(
            lambda: len(self.recorder.closed) >= number and not self.counts.open(),
            f"{number} associations to end",
        )

    def wait_idle(self) -> None:
        """Wait until no connection is served any more."""
        wait_until(
            lambda: (
                not any(
                    one.name.startswith("dimse 127") for one in threading.enumerate()
                )
            ),
            "all connections to end",
        )


def _listen() -> socket.socket:
    made = socket.socket()
    made.bind(("127.0.0.1", 0))
    made.listen(256)
    return made


class Ended(Exception):
    """The server closed the connection."""


class RawPeer:
    """An SCU that writes its own PDUs, right or wrong."""

    def __init__(self, port: int, *, timeout: float = 10.0) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._message_id = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def reset(self) -> None:
        """Vanish: the server gets a reset."""
        self.socket.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        self.socket.close()

    def send(self, *data: bytes) -> None:
        self.socket.sendall(b"".join(data))

    def read_pdu(self) -> tuple[int, bytes]:
        """Return type and body of the next PDU.

        Raises
        ------
        Ended
        """
        kind, length = pdu.HEADER.unpack(self._read(6))
        return kind, self._read(length)

    def _read(self, size: int) -> bytes:
        whole = b""
        while len(whole) < size:
            try:
                part = self.socket.recv(size - len(whole))
            except ConnectionError as error:
                raise Ended(str(error)) from error
            if not part:
                raise Ended("closed")
            whole += part
        return whole

    def read_to_end(self) -> bytes:
        """Return everything until the server closes."""
        whole = b""
        with suppress(ConnectionError):
            while part := self.socket.recv(65536):
                whole += part
        return whole

    def associate(
        self,
        contexts: Iterable[tuple[int, str, tuple[str, ...]]] = ((1, CT, (EXPLICIT,)),),
        *,
        called: str = "HUYING",
        calling: str = "TEST",
        roles: Mapping[str, tuple[bool, bool]] | None = None,
    ) -> pdu.AssociateAccept:
        """Associate; the answer must be an acceptance."""
        self.send(associate_rq(contexts, called=called, calling=calling, roles=roles))
        kind, body = self.read_pdu()
        if kind != PduType.ASSOCIATE_AC:
            raise AssertionError(f"not accepted: PDU {kind}, {body.hex()}")
        return pdu.parse_associate_ac(body)

    def request(self, context_id: int, values: dict[int, Value], *data: bytes) -> None:
        """Send a command, and each of `data` as a fragment of its data set."""
        self.send(message(context_id, values, *data))

    def read_response(self) -> dict[int, Value]:
        """Return the command of the next message; its data set is read too."""
        return self.read_message()[0]

    def read_message(self) -> tuple[dict[int, Value], bytes]:
        """Return the next message: command and data set."""
        raw: dict[int, bytes] = {0: b"", 1: b""}
        wanted = 1
        values: dict[int, Value] = {}
        while True:
            kind, body = self.read_pdu()
            if kind != PduType.DATA:
                raise Ended(f"PDU {kind} {body.hex()}")
            at = 0
            while at < len(body):
                size, _, flags = pdu.PDV.unpack_from(body, at)
                raw[flags & 1] += body[at + 6 : at + 4 + size]
                at += 4 + size
                if not flags & pdu.LAST:
                    continue
                if flags & pdu.COMMAND:
                    values = cmd.decode(raw[1])
                    wanted = values[cmd.DATASET_TYPE] != cmd.NO_DATASET
                if bool(flags & pdu.COMMAND) != bool(wanted):
                    return values, raw[0]

    def echo(self, context_id: int = 1) -> int:
        """Return the status of a C-ECHO."""
        self._message_id += 1
        self.request(
            context_id,
            {
                cmd.AFFECTED_CLASS: VERIFICATION,
                cmd.FIELD: CommandField.C_ECHO_RQ,
                cmd.MESSAGE_ID: self._message_id,
                cmd.DATASET_TYPE: cmd.NO_DATASET,
            },
        )
        return cmd.number(self.read_response(), cmd.STATUS)

    def store(
        self,
        instance_uid: str,
        dataset: bytes,
        *,
        class_uid: str = CT,
        context_id: int = 1,
        fragment: int = 8 * KIB,
    ) -> dict[int, Value]:
        """Store a data set; return the response."""
        self.request(
            context_id,
            store_rq(instance_uid, class_uid=class_uid),
            *(
                dataset[at : at + fragment]
                for at in range(0, max(1, len(dataset)), fragment)
            ),
        )
        return self.read_response()

    def release(self) -> None:
        """Release; the answer must be a release."""
        self.send(pdu.RELEASE_RQ)
        kind, _ = self.read_pdu()
        if kind != PduType.RELEASE_RP:
            raise AssertionError(f"not released: PDU {kind}")


def associate_rq(
    contexts: Iterable[tuple[int, str, tuple[str, ...]]] = ((1, CT, (EXPLICIT,)),),
    *,
    called: str = "HUYING",
    calling: str = "TEST",
    max_length: int = 16 * KIB,
    roles: Mapping[str, tuple[bool, bool]] | None = None,
) -> bytes:
    """Return an A-ASSOCIATE-RQ."""
    return pdu.encode_associate_rq(
        called_ae=called,
        calling_ae=calling,
        contexts=[ProposedContext(*one) for one in contexts],
        max_length=max_length,
        roles=roles,
    )


def store_rq(
    instance_uid: str, *, class_uid: str = CT, message_id: int = 1
) -> dict[int, Value]:
    """Return the command of a C-STORE-RQ."""
    return {
        cmd.AFFECTED_CLASS: class_uid,
        cmd.FIELD: CommandField.C_STORE_RQ,
        cmd.MESSAGE_ID: message_id,
        cmd.PRIORITY: 0,
        cmd.DATASET_TYPE: 1,
        cmd.AFFECTED_INSTANCE: instance_uid,
    }


def find_rq(*, class_uid: str = STUDY_FIND, message_id: int = 1) -> dict[int, Value]:
    """Return the command of a C-FIND-RQ."""
    return {
        cmd.AFFECTED_CLASS: class_uid,
        cmd.FIELD: CommandField.C_FIND_RQ,
        cmd.MESSAGE_ID: message_id,
        cmd.PRIORITY: 0,
        cmd.DATASET_TYPE: 1,
    }


def message(context_id: int, values: dict[int, Value], *data: bytes) -> bytes:
    """Return the PDUs of a message; each of `data` is one fragment."""
    parts = [pdv(context_id, pdu.COMMAND | pdu.LAST, cmd.encode(values))]
    for number, fragment in enumerate(data, 1):
        last = pdu.LAST if number == len(data) else 0
        parts.append(pdv(context_id, last, fragment))
    return b"".join(parts)


def pdv(context_id: int, flags: int, data: bytes) -> bytes:
    """Return a P-DATA-TF PDU with one fragment."""
    head = pdu.PDU_AND_PDV.pack(
        PduType.DATA, len(data) + 6, len(data) + 2, context_id, flags
    )
    return head + data


def abort_of(data: bytes) -> tuple[int, int]:
    """Return source and reason of the A-ABORT that `data` ends with."""
    kind, length, source, reason = struct.unpack(">BxIxxBB", data[-10:])
    if (kind, length) != (PduType.ABORT, 4):
        raise AssertionError(f"no A-ABORT: {data.hex()}")
    return source, reason


def rejection_of(data: bytes) -> tuple[int, int, int]:
    """Return result, source and reason of an A-ASSOCIATE-RJ."""
    kind, length, result, source, reason = struct.unpack(">BxIxBBB", data)
    if (kind, length) != (PduType.ASSOCIATE_RJ, 4):
        raise AssertionError(f"no A-ASSOCIATE-RJ: {data.hex()}")
    return result, source, reason
