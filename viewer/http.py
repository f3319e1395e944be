"""Small HTTP things of the viewer's routes: bodies, entity tags, errors."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, Protocol

import orjson
from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute

from storage.kernel.errors import InvalidParameter, MalformedObject, TooLarge
from storage.kernel.types import Actor

#: A request's JSON body.
MAX_BODY: Final = 64 * 1024
BODY_SECONDS: Final = 10.0
#: Shorter answers are not worth compressing.
_WORTH: Final = 1400

REVALIDATE: Final = "private, no-cache"
IMMUTABLE: Final = "private, max-age=31536000, immutable"


class Policy(Protocol):
    """Who may do what."""

    def require(self, actor: Actor, action: str) -> None:
        """Raise NotAllowed unless `actor` may do `action`."""
        ...


class StoredRoute(APIRoute):
    """A route whose request is right even where what is stored cannot be read: 422."""

    def get_route_handler(
        self,
    ) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except MalformedObject as error:
                raise HTTPException(422, str(error)) from error

        return handle


async def read_json(request: Request) -> dict[str, Any]:
    """Read a small JSON object.

    Raises
    ------
    InvalidParameter, TooLarge
        It is none, takes too long, or is longer than `MAX_BODY`.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    raise TooLarge("body", MAX_BODY)
    except TimeoutError:
        raise InvalidParameter("body", "took too long") from None
    try:
        found = orjson.loads(body)
    except ValueError as error:
        raise InvalidParameter("body", "is not JSON") from error
    if not isinstance(found, dict):
        raise InvalidParameter("body", "is not a JSON object")
    return found


def digest(*parts: object) -> str:
    """Return an entity tag, without quotation marks, for what `parts` name."""
    made = hashlib.sha256()
    for part in parts:
        made.update(str(part).encode())
        made.update(b"\0")
    return made.hexdigest()[:32]


def unchanged(request: Request, etag: str) -> bool:
    """Tell whether the client has this already (RFC 9110 13.1.2)."""
    asked = request.headers.get("if-none-match", "")
    if asked.strip() == "*":
        return True
    tags = (one.strip().removeprefix("W/") for one in asked.split(","))
    return f'"{etag}"' in tags


def named(etag: str, cache: str = REVALIDATE) -> dict[str, str]:
    """Return the headers that let a client keep an answer."""
    return {
        "ETag": f'"{etag}"',
        "Cache-Control": cache,
        "Vary": "Accept, Accept-Encoding",
        "X-Content-Type-Options": "nosniff",
    }


def send_json(
    request: Request, body: bytes, etag: str, headers: Mapping[str, str] | None = None
) -> Response:
    """Answer with JSON, compressed where the client takes that, or with 304."""
    kept = {**named(etag), **(headers or {})}
    if unchanged(request, etag):
        return Response(status_code=304, headers=kept)
    taken = request.headers.get("accept-encoding", "").lower()
    if len(body) > _WORTH and "gzip" in taken:
        body = gzip.compress(body, 1, mtime=0)
        kept["Content-Encoding"] = "gzip"
    return Response(body, media_type="application/json", headers=kept)
