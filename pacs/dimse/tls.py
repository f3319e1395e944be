"""The server's side of TLS (PS3.15 B.9, BCP 195)."""

from __future__ import annotations

import ssl

from storage.kernel.errors import InvalidParameter
from storage.kernel.settings import DimseTls


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


def certificate_name(connection: ssl.SSLSocket) -> str | None:
    """Return the Common Name of a verified client certificate, empty without one."""
    certificate = connection.getpeercert()
    if not certificate:
        return None
    for part in certificate.get("subject", ()):
        for pair in part:
            if pair[0] == "commonName":
                return str(pair[1])
    return ""
