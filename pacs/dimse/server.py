"""The DICOM listener: accepts connections, negotiates, serves one thread each.

All services run here; a thread per association, blocking sockets, every wait bounded
(PS3.8 9.2: an acceptor with the state machine written as straight-line code).
"""

from __future__ import annotations

import errno
import logging
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from pacs.dimse import command as cmd
from pacs.dimse.association import Association, Handler, Message, Timers
from pacs.dimse.command import CommandField
from pacs.dimse.counts import AssociationCounts
from pacs.dimse.echo import answer_echo
from pacs.dimse.negotiation import (
    CALLED_AE,
    CALLING_AE,
    LOCAL_LIMIT,
    Agreement,
    Rejection,
    abort_reason,
    negotiate,
    only_verifies,
    refuse_form,
)
from pacs.dimse.observer import DimseObserver, OncePerPeer, Silent
from pacs.dimse.pdu import (
    HEADER,
    RELEASE_RP,
    AbortReason,
    AssociateRequest,
    PduType,
    ProtocolError,
    encode_abort,
    encode_associate_ac,
    encode_associate_rj,
    parse_associate_rq,
)
from pacs.dimse.pdv import ReleaseRequested
from pacs.dimse.status import Status, comment_of, status_of
from pacs.dimse.store import Buffers, StoreSession
from pacs.dimse.transport import (
    STOP_GRACE,
    TICK,
    PeerGone,
    Stopping,
    TimedOut,
    Wire,
)
from pacs.services.ingest import IngestService
from pacs.services.policy import AccessPolicy, Refused
from storage.kernel.errors import ImagingError, InvalidParameter
from storage.kernel.limits import Limits
from storage.kernel.settings import Dimse, DimseTls
from storage.kernel.types import Actor, Role

__all__ = ["AssociationCounts", "DimseObserver", "DimseServer", "tls_context"]

log = logging.getLogger(__name__)

#: Connections above the associations allowed: requests not yet read, monitors.
_SPARE_CONNECTIONS = 64
#: How often a listener that waits looks at shutdown, in seconds.
_ACCEPT_TICK = 0.1
#: How long a busier process leaves a new connection to an idler one.
_YIELD_SECONDS = 0.002
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


class DimseServer:
    """Serve DICOM associations of one process.

    Parameters
    ----------
    settings : Dimse
    limits : Limits
    policy : AccessPolicy
        Admits associations, and says who may store.
    ingest : IngestService
    handlers : mapping of int to Handler
        By Command Field (0000,0100), beside C-STORE and C-ECHO. A service without
        a handler is not negotiated.
    counts : AssociationCounts
        Shared by all processes of the node.
    slot : int
        This process among them.
    observer : DimseObserver, optional
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
        observer: DimseObserver | None = None,
    ) -> None:
        self._settings = settings
        self._limits = limits
        self._policy = policy
        self._ingest = ingest
        self._handlers = {CommandField.C_ECHO_RQ: answer_echo, **handlers}
        self._services = {*self._handlers, CommandField.C_STORE_RQ}
        self._counts = counts
        self._slot = slot
        self._observer: DimseObserver = observer or Silent()
        self._buffers = Buffers(limits)
        self._timers = Timers(
            idle=settings.idle_seconds,
            read=settings.read_seconds,
            write=settings.write_seconds,
        )
        self._rejections = OncePerPeer()
        self._crowded = OncePerPeer()
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._stop = threading.Event()

    def serve(
        self,
        listener: socket.socket,
        tls_listener: socket.socket | None,
        stop: threading.Event,
    ) -> None:
        """Accept until `stop` is set; return when the associations have ended.

        A message in hand is finished; then associations are aborted.

        Raises
        ------
        InvalidParameter
            The certificate of the TLS listener cannot be used.
        """
        self._stop = stop
        second: threading.Thread | None = None
        if tls_listener is not None:
            context = tls_context(self._settings.tls)
            second = threading.Thread(
                target=self._accept_all,
                args=(tls_listener, context),
                name="dimse-tls",
                daemon=True,
            )
            second.start()
        self._accept_all(listener, None)
        if second is not None:
            second.join()
        until = time.monotonic() + STOP_GRACE + 2 * TICK
        for thread in self._running():
            thread.join(max(0.0, until - time.monotonic()))

    def _running(self) -> list[threading.Thread]:
        with self._lock:
            return list(self._threads)

    def _accept_all(
        self, listener: socket.socket, context: ssl.SSLContext | None
    ) -> None:
        listener.setblocking(False)
        waiting = select.poll()
        waiting.register(listener, select.POLLIN)
        while not self._stop.is_set():
            if not waiting.poll(_ACCEPT_TICK * 1000):
                continue
            if self._counts.is_busiest(self._slot):
                self._stop.wait(_YIELD_SECONDS)
            try:
                connection, address = listener.accept()
            except OSError as error:
                # Another process was faster, or the peer has left already.
                if error.errno not in {errno.EAGAIN, errno.ECONNABORTED}:
                    self._note_crowd(error.strerror or "no resources")
                    self._stop.wait(TICK)
                continue
            self._start(connection, str(address[0]), context)

    def _start(
        self, connection: socket.socket, peer: str, context: ssl.SSLContext | None
    ) -> None:
        """Give a connection its thread; one too many is turned away at once."""
        thread = threading.Thread(
            target=self._run,
            args=(connection, peer, context),
            name=f"dimse {peer}",
            daemon=True,
        )
        with self._lock:
            fits = len(self._threads) < self._counts.most + _SPARE_CONNECTIONS
            if fits:
                self._threads.add(thread)
                self._counts.set_load(self._slot, len(self._threads))
        if fits:
            try:
                thread.start()
            except RuntimeError:  # the machine has no more threads
                self._end(thread)
                fits = False
        if not fits:
            self._note_crowd("too many connections")
            with suppress(OSError), connection:
                if context is None:
                    connection.setblocking(False)
                    connection.send(_rj(LOCAL_LIMIT))

    def _note_crowd(self, reason: str) -> None:
        self._observer.association_rejected(reason)
        if self._crowded.passes(""):
            log.warning(
                "connection refused",
                extra={"event": "dimse.crowded", "reason": reason},
            )

    def _end(self, thread: threading.Thread) -> None:
        with self._lock:
            self._threads.discard(thread)
            self._counts.set_load(self._slot, len(self._threads))

    def _run(
        self,
        connection: socket.socket,
        peer: str,
        context: ssl.SSLContext | None,
    ) -> None:
        """Be the thread of one connection."""
        try:
            name = None
            if context is not None:
                secured = self._secure(connection, peer, context)
                if secured is None:
                    return
                connection, name = secured, _certificate_name(secured)
            self._serve(_Connection(Wire(connection, self._stop), peer, name))
        except Exception:
            log.exception(
                "association failed", extra={"event": "dimse.failed", "peer": peer}
            )
        finally:
            connection.close()
            self._end(threading.current_thread())

    def _secure(
        self, connection: socket.socket, peer: str, context: ssl.SSLContext
    ) -> ssl.SSLSocket | None:
        """Do the TLS handshake within the time of an association request."""
        connection.settimeout(self._settings.acse_seconds)
        try:
            return context.wrap_socket(connection, server_side=True)
        except OSError as error:
            # A connection that is closed at once is a health probe.
            if not isinstance(error, ssl.SSLEOFError | ConnectionError):
                reason = getattr(error, "reason", None) or type(error).__name__
                self._observer.association_rejected("TLS")
                self._warn("TLS refused", "dimse.tls", peer, reason=reason)
            return None

    def _serve(self, connection: _Connection) -> None:
        """Take one connection from its first byte to its last."""
        last_words, outcome = b"", "gone"
        try:
            self._open(connection)
            self._serve_messages(connection)
            last_words, outcome = RELEASE_RP, "released"
        except _Rejected as error:
            last_words, outcome = _rj(error.rejection), "rejected"
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
        actor = self._policy.admit(
            request.called_ae,
            request.calling_ae,
            connection.peer,
            certificate_name=connection.certificate_name,
        )
        if isinstance(actor, Refused):
            raise self._rejected(connection, _REFUSED[actor])
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
            and Role.ADMIN in actor.roles
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
        while True:
            try:
                message = association.next_command()
            except ReleaseRequested:
                break
            started = time.perf_counter()
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


def tls_context(settings: DimseTls) -> ssl.SSLContext:
    """Return the server side of TLS 1.2 and later (PS3.15 B.9, BCP 195).

    Raises
    ------
    InvalidParameter
        A file is missing or unusable.
    """
    if settings.certificate is None:
        raise InvalidParameter("dimse.tls.certificate", "is needed for a TLS listener")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(settings.certificate, settings.key)
        if settings.client_ca is not None:
            context.load_verify_locations(settings.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:
        raise InvalidParameter("dimse.tls", f"certificate: {error}") from error
    return context


def _certificate_name(connection: ssl.SSLSocket) -> str | None:
    """Return the Common Name of a verified client certificate, empty without one."""
    certificate = connection.getpeercert()
    if not certificate:
        return None
    for part in certificate.get("subject", ()):
        for pair in part:
            if pair[0] == "commonName":
                return str(pair[1])
    return ""


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


def _rj(rejection: Rejection) -> bytes:
    return encode_associate_rj(rejection.result, rejection.source, rejection.reason)
