"""Which form of a resource a client gets: the Accept rules of PS3.18 8.7.

Tolerates: unquoted `type` parameters, upper case, several types in one list, and a
transfer syntax as a parameter of either the multipart or the inner type.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from urllib.parse import unquote_to_bytes

from fastapi import Request

from storage.kernel.errors import Unsupported

MULTIPART = "multipart/related"
DICOM = "application/dicom"
DICOM_JSON = "application/dicom+json"
DICOM_XML = "application/dicom+xml"
OCTETS = "application/octet-stream"
ZIP = "application/zip"
#: Any transfer syntax: as stored.
ANY = "*"

#: Media ranges of one request that are looked at.
MAX_RANGES = 64

_PARAMETER = re.compile(
    r';\s*([!#$%&\'*+\-.^_`|~0-9A-Za-z]+)\s*=\s*("(?:[^"\\]|\\.)*"|[^;,"]*)'
)


@dataclass(frozen=True, slots=True)
class MediaRange:
    """One entry of an Accept header.

    Attributes
    ----------
    media_type : str
        In lower case; of a multipart range that of its parts, ``*/*`` without one.
    multipart : bool or None
        None: either.
    transfer_syntax : str
        Empty: none was named.
    quality : float
        0: not acceptable.
    """

    media_type: str
    multipart: bool | None
    transfer_syntax: str = ""
    quality: float = 1.0

    def matches(self, media_type: str, *, multipart: bool) -> bool:
        """Tell whether a representation of this type falls into the range."""
        if self.multipart is not None and self.multipart != multipart:
            return False
        if self.media_type in {"*/*", media_type}:
            return True
        main, _, sub = self.media_type.partition("/")
        return sub == "*" and media_type.startswith(main + "/")

    @property
    def rank(self) -> tuple[float, int]:
        """Order of preference: quality, then how narrow the range is."""
        wild = 0 if self.media_type == "*/*" else 1 if "*" in self.media_type else 2
        return self.quality, wild


@dataclass(frozen=True, slots=True)
class Offer:
    """One form a resource can be given in; `media_type` is that of the parts."""

    media_type: str
    multipart: bool = False

    def __str__(self) -> str:
        if not self.multipart:
            return self.media_type
        return f'{MULTIPART}; type="{self.media_type}"'


def accept_of(request: Request) -> str:
    """Return what the client accepts: the query parameter wins (PS3.18 8.3.3.1)."""
    for part in request.scope["query_string"].split(b"&"):
        name, _, value = part.partition(b"=")
        if name == b"accept" and value:
            text = unquote_to_bytes(value.replace(b"+", b" "))
            # A plus sign that was not escaped belongs to a type name.
            return re.sub(r"(?<=dicom) (?=json|xml)", "+", text.decode("latin-1"))
    return request.headers.get("accept", "")


def parse_accept(accept: str) -> tuple[MediaRange, ...]:
    """Return the ranges of an Accept header, in its order; none: anything goes."""
    if not accept.strip():
        return (MediaRange("*/*", None),)
    return tuple(filter(None, map(_range, _entries(accept))))


def _entries(accept: str) -> Iterator[str]:
    """Split at commas outside quotation marks."""
    start, quoted, found = 0, False, 0
    for i, character in enumerate(accept):
        if character == '"':
            quoted = not quoted
        elif character == "," and not quoted:
            yield accept[start:i]
            start, found = i + 1, found + 1
            # Bound: what a client lists beyond this is not looked at.
            if found == MAX_RANGES:
                return
    yield accept[start:]


def _range(entry: str) -> MediaRange | None:
    name = entry.partition(";")[0].strip().lower()
    if "/" not in name:
        return None
    parameters = {
        match[1].lower(): match[2].strip().strip('"').strip()
        for match in _PARAMETER.finditer(entry)
    }
    try:
        quality = float(parameters.get("q", "1"))
    except ValueError:
        quality = 0.0
    if not 0 <= quality <= 1:
        quality = 0.0
    multipart: bool | None = False
    if name in {"*/*", "application/*"}:
        multipart = None
    elif name in {MULTIPART, "multipart/*"}:
        multipart = True
        # Tolerates: parameters of the part's type inside the quotation marks.
        kind, _, inner = parameters.get("type", "").partition(";")
        name = kind.strip().lower() or "*/*"
        for match in _PARAMETER.finditer(";" + inner):
            parameters.setdefault(match[1].lower(), match[2].strip().strip('"'))
    syntax = parameters.get("transfer-syntax", "")
    return MediaRange(_ALIASES.get(name, name), multipart, syntax, quality)


#: What clients say for the types of the standard.
_ALIASES = {"application/json": DICOM_JSON, "application/xml": DICOM_XML}


def choose(accept: str, offers: Sequence[Offer]) -> Offer:
    """Return the best acceptable offer; among equals the first (PS3.18 8.7.5).

    Raises
    ------
    Unsupported
        None is acceptable; the message lists what can be had.
    """
    return candidates(accept, offers)[0][0]


#: Longer headers are not worth remembering.
_REMEMBERED_CHARS = 512


def candidates(accept: str, offers: Sequence[Offer]) -> list[tuple[Offer, str]]:
    """Return every acceptable (offer, transfer syntax), the best first.

    The transfer syntax is empty where the client named none.

    Raises
    ------
    Unsupported
        None is acceptable.
    """
    listed = tuple(offers)
    # A viewer asks for thousands of frames with one and the same header.
    short = len(accept) <= _REMEMBERED_CHARS
    found = (_remembered if short else _candidates)(accept, listed)
    if not found:
        raise Unsupported(f"available: {', '.join(map(str, offers))}")
    return list(found)


def _candidates(
    accept: str, offers: tuple[Offer, ...]
) -> tuple[tuple[Offer, str], ...]:
    ranges = parse_accept(accept)
    # Tolerates: a type on its own where only multipart can be given.
    found = _acceptable(ranges, offers) or _acceptable(
        [replace(one, multipart=None) for one in ranges], offers
    )
    order = {offer: i for i, offer in enumerate(offers)}
    # Sorting is stable: ranges of equal weight keep the order they were listed in.
    return tuple(
        sorted(
            found,
            key=lambda key: (-found[key][0], -found[key][1], order[key[0]]),
        )
    )


_remembered = lru_cache(256)(_candidates)


def _acceptable(
    ranges: Sequence[MediaRange], offers: Sequence[Offer]
) -> dict[tuple[Offer, str], tuple[float, int]]:
    """Return (offer, transfer syntax) of everything acceptable, and its rank."""
    refused = [one for one in ranges if one.quality == 0]
    found: dict[tuple[Offer, str], tuple[float, int]] = {}
    for one in ranges:
        for offer in offers:
            if one.quality == 0 or not one.matches(
                offer.media_type, multipart=offer.multipart
            ):
                continue
            if any(_forbids(no, one, offer) for no in refused):
                continue
            key = (offer, one.transfer_syntax)
            found[key] = max(found.get(key, (0.0, 0)), one.rank)
    return found


def _forbids(no: MediaRange, wanted: MediaRange, offer: Offer) -> bool:
    """Tell whether a range with ``q=0`` takes back what another one allows."""
    if no.transfer_syntax and no.transfer_syntax != wanted.transfer_syntax:
        return False
    # The narrower range decides (RFC 9110 12.5.1).
    narrower = no.rank[1] >= wanted.rank[1]
    return narrower and no.matches(offer.media_type, multipart=offer.multipart)
