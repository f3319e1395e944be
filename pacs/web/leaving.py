"""Clients that leave: what is being made for them stops.

A route runs in a thread, which nothing can stop from outside; it looks at its `Caller`
again and again (`Caller.check`) while it does what takes long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping

from fastapi import Request, Response
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from storage.kernel.errors import Cancelled

#: Answers that come sooner are not worth watching their client.
WATCH_AFTER_SECONDS = 0.1


class Caller:
    """Who waits for an answer, and may leave; for use by many threads."""

    def __init__(self) -> None:
        self._left = False

    def leave(self) -> None:
        """Say that nobody waits any more."""
        self._left = True

    def check(self) -> None:
        """Raise `Cancelled` once nobody waits any more."""
        if self._left:
            raise Cancelled("the client has left")


def caller_of(request: Request) -> Caller:
    """Return who waits for the answer to a request."""
    found = getattr(request.state, "caller", None)
    if not isinstance(found, Caller):
        found = request.state.caller = Caller()
    return found


async def watched(
    request: Request, handler: Callable[[Request], Awaitable[Response]]
) -> Response:
    """Answer a request without a body, and note when its client leaves meanwhile."""
    caller = caller_of(request)
    watching: asyncio.Task[None] | None = None

    def watch() -> None:
        nonlocal watching
        watching = asyncio.ensure_future(_watch(request, caller))

    later = asyncio.get_running_loop().call_later(WATCH_AFTER_SECONDS, watch)
    try:
        return await handler(request)
    finally:
        later.cancel()
        if watching is not None:
            watching.cancel()


async def _watch(request: Request, caller: Caller) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    caller.leave()


class Stream(StreamingResponse):
    """A long body, made while it is sent, as long as there is somebody to send it to.

    Its first piece is made at once: what cannot be made is refused by a status, not
    by a connection that breaks.
    """

    def __init__(
        self,
        request: Request,
        chunks: Iterator[bytes],
        status: int,
        headers: Mapping[str, str],
    ) -> None:
        self._caller = caller_of(request)
        first = next(chunks, b"")
        super().__init__(_resumed([first], chunks), status, headers)
        # Not held once more while a slow client takes it.
        del first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def noticing() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect":
                self._caller.leave()
            return message

        try:
            await super().__call__(scope, noticing, send)
        finally:
            self._caller.leave()


def _resumed(first: list[bytes], rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first.pop()
    yield from rest
