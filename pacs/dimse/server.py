"""The DICOM listener: accepts connections and gives each a thread.

Several processes accept on one socket; what limits them together is in
`AssociationCounts`. What happens on a connection is in `acceptor`.
"""

from __future__ import annotations

import errno
import logging
import select
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import suppress

from pacs.dimse.acceptor import Acceptor
from pacs.dimse.accesses import NoTrail, Trail
from pacs.dimse.association import Handler
from pacs.dimse.counts import AssociationCounts
from pacs.dimse.negotiation import LOCAL_LIMIT
from pacs.dimse.observer import DimseObserver, OncePerPeer, Silent
from pacs.dimse.tls import certificate_name, tls_context
from pacs.dimse.transport import STOP_GRACE, TICK, Wire
from pacs.services.ingest import IngestService
from pacs.services.policy import AccessPolicy
from storage.kernel.limits import Limits
from storage.kernel.settings import Dimse

__all__ = ["AssociationCounts", "DimseObserver", "DimseServer"]

log = logging.getLogger(__name__)

#: Connections above the associations allowed: requests not yet read, monitors.
_SPARE_CONNECTIONS = 64
#: How often a listener that waits looks at shutdown, in seconds.
_ACCEPT_TICK = 0.1
#: How long a busier process leaves a new connection to an idler one.
_YIELD_SECONDS = 0.002


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
    trail : Trail, optional
        The audit trail.
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
        trail: Trail | None = None,
    ) -> None:
        self._settings = settings
        self._counts = counts
        self._slot = slot
        self._observer: DimseObserver = observer or Silent()
        self._acceptor = Acceptor(
            settings=settings,
            limits=limits,
            policy=policy,
            ingest=ingest,
            handlers=handlers,
            counts=counts,
            slot=slot,
            observer=self._observer,
            trail=trail or NoTrail(),
        )
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
                    connection.send(LOCAL_LIMIT.encoded())

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
                connection, name = secured, certificate_name(secured)
            self._acceptor.serve(Wire(connection, self._stop), peer, name)
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
                log.warning(
                    "TLS refused",
                    extra={"event": "dimse.tls", "peer": peer, "reason": reason},
                )
            return None
