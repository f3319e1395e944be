"""Tables of `storage`: tenants, packs, outbox, change feed.

Instants are microseconds since 1970 in UTC (``*_us``): exact, sortable and the
same on every engine. Tenant columns hold the slug, so that a row can be read and
rebuilt without a join.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Index, Integer, LargeBinary, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from storage.db.base import Base

#: SQLite only auto-increments INTEGER primary keys.
BigId = BigInteger().with_variant(Integer, "sqlite")


class Tenant(Base):
    """An institution; every row of the archive belongs to one."""

    __tablename__ = "tenant"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    key: Mapped[str] = mapped_column(String(64), unique=True)
    name: Mapped[str] = mapped_column(Text, default="")
    created_us: Mapped[int] = mapped_column(BigInteger)


class Pack(Base):
    """One pack file, local or in the object store.

    `kind`: ``log`` (many instances, append-only), ``large`` (one instance),
    ``sealed`` (a settled series). `state`: ``open`` (a process appends),
    ``closed``, ``retired`` (no live record; unlinked after `delete_after_us`).
    `place`: ``local`` (only `node_id` can read it) or ``object``.
    """

    __tablename__ = "pack"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    key: Mapped[str] = mapped_column(String(32), unique=True)
    tenant: Mapped[str] = mapped_column(String(64))
    kind: Mapped[str] = mapped_column(String(8))
    place: Mapped[str] = mapped_column(String(8), default="local")
    node_id: Mapped[str] = mapped_column(String(32))
    state: Mapped[str] = mapped_column(String(8))
    size_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    sha256: Mapped[bytes | None] = mapped_column(LargeBinary(32))
    created_us: Mapped[int] = mapped_column(BigInteger)
    delete_after_us: Mapped[int | None] = mapped_column(BigInteger)

    __table_args__ = (Index("ix_pack_state", "state", "delete_after_us"),)


class OutboxEvent(Base):
    """A change, written in the transaction that made it.

    `position` is given later, by one relay, in one order; the change feed shows
    only events that have one.
    """

    __tablename__ = "outbox_event"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    position: Mapped[int | None] = mapped_column(BigInteger, unique=True)
    tenant: Mapped[str] = mapped_column(String(64))
    kind: Mapped[str] = mapped_column(String(40))
    subject: Mapped[str] = mapped_column(String(128))
    payload: Mapped[str] = mapped_column(Text)
    created_us: Mapped[int] = mapped_column(BigInteger)


class Feed(Base):
    """The change feed's epoch and last position; one row."""

    __tablename__ = "feed"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    epoch: Mapped[str] = mapped_column(String(32))
    last_position: Mapped[int] = mapped_column(BigInteger, default=0)


class Subscriber(Base):
    """How far one internal follower of the feed has come."""

    __tablename__ = "subscriber"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    epoch: Mapped[str] = mapped_column(String(32))
    position: Mapped[int] = mapped_column(BigInteger, default=0)


class IngestActivity(Base):
    """What one tenant stored in one stretch of ten seconds.

    `slot` is the stretch, counted from 1970. Only the last two days are kept; the
    counters show how busy a node is and are no accounts.
    """

    __tablename__ = "ingest_activity"

    slot: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    instances: Mapped[int] = mapped_column(BigInteger)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
