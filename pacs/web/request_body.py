"""The body of a request as a stream, bounded in size and in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from fastapi import Request

from storage.kernel.errors import InvalidInput, InvalidParameter, TooLarge
from storage.kernel.limits import KIB

#: A client slower than this over a whole `body_seconds` is let go.
RATE_FLOOR = 1 * KIB


class TooSlow(InvalidInput):
    """The body comes in slower than the rate floor."""

    code = "input.too_slow"


def declared_length(request: Request, allowed: int) -> int | None:
    """Return Content-Length; None for a chunked body.

    Raises
    ------
    TooLarge
        Before a byte of the body was read.
    """
    text = request.headers.get("content-length")
    if text is None:
        return None
    if not text.isascii() or not text.isdigit():
        raise InvalidParameter("Content-Length", "not a number")
    # Bound: a number of any length is compared as text first.
    if len(text) > 18 or int(text) > allowed:
        raise TooLarge("request_bytes", allowed)
    return int(text)


async def read_body(
    request: Request, *, allowed: int, seconds: float
) -> AsyncGenerator[bytes, None]:
    """Yield the body as it arrives.

    Time that the consumer takes does not count: a client that we make wait is not slow.

    Raises
    ------
    TooLarge
        More than `allowed` bytes.
    TooSlow
        In `seconds` of waiting fewer than `RATE_FLOOR` bytes a second came.
    """
    declared_length(request, allowed)
    loop = asyncio.get_running_loop()
    total = 0
    waited, arrived = 0.0, 0
    stream = request.stream().__aiter__()
    while True:
        started = loop.time()
        try:
            async with asyncio.timeout(seconds - waited):
                chunk = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            if arrived < RATE_FLOOR * seconds:
                raise TooSlow("the body comes in too slowly") from None
            # The generator was cancelled with its wait; a new one goes on.
            waited, arrived = 0.0, 0
            stream = request.stream().__aiter__()
            continue
        waited += loop.time() - started
        arrived += len(chunk)
        total += len(chunk)
        if total > allowed:
            raise TooLarge("request_bytes", allowed)
        if chunk:
            yield chunk
