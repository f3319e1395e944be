"""One accepted association, as its handlers see it (PS3.7, PS3.8).

Everything happens in the thread that serves the association; nothing here is
shared between threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from pacs.dimse import command as cmd
from pacs.dimse.accesses import Accesses
from pacs.dimse.command import CommandField, Value
from pacs.dimse.pdu import (
    COMMAND,
    LAST,
    PDU_AND_PDV,
    AbortReason,
    PduType,
    ProtocolError,
    data_pdus,
)
from pacs.dimse.pdv import MessageReader, ReleaseRequested
from pacs.dimse.status import Status
from pacs.dimse.transport import PeerGone, TimedOut, Wire
from storage.kernel.limits import KIB, Limits
from storage.kernel.types import Actor

#: Bytes that are gathered before they are sent.
_BATCH = 512 * KIB
#: Messages that wait while another is worked on; without an asynchronous window a
#: peer has no reason to send more than a C-CANCEL.
_MAX_WAITING = 16
_NEED_DATASET = frozenset((CommandField.C_STORE_RQ,))


@dataclass(frozen=True, slots=True)
class AcceptedContext:
    """An accepted presentation context.

    Attributes
    ----------
    as_scu, as_scp : bool
        Our roles: we may send requests (C-GET's sub-operations, N-EVENT-REPORT), we
        answer them.
    """

    abstract_syntax: str
    transfer_syntax: str
    as_scu: bool
    as_scp: bool


@dataclass(slots=True)
class Message:
    """A complete DIMSE message; `dataset` is None when the command has none."""

    context_id: int
    command: dict[int, Value]
    dataset: bytes | None = None


@dataclass(frozen=True, slots=True)
class Timers:
    """Seconds a peer may take."""

    idle: float
    read: float
    write: float


class Association:
    """An accepted association.

    Parameters
    ----------
    wire : Wire
    contexts : mapping of int to AcceptedContext
        By presentation context id.
    extended : mapping of str to bytes
        SOP Class Extended Negotiation as agreed.
    accesses : Accesses
        Where its handlers record what they let out or in.
    max_send : int
        The peer's maximum PDU length, bounded.
    """

    def __init__(
        self,
        wire: Wire,
        *,
        actor: Actor,
        called_ae: str,
        calling_ae: str,
        peer: str,
        contexts: Mapping[int, AcceptedContext],
        extended: Mapping[str, bytes],
        max_send: int,
        limits: Limits,
        timers: Timers,
        accesses: Accesses,
    ) -> None:
        self.actor = actor
        self.accesses = accesses
        self.called_ae = called_ae
        self.calling_ae = calling_ae
        self.peer = peer
        self.contexts = contexts
        self.extended = extended
        self.max_send = max_send
        self.limits = limits
        self.reader = MessageReader(
            wire,
            max_pdu=limits.pdu_bytes,
            command_bytes=limits.command_bytes,
            read_seconds=timers.read,
        )
        self._wire = wire
        self._timers = timers
        self._waiting: deque[Message] = deque()
        self._cancelled: set[int] = set()
        self._current: int | None = None
        self._release_requested = False
        self._torn = False
        self._message_id = 0
        #: Status (0000,0900) of the last response.
        self.last_status = 0
        self._out: list[bytes | memoryview] = []
        self._out_bytes = 0

    def send(
        self,
        context_id: int,
        command: dict[int, Value],
        dataset: Iterable[bytes] | None = None,
    ) -> None:
        """Send a message in as few system calls as possible.

        Raises
        ------
        PeerGone, TimedOut
            Let them pass: the association is over.
        """
        self.post(context_id, command, dataset)
        self.flush()

    def post(
        self,
        context_id: int,
        command: dict[int, Value],
        dataset: Iterable[bytes] | None = None,
    ) -> None:
        """Queue a message; sent by `flush`, or once half a MiB has gathered."""
        if self._torn:
            raise ProtocolError("a message was cut off", AbortReason.NOT_SPECIFIED)
        if cmd.STATUS in command:
            self.last_status = cmd.number(command, cmd.STATUS)
        pdus = self.encoded(context_id, command)
        self._out.append(pdus)
        self._out_bytes += len(pdus)
        if dataset is not None:
            # Until it is whole, nothing but an abort can follow.
            self._torn = True
            for chunk, last in _even_chunks(dataset):
                self._put(data_pdus(context_id, 0, chunk, self.max_send, last=last))
                if self._out_bytes >= _BATCH:
                    self.flush()
            self._torn = False
        if self._out_bytes >= _BATCH:
            self.flush()

    def encoded(self, context_id: int, command: dict[int, Value]) -> bytes:
        """Return the PDUs of a command set that goes out many times."""
        raw = cmd.encode(command)
        size = len(raw) + 6
        if size <= self.max_send:
            head = PDU_AND_PDV.pack(
                PduType.DATA, size, size - 4, context_id, COMMAND | LAST
            )
            return head + raw
        return b"".join(data_pdus(context_id, COMMAND, raw, self.max_send, last=True))

    def post_encoded(self, context_id: int, command: bytes, dataset: bytes) -> None:
        """Queue a message whose command is `encoded` already."""
        self._out.append(
            command
            + b"".join(data_pdus(context_id, 0, dataset, self.max_send, last=True))
        )
        self._out_bytes += len(self._out[-1])
        if self._out_bytes >= _BATCH:
            self.flush()

    def flush(self) -> None:
        """Send what is queued."""
        out, self._out, self._out_bytes = self._out, [], 0
        if out:
            self._wire.send(out, self._timers.write)

    def receive(self, timeout: float) -> Message | None:
        """Return the next complete message: responses to our own requests, C-CANCEL.

        None after `timeout` seconds, and when the peer asks for release. The data
        set is bounded by ``identifier_bytes``.

        Raises
        ------
        PeerGone, TimedOut, ProtocolError
            Let them pass: the association is over.
        """
        if self._waiting:
            return self._waiting.popleft()
        if self._release_requested:
            return None
        if not self._wire.poll():
            try:
                self._wire.expect("response", timeout)
                self._wire.need(1)
            except TimedOut:
                return None
        return self._read()

    def cancelled(self, message_id: int) -> bool:
        """Tell whether C-CANCEL-RQ for `message_id` has come; never waits.

        Other messages are kept for `receive`, and for after the handler.
        """
        while not self._release_requested and self._wire.poll():
            message = self._read()
            if message is None:
                break
            field = cmd.number(message.command, cmd.FIELD)
            if field == CommandField.C_CANCEL_RQ:
                self._cancelled.add(cmd.number(message.command, cmd.RESPONDED_ID))
            elif (
                not field & cmd.RESPONSE
                and cmd.number(message.command, cmd.MESSAGE_ID) == self._current
            ):
                self.send(
                    message.context_id,
                    cmd.response(message.command, Status.DUPLICATE_INVOCATION),
                )
            elif len(self._waiting) >= _MAX_WAITING:
                raise ProtocolError(
                    "too many messages at a time", AbortReason.UNEXPECTED_PDU
                )
            else:
                self._waiting.append(message)
        return message_id in self._cancelled

    def stopping(self) -> bool:
        """Tell whether this process ends: finish what is in hand, start no more."""
        return self._wire.stopping

    def next_message_id(self) -> int:
        """Return a Message ID (0000,0110) for a request of ours."""
        self._message_id = self._message_id % 0xFFFF + 1
        return self._message_id

    def next_command(self) -> Message:
        """Wait for the next message and read its command set, for the server's loop.

        The caller reads the data set. A message that came while another was worked
        on is complete.

        Raises
        ------
        ReleaseRequested
        PeerGone, TimedOut, Stopping, ProtocolError
        """
        self._cancelled.clear()
        self._current = None
        if self._waiting:
            message = self._waiting.popleft()
        elif self._release_requested:
            raise ReleaseRequested
        else:
            self.reader.wait("idle", self._timers.idle)
            context_id, command = self.reader.read_command()
            message = Message(context_id, command)
        self._current = cmd.number(message.command, cmd.MESSAGE_ID)
        return message

    def complete(self, message: Message) -> Message:
        """Read the data set of a message other than C-STORE-RQ, when it has one."""
        if message.dataset is None and has_dataset(message.command):
            asks = cmd.number(message.command, cmd.FIELD)
            message.dataset = self.reader.read_dataset(
                message.context_id,
                self.limits.action_bytes
                if asks == CommandField.N_ACTION_RQ
                else self.limits.identifier_bytes,
            )
        return message

    def _read(self) -> Message | None:
        """Read a whole message while another is worked on."""
        try:
            context_id, command = self.reader.read_command()
        except ReleaseRequested:
            self._release_requested = True
            return None
        if cmd.number(command, cmd.FIELD) in _NEED_DATASET:
            raise ProtocolError(
                "C-STORE while another request is worked on", AbortReason.UNEXPECTED_PDU
            )
        return self.complete(Message(context_id, command))

    def _put(self, buffers: Iterator[bytes | memoryview]) -> None:
        for one in buffers:
            self._out.append(one)
            self._out_bytes += len(one)


Handler = Callable[[Association, Message], None]
"""Answers one request completely; registered by Command Field (0000,0100)."""


def has_dataset(command: Mapping[int, Value]) -> bool:
    """Tell whether a data set follows: Command Data Set Type (0000,0800)."""
    return command.get(cmd.DATASET_TYPE, cmd.NO_DATASET) != cmd.NO_DATASET


def _even_chunks(chunks: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Yield (chunk, is last); all but the last are even (PS3.8 Annex E.1)."""
    held = b""
    for chunk in chunks:
        if not chunk:
            continue
        if len(held) % 2:
            chunk = held[-1:] + chunk  # noqa: PLW2901  # an odd byte moves on
            held = held[:-1]
        if held:
            yield held, False
        held = chunk
    yield held, True


__all__ = [
    "AcceptedContext",
    "Association",
    "Handler",
    "Message",
    "PeerGone",
    "ProtocolError",
    "TimedOut",
    "Timers",
    "has_dataset",
]
