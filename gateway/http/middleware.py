"""What happens around every HTTP request: who may reach us, headers, timing.

Pure ASGI: bodies pass through untouched, so that streams stay streams.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import metrics
from pacs.web.problems import problem_response
from storage.kernel.errors import NotAllowed
from storage.kernel.settings import is_loopback

#: Methods that a page of another site could make a browser send blindly.
UNSAFE = frozenset(("POST", "PUT", "PATCH", "DELETE"))
METHODS = UNSAFE | {"GET", "HEAD", "OPTIONS"}

SECURITY_HEADERS = (
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)


class Timing:
    """Observe each request and add the headers that every answer carries."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS:
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            route = scope.get("route")
            metrics.HTTP_SECONDS.labels(
                scope["method"] if scope["method"] in METHODS else "other",
                getattr(route, "path", "none"),
                str(status),
            ).observe(time.perf_counter() - started)


class LoopbackOnly:
    """Keep other sites' pages away from a node that asks for no login.

    A browser on this machine can be made to talk to us: by a form of another site
    (its ``Origin`` gives it away), or by a name of theirs that resolves to loopback
    (``Host`` does).
    """

    def __init__(self, app: ASGIApp, allowed_hosts: Iterable[str] = ()) -> None:
        self._app = app
        self._allowed = frozenset(allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            host = headers.get("host", "")
            origin = headers.get("origin", "")
            if not self._is_ours(f"//{host}"):
                error = NotAllowed("an open node answers to loopback names only")
                await problem_response(error)(scope, receive, send)
                return
            foreign = bool(origin) and not self._is_ours(origin)
            if foreign and scope["method"] in UNSAFE:
                error = NotAllowed("requests of other sites are not accepted")
                await problem_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_ours(self, url: str) -> bool:
        try:
            name = urlsplit(url).hostname or ""
        except ValueError:
            return False
        return is_loopback(name) or name in self._allowed
