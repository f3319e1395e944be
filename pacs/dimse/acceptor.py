"""One connection: negotiation, its messages, its end (PS3.8 9.2).

The acceptor's side of the state machine, written as straight-line code: whatever ends
an association is an exception, and one place says what it means for the peer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass

from pacs.dimse import command as cmd
from pacs.dimse.accesses import Accesses, Trail, rejected
from pacs.dimse.association import Association, Handler, Message, Timers
from pacs.dimse.command import CommandField
from pacs.dimse.counts import AssociationCounts
from pacs.dimse.echo import answer_echo
from pacs.dimse.negotiation import (
    CALLED_AE,
    CALLING_AE,
    CONGESTED,
    LOCAL_LIMIT,
    NO_REASON,
    Agreement,
    Rejection,
    abort_reason,
    negotiate,
    only_verifies,
    refuse_form,
)
from pacs.dimse.observer import DimseObserver, OncePerPeer
from pacs.dimse.pdu import (
    HEADER,
    RELEASE_RP,
    AbortReason,
    AssociateRequest,
    PduType,
    ProtocolError,
    encode_abort,
    encode_associate_ac,
    parse_associate_rq,
)
from pacs.dimse.pdv import ReleaseRequested
from pacs.dimse.status import Status, comment_of, status_of
from pacs.dimse.store import Buffers, StoreSession
from pacs.dimse.transport import PeerGone, Stopping, TimedOut, Wire
from pacs.services.ingest import IngestService
from pacs.services.policy import AccessPolicy, Refused
from storage.kernel.errors import ImagingError, Unavailable
from storage.kernel.limits import Limits
from storage.kernel.settings import Dimse
from storage.kernel.types import Actor, Role

log = logging.getLogger(__name__)

#: A-ABORT by us as the user of the service, and as its provider (PS3.8 9.3.8).
_SERVICE_USER = 0
_PROVIDER = 2

_REFUSED: Mapping[Refused, Rejection] = {
    Refused.CALLED_AE: CALLED_AE,
    Refused.CALLING_AE: CALLING_AE,
}


@dataclass(slots=True)
class _Connection:
    """One connection and what becomes of it."""

    wire: Wire
    peer: str
    certificate_name: str | None
    calling_ae: str = ""
    cell: int | None = None
    association: Association | None = None
    opened: float = 0.0


class _Rejected(Exception):
    """The association is rejected."""

    def __init__(self, rejection: Rejection) -> None:
        super().__init__(rejection.words)
        self.rejection = rejection


class Acceptor:
    """Serves the connections of one process, each in a thread of its own.

    Takes the parameters of `DimseServer`.
    """

    def __init__(
        self,
        *,
        settings: Dimse,
        limits: Limits,
        policy: AccessPolicy,
        ingest: IngestService,
        handlers: Mapping[int, Handler],
        counts: AssociationCounts,
        slot: int,
        observer: DimseObserver,
        trail: Trail,
    ) -> None:
        self._settings = settings
        self._limits = limits
        self._policy = policy
        self._ingest = ingest
        self._handlers = {CommandField.C_ECHO_RQ: answer_echo, **handlers}
        self._services = {*self._handlers, CommandField.C_STORE_RQ}
        self._counts = counts
        self._slot = slot
        self._observer = observer
        self._trail = trail
        self._buffers = Buffers(limits)
        self._timers = Timers(
            idle=settings.idle_seconds,
            read=settings.read_seconds,
            write=settings.write_seconds,
        )
        self._rejections = OncePerPeer()
        self._unknown = OncePerPeer()

    def serve(self, wire: Wire, peer: str, certificate_name: str | None) -> None:
        """Take one connection from its first byte to its last.

        Parameters
        ----------
        peer : str
            Network address.
        certificate_name : str or None
            Common Name of the peer's verified certificate.
        """
        connection = _Connection(wire, peer, certificate_name)
        last_words, outcome = b"", "gone"
        try:
            self._open(connection)
            self._serve_messages(connection)
            last_words, outcome = RELEASE_RP, "released"
        except _Rejected as error:
            last_words, outcome = error.rejection.encoded(), "rejected"
        except ProtocolError as error:
            last_words, outcome = encode_abort(error.reason), "aborted"
            self._warn_about(connection, "association aborted", error)
        except TimedOut as error:
            last_words = encode_abort(AbortReason.NOT_SPECIFIED, _SERVICE_USER)
            outcome = "timeout"
            self._warn_about(connection, "association timed out", error)
        except Stopping:
            last_words = encode_abort(AbortReason.NOT_SPECIFIED, _SERVICE_USER)
            outcome = "stopped"
        except PeerGone as error:
            if connection.association is None:
                log.debug("connection closed", extra={"peer": connection.peer})
            else:
                self._warn_about(connection, "association lost", error)
        except ImagingError as error:
            last_words = encode_abort(AbortReason.NOT_SPECIFIED, _SERVICE_USER)
            outcome = "aborted"
            self._warn_about(connection, "association aborted", error)
        except BaseException:
            last_words = encode_abort(AbortReason.NOT_SPECIFIED, _PROVIDER)
            outcome = "aborted"
            raise
        finally:
            if connection.cell is not None:
                self._counts.release(connection.cell)
            if connection.association is not None:
                self._observer.association_closed(
                    outcome, time.monotonic() - connection.opened
                )
            connection.wire.close(last_words)

    def _open(self, connection: _Connection) -> None:
        """Read the request, decide, and answer it.

        Raises
        ------
        _Rejected, ProtocolError, PeerGone, TimedOut
        """
        request, body = self._read_request(connection.wire)
        connection.calling_ae = request.calling_ae
        actor = self._admit(connection, request)
        agreement = negotiate(request, self._services, self._limits)
        connection.cell = self._counts.claim(
            self._slot, request.calling_ae, monitor=only_verifies(request)
        )
        if connection.cell is None:
            raise self._rejected(connection, LOCAL_LIMIT)
        self._accept(connection, request, body, agreement, actor)

    def _read_request(self, wire: Wire) -> tuple[AssociateRequest, bytes]:
        """Read A-ASSOCIATE-RQ; one timer runs over all of it."""
        wire.expect("association", self._settings.acse_seconds)
        wire.need(1, interruptible=True)
        first = wire.peek(1)[0]
        if first != PduType.ASSOCIATE_RQ:
            raise ProtocolError("not an association request", abort_reason(first))
        wire.need(HEADER.size)
        _, length = HEADER.unpack(wire.peek(HEADER.size))
        if length > self._limits.associate_pdu_bytes:
            raise ProtocolError("the association request is too long")
        wire.take(HEADER.size)
        body = wire.read(length)
        return parse_associate_rq(body), body

    def _admit(self, connection: _Connection, request: AssociateRequest) -> Actor:
        rejection = refuse_form(request)
        if rejection is not None:
            raise self._rejected(connection, rejection)
        try:
            actor = self._policy.admit(
                request.called_ae,
                request.calling_ae,
                connection.peer,
                certificate_name=connection.certificate_name,
            )
        except Unavailable as error:
            # Who the peer is cannot be looked up now; it may come again.
            raise self._rejected(connection, CONGESTED) from error
        if isinstance(actor, Refused):
            rejection = _REFUSED.get(actor, NO_REASON)
            if self._unknown.passes(connection.peer):
                rejected(
                    self._trail, request.calling_ae, connection.peer, rejection.words
                )
            raise self._rejected(connection, rejection)
        return actor

    def _accept(
        self,
        connection: _Connection,
        request: AssociateRequest,
        body: bytes,
        agreement: Agreement,
        actor: Actor,
    ) -> None:
        identity = request.user_identity
        # Whoever may do anything is who they say: an open node.
        confirmed = (
            identity is not None
            and identity.response_requested
            and Role.OPEN in actor.roles
        )
        answer = encode_associate_ac(
            body,
            agreement.results,
            max_length=self._limits.pdu_bytes,
            roles=agreement.roles,
            extended=agreement.extended,
            identity_response=b"" if confirmed else None,
        )
        connection.wire.send((answer,), self._timers.write)
        connection.opened = time.monotonic()
        connection.association = Association(
            connection.wire,
            actor=actor,
            called_ae=request.called_ae,
            calling_ae=request.calling_ae,
            peer=connection.peer,
            contexts=agreement.contexts,
            extended=agreement.extended,
            max_send=agreement.max_send,
            limits=self._limits,
            timers=self._timers,
            accesses=Accesses(self._trail, actor, connection.peer),
        )
        self._observer.association_opened()

    def _serve_messages(self, connection: _Connection) -> None:
        """Answer requests until the peer asks for release."""
        association = connection.association
        if association is None:
            return
        session = StoreSession(
            association,
            ingest=self._ingest,
            policy=self._policy,
            buffers=self._buffers,
        )
        with closing(session):
            while True:
                try:
                    message = association.next_command()
                except ReleaseRequested:
                    break
                started = time.perf_counter()
                # What has no response, a cancel, has not the status of the last one.
                association.last_status = Status.SUCCESS
                name = self._answer(association, session, message)
                self._observer.message(
                    name, association.last_status, time.perf_counter() - started
                )
            if session.stored:
                # What a weaker sync policy left in memory; nothing for the others.
                self._ingest.flush()

    def _answer(
        self, association: Association, session: StoreSession, message: Message
    ) -> str:
        """Have one request answered; return its name."""
        request = message.command
        field = cmd.number(request, cmd.FIELD)
        context = association.contexts.get(message.context_id)
        if context is None:
            raise ProtocolError("a message on a context that was not accepted")
        if field & cmd.RESPONSE:
            raise ProtocolError(
                "a response to nothing", AbortReason.UNEXPECTED_PARAMETER
            )
        if field == CommandField.C_CANCEL_RQ:
            return "C-CANCEL"
        refusal = _refuse_command(request)
        if refusal is None and field == CommandField.C_STORE_RQ:
            self._guarded(association, message, lambda: session.answer(message))
            return "C-STORE"
        association.complete(message)
        handler = self._handlers.get(field)
        if refusal is None and handler is None:
            refusal = Status.UNRECOGNIZED_OPERATION
        if refusal is not None or handler is None:
            status = refusal or Status.UNRECOGNIZED_OPERATION
            association.send(message.context_id, cmd.response(request, status))
            self._warn(
                "request refused",
                "dimse.refused",
                association.peer,
                calling_ae=association.calling_ae,
                status=f"{status:04X}",
            )
            return _name(field)
        self._guarded(association, message, lambda: handler(association, message))
        return _name(field)

    def _guarded(
        self, association: Association, message: Message, work: Callable[[], None]
    ) -> None:
        """Answer for a handler that fails; the association goes on."""
        try:
            work()
        except ImagingError as error:
            status = status_of(error)
            response = cmd.response(message.command, status)
            response[cmd.COMMENT] = comment_of(error)
            association.send(message.context_id, response)
            self._warn(
                "request failed",
                "dimse.request_failed",
                association.peer,
                calling_ae=association.calling_ae,
                status=f"{status:04X}",
                reason=error.code,
            )
        except (PeerGone, TimedOut, Stopping, ProtocolError):
            raise
        except Exception:
            log.exception(
                "request failed",
                extra={"event": "dimse.request_failed", "peer": association.peer},
            )
            association.send(
                message.context_id,
                cmd.response(message.command, Status.PROCESSING_FAILURE),
            )

    def _rejected(self, connection: _Connection, rejection: Rejection) -> _Rejected:
        self._observer.association_rejected(rejection.words)
        if self._rejections.passes(f"{connection.peer} {rejection.words}"):
            self._warn(
                "association rejected",
                "dimse.rejected",
                connection.peer,
                reason=rejection.words,
            )
        return _Rejected(rejection)

    def _warn_about(
        self, connection: _Connection, message: str, error: Exception
    ) -> None:
        reason = error.code if isinstance(error, ImagingError) else str(error)
        self._warn(
            message,
            "dimse.ended",
            connection.peer,
            calling_ae=connection.calling_ae,
            reason=reason,
        )

    def _warn(self, message: str, event: str, peer: str, **fields: object) -> None:
        log.warning(message, extra={"event": event, "peer": peer, **fields})


def _refuse_command(request: Mapping[int, cmd.Value]) -> Status | None:
    """Return why a command set cannot be served, whatever it asks (PS3.7 Annex C)."""
    if cmd.GROUP_LENGTH in request or cmd.MESSAGE_ID not in request:
        return Status.MISTYPED_ARGUMENT
    if cmd.AFFECTED_CLASS not in request and cmd.REQUESTED_CLASS not in request:
        return Status.MISTYPED_ARGUMENT
    return None


def _name(field: int) -> str:
    try:
        return CommandField(field).name.removesuffix("_RQ").replace("_", "-")
    except ValueError:
        return "unknown"
