"""The chain: what is hashed, in which form, and what the key signs.

Each record's hash is taken over the hash before it and the record's content, so that
a record cannot be changed, moved, added or taken away without all later hashes
changing. Anybody can compute it from an export. The key makes it more than that: each
hash, and the head of the chain, carry an HMAC that whoever has only the database
cannot make.

The canonical content is the JSON array of `CONTENT`, in that order, without white
space, in UTF-8; digests are hexadecimal. A change of it is a new `FORMAT`.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import orjson

#: Version of the canonical content, its first element.
FORMAT = 1
#: Hash of a chain and of its HMAC, by the name that records carry.
ALGORITHMS: Mapping[str, str] = MappingProxyType({"sha256": "sha256"})
DEFAULT_ALGORITHM = "sha256"
#: What precedes the first record.
GENESIS = bytes(32)

CONTENT = (
    "format", "alg", "stream", "sequence", "time_us", "last_us", "count", "tenant",
    "actor", "roles", "session", "source", "door", "action", "outcome", "reason",
    "object_kind", "object_tenant", "patient_id", "study_uid", "series_uid",
    "instance_uid", "object_id", "purpose", "request_id", "detail", "before", "after",
)  # fmt: skip


def canonical(values: Sequence[Any]) -> bytes:
    """Return the bytes that are hashed, from the values of `CONTENT`."""
    return orjson.dumps(values, default=_hexadecimal)


def _hexadecimal(value: object) -> str:
    if isinstance(value, bytes | memoryview):
        return value.hex()
    raise TypeError(f"{type(value).__name__} has no canonical form")


def link(algorithm: str, previous: bytes, content: bytes) -> bytes:
    """Return the hash of the record that follows `previous`."""
    return hashlib.new(ALGORITHMS[algorithm], previous + content).digest()


@dataclass(frozen=True, slots=True)
class Head:
    """Where a chain stands.

    Attributes
    ----------
    base_sequence, base_hash : int, bytes
        The last record that is no longer kept, and its hash; 0 and `GENESIS` until
        a beginning has been archived.
    sequence, hash : int, bytes
        The last record.
    time_us : int
        When it was written.
    """

    stream: str
    base_sequence: int
    base_hash: bytes
    sequence: int
    hash: bytes
    time_us: int


class Sealer:
    """Sign with one key.

    Parameters
    ----------
    key : bytes
        32 random bytes.
    algorithm : str
        One of `ALGORITHMS`.
    """

    def __init__(self, key: bytes, algorithm: str = DEFAULT_ALGORITHM) -> None:
        self._key = key
        self.algorithm = algorithm
        #: Tells keys apart and says nothing about them.
        self.key_id = self._mac(b"huying audit key id").hex()[:16]

    def _mac(self, message: bytes) -> bytes:
        return hmac.digest(self._key, message, ALGORITHMS[self.algorithm])

    def record(self, sequence: int, record_hash: bytes) -> bytes:
        """Sign one record, by its place and its hash."""
        return self._mac(b"huying audit record\0%d\0%b" % (sequence, record_hash))

    def head(self, head: Head) -> bytes:
        """Sign where a chain stands."""
        return self._mac(b"huying audit head\0" + _fields(head))

    def anchor(self, stream: str, sequence: int, record_hash: bytes, at: int) -> bytes:
        """Sign that the record `sequence` had this hash at the time `at`."""
        statement = orjson.dumps([stream, sequence, record_hash.hex(), at])
        return self._mac(b"huying audit anchor\0" + statement)


@dataclass(frozen=True, slots=True)
class Keyring:
    """The key that signs, and those of others who write into the same database."""

    own: Sealer
    others: tuple[Sealer, ...] = ()

    def find(self, key_id: str) -> Sealer | None:
        """Return the key with this id, or None."""
        for sealer in self:
            if sealer.key_id == key_id:
                return sealer
        return None

    def __iter__(self) -> Iterator[Sealer]:
        yield self.own
        yield from self.others


def same(one: bytes, other: bytes) -> bool:
    """Compare two signatures without telling by time where they differ."""
    return hmac.compare_digest(one, other)


def _fields(head: Head) -> bytes:
    return orjson.dumps(
        [
            head.stream,
            head.base_sequence,
            head.base_hash.hex(),
            head.sequence,
            head.hash.hex(),
            head.time_us,
        ]
    )
