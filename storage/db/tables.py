"""Tables of `storage`: tenants, packs, outbox, change feed, audit.

Instants are microseconds since 1970 in UTC (``*_us``): exact, sortable and the
same on every engine. Tenant columns hold the slug, so that a row can be read and
rebuilt without a join.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Index, Integer, LargeBinary, String, Text, text
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


class AuditStream(Base):
    """The head of one chain of audit records; its row is the writers' lock.

    `mac` signs all other columns but `anchor_us`, when the last anchor was made.
    """

    __tablename__ = "audit_stream"

    stream: Mapped[str] = mapped_column(String(16), primary_key=True)
    base_sequence: Mapped[int] = mapped_column(BigInteger)
    base_hash: Mapped[bytes] = mapped_column(LargeBinary(64))
    sequence: Mapped[int] = mapped_column(BigInteger)
    hash: Mapped[bytes] = mapped_column(LargeBinary(64))
    time_us: Mapped[int] = mapped_column(BigInteger)
    anchor_us: Mapped[int] = mapped_column(BigInteger)
    alg: Mapped[str] = mapped_column(String(16))
    key_id: Mapped[str] = mapped_column(String(16))
    mac: Mapped[bytes] = mapped_column(LargeBinary(64))


class AuditRecord(Base):
    """One record of a chain; triggers refuse to change or delete it.

    `count` accesses between `time_us` and `last_us` are one record. `outcome`:
    ``allow``, ``deny``, ``error``. Columns that may be NULL have an index of the rows
    that have them. `storage.audit.chain` says what `hash` and `mac` cover.
    """

    __tablename__ = "audit_record"

    stream: Mapped[str] = mapped_column(String(16), primary_key=True)
    sequence: Mapped[int] = mapped_column(
        BigInteger, primary_key=True, autoincrement=False
    )
    format: Mapped[int] = mapped_column(Integer)
    alg: Mapped[str] = mapped_column(String(16))
    time_us: Mapped[int] = mapped_column(BigInteger)
    last_us: Mapped[int] = mapped_column(BigInteger)
    count: Mapped[int] = mapped_column(Integer)
    tenant: Mapped[str] = mapped_column(String(64))
    actor: Mapped[str] = mapped_column(String(128))
    roles: Mapped[str] = mapped_column(String(128))
    session: Mapped[str] = mapped_column(String(64))
    source: Mapped[str] = mapped_column(String(64))
    door: Mapped[str] = mapped_column(String(16))
    action: Mapped[str] = mapped_column(String(40))
    outcome: Mapped[str] = mapped_column(String(8))
    reason: Mapped[str] = mapped_column(String(256))
    object_kind: Mapped[str] = mapped_column(String(24))
    object_tenant: Mapped[str | None] = mapped_column(String(64))
    patient_id: Mapped[str | None] = mapped_column(String(64))
    study_uid: Mapped[str | None] = mapped_column(String(64))
    series_uid: Mapped[str | None] = mapped_column(String(64))
    instance_uid: Mapped[str | None] = mapped_column(String(64))
    object_id: Mapped[str | None] = mapped_column(String(128))
    purpose: Mapped[str] = mapped_column(String(64))
    request_id: Mapped[str] = mapped_column(String(64))
    detail: Mapped[str] = mapped_column(Text)
    before: Mapped[bytes | None] = mapped_column(LargeBinary(64))
    after: Mapped[bytes | None] = mapped_column(LargeBinary(64))
    hash: Mapped[bytes] = mapped_column(LargeBinary(64))
    key_id: Mapped[str] = mapped_column(String(16))
    mac: Mapped[bytes] = mapped_column(LargeBinary(64))

    __table_args__ = (
        Index("ix_audit_time", "time_us", "sequence"),
        Index("ix_audit_tenant", "tenant", "time_us", "sequence"),
        Index("ix_audit_actor", "actor", "time_us", "sequence"),
        *(
            Index(
                f"ix_audit_{name}",
                f"{column}",
                "time_us",
                "sequence",
                sqlite_where=text(f"{column} IS NOT NULL"),
                postgresql_where=text(f"{column} IS NOT NULL"),
            )
            for name, column in (
                ("owner", "object_tenant"),
                ("patient", "patient_id"),
                ("study", "study_uid"),
            )
        ),
        Index(
            "ix_audit_refused",
            "time_us",
            "sequence",
            sqlite_where=text("outcome <> 'allow'"),
            postgresql_where=text("outcome <> 'allow'"),
        ),
    )


class AuditAnchor(Base):
    """A signed point of a chain: what was its hash at a time.

    One for each thousand records and hour, to begin a verification at, to publish,
    and to archive up to.
    """

    __tablename__ = "audit_anchor"

    stream: Mapped[str] = mapped_column(String(16), primary_key=True)
    sequence: Mapped[int] = mapped_column(
        BigInteger, primary_key=True, autoincrement=False
    )
    hash: Mapped[bytes] = mapped_column(LargeBinary(64))
    time_us: Mapped[int] = mapped_column(BigInteger)
    alg: Mapped[str] = mapped_column(String(16))
    key_id: Mapped[str] = mapped_column(String(16))
    mac: Mapped[bytes] = mapped_column(LargeBinary(64))
