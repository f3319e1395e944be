"""Content codings of text: gzip and zstd, for JSON and XML only (RFC 9110 8.4).

Pixels are never coded: they are compressed already, or a client that wants them
smaller asks for another transfer syntax.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from fastapi import Request

from pacs.services.coding import CODINGS, GZIP, compress, compressed

_ALIASES: Final = {"x-gzip": GZIP}
#: Shorter bodies are sent as they are.
MIN_BYTES: Final = 1024
#: Entries of a header that are looked at.
MAX_ENTRIES: Final = 32


def content_coding(request: Request) -> str:
    """Return the coding that a client takes most gladly; empty: none of ours.

    A coding that is not named counts as ``*`` does; without a header nothing is coded
    (RFC 9110 12.5.3).
    """
    header = request.headers.get("accept-encoding", "")
    weights = _weights(header)
    rest = weights.get("*", 0.0)
    found = [(weights.get(coding, rest), coding) for coding in CODINGS]
    weight, coding = max(found, key=lambda one: one[0])
    # Whoever would rather have it plain says so.
    return coding if weight > 0 and weight >= weights.get("identity", 0.0) else ""


def _weights(header: str) -> Mapping[str, float]:
    weights: dict[str, float] = {}
    for entry in header.lower().split(",", MAX_ENTRIES)[:MAX_ENTRIES]:
        name, _, parameters = entry.partition(";")
        key, _, value = parameters.partition("=")
        try:
            weight = float(value) if key.strip() == "q" else 1.0
        except ValueError:
            weight = 0.0
        name = name.strip()
        if name:
            weights[_ALIASES.get(name, name)] = weight if 0 <= weight <= 1 else 0.0
    return weights


def coded(
    request: Request, body: bytes, headers: Mapping[str, str]
) -> tuple[bytes, dict[str, str]]:
    """Return a text and the headers it is sent with, coded as the client likes."""
    coding = content_coding(request) if len(body) >= MIN_BYTES else ""
    if not coding:
        return body, dict(headers)
    return compress(body, coding), {**headers, "Content-Encoding": coding}


def coded_chunks(
    request: Request, chunks: Iterator[bytes], headers: Mapping[str, str]
) -> tuple[Iterator[bytes], dict[str, str]]:
    """Return a text of unknown length as `coded` does."""
    coding = content_coding(request)
    if not coding:
        return chunks, dict(headers)
    return compressed(chunks, coding), {**headers, "Content-Encoding": coding}
