"""Content codings of text: gzip and zstd (RFC 9110 8.4.1, RFC 8878)."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from typing import Final, Protocol

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

GZIP: Final = "gzip"
ZSTD: Final = "zstd"
#: Among codings that a client likes equally the first is taken.
CODINGS: Final = (ZSTD, GZIP)
_GZIP_WINDOW: Final = 31
_GZIP_LEVEL: Final = 1
_ZSTD_LEVEL: Final = 3
_CHUNK: Final = 256 * 1024


class Coder(Protocol):
    """Compresses what it is given, piece by piece."""

    def compress(self, data: bytes) -> bytes: ...
    def flush(self) -> bytes: ...


def coder(coding: str) -> Coder:
    """Return a compressor for a coding of `CODINGS`."""
    if coding == ZSTD:
        return zstd.ZstdCompressor(_ZSTD_LEVEL)
    return zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP_WINDOW)


def compress(data: bytes, coding: str) -> bytes:
    """Return `data` in a coding of `CODINGS`."""
    made = coder(coding)
    return made.compress(data) + made.flush()


def compressed(chunks: Iterator[bytes], coding: str) -> Iterator[bytes]:
    """Yield what `chunks` yield in a coding; holds no more than the coder does."""
    made = coder(coding)
    for chunk in chunks:
        if packed := made.compress(chunk):
            yield packed
    yield made.flush()


def inflated(data: bytes) -> Iterator[bytes]:
    """Yield what gzip-compressed bytes of ours hold, at most 256 KiB at a time."""
    inflater = zlib.decompressobj(_GZIP_WINDOW)
    while data:
        yield inflater.decompress(data, _CHUNK)
        data = inflater.unconsumed_tail
    yield inflater.flush()
