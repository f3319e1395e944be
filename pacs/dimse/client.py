"""Our side of an association that we open: the SCU (PS3.7, PS3.8).

One thread, one blocking socket. Everything that arrives is bounded before it is read;
a message goes out with as few system calls as the peer's PDU length allows. Whatever
fails is a `DependencyDown` whose message begins with where: name resolution, TCP, TLS,
association, or the operation.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from pacs.dimse import command as cmd
from pacs.dimse import pdu
from pacs.dimse.command import CommandField, Value
from pacs.dimse.dial import Address, Timeouts, client_tls, dial
from pacs.dimse.pdu import AbortReason, PduType, ProposedContext, ProtocolError
from pacs.dimse.pdv import MessageReader, ReleaseRequested
from pacs.dimse.transport import PeerGone, TimedOut, Wire
from pacs.domain.study import ByteStream
from pacs.imaging.sopclasses import VERIFICATION
from pacs.imaging.syntaxes import EXPLICIT_VR_LE, IMPLICIT_VR_LE
from storage.kernel.errors import DependencyDown
from storage.kernel.limits import KIB, MIB

#: PDU length we announce: answers to an SCU are short.
ANNOUNCED_PDU = 128 * KIB
#: A peer that names no limit, or a huge one, gets PDUs of this length.
MAX_SENT_PDU = 256 * KIB
#: Before the peer has accepted nothing limits it but this.
MAX_ASSOCIATE_PDU = 256 * KIB
MAX_COMMAND = 64 * KIB
MAX_DATASET = 16 * MIB
#: How long a release may take: nothing depends on it any more.
RELEASE_SECONDS = 5.0

SUCCESS = 0x0000
PENDING = frozenset((0xFF00, 0xFF01))

#: PS3.8 Table 9-21, by (source, reason).
_REJECTIONS: Mapping[tuple[int, int], str] = {
    (1, 1): "no reason given",
    (1, 2): "application context name not supported",
    (1, 3): "calling AE title not recognized",
    (1, 7): "called AE title not recognized",
    (2, 1): "no reason given (ACSE)",
    (2, 2): "protocol version not supported",
    (3, 1): "temporary congestion",
    (3, 2): "local limit exceeded",
}


Wanted = tuple[str, Sequence[str]]
"""An abstract syntax and the transfer syntaxes of one context to propose."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A presentation context that the peer accepted."""

    context_id: int
    abstract_syntax: str
    transfer_syntax: str


@dataclass(slots=True)
class Reply:
    """A message from the peer."""

    context_id: int
    command: dict[int, Value]
    dataset: bytes | None = None

    @property
    def status(self) -> int:
        return cmd.number(self.command, cmd.STATUS)

    @property
    def comment(self) -> str:
        """Error Comment (0000,0902)."""
        return cmd.text(self.command, cmd.COMMENT)


@dataclass(frozen=True, slots=True)
class SubOperations:
    """Counts of a C-MOVE response."""

    status: int
    remaining: int
    completed: int
    failed: int
    warning: int
    identifier: bytes | None = field(default=None, repr=False)


def propose(wanted: Iterable[Wanted]) -> tuple[ProposedContext, ...]:
    """Number (abstract syntax, transfer syntaxes) pairs; at most 128 of them."""
    numbered = tuple(
        ProposedContext(2 * number + 1, abstract, tuple(transfer))
        for number, (abstract, transfer) in enumerate(wanted)
    )
    if len(numbered) > pdu.MAX_CONTEXTS:
        raise ValueError("more than 128 presentation contexts")
    return numbered


VERIFICATION_CONTEXTS = propose([(VERIFICATION, (EXPLICIT_VR_LE, IMPLICIT_VR_LE))])


def connect(
    address: Address,
    calling_ae: str,
    contexts: Sequence[ProposedContext],
    *,
    timeouts: Timeouts | None = None,
    tls: ssl.SSLContext | None = None,
    roles: Mapping[str, tuple[bool, bool]] | None = None,
) -> RemoteAssociation:
    """Open an association.

    Parameters
    ----------
    tls : SSLContext, optional
        Needed when ``address.tls``.
    roles : mapping of SOP class to (SCU, SCP)
        What we want to be, where that is not the SCU alone (PS3.7 D.3.3.4).

    Raises
    ------
    DependencyDown
        Says where it failed, and a rejection's reason in words.
    """
    timeouts = timeouts or Timeouts()
    raw = dial(address, timeouts, tls)
    try:
        association = RemoteAssociation(raw, timeouts)
        association.negotiate(address.title, calling_ae, contexts, roles or {})
    except BaseException:
        raw.close()
        raise
    return association


class RemoteAssociation:
    """An open association; a context manager that releases it, or aborts on error.

    Attributes
    ----------
    offers : tuple of Offer
        Accepted presentation contexts, in the order of proposal.
    roles : mapping of SOP class to (SCU, SCP)
        As accepted.
    max_send : int
        Longest PDU we send, bytes.
    """

    def __init__(self, raw: socket.socket, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        self._wire = Wire(raw, threading.Event())
        self._reader = MessageReader(
            self._wire,
            max_pdu=ANNOUNCED_PDU,
            command_bytes=MAX_COMMAND,
            read_seconds=timeouts.dimse,
        )
        self._message_id = 0
        self._open = True
        self.offers: tuple[Offer, ...] = ()
        self.roles: Mapping[str, tuple[bool, bool]] = {}
        self.max_send = MAX_SENT_PDU

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.release()
        else:
            self.abort()

    @property
    def is_open(self) -> bool:
        """False after release, abort, or a failure of the peer."""
        return self._open

    def negotiate(
        self,
        called_ae: str,
        calling_ae: str,
        contexts: Sequence[ProposedContext],
        roles: Mapping[str, tuple[bool, bool]],
    ) -> None:
        """Request the association and read the answer."""
        request = pdu.encode_associate_rq(
            called_ae=called_ae,
            calling_ae=calling_ae,
            contexts=contexts,
            max_length=ANNOUNCED_PDU,
            roles=roles,
        )
        with self._failing("association"):
            self._wire.send((request,), self._timeouts.write)
            kind, body = self._read_pdu(self._timeouts.acse)
            if kind == PduType.ASSOCIATE_RJ and len(body) >= 4:
                raise DependencyDown(f"association: {_rejection(body)}")
            if kind == PduType.ABORT:
                raise PeerGone("aborted by the peer")
            if kind != PduType.ASSOCIATE_AC:
                raise ProtocolError("unexpected answer", AbortReason.UNEXPECTED_PDU)
            answer = pdu.parse_associate_ac(body)
        proposed = {context.context_id: context for context in contexts}
        self.offers = tuple(
            Offer(one.context_id, wanted.abstract_syntax, one.transfer_syntax)
            for one in answer.contexts
            if one.result == pdu.ContextResult.ACCEPTED
            and (wanted := proposed.get(one.context_id)) is not None
            and one.transfer_syntax in wanted.transfer_syntaxes
        )
        self.roles = answer.roles
        self.max_send = min(answer.max_length or MAX_SENT_PDU, MAX_SENT_PDU)

    def offer(self, abstract_syntax: str) -> Offer:
        """Return the first accepted context of a SOP class.

        Raises
        ------
        DependencyDown
            There is none.
        """
        for one in self.offers:
            if one.abstract_syntax == abstract_syntax:
                return one
        raise DependencyDown("association: the peer does not offer this service")

    def echo(self) -> None:
        """C-ECHO (PS3.7 9.1.5).

        Raises
        ------
        DependencyDown
            Also when the status is not Success.
        """
        context = self.offer(VERIFICATION)
        number = self.request(
            context.context_id,
            {cmd.AFFECTED_CLASS: VERIFICATION, cmd.FIELD: CommandField.C_ECHO_RQ},
            operation="echo",
        )
        reply = self.response(number, operation="echo")
        if reply.status != SUCCESS:
            raise DependencyDown(f"echo: status {reply.status:04X}")

    def store(
        self,
        instance_uid: str,
        class_uid: str,
        stream: ByteStream,
        context: Offer,
        *,
        originator: tuple[str, int] | None = None,
    ) -> int:
        """C-STORE one data set; return the status (PS3.7 9.1.1)."""
        number = self.begin_store(
            instance_uid, class_uid, stream.chunks, context, originator=originator
        )
        return self.response(number, operation="store").status

    def begin_store(
        self,
        instance_uid: str,
        class_uid: str,
        chunks: Iterable[bytes],
        context: Offer,
        *,
        originator: tuple[str, int] | None = None,
    ) -> int:
        """Send a C-STORE-RQ and return its Message ID; `response` has the rest.

        Between the two the caller can prepare the next instance.

        Parameters
        ----------
        originator : (AE title, Message ID), optional
            Of the C-MOVE this is a sub-operation of.
        """
        command: dict[int, Value] = {
            cmd.AFFECTED_CLASS: class_uid,
            cmd.FIELD: CommandField.C_STORE_RQ,
            cmd.PRIORITY: 0,
            cmd.AFFECTED_INSTANCE: instance_uid,
        }
        if originator is not None:
            command[cmd.MOVE_ORIGINATOR_AE], command[cmd.MOVE_ORIGINATOR_ID] = (
                originator
            )
        return self.request(context.context_id, command, chunks, operation="store")

    def find(
        self, context: Offer, identifier: bytes, *, limit: int = 100_000
    ) -> Iterator[bytes]:
        """C-FIND: yield the identifiers of matches (PS3.7 9.1.2).

        Raises
        ------
        DependencyDown
            Any final status but Success, or more than `limit` matches.
        """
        number = self._with_identifier(context, CommandField.C_FIND_RQ, identifier)
        for _ in range(limit):
            reply = self.response(number, operation="find")
            if reply.status not in PENDING:
                if reply.status != SUCCESS:
                    raise DependencyDown(f"find: status {reply.status:04X}")
                return
            if reply.dataset is not None:
                yield reply.dataset
        self.cancel(context, number)
        raise DependencyDown(f"find: more than {limit} matches")

    def move(
        self, context: Offer, destination: str, identifier: bytes
    ) -> Iterator[SubOperations]:
        """C-MOVE: yield the counts of each response, the final one too."""
        number = self._with_identifier(
            context,
            CommandField.C_MOVE_RQ,
            identifier,
            {cmd.MOVE_DESTINATION: destination},
        )
        while True:
            reply = self.response(number, operation="move")
            counts = reply.command
            yield SubOperations(
                reply.status,
                cmd.number(counts, cmd.REMAINING),
                cmd.number(counts, cmd.COMPLETED),
                cmd.number(counts, cmd.FAILED),
                cmd.number(counts, cmd.WARNING),
                reply.dataset,
            )
            if reply.status not in PENDING:
                return

    def _with_identifier(
        self,
        context: Offer,
        what: CommandField,
        identifier: bytes,
        more: Mapping[int, Value] | None = None,
    ) -> int:
        command: dict[int, Value] = {
            cmd.AFFECTED_CLASS: context.abstract_syntax,
            cmd.FIELD: what,
            cmd.PRIORITY: 0,
            **(more or {}),
        }
        return self.request(context.context_id, command, (identifier,))

    def cancel(self, context: Offer, message_id: int) -> None:
        """Send a C-CANCEL-RQ (PS3.7 9.3.2.3)."""
        self._send_message(
            context.context_id,
            {
                cmd.FIELD: CommandField.C_CANCEL_RQ,
                cmd.RESPONDED_ID: message_id,
                cmd.DATASET_TYPE: cmd.NO_DATASET,
            },
            None,
        )

    def n_action(
        self,
        context: Offer,
        *,
        class_uid: str,
        instance_uid: str,
        action_type: int,
        information: bytes,
    ) -> int:
        """N-ACTION; return the status (PS3.7 10.1.4)."""
        number = self.request(
            context.context_id,
            {
                cmd.REQUESTED_CLASS: class_uid,
                cmd.FIELD: CommandField.N_ACTION_RQ,
                cmd.REQUESTED_INSTANCE: instance_uid,
                cmd.ACTION_TYPE: action_type,
            },
            (information,),
            operation="action",
        )
        return self.response(number, operation="action").status

    def n_event_report(
        self,
        context: Offer,
        *,
        class_uid: str,
        instance_uid: str,
        event_type: int,
        information: bytes,
    ) -> int:
        """N-EVENT-REPORT; return the status (PS3.7 10.1.1)."""
        number = self.request(
            context.context_id,
            {
                cmd.AFFECTED_CLASS: class_uid,
                cmd.FIELD: CommandField.N_EVENT_REPORT_RQ,
                cmd.AFFECTED_INSTANCE: instance_uid,
                cmd.EVENT_TYPE: event_type,
            },
            (information,),
            operation="event report",
        )
        return self.response(number, operation="event report").status

    def request(
        self,
        context_id: int,
        command: dict[int, Value],
        dataset: Iterable[bytes] | None = None,
        *,
        operation: str = "request",
    ) -> int:
        """Send a request with a new Message ID, which is returned."""
        self._message_id = self._message_id % 0xFFFF + 1
        command[cmd.MESSAGE_ID] = self._message_id
        command[cmd.DATASET_TYPE] = cmd.NO_DATASET if dataset is None else 1
        with self._failing(operation):
            self._send_message(context_id, command, dataset)
        return self._message_id

    def response(self, message_id: int, *, operation: str = "request") -> Reply:
        """Return the next response to `message_id`; others are left aside."""
        deadline = time.monotonic() + self._timeouts.dimse
        while True:
            reply = self.receive(deadline - time.monotonic(), operation=operation)
            if reply is None:
                self.abort()
                raise DependencyDown(f"{operation}: no answer in time")
            answered = cmd.number(reply.command, cmd.RESPONDED_ID, -1)
            is_response = cmd.number(reply.command, cmd.FIELD) & cmd.RESPONSE
            if is_response and answered == message_id:
                return reply

    def receive(self, timeout: float, *, operation: str = "request") -> Reply | None:
        """Return the next message of any kind, or None when none begins in time."""
        with self._failing(operation):
            try:
                self._reader.wait(operation, max(timeout, 0.0))
            except TimedOut:
                return None
            context_id, command = self._reader.read_command()
            reply = Reply(context_id, command)
            if cmd.number(command, cmd.DATASET_TYPE) != cmd.NO_DATASET:
                reply.dataset = self._reader.read_dataset(context_id, MAX_DATASET)
            return reply

    def answer(self, request: Reply, status: int) -> None:
        """Respond to a request of the peer (N-EVENT-REPORT, C-STORE)."""
        with self._failing("answer"):
            self._send_message(
                request.context_id, cmd.response(request.command, status), None
            )

    def release(self) -> None:
        """Release in good order, or abort when the peer does not answer."""
        if not self._open:
            return
        try:
            self._wire.send((pdu.RELEASE_RQ,), RELEASE_SECONDS)
            deadline = time.monotonic() + RELEASE_SECONDS
            kind = 0
            while kind != PduType.RELEASE_RP:
                kind, _ = self._read_pdu(deadline - time.monotonic())
                if kind == PduType.RELEASE_RQ:  # collision: PS3.8 7.2.2.7
                    self._wire.send((pdu.RELEASE_RP,), RELEASE_SECONDS)
                elif kind == PduType.ABORT:
                    break
        except (PeerGone, TimedOut, ProtocolError):
            self.abort()
            return
        self._open = False
        self._wire.close()

    def abort(self) -> None:
        """End the association at once; harmless when it has ended."""
        if self._open:
            self._open = False
            self._wire.close(pdu.encode_abort(AbortReason.NOT_SPECIFIED, source=0))

    @contextlib.contextmanager
    def _failing(self, operation: str) -> Iterator[None]:
        """Turn what goes wrong on the wire into a sentence, and end the association."""
        if not self._open:
            raise DependencyDown(f"{operation}: the association has ended")
        try:
            yield
        except PeerGone as error:
            self.abort()
            raise DependencyDown(f"{operation}: {error}") from error
        except TimedOut as error:
            self.abort()
            raise DependencyDown(f"{operation}: no answer in time") from error
        except ProtocolError as error:
            self.abort()
            raise DependencyDown(f"{operation}: the peer breaks the protocol") from (
                error
            )
        except ReleaseRequested as error:
            with contextlib.suppress(PeerGone, TimedOut):
                self._wire.send((pdu.RELEASE_RP,), RELEASE_SECONDS)
            self._open = False
            self._wire.close()
            raise DependencyDown(f"{operation}: released by the peer") from error
        except BaseException:
            # A source that fails inside a message leaves half of it on the wire.
            self.abort()
            raise

    def _send_message(
        self,
        context_id: int,
        command: dict[int, Value],
        dataset: Iterable[bytes] | None,
    ) -> None:
        """Send command and data set, the first chunk together with the command."""
        buffers: list[bytes | memoryview] = list(
            pdu.data_pdus(
                context_id, pdu.COMMAND, cmd.encode(command), self.max_send, last=True
            )
        )
        if dataset is not None:
            held = b""
            for chunk in dataset:
                if held:
                    buffers += pdu.data_pdus(
                        context_id, 0, held, self.max_send, last=False
                    )
                    self._wire.send(buffers, self._timeouts.write)
                    buffers = []
                held = chunk
            buffers += pdu.data_pdus(context_id, 0, held, self.max_send, last=True)
        self._wire.send(buffers, self._timeouts.write)

    def _read_pdu(self, timeout: float) -> tuple[int, bytes]:
        """Return type and body of a PDU outside data transfer."""
        self._wire.expect("association", max(timeout, 0.0))
        self._wire.need(pdu.HEADER.size)
        kind, length = pdu.HEADER.unpack(self._wire.take(pdu.HEADER.size))
        if length > MAX_ASSOCIATE_PDU:
            raise ProtocolError("the answer is too long")
        return kind, self._wire.read(length)


def _rejection(body: bytes) -> str:
    result, source, reason = body[1:4]
    why = _REJECTIONS.get((source, reason), "unknown reason")
    return f"rejected, {why}" + (" (for now)" if result == 2 else "")


__all__ = [
    "Address",
    "Offer",
    "RemoteAssociation",
    "Reply",
    "SubOperations",
    "Timeouts",
    "Wanted",
    "client_tls",
    "connect",
    "propose",
]
