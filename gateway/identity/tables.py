"""Tables of identity. Secrets that are long and random are kept as SHA-256, passwords
as argon2id; nothing here can be used to log in.

Instants are microseconds since 1970 in UTC, as in `storage.db.tables`.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import Mapped, mapped_column

from storage.db.base import Base
from storage.db.tables import BigId


class Account(Base):
    """A person who logs in.

    `name` is unique over all tenants, in lower case. `roles` and `readable` (tenants)
    are words with spaces between; `patients` lists (JSON) tenant, issuer and Patient
    ID of each patient that the person is. `totp_step` is the last time step whose
    code was taken: codes are good once. `totp_pending` is a secret that has not been
    confirmed by a code yet.
    """

    __tablename__ = "account"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    display_name: Mapped[str] = mapped_column(Text, default="")
    tenant: Mapped[str] = mapped_column(String(64))
    readable: Mapped[str] = mapped_column(Text, default="")
    roles: Mapped[str] = mapped_column(Text, default="")
    patients: Mapped[str] = mapped_column(Text, default="[]")
    state: Mapped[str] = mapped_column(String(12), default="active")
    password_hash: Mapped[str] = mapped_column(Text)
    password_us: Mapped[int] = mapped_column(BigInteger)
    must_change: Mapped[int] = mapped_column(Integer, default=1)
    totp_secret: Mapped[str] = mapped_column(String(64), default="")
    totp_pending: Mapped[str] = mapped_column(String(64), default="")
    totp_step: Mapped[int] = mapped_column(BigInteger, default=0)
    created_us: Mapped[int] = mapped_column(BigInteger)
    updated_us: Mapped[int] = mapped_column(BigInteger)
    login_us: Mapped[int | None] = mapped_column(BigInteger)

    __table_args__ = (Index("ix_account_tenant", "tenant", "name"),)


class OldPassword(Base):
    """A password an account has had; the newest few cannot be taken again."""

    __tablename__ = "old_password"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    account_pk: Mapped[int] = mapped_column(
        ForeignKey("account.id", ondelete="CASCADE")
    )
    password_hash: Mapped[str] = mapped_column(Text)
    created_us: Mapped[int] = mapped_column(BigInteger)

    __table_args__ = (Index("ix_old_password_account", "account_pk", "id"),)


class LoginFailure(Base):
    """Attempts that failed, by what they have in common.

    `subject` is ``account:`` and a digest of the name that was given, whether there is
    such an account or not, or ``address:`` and the address.
    """

    __tablename__ = "login_failure"

    subject: Mapped[str] = mapped_column(String(80), primary_key=True)
    failures: Mapped[int] = mapped_column(Integer)
    last_us: Mapped[int] = mapped_column(BigInteger)
    locked_until_us: Mapped[int] = mapped_column(BigInteger, default=0)

    __table_args__ = (Index("ix_login_failure_last", "last_us"),)


class Session(Base):
    """A login, or what a launch ticket was exchanged for.

    `account_pk` is whose it is; of a ticket's session: who issued the ticket, null
    for a machine. Then `scope` (JSON) says what it can see, and `roles` is ``ticket``.
    """

    __tablename__ = "session"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    digest: Mapped[bytes] = mapped_column(LargeBinary(32), unique=True)
    public_id: Mapped[str] = mapped_column(String(24), unique=True)
    account_pk: Mapped[int | None] = mapped_column(
        ForeignKey("account.id", ondelete="CASCADE")
    )
    token_pk: Mapped[int | None] = mapped_column(
        ForeignKey("api_token.id", ondelete="CASCADE")
    )
    kind: Mapped[str] = mapped_column(String(8))
    actor: Mapped[str] = mapped_column(String(128))
    tenant: Mapped[str] = mapped_column(String(64))
    purpose: Mapped[str] = mapped_column(String(16), default="")
    scope: Mapped[str] = mapped_column(Text, default="")
    second_factor: Mapped[int] = mapped_column(Integer, default=0)
    address: Mapped[str] = mapped_column(String(64), default="")
    created_us: Mapped[int] = mapped_column(BigInteger)
    seen_us: Mapped[int] = mapped_column(BigInteger)
    idle_us: Mapped[int] = mapped_column(BigInteger)
    expires_us: Mapped[int] = mapped_column(BigInteger)

    __table_args__ = (
        Index("ix_session_account", "account_pk", "created_us"),
        Index("ix_session_token", "token_pk"),
        Index("ix_session_expires", "expires_us"),
    )


class ApiToken(Base):
    """What a machine shows instead of a password; revoked ones are kept as record."""

    __tablename__ = "api_token"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    digest: Mapped[bytes] = mapped_column(LargeBinary(32), unique=True)
    name: Mapped[str] = mapped_column(String(64))
    tenant: Mapped[str] = mapped_column(String(64))
    readable: Mapped[str] = mapped_column(Text, default="")
    roles: Mapped[str] = mapped_column(Text)
    created_by: Mapped[str] = mapped_column(String(128))
    created_us: Mapped[int] = mapped_column(BigInteger)
    expires_us: Mapped[int] = mapped_column(BigInteger)
    revoked_us: Mapped[int | None] = mapped_column(BigInteger)

    __table_args__ = (UniqueConstraint("name"),)


class LaunchTicket(Base):
    """Leave to look at one study or one patient, once, for somebody who has it.

    One that was withdrawn has expired when it was created.
    """

    __tablename__ = "launch_ticket"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    digest: Mapped[bytes] = mapped_column(LargeBinary(32), unique=True)
    public_id: Mapped[str] = mapped_column(String(24), unique=True)
    tenant: Mapped[str] = mapped_column(String(64))
    account_pk: Mapped[int | None] = mapped_column(
        ForeignKey("account.id", ondelete="CASCADE")
    )
    token_pk: Mapped[int | None] = mapped_column(
        ForeignKey("api_token.id", ondelete="CASCADE")
    )
    issuer: Mapped[str] = mapped_column(String(128))
    purpose: Mapped[str] = mapped_column(String(16))
    scope: Mapped[str] = mapped_column(Text)
    created_us: Mapped[int] = mapped_column(BigInteger)
    expires_us: Mapped[int] = mapped_column(BigInteger)
    used_us: Mapped[int | None] = mapped_column(BigInteger)

    __table_args__ = (
        Index("ix_launch_ticket_expires", "expires_us"),
        Index("ix_launch_ticket_account", "account_pk"),
        Index("ix_launch_ticket_token", "token_pk"),
    )
