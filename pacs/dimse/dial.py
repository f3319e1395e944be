"""Reaching a remote AE: name resolution, TCP and TLS, each with its own failure."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass

from storage.kernel.errors import DependencyDown, InvalidParameter
from storage.kernel.settings import Dimse, DimseTls


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long a peer may take, in seconds.

    Attributes
    ----------
    dimse : float
        For each message that we wait for.
    write : float
        While it reads nothing of what we send.
    """

    connect: float = 10.0
    acse: float = 30.0
    dimse: float = 60.0
    write: float = 60.0

    @classmethod
    def for_settings(cls, settings: Dimse) -> Timeouts:
        """Return what the DICOM listener is set to, for our own associations."""
        return cls(
            connect=min(10.0, settings.acse_seconds),
            acse=settings.acse_seconds,
            dimse=settings.read_seconds,
            write=settings.write_seconds,
        )


@dataclass(frozen=True, slots=True)
class Address:
    """Where a remote AE listens."""

    host: str
    port: int
    title: str
    tls: bool = False


def client_tls(settings: DimseTls) -> ssl.SSLContext:
    """Return how we open TLS associations: TLS 1.2 or later, the peer verified.

    The peer is checked against `client_ca` when that is set, else against the
    system's authorities; our certificate is shown when there is one.

    Raises
    ------
    InvalidParameter
        A file is missing, or not what it should be.
    """
    try:
        cafile = str(settings.client_ca) if settings.client_ca else None
        context = ssl.create_default_context(cafile=cafile)
        if settings.certificate is not None:
            context.load_cert_chain(settings.certificate, settings.key)
    except OSError as error:
        reason = error.strerror or "not a certificate and its key"
        raise InvalidParameter("dimse.tls", reason) from error
    return context


def dial(
    address: Address, timeouts: Timeouts, tls: ssl.SSLContext | None = None
) -> socket.socket:
    """Return a connected socket, the TLS handshake done.

    Raises
    ------
    DependencyDown
    """
    raw = _open_socket(address, timeouts)
    if not address.tls:
        return raw
    try:
        return _start_tls(raw, address, timeouts, tls)
    except BaseException:
        raw.close()
        raise


def _open_socket(address: Address, timeouts: Timeouts) -> socket.socket:
    try:
        places = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise DependencyDown(f"name resolution: no address of {address.host}") from (
            error
        )
    failure: OSError | None = None
    for family, kind, protocol, _, place in places:
        raw = socket.socket(family, kind, protocol)
        try:
            raw.settimeout(timeouts.connect)
            raw.connect(place)
        except OSError as error:
            raw.close()
            failure = error
            continue
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return raw
    reason = _reason(failure) if failure else "no address"
    raise DependencyDown(f"TCP: {reason}") from failure


def _start_tls(
    raw: socket.socket,
    address: Address,
    timeouts: Timeouts,
    tls: ssl.SSLContext | None,
) -> ssl.SSLSocket:
    if tls is None:
        raise DependencyDown("TLS: no certificate or authority is configured")
    try:
        raw.settimeout(timeouts.acse)
        return tls.wrap_socket(raw, server_hostname=address.host)
    except ssl.SSLError as error:
        raise DependencyDown(f"TLS: {error.reason or 'handshake failed'}") from error
    except OSError as error:
        raise DependencyDown(f"TLS: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError | BlockingIOError):
        return "no answer in time"
    return error.strerror or type(error).__name__
