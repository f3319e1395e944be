"""Records and tombstones of many packs in a file, so that memory stays bounded."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Self, TypeVar

from pacs.services.ingest import ORPHAN
from storage.packs.format import Kind, RecordHeader, RecordInfo

T = TypeVar("T")

_SCHEMA = """
CREATE TABLE object (
    tenant TEXT, uid TEXT, digest BLOB, received_us INTEGER, replaces BLOB,
    pack TEXT, place TEXT, record_offset INTEGER, dead INTEGER DEFAULT 0);
CREATE TABLE tombstone (
    tenant TEXT, uid TEXT, digest BLOB, received_us INTEGER, reason TEXT,
    PRIMARY KEY (tenant, uid, digest, reason)) WITHOUT ROWID;
"""
_BURIED = (
    "EXISTS (SELECT 1 FROM tombstone t WHERE t.tenant=o.tenant AND t.uid=o.uid"
    " AND t.digest=o.digest AND t.received_us>=o.received_us)"
)


@dataclass(frozen=True, slots=True)
class Kept:
    """One object's record."""

    tenant: str
    uid: str
    digest: bytes
    received_us: int
    pack: str
    place: str
    offset: int


class Scratch:
    """A private SQLite file that goes when the block ends.

    Parameters
    ----------
    folder : Path
        Where it lies meanwhile.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Self:
        self._file = tempfile.NamedTemporaryFile(  # closed in __exit__
            dir=self._folder, prefix=".verify-", suffix=".db"
        )
        self._db = sqlite3.connect(self._file.name, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=OFF")
        self._db.execute("PRAGMA synchronous=OFF")
        self._db.executescript(_SCHEMA)
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()
        self._file.close()

    def add(self, info: RecordInfo, *, place: str) -> None:
        """Take in a record of either kind."""
        if info.kind is Kind.TOMBSTONE:
            self.add_tombstone(info.header)
        else:
            self.add_object(info, place=place)

    def add_object(self, info: RecordInfo, *, place: str) -> None:
        header = info.header
        self._db.execute(
            "INSERT INTO object VALUES (?,?,?,?,?,?,?,?,0)",
            (
                header.tenant,
                header.sop_instance_uid,
                info.digest,
                header.received_us,
                _digest(header.digest),
                info.location.pack_key,
                place,
                info.location.record_offset,
            ),
        )

    def add_tombstone(self, header: RecordHeader) -> None:
        self._db.execute(
            "INSERT INTO tombstone VALUES (?,?,?,?,?) ON CONFLICT DO UPDATE"
            " SET received_us=max(received_us, excluded.received_us)",
            (
                header.tenant,
                header.sop_instance_uid,
                _digest(header.digest),
                header.received_us,
                header.origin,
            ),
        )

    def unburied(self) -> Iterator[Kept]:
        """Yield the objects that no tombstone buries."""
        for row in self._db.execute(
            "SELECT tenant, uid, digest, received_us, pack, place, record_offset"  # noqa: S608
            f" FROM object o WHERE NOT {_BURIED} ORDER BY rowid"
        ):
            yield Kept(*row)

    def tombstones(self) -> Iterator[tuple[str, str, bytes, int]]:
        """Yield (tenant, SOP Instance UID, digest, received until) of each."""
        yield from self._db.execute(
            "SELECT tenant, uid, digest, received_us FROM tombstone"
        )

    def buried(self) -> Iterator[tuple[Kept, str]]:
        """Yield the objects that a tombstone buries, and why."""
        for *row, reason in self._db.execute(
            "SELECT o.tenant, o.uid, o.digest, t.received_us, o.pack, o.place,"
            " o.record_offset, t.reason FROM object o JOIN tombstone t"
            " ON t.tenant=o.tenant AND t.uid=o.uid AND t.digest=o.digest"
            " AND t.received_us>=o.received_us ORDER BY o.rowid"
        ):
            yield Kept(*row), reason

    def decide(self) -> list[Kept]:
        """Leave one living record of each instance; return contradictions.

        Buried and replaced content goes first; of copies the sealed one stays, of
        different content the first that was received.
        """
        db = self._db
        db.execute("CREATE INDEX ix_object ON object (tenant, uid)")
        db.execute(f"UPDATE object AS o SET dead=1 WHERE {_BURIED}")  # noqa: S608
        # What replaced other content may have been deleted since and still counts;
        # what never made it into the index does not.
        db.execute(
            "UPDATE object AS o SET dead=1 WHERE dead=0 AND EXISTS (SELECT 1 FROM"
            " object n WHERE n.tenant=o.tenant AND n.uid=o.uid"
            " AND n.replaces=o.digest AND n.received_us>o.received_us"
            " AND NOT EXISTS (SELECT 1 FROM tombstone t WHERE t.tenant=n.tenant"
            " AND t.uid=n.uid AND t.digest=n.digest AND t.reason=?"
            " AND t.received_us>=n.received_us))",
            (ORPHAN,),
        )
        better = (
            "n.tenant=o.tenant AND n.uid=o.uid AND n.dead=0 AND n.rowid<>o.rowid AND"
        )
        same = (
            f"EXISTS (SELECT 1 FROM object n WHERE {better} n.digest=o.digest AND"  # noqa: S608
            " (n.place>o.place OR (n.place=o.place AND (n.received_us, n.rowid)"
            " < (o.received_us, o.rowid))))"
        )
        # "object" sorts after "local": the sealed copy is the better one.
        db.execute(f"UPDATE object AS o SET dead=1 WHERE dead=0 AND {same}")  # noqa: S608
        other = (
            f"EXISTS (SELECT 1 FROM object n WHERE {better}"  # noqa: S608
            " (n.received_us, n.rowid) < (o.received_us, o.rowid))"
        )
        contradictions = (
            "SELECT tenant, uid, digest, received_us, pack, place, record_offset"  # noqa: S608
            f" FROM object o WHERE dead=0 AND {other} LIMIT 1000"
        )
        lost = [Kept(*row) for row in db.execute(contradictions)]
        db.execute(f"UPDATE object AS o SET dead=1 WHERE dead=0 AND {other}")  # noqa: S608
        return lost

    def living_local(self) -> Iterator[tuple[str, int]]:
        """Yield pack and offset of the living local records, as they were received."""
        yield from self._db.execute(
            "SELECT pack, record_offset FROM object"
            " WHERE dead=0 AND place='local' ORDER BY received_us, pack, record_offset"
        )

    def remote_packs(self) -> list[str]:
        """Return the packs in the object store with living records, oldest first."""
        return [
            key
            for (key,) in self._db.execute(
                "SELECT pack FROM object WHERE dead=0 AND place<>'local'"
                " GROUP BY pack ORDER BY min(received_us), pack"
            )
        ]

    def living_in(self, pack: str) -> Iterator[int]:
        """Yield the offsets of the living records of one pack."""
        for (offset,) in self._db.execute(
            "SELECT record_offset FROM object WHERE dead=0 AND pack=?"
            " ORDER BY record_offset",
            (pack,),
        ):
            yield offset


def batched(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """Yield `items` in tuples of at most `size`."""
    iterator = iter(items)
    while batch := tuple(islice(iterator, size)):
        yield batch


def _digest(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        return b""
