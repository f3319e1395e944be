"""Peers that receive: DCMTK's storescp, and SCPs that misbehave on purpose."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydicom import dcmread
from pydicom.dataset import Dataset
from pynetdicom import AE, build_context, build_role, evt

from pacs.dimse import pdu
from pacs.imaging.sopclasses import storage_classes
from pacs.imaging.syntaxes import all_syntaxes
from tests.support import dcmtk, process
from tests.support.ports import free_port
from tests.support.waiting import wait_until


class StoreScp:
    """DCMTK's storescp, writing what it receives to a folder."""

    def __init__(self, folder: Path, *options: str, title: str = "STORESCP") -> None:
        self.folder = folder
        self.title = title
        self.port = free_port()
        self.log = folder.with_suffix(".log")
        folder.mkdir(parents=True)
        # +B: the data set exactly as received.
        self._command = [
            dcmtk.tool("storescp"), "+B", "-aet", title, "-od", str(folder),
            *options, str(self.port),
        ]  # fmt: skip

    @contextmanager
    def running(self) -> Iterator[StoreScp]:
        with self.log.open("wb") as output:
            child = subprocess.Popen(self._command, stdout=output, stderr=output)
        try:
            process.wait_ready(child, self._is_listening, name="storescp", log=self.log)
            yield self
        finally:
            process.stop(child)

    def _is_listening(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def files(self) -> dict[str, bytes]:
        """Return SOP Instance UID and bytes of each file."""
        found = {}
        for path in self.folder.iterdir():
            meta = dcmread(path, specific_tags=[], stop_before_pixels=True)
            uid = meta.file_meta.MediaStorageSOPInstanceUID
            found[str(uid)] = path.read_bytes()
        return found

    def wait_for(self, count: int) -> dict[str, bytes]:
        """Return the files once there are so many."""
        wait_until(lambda: len(list(self.folder.iterdir())) >= count, "the files")
        return self.files()


class RawScp:
    """A listener whose associations a function plays by hand."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(30)
        self.port: int = self.listener.getsockname()[1]
        self.connections = 0
        self.leave = threading.Event()

    @contextmanager
    def hanging(self) -> Iterator[RawScp]:
        """Accept connections and never say anything."""
        with self._playing(lambda _connection: None):
            yield self

    @contextmanager
    def silent_after_acceptance(self) -> Iterator[RawScp]:
        """Accept every context, and then answer nothing."""
        with self._playing(accept_all):
            yield self

    @contextmanager
    def vanishing(self, received: int) -> Iterator[RawScp]:
        """Accept every context; hang up after so many bytes of data."""

        def play(connection: socket.socket) -> None:
            accept_all(connection)
            left = received
            while left > 0 and (data := connection.recv(min(left, 65_536))):
                left -= len(data)
            connection.close()

        with self._playing(play):
            yield self

    @contextmanager
    def _playing(self, play: Callable[[socket.socket], None]) -> Iterator[RawScp]:
        threads: list[threading.Thread] = []
        held: list[socket.socket] = []

        def accept() -> None:
            while not self.leave.is_set():
                try:
                    connection, _ = self.listener.accept()
                except OSError:
                    return
                self.connections += 1
                connection.settimeout(30)
                held.append(connection)
                thread = threading.Thread(target=play, args=(connection,))
                threads.append(thread)
                thread.start()

        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield self
        finally:
            self.leave.set()
            self.listener.shutdown(socket.SHUT_RDWR)
            accepting.join()
            for connection in held:
                connection.close()
            for thread in threads:
                thread.join()
            self.listener.close()


def read_exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def read_pdu(connection: socket.socket) -> tuple[int, bytes]:
    """Return type and body of the next PDU."""
    kind, length = pdu.HEADER.unpack(read_exactly(connection, 6))
    return kind, read_exactly(connection, length)


def accept_all(connection: socket.socket, max_length: int = 16_384) -> None:
    """Read an A-ASSOCIATE-RQ and accept every context in its first syntax."""
    _, body = read_pdu(connection)
    request = pdu.parse_associate_rq(body)
    contexts = [
        pdu.NegotiatedContext(
            one.context_id, pdu.ContextResult.ACCEPTED, one.transfer_syntaxes[0]
        )
        for one in request.contexts
    ]
    connection.sendall(
        pdu.encode_associate_ac(
            body, contexts, max_length=max_length, roles=request.roles, extended={}
        )
    )


@dataclass
class Received:
    """One C-STORE request as it came."""

    instance_uid: str
    class_uid: str
    transfer_syntax_uid: str
    dataset: bytes
    originator: tuple[str, int] | None


class PyScp:
    """pynetdicom's storage SCP: accepts what it is told, answers as it is told.

    Parameters
    ----------
    syntaxes : sequence of str
        Transfer syntaxes it accepts.
    status : callable
        Status for each request, by its number from 0.
    """

    def __init__(
        self,
        *,
        title: str = "PYSCP",
        syntaxes: Sequence[str] = (),
        classes: Sequence[str] = (),
        status: Callable[[int], int] = lambda _number: 0x0000,
        require_called_ae: bool = False,
    ) -> None:
        self.title = title
        self.received: list[Received] = []
        self.associations = 0
        self.open = 0
        self._status = status
        self.entity = AE(ae_title=title)
        self.entity.require_called_aet = require_called_ae
        accepted = list(syntaxes) or [one.uid for one in all_syntaxes()]
        for uid in classes or storage_classes():
            self.entity.add_supported_context(uid, accepted)
        self.port = 0

    @contextmanager
    def running(self, port: int = 0) -> Iterator[Self]:
        server = self.entity.start_server(
            ("127.0.0.1", port),
            block=False,
            evt_handlers=[
                (evt.EVT_C_STORE, self._store),
                (evt.EVT_ACCEPTED, self._count),
                (evt.EVT_CONN_CLOSE, self._closed),
            ],
        )
        self.port = server.socket.getsockname()[1]
        try:
            yield self
        finally:
            server.shutdown()

    def _count(self, _event: evt.Event) -> None:
        self.associations += 1
        self.open += 1

    def _closed(self, _event: evt.Event) -> None:
        self.open -= 1

    def _store(self, event: evt.Event) -> int:
        request = event.request
        originator = None
        if request.MoveOriginatorApplicationEntityTitle:
            originator = (
                str(request.MoveOriginatorApplicationEntityTitle).strip(),
                int(request.MoveOriginatorMessageID),
            )
        self.received.append(
            Received(
                str(request.AffectedSOPInstanceUID),
                str(request.AffectedSOPClassUID),
                str(event.context.transfer_syntax),
                request.DataSet.getvalue(),
                originator,
            )
        )
        return self._status(len(self.received) - 1)


class EventScp:
    """A modality that takes results of storage commitment on a second association.

    Attributes
    ----------
    status : int
        What it answers.
    events : list of (event type, event information)
    """

    def __init__(self, title: str = "MODALITY") -> None:
        self.title = title
        self.status = 0x0000
        self.events: list[tuple[int, Dataset]] = []
        self.entity = AE(ae_title=title)
        self.entity.add_supported_context(
            "1.2.840.10008.1.20.1", scu_role=True, scp_role=True
        )
        self.port = 0

    @contextmanager
    def running(self) -> Iterator[Self]:
        server = self.entity.start_server(
            ("127.0.0.1", 0),
            block=False,
            evt_handlers=[(evt.EVT_N_EVENT_REPORT, self._take)],
        )
        self.port = server.socket.getsockname()[1]
        try:
            yield self
        finally:
            server.shutdown()

    def _take(self, event: evt.Event) -> tuple[int, Dataset | None]:
        self.events.append((event.event_type, event.event_information))
        return self.status, None


#: Study Root Query/Retrieve Information Model - GET.
GET_MODEL = "1.2.840.10008.5.1.4.1.2.2.3"


def get(
    port: int,
    aet: str,
    study_uids: Iterable[str],
    contexts: Sequence[tuple[str, str]],
    **tls: Any,
) -> dict[str, tuple[str, bytes]]:
    """C-GET with pynetdicom; return syntax and data set of each instance.

    Parameters
    ----------
    contexts : sequence of (SOP class, transfer syntax)
        Each is proposed in a context of its own.
    """
    got: dict[str, tuple[str, bytes]] = {}

    def store(event: evt.Event) -> int:
        request = event.request
        got[str(request.AffectedSOPInstanceUID)] = (
            str(event.context.transfer_syntax),
            request.DataSet.getvalue(),
        )
        return 0x0000

    entity = AE(ae_title="GETTER")
    proposed = [build_context(GET_MODEL)]
    proposed += [build_context(uid, syntax) for uid, syntax in contexts]
    association = entity.associate(
        "127.0.0.1",
        port,
        proposed,
        ae_title=aet,
        ext_neg=[build_role(uid, scp_role=True) for uid in {c for c, _ in contexts}],
        evt_handlers=[(evt.EVT_C_STORE, store)],
        **tls,
    )
    assert association.is_established
    wanted = Dataset()
    wanted.QueryRetrieveLevel = "STUDY"
    wanted.StudyInstanceUID = list(study_uids)
    answers = association.send_c_get(wanted, GET_MODEL)
    statuses = [status.Status for status, _ in answers]
    association.release()
    assert statuses[-1] == 0x0000
    return got
