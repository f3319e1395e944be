"""What an object store promises. Files and S3 keep it; one test suite checks both."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from storage.kernel.errors import InvalidParameter

_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.-]*)*\Z")
MAX_KEY = 512


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object; `sha256` in hex, empty when the store does not know it."""

    key: str
    size: int
    sha256: str


class ObjectStore(Protocol):
    """Immutable objects under unique keys.

    All methods raise DependencyDown when the store does not answer in time, and
    InvalidParameter for a key that is not one.
    """

    def put_file(self, key: str, path: Path, sha256: str) -> ObjectInfo:
        """Store the file durably under `key`; replacing it is atomic."""
        ...

    def read(self, key: str, offset: int, length: int) -> bytes:
        """Return up to `length` bytes at `offset`; NotFound without the object."""
        ...

    def stat(self, key: str) -> ObjectInfo | None:
        """Return what is stored under `key`, or None."""
        ...

    def delete(self, key: str) -> None:
        """Remove the object; harmless when it is not there."""
        ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects whose keys start with `prefix`, sorted by key."""
        ...

    def health(self) -> None:
        """Raise DependencyDown unless the store can read and write."""
        ...


def check_key(key: str) -> str:
    """Return `key`; refuse anything that could leave the store's root."""
    if len(key) > MAX_KEY or not _KEY.match(key):
        raise InvalidParameter("key", "not an object key")
    return key
