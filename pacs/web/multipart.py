"""Multipart bodies as a stream: reading them with bounds, writing them with a length.

The reader takes what RFC 2046 allows and clients send: text before the first
boundary and behind the last, white space behind a boundary, bare LF, quoted
boundaries. It holds one chunk and never more of a part than that.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from storage.kernel.errors import InvalidParameter, MalformedObject, TooLarge

#: RFC 2046 5.1.1; the last character is no space.
#: Tolerates: more than 70 characters; Orthanc's boundaries are two UUIDs, 73.
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,\-./:=? ]{0,199}[0-9A-Za-z'()+_,\-./:=?]\Z")
_PARAMETER = re.compile(
    r';\s*([!#$%&\'*+\-.^_`|~0-9A-Za-z]+)\s*=\s*("(?:[^"\\]|\\.)*"|[^;"]*)'
)
_HEADER_END = re.compile(rb"\r?\n\r?\n|\A\r?\n")

#: Kinds of events.
PART: Final = 0
DATA: Final = 1
END: Final = 2

Headers = Mapping[str, str]
Event = tuple[int, Headers | bytes | None]
"""(PART, headers), (DATA, bytes), (END, None); names of headers in lower case."""


@dataclass(frozen=True, slots=True)
class ContentType:
    """A Content-Type: the type in lower case and its parameters."""

    media_type: str
    parameters: Mapping[str, str]


def parse_content_type(text: str) -> ContentType:
    """Parse a Content-Type leniently: quotation marks and white space are optional."""
    media_type = text.partition(";")[0].strip().lower()
    parameters: dict[str, str] = {}
    for match in _PARAMETER.finditer(text):
        value = match[2].strip()
        if value.startswith('"'):
            value = re.sub(r"\\(.)", r"\1", value[1:-1])
        parameters.setdefault(match[1].lower(), value)
    return ContentType(media_type, parameters)


def boundary_of(content_type: ContentType) -> bytes:
    """Return the boundary of a multipart type.

    Raises
    ------
    InvalidParameter
        It has none, or one that is not legal.
    """
    boundary = content_type.parameters.get("boundary", "")
    if not _BOUNDARY.match(boundary):
        raise InvalidParameter("Content-Type", "boundary is missing or not legal")
    return boundary.encode()


class MultipartReader:
    """Splits a multipart body that arrives in pieces.

    Parameters
    ----------
    boundary : bytes
    header_bytes : int
        Limit of the headers of one part.
    max_parts : int
    """

    def __init__(self, boundary: bytes, *, header_bytes: int, max_parts: int) -> None:
        self._delimiter = b"\n--" + boundary
        quoted = re.escape(self._delimiter)
        # A boundary is one only with the rest of its line: the same bytes can lie
        # in pixels.
        self._line = re.compile(quoted + rb"(?:(--)|[ \t]{0,256}\r?\n)")
        self._line_start = re.compile(quoted + rb"(?:-|[ \t]{0,256}\r?)\Z")
        self._header_bytes = header_bytes
        self._max_parts = max_parts
        self._n_parts = 0
        # A body may start with the boundary: no line end is before it then.
        self._rest = b"\n"
        self._step: Callable[[], Iterator[Event] | None] = self._preamble
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether the closing boundary has been seen."""
        return self._ended

    def feed(self, data: bytes) -> Iterator[Event]:
        """Yield what `data` brings; take all events before feeding more.

        Raises
        ------
        MalformedObject, TooLarge
        """
        self._rest = self._rest + data if self._rest else data
        while True:
            events = self._step()
            if events is None:
                return
            yield from events

    def close(self) -> None:
        """Check that the body was complete.

        Raises
        ------
        MalformedObject
        """
        if not self._ended:
            raise MalformedObject("the closing boundary is missing")

    def _boundary(self) -> tuple[int, re.Match[bytes] | None]:
        """Find the first boundary line.

        Returns where what precedes it ends, and the line if it is there whole. Bytes
        that may still turn out to begin one are left behind that point.
        """
        rest, delimiter = self._rest, self._delimiter
        # Most chunks hold no boundary; searching backwards says so much sooner.
        at = rest.find(delimiter) if rest.rfind(delimiter) >= 0 else -1
        while at >= 0:
            match = self._line.match(rest, at)
            if match is not None or self._line_start.match(rest, at):
                return at - (at > 0 and rest[at - 1] == 0x0D), match
            at = rest.find(delimiter, at + 1)
        first = max(0, len(rest) - len(delimiter))
        at = rest.find(b"\n", first)
        while at >= 0 and not delimiter.startswith(rest[at:]):
            at = rest.find(b"\n", at + 1)
        if at < 0:
            return len(rest) - rest.endswith(b"\r"), None
        return at - (at > 0 and rest[at - 1] == 0x0D), None

    def _preamble(self) -> Iterator[Event] | None:
        end, line = self._boundary()
        if line is None:
            self._rest = self._rest[end:]
            return None
        return self._pass(line)

    def _pass(self, line: re.Match[bytes]) -> Iterator[Event]:
        """Go on behind a boundary line."""
        self._rest = self._rest[line.end() :]
        if line[1]:
            self._ended = True
            self._step = self._epilogue
            return iter(())
        self._n_parts += 1
        if self._n_parts > self._max_parts:
            raise TooLarge("request_parts", self._max_parts)
        self._step = self._headers
        return iter(())

    def _headers(self) -> Iterator[Event] | None:
        match = _HEADER_END.search(self._rest, 0, self._header_bytes + 4)
        if match is None:
            if len(self._rest) > self._header_bytes:
                raise TooLarge("part_header_bytes", self._header_bytes)
            return None
        headers = _parse_headers(self._rest[: match.start()])
        # An empty part's boundary may use the line end of the last header.
        self._rest = b"\r\n" + self._rest[match.end() :]
        self._step = self._first_data
        return iter(((PART, headers),))

    def _first_data(self) -> Iterator[Event] | None:
        # The line end in front was put there; it is no data unless it must wait.
        end, line = self._boundary()
        if end == 0:
            if line is None:
                return None
            self._pass(line)
            return iter(((END, None),))
        self._rest = self._rest[2:]
        self._step = self._data
        return iter(())

    def _data(self) -> Iterator[Event] | None:
        end, line = self._boundary()
        data = self._rest if end == len(self._rest) else self._rest[:end]
        if line is not None:
            self._pass(line)
            return iter(((DATA, data), (END, None)) if data else ((END, None),))
        if not data:
            return None
        self._rest = self._rest[end:]
        return iter(((DATA, data),))

    def _epilogue(self) -> Iterator[Event] | None:
        self._rest = b""
        return None


def _parse_headers(raw: bytes) -> Headers:
    headers: dict[str, str] = {}
    text = re.sub(r"\r?\n[ \t]+", " ", raw.decode("latin-1"))
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if not colon:
            raise MalformedObject("a part header is no header")
        headers.setdefault(name.strip().lower(), value.strip())
    return headers


@dataclass(frozen=True, slots=True)
class Part:
    """One part to be written; `length` is None while unknown."""

    headers: Sequence[tuple[str, str]]
    length: int | None
    chunks: Callable[[], Iterator[bytes]]


class MultipartWriter:
    """Writes parts one after another, each opened when its turn comes.

    Attributes
    ----------
    content_type : str
    length : int or None
        Of the whole body; None when that of a part is unknown.
    """

    def __init__(self, media_type: str, parts: Sequence[Part]) -> None:
        boundary = uuid.uuid4().hex
        self.content_type = (
            f'multipart/related; type="{media_type}"; boundary={boundary}'
        )
        self._parts = parts
        self._open = f"--{boundary}\r\n".encode()
        self._close = f"--{boundary}--\r\n".encode()
        self.length: int | None = None
        lengths = [part.length for part in parts]
        known = [length for length in lengths if length is not None]
        if len(known) == len(lengths):
            heads = sum(len(self._head(part)) + 2 for part in parts)
            self.length = heads + sum(known) + len(self._close)

    def _head(self, part: Part) -> bytes:
        headers = list(part.headers)
        if part.length is not None:
            headers.append(("Content-Length", str(part.length)))
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
        return self._open + lines.encode("latin-1") + b"\r\n"

    def __iter__(self) -> Iterator[bytes]:
        for part in self._parts:
            yield self._head(part)
            yield from part.chunks()
            yield b"\r\n"
        yield self._close
