"""Sending bytes: ranges, conditions, lengths, and streams (RFC 9110 13, 14)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime, parsedate_to_datetime

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from pacs.services.sources import ByteSource
from pacs.web.leaving import Stream
from pacs.web.multipart import MultipartWriter
from pacs.web.problems import problem
from storage.kernel.limits import MIB

#: Bodies up to this are sent at once; longer ones are streamed.
AT_ONCE = 4 * MIB

REVALIDATE = "private, no-cache"
#: The pixels behind a SOP Instance UID do not change.
IMMUTABLE = "private, max-age=31536000, immutable"

_RANGE = re.compile(r"bytes=\s*([0-9]{0,18})-([0-9]{0,18})\s*\Z")
_TAG = re.compile(r'(?:W/)?("[^"]*")')


class PiecesResponse(Response):
    """A short body in several pieces, none of which is copied."""

    def __init__(
        self, pieces: Sequence[bytes], status: int, headers: Mapping[str, str]
    ) -> None:
        length = str(sum(map(len, pieces)))
        super().__init__(None, status, {**headers, "Content-Length": length})
        self._pieces = pieces

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        for piece in self._pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@dataclass(frozen=True, slots=True)
class Validators:
    """What a client can compare: a strong entity tag and, for some, a time.

    Attributes
    ----------
    etag : str
        Without quotation marks.
    modified_us : int or None
        Only for what changes less than once a second.
    """

    etag: str = ""
    modified_us: int | None = None
    cache: str = REVALIDATE

    def headers(self) -> dict[str, str]:
        found = {"Cache-Control": self.cache, "Vary": "Accept, Accept-Encoding"}
        if self.etag:
            found["ETag"] = f'"{self.etag}"'
        if self.modified_us is not None:
            found["Last-Modified"] = format_datetime(_instant(self.modified_us), True)
        return found

    def unchanged(self, request: Request) -> bool:
        """Tell whether the client has this already (RFC 9110 13.2.2)."""
        tags = request.headers.get("if-none-match")
        if tags is not None:
            if tags.strip() == "*":
                return True
            return bool(self.etag) and f'"{self.etag}"' in _TAG.findall(tags)
        since = request.headers.get("if-modified-since")
        if since is None or self.modified_us is None:
            return False
        try:
            asked = parsedate_to_datetime(since)
        except ValueError:
            return False
        if asked.tzinfo is None:
            asked = asked.replace(tzinfo=UTC)
        return _instant(self.modified_us) <= asked


def _instant(microseconds: int) -> datetime:
    return datetime.fromtimestamp(microseconds // 1_000_000, UTC)


def not_modified(validators: Validators) -> Response:
    """Return 304 with what a cache needs."""
    return Response(status_code=304, headers=validators.headers())


def _range(request: Request, length: int, etag: str) -> tuple[int, int] | str | None:
    """Return start and stop of a single range; "" when it cannot be satisfied.

    None: no range, or one that is not honoured (several, or not of bytes).
    """
    asked = request.headers.get("range")
    if asked is None:
        return None
    condition = request.headers.get("if-range")
    # A weak tag or a time never makes a range safe.
    if condition is not None and condition.strip() != f'"{etag}"':
        return None
    match = _RANGE.match(asked.strip())
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        size = min(int(match[2]), length)
        return (length - size, length) if size else ""
    start = int(match[1])
    stop = int(match[2]) + 1 if match[2] else length
    if match[2] and stop <= start:
        return None
    return (start, min(stop, length)) if start < length else ""


def send_source(
    request: Request,
    source: ByteSource,
    media_type: str,
    validators: Validators,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Send bytes as a single part, or the range of them that was asked for."""
    if validators.unchanged(request):
        return not_modified(validators)
    named = {
        **validators.headers(),
        **(headers or {}),
        "Content-Type": media_type,
        "Accept-Ranges": "bytes",
    }
    status, start, stop = 200, 0, source.length
    found = _range(request, source.length, validators.etag)
    if isinstance(found, str):
        total = {"Content-Range": f"bytes */{source.length}"}
        return problem(416, "range", "the range begins behind the end", total)
    if found is not None:
        status, (start, stop) = 206, found
        named["Content-Range"] = f"bytes {start}-{stop - 1}/{source.length}"
    if request.method == "HEAD":
        named["Content-Length"] = str(stop - start)
        return Response(None, status, named)
    if stop - start <= AT_ONCE:
        return PiecesResponse([source.read(start, stop - start)], status, named)
    named["Content-Length"] = str(stop - start)
    return Stream(request, source.chunks(start, stop), status, named)


def send_parts(
    request: Request, writer: MultipartWriter, validators: Validators
) -> Response:
    """Send a multipart body; with its length when that is known."""
    if validators.etag and validators.unchanged(request):
        return not_modified(validators)
    named = {**validators.headers(), "Content-Type": writer.content_type}
    if writer.length is not None:
        named["Content-Length"] = str(writer.length)
    if request.method == "HEAD":
        return Response(None, 200, named)
    if writer.length is not None and writer.length <= AT_ONCE:
        return PiecesResponse(list(writer), 200, named)
    return Stream(request, gathered(iter(writer)), 200, named)


def gathered(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the same bytes in fewer chunks: small ones are joined."""
    pending: list[bytes] = []
    size = 0
    for chunk in chunks:
        pending.append(chunk)
        size += len(chunk)
        if size >= GATHER:
            joined = b"".join(pending)
            # Not held once more while a slow client takes them.
            del chunk
            pending, size = [], 0
            yield joined
    if pending:
        yield b"".join(pending)


GATHER = 512 * 1024


@dataclass(frozen=True, slots=True)
class Attachment:
    """How a file is offered for saving, never for display."""

    filename: str

    def headers(self) -> dict[str, str]:
        """Return headers that keep a browser from running what it gets."""
        plain = re.sub(r"[^0-9A-Za-z._-]", "_", self.filename)[:128] or "file"
        return {
            "Content-Disposition": f'attachment; filename="{plain}"',
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": "sandbox; default-src 'none'",
        }
