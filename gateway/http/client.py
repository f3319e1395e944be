"""Where a request comes from, and by which of our names it was sent."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from functools import lru_cache
from urllib.parse import urlsplit

from starlette.types import Scope

from storage.kernel.settings import is_loopback


class Clients:
    """Tell addresses and origins of requests, behind proxies too.

    Parameters
    ----------
    trusted_proxies : iterable of str
        Addresses whose X-Forwarded-For and X-Forwarded-Proto are believed.
    external_url : str
        How browsers know us; empty: as the Host header says.
    """

    def __init__(
        self, trusted_proxies: Iterable[str] = (), external_url: str = ""
    ) -> None:
        self._trusted = frozenset(map(_normal, trusted_proxies))
        self._own = _origin(external_url)

    def address(self, scope: Scope, headers: Mapping[bytes, bytes]) -> str:
        """Return the address of the client: the last one that no proxy of ours has."""
        client = scope.get("client")
        peer = _normal(client[0]) if client else ""
        if peer not in self._trusted:
            return peer
        forwarded = headers.get(b"x-forwarded-for", b"").decode("latin-1")
        for one in reversed(forwarded.split(",")):
            named = _normal(one.strip())
            if not named:
                break
            if named not in self._trusted:
                return named
        return peer

    def is_private(self, scope: Scope, headers: Mapping[bytes, bytes]) -> bool:
        """Tell whether nobody between could read the request: TLS, or loopback."""
        client = scope.get("client")
        peer = _normal(client[0]) if client else ""
        if peer in self._trusted:
            return headers.get(b"x-forwarded-proto", b"").lower() == b"https"
        return is_loopback(peer) and b"x-forwarded-for" not in headers

    def is_same_origin(self, headers: Mapping[bytes, bytes]) -> bool:
        """Tell whether the page that sends a request is ours (RFC 6454)."""
        if headers.get(b"sec-fetch-site", b"same-origin") not in {
            b"same-origin",
            b"none",
        }:
            return False
        origin = headers.get(b"origin")
        if origin is None:
            return True
        named = _origin(origin.decode("latin-1"))
        if named == ("", ""):
            return False
        if self._own != ("", ""):
            return named == self._own
        return named[1] == headers.get(b"host", b"").decode("latin-1").lower()


def _origin(url: str) -> tuple[str, str]:
    """Return scheme and authority of a URL, default ports left out."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "", ""
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        return "", ""
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    usual = {"http": 80, "https": 443}[parts.scheme]
    return parts.scheme, host if port in {None, usual} else f"{host}:{port}"


@lru_cache(maxsize=4096)
def _normal(text: str) -> str:
    """Return an address in its one form; IPv4 in IPv6 as IPv4; else nothing."""
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return ""
    mapped = getattr(found, "ipv4_mapped", None)
    return str(mapped or found)
